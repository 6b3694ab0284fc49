"""Counterexample-guided edits with trees as certificates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import torch_prepared as tp
from tests.helpers import mlp
from torch_prepared.core.deadline import Deadline
from torch_prepared.edit import EDITORS, _forest, _home
from torch_prepared.edit._base import EditOptions, EditProblem
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._repair import LEAF_AIM, Repair
from torch_prepared.edit.refine import RefineEditor, _Refinement
from torch_prepared.errors import InfeasibleEditError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, Property, SafeSet


def setting(seed: int) -> tuple[tp.Graph, Property]:
    """A property of a wide box that a few percent of its inputs violate."""
    graph = mlp((2, 16, 16, 3), "relu", seed, torch.float32)
    region = Box(torch.full((2,), -1.0), torch.full((2,), 1.0))
    x = region.sample(20_000, torch.Generator().manual_seed(1))
    y = evaluate_graph(graph.to(torch.float64), x)
    bound = (y[:, 0] - y[:, 1]).quantile(0.97)
    rows = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    return graph, Property(region, SafeSet.polytope(rows, bound[None]), "high")


@pytest.mark.parametrize("seed", [0, 1])
def test_refine_certifies_a_whole_region_and_keeps_the_rest(seed: int) -> None:
    graph, prop = setting(seed)
    result = tp.edit_network(graph, prop, method="refine", domain=(-1.0, 1.0), time_limit=60)
    assert result.status is tp.Verdict.CERTIFIED
    assert result.check.per_property[0].leaves >= 1
    x = prop.region.sample(20_000, torch.Generator().manual_seed(3))
    after = evaluate_graph(result.model.to(torch.float64), x)
    before = evaluate_graph(graph.to(torch.float64), x)
    assert float(prop.safe.margin(after).min()) >= 0 > float(prop.safe.margin(before).min())
    crude = tp.edit_network(graph, prop, method="one_shot", domain=(-1.0, 1.0))
    assert result.report.drawdown.distance < crude.report.drawdown.distance


def test_a_certificate_of_a_tree_survives_its_file(tmp_path) -> None:
    graph, prop = setting(0)
    result = tp.edit_network(graph, prop, method="refine", domain=(-1.0, 1.0), time_limit=60)
    result.certificate.save(tmp_path / "c.json")
    loaded = tp.Certificate.load(tmp_path / "c.json")
    again = tp.check_certificate(loaded, result.model.record(), [prop.record()])
    assert again.status is tp.Verdict.CERTIFIED
    with pytest.raises(tp.certify.certificate.CertificateError):
        tp.check_certificate(loaded, graph.record(), [prop.record()])


def test_the_way_home_comes_closer_and_loses_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, prop = setting(1)

    def distance() -> float:
        result = tp.edit_network(
            graph, prop, method="refine", domain=(-1.0, 1.0), time_limit=60, threads=1
        )
        assert result.status is tp.Verdict.CERTIFIED
        return float(result.report.drawdown.distance)

    home = distance()
    monkeypatch.setattr(_Refinement, "_go_home", lambda self: False)
    assert home < 0.9 * distance()


def test_an_interrupt_on_the_way_home_keeps_what_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, prop = setting(1)
    prove, stops = _home._prove, []

    def interrupted(*arguments: object) -> bool:
        stops.append(prove(*arguments))
        raise KeyboardInterrupt  # on the way home, after a step

    monkeypatch.setattr(_home, "_prove", interrupted)
    result = tp.edit_network(
        graph, prop, method="refine", domain=(-1.0, 1.0), time_limit=60, threads=1
    )
    assert result.status is tp.Verdict.CERTIFIED
    assert result.report.method == "refine"
    assert [attempt.certified for attempt in result.report.attempts] == [True]
    assert stops == [True]


def test_trees_that_cannot_be_checked_in_time_are_not_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, prop = setting(0)
    monkeypatch.setattr("torch_prepared.edit.refine.FLOP_SECONDS", 1.0)
    with pytest.raises(InfeasibleEditError, match=r"room for 0 leaves.*'sequential'"):
        tp.edit_network(graph, prop, method="refine", domain=(-1.0, 1.0), time_limit=20)
    result = tp.edit_network(graph, prop, method="auto", domain=(-1.0, 1.0), time_limit=5)
    assert result.status is tp.Verdict.CERTIFIED
    assert "refine" not in {attempt.method for attempt in result.report.attempts}


def test_every_editor_is_listed() -> None:
    assert {"auto", "one_shot", "refine", "sequential"} <= set(EDITORS)


def proved_repair(seed: int = 1) -> Repair:
    """Trees of a small network, proved."""
    graph, prop = setting(seed)
    reference = Reference.of(graph, None, None, (-1.0, 1.0), (prop,), 0)
    problem = EditProblem(graph, (prop,), reference, EditOptions())
    run = _Refinement.start(problem, RefineEditor(), Deadline(None))
    run.repair.points.seek(Deadline(None), 1)
    run._prove()
    return run.repair


def test_a_step_home_is_looked_at_until_nothing_new_loses_more_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repair = proved_repair(3)
    monkeypatch.setattr(_forest, "FEWEST_ROWS", 1)
    monkeypatch.setattr(_forest, "MOST_ROWS", 1)  # a leaf at each look
    (old,), theta = repair.forest.trees, repair.walk.theta
    before, loss = old.margins(old.leaves).copy(), 0.1 * repair.aim
    goal = np.minimum(before, LEAF_AIM * repair.aim) - 2 * loss  # rows are linear, leaves are not
    lost = []
    for looks in (1, 20):
        monkeypatch.setattr(_home, "LOOKS", looks)
        step = _home._look(repair, 0.3, loss)
        assert step is not None
        assert step.known == (looks > 1)
        assert repair.walk.distance(theta + step.delta) < 0.97 * repair.walk.distance()
        lost.append(int((step.trees[0].margins(old.leaves) < goal).sum()))
    assert lost[1] < lost[0]
    assert repair.walk.theta is theta
    assert repair.forest.trees == [old]
    assert np.array_equal(old.margins(old.leaves), before)


def test_a_step_that_is_not_proved_again_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repair = proved_repair()
    theta, (tree,) = repair.walk.theta, repair.forest.trees
    monkeypatch.setattr(_home, "_prove", lambda *_: False)
    step = _home._look(repair, 0.3, repair.aim)
    assert step is not None
    assert _home._follow(repair, step, 1.0, 10_000) == 0.0
    assert repair.walk.theta is theta
    assert repair.forest.trees == [tree]
    assert repair.forest.proved


def test_small_trees_may_open_all_their_leaves_and_full_ones_few() -> None:
    repair = proved_repair()
    step = _home._look(repair, 0.3, repair.aim)
    assert step is not None
    leaves = repair.forest.leaf_count
    opened = sum(len(tree.open) for tree in step.trees) / leaves
    repair.capacity = 9.0 * leaves
    assert step.room(repair) == pytest.approx(2.0 / opened)
    repair.capacity = 1.0 * leaves
    assert step.room(repair) == pytest.approx(_home.LEAST_OPEN / opened)
