"""The benchmark of the layers: what is skipped, how ratios are taken, and one smoke run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks import fig_lp_layer
from benchmarks._lp_layer_case import Case


def row(
    method: str, outcome: str, seconds: float = 1.0, n: int = 50, limit: float = 30.0
) -> dict[str, object]:
    return {
        "kind": "l1", "method": method, "n": n, "m": 20, "batch": 32, "limit": limit,
        "outcome": outcome, "forward": seconds, "backward": seconds, "reason": "",
    }  # fmt: skip


def test_ratio_is_against_the_best_peer_or_the_limit() -> None:
    rows = [row("ours", "done", 0.1), row("ecos", "done", 0.5), row("scs", "done", 0.9)]
    assert fig_lp_layer.speedups(rows) == [("l1", 50, 20, 32, pytest.approx(5.0), False)]
    rows = [row("ours", "done", 0.1), row("ecos", "timeout")]
    assert fig_lp_layer.speedups(rows) == [("l1", 50, 20, 32, pytest.approx(150.0), True)]
    assert fig_lp_layer.speedups([row("ours", "timeout"), row("ecos", "done")]) == []


def test_a_peer_that_was_given_less_time_than_another_took_bounds_the_ratio() -> None:
    rows = [row("ours", "done", 0.1), row("scs", "done", 50.0), row("ecos", "timeout", limit=20.0)]
    assert fig_lp_layer.speedups(rows) == [("l1", 50, 20, 32, pytest.approx(100.0), True)]


def test_only_larger_cases_of_a_peer_that_failed_are_skipped() -> None:
    rows = [row("ecos", "timeout", n=500)]
    assert fig_lp_layer._hopeless(Case("l1", "ecos", 500, 200, 32, 1), rows, 30.0) is not None
    assert fig_lp_layer._hopeless(Case("l1", "ecos", 500, 200, 32, 1), rows, 31.0) is None
    assert fig_lp_layer._hopeless(Case("l1", "ecos", 500, 200, 1, 1), rows, 30.0) is None
    assert fig_lp_layer._hopeless(Case("l1", "scs", 2000, 20, 32, 1), rows, 30.0) is None
    rows = [row("ecos", "failed", n=500)]
    assert fig_lp_layer._hopeless(Case("l1", "ecos", 500, 200, 32, 1), rows, 31.0) is not None
    huge = fig_lp_layer._hopeless(Case("l1", "ours", 20000, 1000, 256, 1), [], 30.0)
    assert huge == "not run: rows of 41.0 GB"


def test_select_and_limit_choose_what_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def pretend(case: Case, limit: float, rows: object) -> dict[str, object]:
        asked.append(fig_lp_layer.name_of(case))
        outcome = "timeout" if case.method != "ours" and limit < 100.0 else "done"
        return {**asdict(case), "limit": limit, "outcome": outcome}

    monkeypatch.setattr(fig_lp_layer, "run_one", pretend)
    output = tmp_path / "rows.json"

    def run(limit: float, **options: Any) -> list[str]:
        asked.clear()
        fig_lp_layer.run(limit, 1, True, output, **options)
        return list(asked)

    first = ["projection 20x5 batch 2 ours", "projection 20x5 batch 2 scs"]
    assert run(20.0, select="projection.*(ours|scs)") == first
    assert run(20.0, select="projection.*(ours|scs)") == []
    assert run(10.0, select="scs") == ["l1 20x5 batch 2 scs"]
    assert run(120.0, select=r"projection 20x5 batch 2 (ours|scs)$") == first[1:]
    assert run(120.0, select="projection.*ours", fresh=True) == first[:1]
    rows = {(r["kind"], r["method"]): r for r in json.loads(output.read_text())["rows"]}
    assert rows["projection", "scs"]["limit"] == 120.0
    assert rows["l1", "scs"]["limit"] == 10.0
    assert len(rows) == 3


@pytest.mark.slow
def test_smoke_run_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("cvxpylayers", reason="the peers need cvxpylayers")
    output = tmp_path / "smoke.json"
    fig_lp_layer.run(60.0, 1, smoke=True, output=output)
    rows = json.loads(output.read_text())["rows"]
    done = {(r["kind"], r["method"]) for r in rows if r["outcome"] == "done"}
    assert {(kind, m) for kind in fig_lp_layer.KINDS for m in ("ours", "ecos", "scs")} <= done
    for r in rows:
        if r["method"] == "ours":
            assert r["violation"] <= 1e-8
            assert r["gradient_error"] <= 1e-5
    fig_lp_layer.plot(output, tmp_path / "smoke.png")
    assert (tmp_path / "smoke.png").stat().st_size > 1000
