"""Reference inputs: blends of few, and which inputs stand for all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import mlp
from torch_prepared.core.graph import Graph
from torch_prepared.edit import _behavior
from torch_prepared.edit._behavior import Reference
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, Property, SafeSet


def few(count: int = 6, labels: Tensor | None = None) -> tuple[Graph, Reference]:
    graph = mlp((4, 8, 3))
    inputs = torch.rand(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return graph, Reference.of(graph, inputs, labels, None, (), 0)


def test_blends_lie_between_two_inputs_nearer_to_one_and_have_the_networks_outputs() -> None:
    graph, reference = few(2)
    blended = reference.blended(graph, seed=0)
    assert blended.blends == 2 * _behavior.BLENDS
    torch.testing.assert_close(blended.inputs[:2], reference.inputs, rtol=0, atol=0)
    a, b = reference.inputs.double()
    share = ((blended.inputs[2:].double() - b) @ (a - b)) / (a - b).square().sum()
    torch.testing.assert_close(
        blended.inputs[2:].double(), share[:, None] * a + (1 - share[:, None]) * b
    )
    assert bool(((share > -1e-6) & (share < 1 + 1e-6)).all())
    assert len(share.unique()) > 2
    torch.testing.assert_close(
        blended.outputs, evaluate_graph(graph, blended.inputs).flatten(1).to(blended.outputs)
    )


def test_labels_of_blends_are_the_original_decisions_and_given_ones_stay() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    graph, reference = few(labels=labels)
    blended = reference.blended(graph, seed=0)
    assert blended.labels is not None
    assert torch.equal(blended.labels[:6], labels)
    assert torch.equal(blended.labels[6:], blended.outputs[6:].argmax(dim=1))


def test_blends_depend_on_the_seed_alone() -> None:
    graph, reference = few()
    one, same, other = (reference.blended(graph, seed=s).inputs for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_many_inputs_samples_and_single_ones_are_not_blended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, reference = few()
    assert few(1)[1].blended(graph, 0).blends == 0
    ends = torch.zeros(4), torch.ones(4)
    sampled = Reference.of(graph, None, None, ends, (), 0, samples=6)
    assert sampled.blended(graph, 0) is sampled
    monkeypatch.setattr(_behavior, "ENOUGH", 8)
    assert reference.blended(graph, 0).blends == 2
    monkeypatch.setattr(_behavior, "ENOUGH", 6)
    assert reference.blended(graph, 0) is reference


def test_large_networks_are_not_evaluated_on_blends(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, reference = few()
    monkeypatch.setattr(_behavior, "BLEND_FLOPS", 1.0)
    assert reference.blended(graph, 0) is reference


def test_blends_are_chosen_only_where_all_given_inputs_fit() -> None:
    graph, reference = few()
    blended, generator = reference.blended(graph, 0), torch.Generator().manual_seed(0)
    assert sorted(blended.choose(5, generator).tolist()) != list(range(5))
    assert all(int(blended.choose(5, generator).max()) < 6 for _ in range(20))
    assert sorted(blended.choose(24, generator).tolist()) == list(range(24))
    assert any(int(blended.choose(6, generator).max()) >= 6 for _ in range(20))


def test_blends_that_must_change_are_dropped_and_the_rest_is_still_known_as_blends() -> None:
    graph, reference = few(40)
    blended = reference.blended(graph, 0)
    half = Box(torch.zeros(4).double(), torch.tensor([0.5, 1, 1, 1]).double())
    decision = int(reference.outputs.argmax(dim=1).mode().values)
    prop = Property(half, SafeSet.argmax((decision + 1) % 3, 3), "p")
    kept = blended.that_may_stay((prop,))
    free = ~half.contains(blended.inputs) | prop.safe.contains(blended.outputs)
    assert 0 < int(free.sum()) < len(free)
    assert torch.equal(kept.inputs, blended.inputs[free])
    assert kept.blends == int(free[40:].sum())
