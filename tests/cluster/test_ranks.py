"""Edits and projections shared by real processes over gloo: same results, clear ends."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch

import torch_prepared as tp
from tests.cluster.program import task
from tests.cluster.ranks import Ranks, start_ranks
from torch_prepared.cluster import Group, RankTeam, join_group
from torch_prepared.cluster._shards import blocks
from torch_prepared.edit import _driver, sequential
from torch_prepared.errors import SpecError


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps and short attacks, as in the ranks' program."""
    monkeypatch.setattr(sequential, "LAST_SHRINK_STEPS", 3)
    monkeypatch.setattr(_driver, "GLANCE_MOST", 0.1)
    torch.set_num_threads(1)


def run(size: int, *arguments: str) -> list[dict[str, object]]:
    told = start_ranks(size, ["-m", "tests.cluster.program", *arguments]).finish()
    assert [code for code, _, _ in told] == [0] * size, told
    return [json.loads(out) for _, out, _ in told]


def wait_for_line(ranks: Ranks, rank: int, text: str) -> None:
    stream = ranks.processes[rank].stderr
    assert stream is not None
    for line in stream:
        if text in line:
            return
    pytest.fail(f"rank {rank} ended without {text!r}")


@pytest.mark.parametrize(
    "norm",
    [
        "2",
        pytest.param("behavior", marks=pytest.mark.slow),
        pytest.param("1", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_gives_the_edit_of_one(norm: str) -> None:
    model, properties = task()
    alone = tp.edit_network(model, properties, method="sequential", norm=norm)
    expected = torch.cat([p.detach().reshape(-1) for p in alone.model.parameters()])
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    moved = float((expected - before).abs().max())
    assert moved > 1e-3
    for size in (2, 4):
        told = run(size, "edit", norm)
        assert [answer["status"] for answer in told] == ["certified"] * size
        assert len({str(answer["digest"]) for answer in told}) == 1
        got = torch.tensor(told[0]["parameters"])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3 * moved)
        assert told[0]["attempts"] == [a.note for a in alone.report.attempts]
        margins = [check.margin for check in alone.check.per_property]
        assert told[-1]["margins"] == pytest.approx(margins, abs=1e-4)


def test_a_team_of_one_rank_is_the_plain_edit() -> None:
    model, properties = task()
    deltas = [
        tp.edit_network(model, properties, method="sequential", norm="2", team=team).report.delta
        for team in (None, RankTeam(Group(0, 1, 60.0)))
    ]
    assert deltas[0].l2 == pytest.approx(deltas[1].l2, rel=1e-6)


def test_what_has_nothing_to_share_runs_in_the_leader() -> None:
    model, properties = task()
    team = RankTeam(Group(0, 1, 60.0))
    result = tp.edit_network(model, properties, method="one_shot", team=team)
    assert result.status is tp.Verdict.CERTIFIED


@pytest.mark.parametrize("size", [2, 3])
def test_weights_spread_over_ranks_project_to_the_point_of_one_process(size: int) -> None:
    whole = run(1, "project")[0]
    parts = run(size, "project", "11")
    assert whole["status"] == "OPTIMAL"
    assert {part["status"] for part in parts} == {"OPTIMAL"}
    got = torch.tensor([x for part in parts for x in part["x"]])
    torch.testing.assert_close(got, torch.tensor(whole["x"]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_with_one_line(victim: int) -> None:
    ranks = start_ranks(2, ["-m", "tests.cluster.program", "edit", "2", "3", "60", "1000000"])
    try:
        wait_for_line(ranks, victim, "started")
        time.sleep(1.0)
        ranks.processes[victim].kill()
        clock = time.monotonic()
        told = ranks.finish(60.0)
    finally:
        ranks.kill()
    code, out, err = told[1 - victim]
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 1), told
    assert "ClusterError" in errors[0]
    assert f"rank {1 - victim} of 2" in errors[0]
    assert time.monotonic() - clock < 30.0


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stalled_rank_is_waited_for_no_longer_than_the_time_out(victim: int) -> None:
    ranks = start_ranks(2, ["-m", "tests.cluster.program", "edit", "2", "3", "4", "1000000"])
    try:
        wait_for_line(ranks, victim, "started")
        time.sleep(1.0)
        ranks.processes[victim].send_signal(signal.SIGSTOP)
        out, err = ranks.processes[1 - victim].communicate(timeout=60.0)
    finally:
        ranks.kill()
    assert ranks.processes[1 - victim].returncode == 2, err
    assert err.count("error: ClusterError: ") == 1
    assert out == ""


def test_ranks_with_different_tasks_are_refused_everywhere() -> None:
    told = start_ranks(2, ["-m", "tests.cluster.program", "edit", "2", "34"]).finish()
    assert [code for code, _, _ in told] == [2, 2]
    assert all("rank 1: was given another network" in err for _, _, err in told)


def test_blocks_cover_everything_once_and_balance_weights() -> None:
    for count, parts in ((0, 3), (2, 4), (10, 3), (7, 1)):
        found = blocks(count, parts)
        assert [i for part in found for i in range(count)[part]] == list(range(count))
        assert len(found) == parts
    found = blocks(6, 2, [10, 1, 1, 1, 1, 6])
    assert [i for part in found for i in range(6)[part]] == list(range(6))
    assert sum([10, 1, 1, 1, 1, 6][found[0]]) in (10, 11)


def test_a_time_out_must_be_positive() -> None:
    with pytest.raises(SpecError, match="timeout"), join_group(0.0):
        pass
