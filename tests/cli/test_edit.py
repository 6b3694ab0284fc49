"""``edit``: certified files or none at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_prepared.cli import edit as edit_module
from torch_prepared.core.onnx import load_onnx, run_onnx
from torch_prepared.edit.verify import CrossCheck

from .conftest import Run, WriteModel, WriteProperty, one_line_error, only_json

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "vnncomp2022"


def outputs(tmp_path: Path) -> list[str]:
    return ["-o", str(tmp_path / "out.onnx"), "--certificate", str(tmp_path / "cert.json")]


def assert_nothing_written(tmp_path: Path) -> None:
    left = sorted(path.name for path in tmp_path.iterdir())
    assert not [name for name in left if name.startswith(".") or "out" in name or "cert" in name]


def test_a_violated_property_is_repaired_and_the_certificate_replays(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    model, prop = write_model(), write_property()
    result = run("edit", model, prop, *outputs(tmp_path), "--method", "one_shot", "--json")
    assert result.exit_code == 0, result.output
    data = only_json(result)
    assert data["status"] == "certified"
    assert data["method"] == "one_shot"
    assert isinstance(data["margin"], float)
    assert data["margin"] > 0
    assert {"l1", "l2", "linf", "relative_l2"} <= set(data["delta"])
    assert data["properties"][0]["status"] == "certified"
    assert data["cross_check"]["violations"] == []
    assert {"seconds", "drawdown", "attempts"} <= set(data)
    assert data["output"] == str(tmp_path / "out.onnx")
    corners = np.array([[a, b] for a in (-1, 1) for b in (-1, 1)], np.float32)
    assert (run_onnx(tmp_path / "out.onnx", corners)[:, 0] < 1.5).all()
    check = run("check", tmp_path / "cert.json", tmp_path / "out.onnx", prop)
    assert check.exit_code == 0, check.output
    assert check.stdout.startswith("CERTIFIED")
    assert {path.name for path in tmp_path.iterdir()} == {
        "net.onnx",
        "prop.vnnlib",
        "out.onnx",
        "cert.json",
    }
    umask = os.umask(0)
    os.umask(umask)
    for name in ("out.onnx", "cert.json"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_text_tells_what_was_done(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    arguments = (write_model(), write_property(), *outputs(tmp_path), "--method", "one_shot")
    result = run("edit", *arguments, "--domain=-1,1")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("CERTIFIED")
    assert "onnxruntime" in result.stdout
    assert "domain" in result.stdout


def test_a_property_that_holds_gives_the_unchanged_network_and_a_certificate(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    model, prop = write_model(), write_property("(>= Y_0 2.5)")
    result = run("edit", model, prop, *outputs(tmp_path), "--json")
    data = only_json(result)
    assert (result.exit_code, data["status"], data["method"]) == (0, "certified", "none")
    assert "already" in str(data["message"])
    old, new = load_onnx(model).graph, load_onnx(tmp_path / "out.onnx").graph
    for name, value in old.parameters.items():
        assert torch.equal(value, new.parameters[name])
    assert run("check", tmp_path / "cert.json", tmp_path / "out.onnx", prop).exit_code == 0


def test_contradictory_properties_write_nothing_and_say_why(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    above = write_property("(<= Y_0 3.0)", name="above.vnnlib")
    below = write_property("(>= Y_0 1.0)", name="below.vnnlib")
    arguments = (write_model(), above, below, *outputs(tmp_path), "--time-limit", 5)
    result = run("edit", *arguments, "--method", "one_shot", "--json")
    assert result.exit_code == 20
    data = only_json(result)
    assert data["status"] == "unknown"
    assert data["certificate"] is None
    assert data["output"] is None
    assert "above" in str(data["message"])
    assert_nothing_written(tmp_path)


def test_a_violation_in_onnxruntime_keeps_nothing_and_is_loud(
    run: Run,
    write_model: WriteModel,
    write_property: WriteProperty,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = CrossCheck(points=1, smallest_margin=-1.0, violations=("prop",), seconds=0.0)
    monkeypatch.setattr(edit_module, "_attack_file", lambda *_: found)
    arguments = (write_model(), write_property(), *outputs(tmp_path), "--method", "one_shot")
    result = run("edit", *arguments, "--json")
    assert result.exit_code == 20
    assert only_json(result)["status"] == "unknown"
    assert "SOUNDNESS ALARM" in result.stderr
    assert_nothing_written(tmp_path)


def test_an_interrupt_before_any_edit_leaves_nothing(
    run: Run,
    write_model: WriteModel,
    write_property: WriteProperty,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(edit_module, "_reference", interrupted)
    result = run("edit", write_model(), write_property(), *outputs(tmp_path))
    assert "interrupted" in one_line_error(result, 130)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("which", ["-o", "--certificate"])
@pytest.mark.parametrize("kind", ["no folder", "a folder", "below a file"])
def test_unwritable_outputs_are_refused_before_any_work(
    run: Run,
    write_model: WriteModel,
    write_property: WriteProperty,
    tmp_path: Path,
    which: str,
    kind: str,
) -> None:
    model = write_model()
    bad = {"no folder": tmp_path / "no", "a folder": tmp_path, "below a file": model}[kind]
    name = "out.onnx" if which == "-o" else "cert.json"
    if kind == "a folder":
        (tmp_path / f"folder-{name}").mkdir()
        target = tmp_path / f"folder-{name}"
    else:
        target = bad / name
    arguments = outputs(tmp_path)
    arguments[arguments.index(which) + 1] = str(target)
    line = one_line_error(run("edit", model, write_property(), *arguments))
    assert str(target) in line
    assert not (tmp_path / "out.onnx").exists()
    assert not (tmp_path / "cert.json").exists()


def test_outputs_must_differ_from_inputs_and_from_each_other(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    model, prop = write_model(), write_property()
    before = model.read_bytes()
    same = run("edit", model, prop, "-o", model, "--certificate", tmp_path / "cert.json")
    assert "an input" in one_line_error(same)
    twice = tmp_path / "twice.onnx"
    assert "another output" in one_line_error(
        run("edit", model, prop, "-o", twice, "--certificate", twice)
    )
    assert ".onnx" in one_line_error(
        run("edit", model, prop, "-o", tmp_path / "out.pt", "--certificate", twice)
    )
    assert model.read_bytes() == before


def test_reference_inputs_and_labels_are_read_and_reported(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    inputs = np.random.default_rng(0).uniform(-1, 1, (50, 2)).astype(np.float32)
    np.savez(tmp_path / "ref.npz", inputs=inputs, labels=np.zeros(50, np.int64))
    result = run(
        *("edit", write_model(), write_property(), *outputs(tmp_path), "--json"),
        *("--preserve", tmp_path / "ref.npz", "--method", "one_shot"),
    )
    assert result.exit_code == 0, result.output
    drawdown = only_json(result)["drawdown"]
    assert drawdown["source"] == "preserve"
    assert drawdown["samples"] == 50
    assert drawdown["accuracy_before"] is not None


def _npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    "kind", ["pickle", "text", "cut", "nan", "width", "labels", "names", "huge"]
)
def test_bad_reference_files_are_refused(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path, kind: str
) -> None:
    good = np.zeros((4, 2), np.float32)
    path = tmp_path / "ref.npz"
    if kind == "pickle":
        np.savez(path, inputs=np.array([{"a": 1}], dtype=object))
    elif kind == "text":
        path.write_text("no archive")
    elif kind == "cut":
        data = _npz(path, inputs=good).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    elif kind == "nan":
        _npz(path, inputs=np.full((4, 2), np.nan))
    elif kind == "width":
        _npz(path, inputs=np.zeros((4, 3)))
    elif kind == "labels":
        _npz(path, inputs=good, labels=np.zeros(3, np.int64))
    elif kind == "names":
        _npz(path, a=good, b=good)
    else:
        path = tmp_path / "ref.npy"
        header = {"descr": "<f8", "fortran_order": False, "shape": (2**40, 2)}
        with path.open("wb") as stream:
            np.lib.format.write_array_header_1_0(stream, header)
    arguments = (write_model(), write_property(), *outputs(tmp_path), "--preserve", path)
    one_line_error(run("edit", *arguments))
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        ["--method", "magic"],
        ["--domain", "1,0"],
        ["--domain", "nan,1"],
        ["--domain", "1"],
        ["--norm", "3"],
        ["--time-limit", "0"],
        ["--layers", "no_such_layer", "--method", "one_shot"],
        ["--preserve", "x.npz", "--domain", "0,1"],
        ["--preserve", "no_such_file.npz"],
        ["--device", "tpu"],
        ["--threads", "0"],
    ],
)
def test_bad_options_are_refused(
    run: Run,
    write_model: WriteModel,
    write_property: WriteProperty,
    tmp_path: Path,
    extra: list[str],
) -> None:
    one_line_error(run("edit", write_model(), write_property(), *outputs(tmp_path), *extra))
    assert_nothing_written(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "network", "property_file"),
    [
        ("acasxu", "ACASXU_run2a_2_9_batch_2000", "prop_2"),
        ("mnist_fc", "mnist-net_256x2", "prop_0_0.05"),
    ],
)
def test_real_networks_are_edited_and_checked(
    run: Run, tmp_path: Path, benchmark: str, network: str, property_file: str
) -> None:
    folder = DATA / benchmark
    if not folder.exists():
        pytest.skip(f"benchmark data are absent: {folder}")
    model = folder / "onnx" / f"{network}.onnx.gz"
    prop = folder / "vnnlib" / f"{property_file}.vnnlib.gz"
    result = run(
        "edit", model, prop, *outputs(tmp_path), "--time-limit", 40, "--method", "one_shot"
    )
    assert result.exit_code == 0, result.output
    assert run("check", tmp_path / "cert.json", tmp_path / "out.onnx", prop).exit_code == 0


def test_a_violated_property_cannot_be_kept(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    broken = write_property("(>= Y_0 1.2)", name="broken.vnnlib")
    arguments = (write_model(), write_property(), *outputs(tmp_path), "--keep", broken)
    line = one_line_error(run("edit", *arguments, "--report", tmp_path / "report.json"))
    assert "'broken' does not hold before the edit" in line
    assert_nothing_written(tmp_path)
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("option", ["--keep", "--holdout"])
def test_further_property_files_are_read_with_the_same_care(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path, option: str
) -> None:
    other = write_property(name="other.vnnlib", inputs=3)
    arguments = (write_model(), write_property(), *outputs(tmp_path), option, other)
    assert "other.vnnlib" in one_line_error(run("edit", *arguments))
    assert "no_such" in one_line_error(run("edit", *arguments[:-1], tmp_path / "no_such.vnnlib"))
    assert_nothing_written(tmp_path)


def test_the_report_is_no_other_file_of_the_edit(
    run: Run, write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    model, prop = write_model(), write_property()
    for taken in (model, prop, tmp_path / "out.onnx", tmp_path / "cert.json", tmp_path):
        one_line_error(run("edit", model, prop, *outputs(tmp_path), "--report", taken))
    assert_nothing_written(tmp_path)
