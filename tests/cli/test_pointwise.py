"""``pointwise``: files written only with a certificate that ``check`` accepts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from torch_prepared.core.onnx import run_onnx

from .conftest import Run, WriteModel, one_line_error, only_json


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """One input that the network gives class 0, to become 1."""
    path = tmp_path / "edits.npz"
    np.savez(path, inputs=np.array([[2.0, 1.0]], np.float32), targets=np.array([1]))
    return path


def _files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "out.onnx", tmp_path / "cert.json"


@pytest.mark.parametrize("norm", ["2", "inf", "1"])
def test_files_check_out(
    run: Run, write_model: WriteModel, examples: Path, tmp_path: Path, norm: str
) -> None:
    out, certificate = _files(tmp_path)
    result = run(
        "pointwise", write_model(), examples, "-o", out, "--certificate", certificate,
        "--norm", norm, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = only_json(result)
    assert data["status"] == "certified"
    assert data["outcome"] == "edited"
    assert data["margin"] > 0
    assert run_onnx(out, np.array([[2.0, 1.0]], np.float32))[0].argmax() == 1
    for arithmetic in ("real", "float32"):
        checked = run("check", certificate, out, examples, "--json", "--arithmetic", arithmetic)
        assert checked.exit_code == 0, checked.output
        assert only_json(checked)["onnxruntime"] == {"right": 1, "total": 1}


def test_csv_is_read(run: Run, write_model: WriteModel, tmp_path: Path) -> None:
    path = tmp_path / "edits.csv"
    path.write_text("class,x0,x1\n1,2.0,1.0\n1,-2.0,1.0\n")
    out, certificate = _files(tmp_path)
    result = run("pointwise", write_model(), path, "-o", out, "--certificate", certificate)
    assert result.exit_code == 0, result.output
    assert "2, margin" in result.stdout
    assert run("check", certificate, out, path).exit_code == 0


def test_check_refuses_what_does_not_belong_together(
    run: Run, write_model: WriteModel, examples: Path, tmp_path: Path
) -> None:
    model = write_model()
    out, certificate = _files(tmp_path)
    assert run("pointwise", model, examples, "-o", out, "--certificate", certificate).exit_code == 0
    assert "weights" in one_line_error(run("check", certificate, model, examples))
    other = tmp_path / "other.npz"
    np.savez(other, inputs=np.array([[2.0, 1.0]], np.float32), targets=np.array([0]))
    assert "other claims" in one_line_error(run("check", certificate, out, other))
    one_line_error(run("check", certificate, out, examples, examples))
    data = json.loads(certificate.read_text())
    data["manifest"]["method"] = "altered"
    certificate.write_text(json.dumps(data))
    assert "altered" in one_line_error(run("check", certificate, out, examples))
    certificate.write_bytes(certificate.read_bytes()[:100])
    one_line_error(run("check", certificate, out, examples))


def test_balls_are_certified_too(
    run: Run, write_model: WriteModel, examples: Path, tmp_path: Path
) -> None:
    out, certificate = _files(tmp_path)
    balls, boxes = tmp_path / "balls.json", tmp_path / "balls.vnnlib"
    result = run(
        "pointwise", write_model(), examples, "-o", out, "--certificate", certificate,
        "--radius", "0.05", "--lift", "one_shot", "--ball-certificate", balls,
        "--ball-properties", boxes, "--time-limit", "60",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert run("check", certificate, out, examples).exit_code == 0
    assert run("check", balls, out, boxes).exit_code == 0


def test_a_conflict_writes_nothing(run: Run, write_model: WriteModel, tmp_path: Path) -> None:
    path = tmp_path / "edits.csv"
    path.write_text("1,2.0,1.0\n0,2.0,1.0\n")
    out, certificate = _files(tmp_path)
    result = run(
        "pointwise", write_model(), path, "-o", out, "--certificate", certificate, "--json"
    )
    assert result.exit_code == 20
    data = only_json(result)
    assert data["outcome"] == "infeasible"
    assert data["conflicting"] == [0, 1]
    assert not out.exists()
    assert not certificate.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 broken", b"not,numbers\nat,all\n", b"1,2\n1,2,3\n", b"1,nan,0\n"],
)
@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_damaged_examples_are_one_line(
    run: Run, write_model: WriteModel, tmp_path: Path, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"edits{suffix}"
    path.write_bytes(content)
    out, certificate = _files(tmp_path)
    result = run("pointwise", write_model(), path, "-o", out, "--certificate", certificate)
    assert "edits" in one_line_error(result)
    assert not out.exists()


def test_pickled_and_misshapen_arrays_are_refused(
    run: Run, write_model: WriteModel, tmp_path: Path
) -> None:
    out, certificate = _files(tmp_path)
    path = tmp_path / "edits.npz"
    cases = [
        {"inputs": np.array([{"a": 1}], dtype=object), "targets": np.array([1])},
        {"inputs": np.zeros((2, 2)), "targets": np.array([1])},
        {"inputs": np.zeros((1, 2)), "targets": np.array([1.5])},
        {"inputs": np.zeros((1, 3)), "targets": np.array([1])},
        {"inputs": np.zeros((1, 2)), "targets": np.array([7])},
        {"something": np.zeros((1, 2))},
    ]
    for case in cases:
        np.savez(path, **case)
        result = run("pointwise", write_model(), path, "-o", out, "--certificate", certificate)
        one_line_error(result)
        assert not out.exists()


def test_options_that_do_not_go_together(
    run: Run, write_model: WriteModel, examples: Path, tmp_path: Path
) -> None:
    model = write_model()
    out, certificate = _files(tmp_path)
    base = ("pointwise", model, examples, "--certificate", certificate)
    assert ".onnx" in one_line_error(run(*base, "-o", tmp_path / "out.txt"))
    assert "--radius" in one_line_error(run(*base, "-o", out, "--radius", "0.1"))
    assert "input" in one_line_error(run(*base, "-o", model))
    assert "z3" in one_line_error(run(*base, "-o", out, "--solver", "z3", "--norm", "2"))


def test_no_examples_and_nothing_to_preserve_are_refused_but_nothing_to_keep_is_fine(
    run: Run, write_model: WriteModel, examples: Path, tmp_path: Path
) -> None:
    out, certificate = _files(tmp_path)
    empty = tmp_path / "empty.npz"
    np.savez(empty, inputs=np.zeros((0, 2), np.float32), targets=np.zeros(0, np.int64))
    tail = ("-o", out, "--certificate", certificate)
    assert "empty.npz" in one_line_error(run("pointwise", write_model(), empty, *tail))
    assert "preserve" in one_line_error(
        run("pointwise", write_model(), examples, *tail, "--preserve", empty)
    )
    assert not out.exists()
    kept = run("pointwise", write_model(), examples, *tail, "--keep", empty)
    assert kept.exit_code == 0, kept.output


def test_a_time_limit_that_is_no_number_is_refused(
    run: Run, write_model: WriteModel, examples: Path, tmp_path: Path
) -> None:
    out, certificate = _files(tmp_path)
    tail = ("-o", out, "--certificate", certificate, "--time-limit", "nan")
    assert "--time-limit" in one_line_error(run("pointwise", write_model(), examples, *tail))


@pytest.mark.parametrize("compute", ["float64", "tf32", "bfloat16"])
def test_a_float_verdict_in_another_type_is_replayed(
    run: Run, write_model: WriteModel, examples: Path, tmp_path: Path, compute: str
) -> None:
    out, certificate = _files(tmp_path)
    result = run(
        "pointwise", write_model(), examples, "-o", out, "--certificate", certificate,
        "--norm", "inf", "--verify", "float", "--compute", compute, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    data = only_json(result)
    assert data["verified"] == "verified-float"
    assert data["compute"] == compute
    assert data["margin_float"] > 0
    checked = run("check", certificate, out, examples, "--arithmetic", compute, "--json")
    assert checked.exit_code == 0, checked.output
    assert only_json(checked)["arithmetic"] == compute


def test_a_margin_for_float32_is_not_certified_in_bfloat16(
    run: Run, write_model: WriteModel, examples: Path, tmp_path: Path
) -> None:
    out, certificate = _files(tmp_path)
    tail = ("-o", out, "--certificate", certificate, "--norm", "inf", "--margin", "1e-4")
    assert run("pointwise", write_model(), examples, *tail).exit_code == 0
    assert run("check", certificate, out, examples, "--arithmetic", "float32").exit_code == 0
    assert run("check", certificate, out, examples, "--arithmetic", "bfloat16").exit_code == 20


def test_biases_or_a_few_weights_alone_are_changed(
    run: Run, write_model: WriteModel, examples: Path, tmp_path: Path
) -> None:
    out, certificate = _files(tmp_path)
    tail = ("-o", out, "--certificate", certificate, "--json")
    model = write_model()
    moved = only_json(run("pointwise", model, examples, *tail, "--layer", "biases"))
    assert moved["status"] == "certified"
    assert "biases of" in moved["method"]
    assert ".weight" not in moved["manifest"]["changed_parameters"]
    few = run("pointwise", model, examples, *tail, "--free", "2", "--norm", "1")
    assert few.exit_code == 0, few.output
    assert only_json(few)["delta"]["changed"] <= 2
    wrong = run("pointwise", model, examples, *tail[:-1], "--free", "99", "--norm", "1")
    assert "1 to 8" in one_line_error(wrong)
