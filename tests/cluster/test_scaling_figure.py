"""The scaling figure runs at a tiny size, in one rank and in two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import fig_scaling
from benchmarks._scaling_case import network_and_properties


def test_the_case_has_the_promised_share_of_violations() -> None:
    model, properties = network_and_properties(100)
    assert sum(p.numel() for p in model.parameters()) == 9733
    centers = [(p.region.lower + p.region.upper).float() / 2 for p in properties]
    margins = [
        float(p.safe.margin(model(x[None]).detach().double()))
        for p, x in zip(properties, centers, strict=True)
    ]
    assert sum(margin < 0 for margin in margins) == 5


@pytest.mark.slow
def test_smoke_run_and_plot(tmp_path: Path) -> None:
    output = tmp_path / "smoke.json"
    fig_scaling.run(1, True, output, True)
    rows = json.loads(output.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["project", "project", "edit", "edit"]
    assert [row["outcome"] for row in rows] == ["OPTIMAL"] * 2 + ["certified"] * 2
    assert rows[3]["detail"]["l2"] == pytest.approx(rows[2]["detail"]["l2"], rel=1e-3)
    assert 0 < rows[3]["critical"]
    fig_scaling.plot(output, tmp_path / "smoke.png")
    assert (tmp_path / "smoke.png").stat().st_size > 1000
