"""The study runs at its smallest size and draws from its JSON alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import _calibration_plot, fig_calibration  # noqa: E402 - needs the path above


def _draw(output: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(_calibration_plot, "FIGURES", folder)
    _calibration_plot.plot(output)
    return sorted(path.name for path in folder.iterdir())


def test_parts_without_data_run_and_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "small.json"
    for part in ("speed", "methods"):
        fig_calibration.run([part], tmp_path, 1, True, output)
    parts = json.loads(output.read_text())["parts"]
    assert set(parts) == {"speed", "methods"}
    for row in parts["methods"]["rows"]:
        assert max(row["ends"], row["alternating"], row["admm"]) <= row["dp"] + 1e-12
    assert _draw(output, tmp_path / "figures", monkeypatch) == ["small.png"]


@pytest.mark.slow
def test_all_parts_run_on_real_data(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "small.json"
    fig_calibration.run(fig_calibration.PARTS, data_dir, 2, True, output)
    parts = json.loads(output.read_text())["parts"]
    for name in ("mnist", "oval", "cifar"):
        for setting in parts[name]["settings"].values():
            for row in setting["radii"]:
                assert setting["ece"] <= row["attacked_ece"] <= row["certified_ece_all"]
    drawn = _draw(output, tmp_path / "figures", monkeypatch)
    assert drawn == ["small.png", "small_reliability.png"]
