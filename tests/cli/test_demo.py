"""``demo``: everything it promises lies in the output folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Run, only_json


@pytest.mark.slow
def test_the_demo_certifies_what_was_violated(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the demo's digits come with scikit-learn")
    folder = tmp_path / "demo"
    result = run("demo", "--output", folder, "--images", 3, "--time-limit", 20, "--json")
    assert result.exit_code == 0, result.output
    data = only_json(result)
    assert (data["before"]["certified"], data["after"]["certified"]) == (0, 3)
    assert (data["before"]["violated"], data["after"]["violated"]) == (3, 0)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "original.onnx",
        "edited.onnx",
        "certificate.json",
        "properties.vnnlib",
        "training.npz",
        "before_after.png",
    }
    files = (folder / "original.onnx", folder / "properties.vnnlib")
    assert run("verify", *files).exit_code == 10
    edited = (folder / "certificate.json", folder / "edited.onnx", folder / "properties.vnnlib")
    assert run("check", *edited).exit_code == 0
