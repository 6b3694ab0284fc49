"""``calibrate``: verdicts, exit codes, pictures, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from .conftest import Run, WriteModel, one_line_error, only_json


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Inputs of y = (|x_0| + |x_1|, 1); a few labels are wrong."""
    rng = np.random.default_rng(0)
    inputs = rng.uniform(-2, 2, (40, 2)).astype(np.float32)
    labels = (np.abs(inputs).sum(axis=1) < 1).astype(np.int64)
    labels[::8] = 1 - labels[::8]
    path = tmp_path / "data.npz"
    np.savez(path, inputs=inputs, labels=labels)
    return path


def test_numbers_are_ordered_and_certified(run: Run, write_model: WriteModel, data: Path) -> None:
    result = run(
        "calibrate", write_model(), data, "--threads", 1, "--eps", 0.01, "--eps", 0.1, "--json"
    )
    assert result.exit_code == 0, result.output
    found = only_json(result)
    assert found["status"] == "certified"
    assert found["samples"] == 40
    assert found["accuracy"] == pytest.approx(35 / 40)
    for row in found["radii"]:
        assert row["checked"]
        assert found["ece"] <= row["attacked_ece"] <= row["certified_ece_all"] <= 1
        assert found["brier"] <= row["attacked_brier"] <= row["certified_brier_all"] <= 1
        assert row["certified_predictions"] > 20
    small, large = found["radii"]
    assert small["certified_ece_all"] < large["certified_ece_all"]


def test_limits_decide_the_exit_code(run: Run, write_model: WriteModel, data: Path) -> None:
    model = write_model()
    arguments = ("calibrate", model, data, "--threads", 1, "--eps", 0.01)
    assert run(*arguments, "--max-ece", 0.99, "--max-brier", 0.99).exit_code == 0
    refuted = run(*arguments, "--max-ece", 0.01, "--json")
    assert refuted.exit_code == 10
    assert "reaches" in only_json(refuted)["message"]
    row = only_json(run(*arguments, "--json"))["radii"][0]
    between = (row["attacked_brier"] + row["certified_brier_all"]) / 2
    unknown = run(*arguments, "--max-brier", between)
    assert unknown.exit_code == 20
    assert unknown.stdout.startswith("UNKNOWN: brier is at most")


def test_unchecked_bounds_are_not_called_certified(
    run: Run, write_model: WriteModel, data: Path
) -> None:
    result = run(
        "calibrate", write_model(), data, "--threads", 1, "--eps", 0.01, "--no-check", "--no-attack"
    )
    assert result.exit_code == 20
    assert "--no-check" in result.stdout


def test_time_over_is_unknown_and_the_bounds_still_hold(
    run: Run, write_model: WriteModel, data: Path
) -> None:
    result = run(
        "calibrate",
        write_model(),
        data,
        "--threads",
        1,
        "--eps",
        0.01,
        "--time-limit",
        1e-6,
        "--json",
    )
    assert result.exit_code == 20
    assert only_json(result)["radii"][0]["certified_ece_all"] == 1.0


def test_smoothing_says_with_what_probability(
    run: Run, write_model: WriteModel, data: Path
) -> None:
    arguments = ("calibrate", write_model(), data, "--threads", 1, "--eps", 0.1, "--sigma", 0.5)
    result = run(*arguments, "--noise", 400, "--samples", 10, "--delta", 0.01, "--json")
    assert result.exit_code == 0, result.output
    found = only_json(result)
    assert "probability 0.99" in found["message"]
    assert found["radii"][0]["attacked_ece"] is None
    assert found["norm"] == "2"
    assert "2-norm" in one_line_error(run(*arguments, "--norm", "1"))


@pytest.mark.parametrize("norm", ["1", "2"])
def test_other_norms_temperature_and_adaptive_bins(
    run: Run, write_model: WriteModel, data: Path, norm: str
) -> None:
    result = run(
        "calibrate", write_model(), data, "--threads", 1, "--eps", 0.05, "--norm", norm,
        "--adaptive", "--temperature", 0.5, "--clip", "-3,3", "--bins", 5, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = only_json(result)
    assert found["bins"] == 5
    assert (found["radii"][0]["attacked_ece"] is None) == (norm == "1")


def test_a_picture_is_written_whole(
    run: Run, write_model: WriteModel, data: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "reliability.png"
    result = run(
        "calibrate", write_model(), data, "--threads", 1, "--eps", 0.01, "--eps", 0.05, "--eps", 9,
        "--plot", picture,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"{picture}" in result.stdout
    assert not list(tmp_path.glob(".*"))


def test_bad_data_is_one_line_and_nothing_is_written(
    run: Run, write_model: WriteModel, data: Path, tmp_path: Path
) -> None:
    model, picture = write_model(), tmp_path / "out.png"
    good = dict(np.load(data))
    cases = {
        "unlabeled": ({"inputs": good["inputs"]}, "labels"),
        "narrow": ({**good, "inputs": good["inputs"][:, :1]}, "2 numbers each"),
        "nan": ({**good, "inputs": good["inputs"] * np.nan}, "NaN"),
        "classes": ({**good, "labels": good["labels"] + 5}, "classes 0 to 1"),
        "empty": ({k: v[:0] for k, v in good.items()}, "inputs of shape"),
    }
    for name, (arrays, message) in cases.items():
        path = tmp_path / f"{name}.npz"
        np.savez(path, **arrays)
        result = run("calibrate", model, path, "--eps", 0.1, "--plot", picture)
        assert message in one_line_error(result), name
    truncated = tmp_path / "truncated.npz"
    truncated.write_bytes(data.read_bytes()[:200])
    one_line_error(run("calibrate", model, truncated, "--eps", 0.1, "--plot", picture))
    one_line_error(run("calibrate", tmp_path / "none.onnx", data, "--eps", 0.1, "--plot", picture))
    assert not picture.exists()
    assert not list(tmp_path.glob(".*"))


def test_bad_options_and_networks_are_one_line(
    run: Run, write_model: WriteModel, data: Path, tmp_path: Path
) -> None:
    model = write_model()
    for options in (
        (),
        ("--eps", "-1"),
        ("--eps", "nan"),
        ("--eps", "0.1", "--bins", "0"),
        ("--eps", "0.1", "--clip", "1,0"),
        ("--eps", "0.1", "--temperature", "0"),
        ("--eps", "0.1", "--method", "magic"),
        ("--eps", "0.1", "--plot", tmp_path / "no" / "such.png"),
        ("--eps", "0.1", "--plot", data),
    ):
        one_line_error(run("calibrate", model, data, *options))
    assert "Erf" in one_line_error(
        run("calibrate", write_model("erf.onnx", op="Erf"), data, "--eps", 0.1)
    )
    broken = onnx.load(str(model))
    weight = broken.graph.initializer[0]
    array = numpy_helper.to_array(weight).copy()
    array[0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save_model(broken, str(tmp_path / "nan.onnx"))
    assert "NaN" in one_line_error(run("calibrate", tmp_path / "nan.onnx", data, "--eps", 0.1))
