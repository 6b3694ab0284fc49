"""Gradients node by node equal reverse differentiation through the whole bound."""

from __future__ import annotations

import pytest
import torch
from helpers import NETWORKS, random_boxes

from torch_prepared.bounds import PropertyBatch, certified_margin
from torch_prepared.bounds.adjoint import margin_gradient
from torch_prepared.core.graph import Graph
from torch_prepared.errors import SpecError
from torch_prepared.specs import LpBall, Property, SafeSet


def one_property(graph: Graph, seed: int, ball: bool = False) -> Property:
    generator = torch.Generator().manual_seed(seed)
    region = random_boxes(graph.input_size, 1, seed, 0.3)[0]
    if ball:
        region = LpBall((region.lower + region.upper) / 2, 0.3, p=2)
    rows = torch.randn(5, graph.output_size + 1, generator=generator, dtype=torch.float64)
    clauses = ((rows[:3, :-1], rows[:3, -1]), (rows[3:, :-1], rows[3:, -1]))
    return Property(region, SafeSet(clauses))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("ball", [False, True])
def test_equals_reverse_differentiation(name: str, activation: str, ball: bool) -> None:
    graph = NETWORKS[name](activation, 3)
    batch = PropertyBatch.of([one_property(graph, 5, ball)])
    parameters = {n: graph.parameters[n].clone().requires_grad_() for n in sorted(graph.editable)}
    margin = certified_margin(graph, batch, parameters=parameters).margin.sum()
    wanted = torch.autograd.grad(margin, list(parameters.values()), allow_unused=True)
    found = margin_gradient(graph, batch, parameters)
    assert set(found) == set(parameters)
    for part, expected in zip(found.values(), wanted, strict=True):
        expected = torch.zeros_like(part) if expected is None else expected
        torch.testing.assert_close(part, expected, rtol=1e-8, atol=1e-10)


def test_known_bounds_are_used_and_nothing_is_changed() -> None:
    graph = NETWORKS["mlp"]("relu", 1)
    batch = PropertyBatch.of([one_property(graph, 2), one_property(graph, 3)])
    parameters = {n: graph.parameters[n] for n in graph.editable}
    before = {n: v.clone() for n, v in parameters.items()}
    bound = certified_margin(graph, batch)
    for i in range(2):
        part = slice(i, i + 1)
        found = margin_gradient(graph, batch[part], parameters, known=bound[part])
        again = margin_gradient(graph, batch[part], parameters)
        assert all(torch.equal(found[n], again[n]) for n in parameters)
    assert all(torch.equal(parameters[n], v) for n, v in before.items())
    with pytest.raises(SpecError, match="2 properties"):
        margin_gradient(graph, batch, parameters)
