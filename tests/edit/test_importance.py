"""What output changes cost, and random directions that stand for it."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import mlp
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._importance import LEAST_GAP, LEAST_LEAD, Importance
from torch_prepared.specs import Box, Property, SafeSet

COUNT = 40_000


def reference(outputs: torch.Tensor, labels: torch.Tensor | None) -> Reference:
    return Reference(torch.zeros(len(outputs), 1), outputs, labels, "preserve")


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_directions_have_the_cost_of_small_changes_as_second_moment(
    outputs: int, labeled: bool
) -> None:
    y = torch.randn(20, outputs, generator=torch.Generator().manual_seed(0))
    labels = y.argmax(dim=1) if labeled else None
    known = reference(y, labels)
    where = torch.full((COUNT,), 7)
    importance = Importance.of(known, where)
    generator = torch.Generator().manual_seed(1)
    directions = importance.directions(outputs, COUNT, generator)
    for _ in range(4):
        change = 1e-3 * torch.randn(outputs, generator=generator)
        cost = importance.cost(change.expand(COUNT, -1))[0]
        assert float((directions @ change).square().mean()) == pytest.approx(float(cost), rel=0.05)


def test_labels_make_thin_leads_weigh_most() -> None:
    y = torch.tensor([[3.0, 1.0, 2.5]])
    importance = Importance.of(reference(y, torch.tensor([0])), torch.zeros(1, dtype=torch.int64))
    floor = LEAST_LEAD * 0.5
    change = torch.tensor([[0.1, -0.2, 0.4]])
    wanted = (0.3 / (2.0 + floor)) ** 2 + (0.3 / (0.5 + floor)) ** 2
    assert float(importance.cost(change)) == pytest.approx(math.log1p(wanted), rel=1e-5)
    assert float(importance.cost(torch.ones(1, 3))) == 0.0  # a common shift decides nothing


def test_without_labels_thin_gaps_at_either_end_weigh_most() -> None:
    y = torch.tensor([[3.0, 2.9, 1.0, 0.0], [3.0, -6.1, 1.0, 9.0]])
    importance = Importance.of(reference(y, None), torch.tensor([0]))
    top, middle, bottom = torch.tensor([[1.0, -1.0, 0, 0], [0, 1.0, -1.0, 0], [0, 0, 1.0, -1.0]])
    cost = {name: float(importance.cost(0.05 * d[None])) for name, d in
            {"top": top, "middle": middle, "bottom": bottom}.items()}  # fmt: skip
    assert cost["top"] > 2 * cost["middle"]
    assert cost["bottom"] > 0


def test_a_single_output_is_measured_in_its_spread() -> None:
    y = torch.tensor([[0.0], [2.0], [4.0]])
    importance = Importance.of(reference(y, None), torch.arange(3))
    assert importance.cost(torch.full((3, 1), 2.0)).tolist() == pytest.approx([1.0] * 3)
    assert LEAST_GAP > 0


def test_a_decision_cannot_be_lost_twice() -> None:
    """What squares would call 10,000 times as bad costs little more where leads are gone anyway."""
    y = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    importance = Importance.of(reference(y, y.argmax(dim=1)), torch.arange(50))
    change = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    cost, more = (importance.cost(scale * change) for scale in (1.0, 100.0))
    assert bool((more > cost).all())
    assert float((more / cost).median()) < 20.0


def test_where_nothing_is_decided_values_count() -> None:
    y = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    values = Reference(torch.zeros(50, 1), y, None, "domain", decides=False)
    change = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    cost = Importance.of(values, torch.arange(50)).cost(change)
    wanted = change.square().sum(dim=1) / y.std(dim=0).mean() ** 2
    torch.testing.assert_close(cost, wanted)


@pytest.mark.parametrize(
    ("safe", "decides"),
    [
        (SafeSet.argmax(1, 3), True),
        (SafeSet.interval([-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]), False),
        (SafeSet.polytope(torch.tensor([[1.0, 1.0, 0.0]]).double(), torch.ones(1).double()), False),
    ],
)
def test_properties_that_compare_outputs_speak_of_decisions(safe: SafeSet, decides: bool) -> None:
    graph = mlp((2, 4, 3), "relu", 0, torch.float32)
    box = Box(torch.zeros(2).double(), torch.ones(2).double())
    prop = Property(box, safe)
    found = Reference.of(graph, None, None, None, (prop,), 0, samples=10)
    assert found.decides == decides
    labels = torch.zeros(4, dtype=torch.int64)
    assert Reference.of(graph, torch.zeros(4, 2), labels, None, (prop,), 0).decides
    assert found.that_may_stay((prop,)).decides == decides
