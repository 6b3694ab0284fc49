"""The benchmark of the layers: what is skipped, how ratios are taken, and one smoke run."""

import json
from pathlib import Path

import pytest

from benchmarks import fig_lp_layer
from benchmarks._lp_layer_case import Case


def row(method: str, outcome: str, seconds: float = 1.0, n: int = 50) -> dict[str, object]:
    return {
        "kind": "l1", "method": method, "n": n, "m": 20, "batch": 32, "limit": 30.0,
        "outcome": outcome, "forward": seconds, "backward": seconds,
    }  # fmt: skip


def test_ratio_is_against_the_best_peer_or_the_limit() -> None:
    rows = [row("ours", "done", 0.1), row("ecos", "done", 0.5), row("scs", "done", 0.9)]
    assert fig_lp_layer.speedups(rows) == [("l1", 50, 20, 32, pytest.approx(5.0), False)]
    rows = [row("ours", "done", 0.1), row("ecos", "timeout")]
    assert fig_lp_layer.speedups(rows) == [("l1", 50, 20, 32, pytest.approx(150.0), True)]
    assert fig_lp_layer.speedups([row("ours", "timeout"), row("ecos", "done")]) == []


def test_only_larger_cases_of_a_peer_that_failed_are_skipped() -> None:
    rows = [row("ecos", "timeout", n=500)]
    assert fig_lp_layer._hopeless(Case("l1", "ecos", 500, 200, 32, 1), rows) is not None
    assert fig_lp_layer._hopeless(Case("l1", "ecos", 500, 200, 1, 1), rows) is None
    assert fig_lp_layer._hopeless(Case("l1", "scs", 2000, 20, 32, 1), rows) is None
    huge = fig_lp_layer._hopeless(Case("l1", "ours", 20000, 1000, 256, 1), [])
    assert huge == "not run: rows of 41.0 GB"


@pytest.mark.slow
def test_smoke_run_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("cvxpylayers", reason="the peers need cvxpylayers")
    output = tmp_path / "smoke.json"
    fig_lp_layer.run(60.0, 1, smoke=True, output=output, fresh=True)
    rows = json.loads(output.read_text())["rows"]
    done = {(r["kind"], r["method"]) for r in rows if r["outcome"] == "done"}
    assert {(kind, m) for kind in fig_lp_layer.KINDS for m in ("ours", "ecos", "scs")} <= done
    for r in rows:
        if r["method"] == "ours":
            assert r["violation"] <= 1e-8
            assert r["gradient_error"] <= 1e-5
    fig_lp_layer.plot(output, tmp_path / "smoke.png")
    assert (tmp_path / "smoke.png").stat().st_size > 1000
