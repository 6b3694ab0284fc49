"""``audit``: verdicts and exit codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .conftest import Run, WriteModel, one_line_error, only_json


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    x = np.random.default_rng(0).uniform(-2, 2, (100, 2)).astype(np.float32)
    np.savez(path, inputs=x, labels=(np.abs(x).sum(axis=1) < 1).astype(np.int64))
    return path


def test_the_same_network_is_proved_the_same(run: Run, write_model: WriteModel, data: Path) -> None:
    result = run("audit", write_model("a.onnx"), write_model("b.onnx"), "--data", data, "--json")
    assert result.exit_code == 0
    found = only_json(result)
    assert found["status"] == "same"
    assert found["layers"] == []
    assert found["data"]["accuracy_before"] == 1.0


def test_a_change_is_shown_with_its_inputs(run: Run, write_model: WriteModel, data: Path) -> None:
    other = write_model("b.onnx", output_weight=1.3)
    result = run("audit", write_model("a.onnx"), other, "--data", data, "--json")
    assert result.exit_code == 10
    found = only_json(result)
    assert found["status"] == "different"
    assert [layer["name"] for layer in found["layers"]] == ["second.weight"]
    assert found["layers"][0]["rank"] == 1
    assert found["suspects"][0]["flips"]
    assert found["data"]["accuracy_after"] < 1.0
    text = run("audit", write_model("a.onnx"), other, "--data", data)
    assert text.exit_code == 10
    assert "second.weight: 4 of 8 entries changed" in text.stdout


def test_a_slight_change_is_within_a_tolerance_on_balls(
    run: Run, write_model: WriteModel, data: Path
) -> None:
    a, b = write_model("a.onnx"), write_model("b.onnx", output_weight=1.0 + 1e-5)
    arguments = ("audit", a, b, "--data", data, "--radius", "0.01", "--points", "3")
    bounded = run(*arguments, "--tolerance", "0.01", "--json")
    assert bounded.exit_code == 0, bounded.output
    assert only_json(bounded)["status"] == "bounded"
    assert run(*arguments, "--tolerance", "1e-9").exit_code == 10
    assert run(*arguments).exit_code in (10, 20)


def test_bad_input_is_one_line(
    run: Run, write_model: WriteModel, data: Path, tmp_path: Path
) -> None:
    a = write_model("a.onnx")
    assert "neither data" in one_line_error(run("audit", a, a, "--radius", "0.1"))
    assert "domain" in one_line_error(run("audit", a, a, "--domain", "1"))
    assert "domain" in one_line_error(run("audit", a, a, "--domain", "2,1"))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(a.read_bytes()[:50])
    assert "broken" in one_line_error(run("audit", a, broken, "--data", data))
    wide = tmp_path / "wide.npz"
    np.savez(wide, inputs=np.zeros((2, 3)))
    one_line_error(run("audit", a, a, "--data", wide))


def test_without_data_or_domain_weights_alone_are_compared(
    run: Run, write_model: WriteModel
) -> None:
    a, b = write_model("a.onnx"), write_model("b.onnx", output_weight=1.3)
    result = run("audit", a, b, "--json")
    assert result.exit_code == 20, result.output
    found = only_json(result)
    assert found["status"] == "unknown"
    assert "1 of 4 parameters differ, most of all second.weight" in found["message"]
    assert "no data and no domain were given, so only weights were compared" in found["message"]
    assert [layer["name"] for layer in found["layers"]] == ["second.weight"]
    assert found["data"] is None
    assert found["suspects"] == found["bounds"] == []
    same = run("audit", a, write_model("c.onnx"))
    assert same.exit_code == 0
    assert "only weights were compared" in same.stdout
    text = run("audit", a, b)
    assert "second.weight: 4 of 8 entries changed" in text.stdout


def test_the_largest_difference_on_balls_is_told(
    run: Run, write_model: WriteModel, data: Path
) -> None:
    a, b = write_model("a.onnx"), write_model("b.onnx", output_weight=1.0 + 1e-4)
    arguments = ("audit", a, b, "--data", data, "--radius", "0.01", "--points", "2", "--exact")
    found = only_json(run(*arguments, "--json"))["largest"]
    assert len(found) == 2
    for ball in found:
        assert ball["complete"]
        assert ball["upper"] == pytest.approx(ball["lower"], rel=2e-3)
    assert "branch and bound" in run(*arguments).stdout
