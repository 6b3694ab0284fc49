"""The benchmark of bounds: counts of the roofline, resuming, ratios."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from helpers import Net, mlp  # noqa: E402 - needs the path above

from benchmarks import fig_bounds  # noqa: E402
from benchmarks._bounds_report import pairs, table  # noqa: E402
from benchmarks._roofline import pass_work  # noqa: E402
from torch_prepared.bounds._regions import RegionBatch  # noqa: E402
from torch_prepared.bounds.crown import bound_nodes  # noqa: E402
from torch_prepared.core.graph import Graph  # noqa: E402

HEAD = {"threads": 1, "limit_seconds": 60.0, "device": "test"}


def row(engine: str, **numbers: object) -> dict[str, object]:
    return {"network": "net", "method": "crown", "batch": 64, "engine": engine, **numbers}


def work(graph: Graph, radius: float, rows: int) -> dict[str, float]:
    center = torch.zeros(1, graph.input_size, dtype=graph.dtype)
    regions = RegionBatch(center - radius, center + radius)
    with torch.no_grad():
        return pass_work(graph, bound_nodes(graph, regions), rows)


class TestWork:
    def test_of_dense_layers_when_every_neuron_is_unstable(self) -> None:
        found = work(mlp((4, 10, 10, 3)), 1e3, 6)
        # Two rows for each of the second layer's ten, on 10 neurons and then 4 inputs; six rows
        # of the output.
        inner = 2 * 10 * (2 * 10 + 2 * 10 * 4)
        output = 6 * (2 * 3 * 10 + 2 * 10 * 10 + 2 * 10 * 4)
        assert found["needed_flops"] == inner + output

    def test_stable_neurons_cost_nothing(self) -> None:
        found = work(mlp((4, 10, 10, 3)), 0.0, 1)
        assert 0 < found["needed_flops"] <= 2 * 3 * 10 + 2 * 10 * 10 + 2 * 10 * 4
        assert found["needed_bytes"] >= 8 * (3 * 10 + 10 * 10 + 10 * 4)

    def test_of_convolutions_counts_the_pixels_that_rows_reach(self) -> None:
        net = Net((1, 5, 5), 0)
        net.conv(2, (3, 3), padding=1)
        net.act("relu")
        net.conv(1, (3, 3), padding=1)
        net.act("relu")
        graph = net.graph(torch.float64)
        found = work(graph, 1e3, 0)
        # A pixel's row meets 9 taps of 2 channels, then those pixels (fewer at the border) 9
        # taps of one channel: 3 x 3 of them inside, 2 x 3 at edges, 2 x 2 in corners.
        reached = 9 * 9 + 12 * 6 + 4 * 4
        assert found["needed_flops"] == 2 * (25 * 2 * 18 + reached * 2 * 2 * 9)


class TestRun:
    def options(self, **changes: object) -> Namespace:
        usual = {
            "smoke": True, "threads": 1, "limit": 1.0, "memory_gb": 4.0, "auto_lirpa": None,
            "minutes": 1.0, "fresh": False, "methods": ["crown"], "networks": None,
        }  # fmt: skip
        return Namespace(**{**usual, **changes})

    def test_known_cases_are_not_run_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def measured(engine: str, *case: object) -> dict[str, object]:
            asked.append((engine, *case[:3]))
            found = dict(zip(("network", "method", "batch"), case[:3], strict=True))
            if len(asked) == 3:
                raise KeyboardInterrupt
            numbers = {"seconds": 1.0, "cpu_seconds": 1.0, "width": 1.0, "memory_mb": 1.0}
            return {**found, "engine": engine, **numbers}

        monkeypatch.setattr(fig_bounds, "_measure", measured)
        output = tmp_path / "bounds.json"
        with pytest.raises(KeyboardInterrupt):
            fig_bounds.run(self.options(), output)
        assert len(json.loads(output.read_text())["rows"]) == 2
        fig_bounds.run(self.options(), output)
        rows = json.loads(output.read_text())["rows"]
        assert len(rows) == len({fig_bounds._key(r) for r in rows}) == 8
        assert asked[2] == asked[3]
        fig_bounds.run(self.options(limit=2.0), output)  # other settings: other rows
        assert len(asked) == 9 + 8

    def test_larger_batches_are_left_out_after_a_failure(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failed(engine: str, network: str, method: str, batch: int, _: object) -> object:
            found = {"network": network, "method": method, "batch": batch, "engine": engine}
            return {**found, "failure": "more than 1 s"}

        monkeypatch.setattr(fig_bounds, "_measure", failed)
        output = tmp_path / "bounds.json"
        options = self.options(smoke=False, networks=["acasxu_1_1"], max_batch=512)
        fig_bounds.run(options, output)
        reasons = [r["failure"] for r in json.loads(output.read_text())["rows"]]
        assert reasons == ["more than 1 s"] * 2 + ["not run: failed at batch 1"] * 4

    def test_a_failure_of_a_larger_batch_keeps_no_smaller_one_from_being_measured(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def measured(engine: str, network: str, method: str, batch: int, _: object) -> object:
            found = {"network": network, "method": method, "batch": batch, "engine": engine}
            if batch == 512:
                return {**found, "failure": "more than 1 s"}
            return {**found, "seconds": 1.0, "cpu_seconds": 1.0, "width": 1.0, "memory_mb": 1.0}

        monkeypatch.setattr(fig_bounds, "_measure", measured)
        output = tmp_path / "bounds.json"
        options = self.options(smoke=False, networks=["acasxu_1_1"], max_batch=512)
        fig_bounds.run(options, output)
        record = json.loads(output.read_text())
        record["rows"] = [r for r in record["rows"] if r["batch"] == 512]
        output.write_text(json.dumps(record))
        fig_bounds.run(options, output)
        again = json.loads(output.read_text())["rows"]
        assert [r["batch"] for r in again if "failure" not in r] == [1, 1, 64, 64]

    def test_a_stopped_case_keeps_what_it_printed(self) -> None:
        assert fig_bounds._numbers(b'noise\n{"seconds": 2}\n{"seconds": 1}\n{"sec') == {
            "seconds": 1
        }
        assert fig_bounds._numbers(None) == {}


class TestReport:
    def test_ratios_and_reasons(self, tmp_path: Path) -> None:
        ours = row("ours", seconds=9.0, cpu_seconds=2.0, width=3.0, memory_mb=10.0)
        rates = {"matmul_flops": 1e11, "copy_bytes": 1e10}
        counted = ours | {"needed_flops": 1e11, "needed_bytes": 2e8, **rates}
        theirs = row("auto_lirpa", seconds=9.0, cpu_seconds=8.0, width=4.0, memory_mb=30.0)
        (pair,) = pairs({**HEAD, "rows": [counted, theirs]})
        assert (pair.faster, pair.width, pair.memory) == (4.0, 0.75, (10.0, 30.0))
        (least,) = pairs({**HEAD, "rows": [ours, row("auto_lirpa", failure="more than 60 s")]})
        assert (least.faster, least.theirs) == (30.0, None)
        (refused,) = pairs({**HEAD, "rows": [ours, row("auto_lirpa", failure="no memory")]})
        assert refused.faster is None
        file = tmp_path / "bounds.json"
        file.write_text(json.dumps({**HEAD, "rows": [counted, theirs]}))
        assert "| net | crown | 64 | 2 | 8 | 4.0x | 0.750000 | 10 / 30 |" in table(file)
        assert "| net | 64 | 50.0 | 50% | 0.100 | 1.0% | 1.00 |" in table(file)


@pytest.mark.slow
def test_smoke_of_all_methods(tmp_path: Path) -> None:
    output = tmp_path / "smoke.json"
    command = [sys.executable, "-m", "benchmarks.fig_bounds", "run", "--smoke", "--output", output]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    rows = json.loads(output.read_text())["rows"]
    ours = [r for r in rows if r["engine"] == "ours"]
    assert [r["method"] for r in ours] == ["ibp", "crown-ibp", "crown", "alpha-crown"]
    widths = [r["width"] for r in ours]
    assert widths == sorted(widths, reverse=True)
