"""Counterexample-guided edits with trees as certificates."""

from __future__ import annotations

import pytest
import torch

import torch_prepared as tp
from tests.helpers import mlp
from torch_prepared.edit import EDITORS, _home
from torch_prepared.edit.refine import _Refinement
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
