"""Margins of batched properties equal a naive loop, gradients equal finite differences."""

from __future__ import annotations

import pytest
import torch
from helpers import NETWORKS, mlp, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.bounds import PropertyBatch, certified_margin, compute_bounds
from torch_prepared.core.graph import Graph
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Property, SafeSet

METHODS = ["ibp", "crown-ibp", "forward", "crown"]


def mixed_properties(graph: Graph, seed: int) -> list[Property]:
    """Numbers of clauses and of rows per clause that differ, so that padding occurs."""
    generator = torch.Generator().manual_seed(seed)
    m = graph.output_size
    regions = random_boxes(graph.input_size, 4, seed, 0.3)

    def clause(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(rows, m + 1, generator=generator, dtype=torch.float64)
        return noise[:, :m], noise[:, m]

    shapes = [(1,), (3, 1), (2, 2, 4), (5,)]
    safes = [SafeSet(tuple(clause(r) for r in shape)) for shape in shapes]
    return [Property(r, s) for r, s in zip(regions, safes, strict=True)]


@given(name=st.sampled_from(sorted(NETWORKS)), seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_margins_equal_a_naive_loop(name: str, seed: int) -> None:
    graph = NETWORKS[name]("relu", seed)
    properties = mixed_properties(graph, seed)
    batch = PropertyBatch.of(properties)
    for method in METHODS:
        found = certified_margin(graph, properties, method=method)
        best = batch.best_rows(found.rows)
        for i, prop in enumerate(properties):
            worst, start = torch.inf, 0
            for k, (rows, offset) in enumerate(prop.safe.clauses):
                lower = compute_bounds(graph, prop.region, rows, method=method).lower[0] + offset
                worst = min(worst, float(lower.max()))
                assert int(best[i, k]) == start + int(lower.argmax())
                start += len(offset)
            assert bool((best[i, len(prop.safe.clauses) :] == -1).all())
            assert float(found.margin[i]) == pytest.approx(worst, rel=1e-10, abs=1e-10)


@given(name=st.sampled_from(sorted(NETWORKS)), seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_margins_are_below_every_sampled_margin(name: str, seed: int) -> None:
    graph = NETWORKS[name]("relu", seed)
    properties = mixed_properties(graph, seed)
    found = certified_margin(graph, properties)
    for i, prop in enumerate(properties):
        x = prop.region.sample(300, torch.Generator().manual_seed(seed))
        margin = prop.safe.margin(evaluate_graph(graph, x).flatten(1))
        assert float(found.margin[i]) <= float(margin.min()) + 1e-10


def test_outputs_and_margins_of_points_agree_with_the_safe_set() -> None:
    graph = mlp()
    properties = mixed_properties(graph, 1)
    batch = PropertyBatch.of(properties)
    y = torch.randn(4, 7, 3, dtype=torch.float64)
    margins = batch.margins(batch.outputs(y).transpose(0, 1)).transpose(0, 1)
    for i, prop in enumerate(properties):
        torch.testing.assert_close(margins[i], prop.safe.margin(y[i]), rtol=1e-12, atol=1e-12)
    half = batch[1:3]
    assert len(half) == 2
    assert torch.equal(half.margins(half.outputs(y[1:3]).transpose(0, 1)).T, margins[1:3])


def test_nan_rows_give_nan_margins() -> None:
    batch = PropertyBatch.of(mixed_properties(mlp(), 0))
    values = torch.zeros_like(batch.offset)
    values[2, 1] = torch.nan
    margins = batch.margins(values + batch.offset)
    assert torch.isnan(margins).tolist() == [False, False, True, False]


def test_no_properties_are_refused() -> None:
    with pytest.raises(SpecError, match="properties: got none"):
        PropertyBatch.of([])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "op", ["relu", "leaky_relu", "tanh", "sigmoid", "softplus", "elu", "gelu", "silu"]
)
@pytest.mark.parametrize("name", ["mlp", "residual", "pooling", "branching"])
def test_gradients_agree_with_finite_differences(name: str, op: str, method: str) -> None:
    """Along random directions in all parameters, intermediate bounds included."""
    graph = NETWORKS[name](op, 5)
    rows = torch.randn(2, graph.output_size, generator=torch.Generator().manual_seed(0)).double()
    region = random_boxes(graph.input_size, 1, 5, 0.4)[0]
    table = {n: p.clone().requires_grad_(n in graph.editable) for n, p in graph.parameters.items()}
    value = compute_bounds(graph, region, rows, method=method, parameters=table)
    names = sorted(graph.editable)
    total = value.lower.sum() - 0.5 * value.upper.sum()
    gradients = torch.autograd.grad(total, [table[n] for n in names], allow_unused=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        step = {n: torch.randn(table[n].shape, generator=generator).double() for n in names}
        slope = sum(
            float((g * step[n]).sum())
            for n, g in zip(names, gradients, strict=True)
            if g is not None
        )
        ends = []
        for h in (1e-6, -1e-6):
            moved = {n: p.detach() + h * step[n] if n in step else p for n, p in table.items()}
            bound = compute_bounds(graph, region, rows, method=method, parameters=moved)
            ends.append(float(bound.lower.sum() - 0.5 * bound.upper.sum()))
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-5)
