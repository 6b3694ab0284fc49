"""The study of ``benchmarks/fig_interpretation.py`` at its smallest size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_smoke_study_end_to_end(data_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "interpretation_smoke.json"
    command = [
        sys.executable, "-m", "benchmarks.fig_interpretation", "all", "--smoke",
        "--data", str(data_dir), "--output", str(output), "--threads", "2",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cells = json.loads(output.read_text())["cells"]
    assert {"standard", "pgd", "certified", "combined", "edit"} <= set(cells)
    for cell in cells.values():
        rows = {row["metric"]: row["value"] for row in cell["rows"]}
        assert not any(value for name, value in rows.items() if name.endswith("unconfirmed"))
    assert (tmp_path / "interpretation_smoke.png").exists()
    assert (tmp_path / "interpretation_smoke_maps.png").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "crown" not in again.stdout  # every cell was there already
