"""Bad networks and properties: exit code 2 and one line, in every command that reads them."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Run, WriteModel, WriteProperty, one_line_error, only_json

PROGRAM = [sys.executable, "-m", "torch_prepared"]


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "text", "nan", "operator"])
@pytest.mark.parametrize("command", ["verify", "edit", "info"])
def test_bad_networks(
    run: Run,
    write_model: WriteModel,
    write_property: WriteProperty,
    tmp_path: Path,
    command: str,
    kind: str,
) -> None:
    model = write_model(
        output_weight=float("nan") if kind == "nan" else 1.0,
        op="Sin" if kind == "operator" else "Relu",
    )
    if kind == "missing":
        model = tmp_path / "nowhere.onnx"
    elif kind == "empty":
        model.write_bytes(b"")
    elif kind == "truncated":
        model.write_bytes(model.read_bytes()[:-100])
    elif kind == "text":
        model.write_text("this is no network\n" * 9)
    arguments = [] if command == "info" else [write_property()]
    if command == "edit":
        arguments += ["-o", tmp_path / "out.onnx", "--certificate", tmp_path / "cert.json"]
    line = one_line_error(run(command, model, *arguments))
    if kind == "operator":
        assert "Sin" in line
        assert "Relu" in line
    if kind == "nan":
        assert "NaN" in line
    assert not list(tmp_path.glob("*cert*"))


@pytest.mark.parametrize("kind", ["missing", "inputs", "empty box", "no bounds", "nan", "syntax"])
@pytest.mark.parametrize("command", ["verify", "edit"])
def test_bad_properties(
    run: Run,
    write_model: WriteModel,
    write_property: WriteProperty,
    tmp_path: Path,
    command: str,
    kind: str,
) -> None:
    prop = write_property()
    if kind == "missing":
        prop = tmp_path / "nowhere.vnnlib"
    elif kind == "inputs":
        prop = write_property(inputs=3)
    elif kind == "empty box":
        prop = write_property(low=1.0, high=-1.0)
    elif kind == "no bounds":
        prop.write_text(prop.read_text().replace("(assert (<= X_0 1.0))\n", ""))
    elif kind == "nan":
        prop = write_property("(>= Y_0 nan)")
    else:
        prop = write_property("(>= Y_0")
    extra = ["-o", tmp_path / "o.onnx", "--certificate", tmp_path / "c.json"]
    one_line_error(run(command, write_model(), prop, *(extra if command == "edit" else [])))


def test_usage_errors_are_one_line_and_json_on_request(run: Run) -> None:
    assert "bogus" in one_line_error(run("bogus"))
    assert "--bogus" in one_line_error(run("--bogus"))
    assert "MODEL" in one_line_error(run("verify"))
    assert "--operators" in one_line_error(run("info"))
    result = run("verify", "nowhere.onnx", "x.vnnlib", "--json")
    assert result.exit_code == 2
    assert only_json(result)["status"] == "error"


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in ("edit", "verify", "check", "info", "demo"):
        assert name in result.stdout
        assert run(name, "--help").exit_code == 0


def test_the_program_itself_returns_the_exit_codes(
    write_model: WriteModel, write_property: WriteProperty
) -> None:
    command = [*PROGRAM, "verify", str(write_model()), str(write_property()), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 10, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def _small_files() -> None:
    """Like a full disk: no file may grow beyond 600 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX resource limits")
def test_a_full_disk_leaves_nothing_behind(
    write_model: WriteModel, write_property: WriteProperty, tmp_path: Path
) -> None:
    model, prop = write_model(), write_property()
    assert model.stat().st_size < 600
    folder = tmp_path / "results"
    folder.mkdir()
    command = [*PROGRAM, "edit", str(model), str(prop), "--method", "one_shot"]
    command += ["-o", str(folder / "out.onnx"), "--certificate", str(folder / "cert.json")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=_small_files
    )
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []
