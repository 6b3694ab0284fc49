"""Bounds for fixed weights enclose every output, and the methods keep their order."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import NETWORKS, Net, attack, mlp, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_prepared.bounds import (
    RegionBatch,
    bound_nodes,
    bound_rows,
    compute_bounds,
    propagate_intervals,
)
from torch_prepared.bounds.crown import tightened_names
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.relax import evaluate_all, evaluate_graph
from torch_prepared.specs import Box, InputSet, LpBall, VPolytope

ACTIVATIONS = ["relu", "leaky_relu", "tanh", "sigmoid", "softplus", "elu", "gelu", "silu"]
METHODS = ["ibp", "crown-ibp", "forward", "crown"]
SETTINGS = settings(max_examples=12, deadline=None)
# Widths, at most some thousands, times depth, in units of the last place.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-4}


def assert_encloses(bound: Interval, values: Tensor, slack: float) -> None:
    """``bound`` (s,) against values (q, s)."""
    assert not bool(torch.isnan(bound.lower).any() | torch.isnan(bound.upper).any())
    scale = slack * (1 + values.abs().amax(0))
    assert bool((bound.lower - scale <= values.amin(0)).all())
    assert bool((values.amax(0) <= bound.upper + scale).all())


def row_values(graph: Graph, rows: Tensor, x: Tensor) -> Tensor:
    return evaluate_graph(graph, x).flatten(1) @ rows.T


@given(
    name=st.sampled_from(sorted(NETWORKS)),
    op=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    radius=st.sampled_from([0.0, 1e-6, 0.1, 0.5, 3.0]),
)
@settings(max_examples=25, deadline=None)
def test_every_method_encloses_sampled_and_attacked_outputs(
    name: str, op: str, seed: int, dtype: torch.dtype, radius: float
) -> None:
    graph = NETWORKS[name](op, seed, dtype)
    exact = graph.to(torch.float64)
    regions = random_boxes(graph.input_size, 2, seed, radius)
    rows = torch.randn(4, graph.output_size, generator=torch.Generator().manual_seed(seed))
    bounds = [compute_bounds(graph, regions, rows, method=method) for method in METHODS]
    for i, region in enumerate(regions):
        x = attack(lambda p: row_values(exact, rows.double(), p), region, seed, count=16)
        values = row_values(exact, rows.double(), x)
        for bound in bounds:
            assert bound.lower.dtype == dtype
            assert_encloses(bound[i].map(Tensor.double), values, ROUNDING[dtype])


@given(
    name=st.sampled_from(sorted(NETWORKS)),
    op=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=15, deadline=None)
def test_intervals_of_every_node_enclose_its_values(name: str, op: str, seed: int) -> None:
    graph = NETWORKS[name](op, seed)
    regions = random_boxes(graph.input_size, 2, seed, 0.5)
    batch = RegionBatch.of(regions)
    plain = propagate_intervals(graph, batch.box)
    for tighten in (False, True):
        boxes = bound_nodes(graph, batch, tighten=tighten)
        for i, region in enumerate(regions):
            x = region.sample(200, torch.Generator().manual_seed(seed))
            x = torch.cat([x, region.corner(torch.randn(50, region.size).double())])
            for node, value in evaluate_all(graph, x).items():
                assert_encloses(boxes[node][i].map(lambda e: e.flatten()), value.flatten(1), 1e-12)
        for node, box in boxes.items():
            if tighten:
                assert bool((box.lower >= plain[node].lower - 1e-12).all())
                assert bool((box.upper <= plain[node].upper + 1e-12).all())
            else:
                assert torch.equal(box.lower, plain[node].lower)
                assert torch.equal(box.upper, plain[node].upper)


@given(
    name=st.sampled_from(sorted(NETWORKS)),
    op=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=25, deadline=None)
def test_backward_bounds_are_never_looser_than_merged_intervals(
    name: str, op: str, seed: int
) -> None:
    """From the same boxes, a full backward pass is at least as good as the shallow one."""
    graph = NETWORKS[name](op, seed)
    regions = RegionBatch.of(random_boxes(graph.input_size, 2, seed, 1.0))
    rows = torch.randn(1, 4, graph.output_size, dtype=torch.float64)
    for tighten in (False, True):
        boxes = bound_nodes(graph, regions, tighten=tighten)
        deep = bound_rows(graph, regions, boxes, rows).lower
        shallow = bound_rows(graph, regions, boxes, rows, shallow=True).lower
        assert bool((deep >= shallow - 1e-12).all())


@pytest.mark.parametrize("seed", range(5))
def test_branches_that_meet_in_the_output_keep_that_order(seed: int) -> None:
    """No single value after the activations separates input and output here."""
    net = Net((4,), seed)
    start = net.linear(8)
    sides = []
    for _ in range(2):
        net.act("relu", start)
        net.linear(8)
        net.act("relu")
        sides.append(net.linear(8))
    net.join(*sides, signs=(1, -1))
    net.linear(3)
    graph = net.graph()
    regions = RegionBatch.of(random_boxes(4, 3, seed, 1.5))
    boxes = bound_nodes(graph, regions, tighten=False)
    rows = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(seed)).double()
    deep = bound_rows(graph, regions, boxes, rows).lower
    shallow = bound_rows(graph, regions, boxes, rows, shallow=True).lower
    assert bool((deep >= shallow - 1e-12).all())


@given(name=st.sampled_from(sorted(NETWORKS)), seed=st.integers(0, 10**6))
@SETTINGS
def test_a_point_is_bounded_exactly(name: str, seed: int) -> None:
    graph = NETWORKS[name]("tanh", seed)
    x = torch.randn(2, graph.input_size, dtype=torch.float64)
    expected = evaluate_graph(graph, x).flatten(1)
    for method in METHODS:
        bound = compute_bounds(graph, [Box(one, one) for one in x], method=method)
        torch.testing.assert_close(bound.lower, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(bound.upper, expected, rtol=0, atol=1e-10)


def ball_and_friends(size: int, seed: int) -> list[InputSet]:
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(size, generator=generator, dtype=torch.float64)
    hull = center + 0.4 * torch.randn(6, size, generator=generator, dtype=torch.float64)
    return [
        LpBall(center, 0.5, 1),
        LpBall(center, 0.5, 2),
        LpBall(center, 0.3, math.inf),
        LpBall(center, 0.5, 2, center - 0.3, center + 0.3),
        VPolytope(hull),
        Box(center - 0.2, center + 0.2),
    ]


@given(name=st.sampled_from(["mlp", "branching", "mixed"]), seed=st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
def test_balls_and_hulls_are_enclosed_and_tighter_than_their_box(name: str, seed: int) -> None:
    graph = NETWORKS[name]("relu", seed)
    sets = ball_and_friends(graph.input_size, seed)
    around = [Box(s.lower, s.upper) for s in sets]
    eye = torch.eye(graph.output_size, dtype=torch.float64)
    bounds = [compute_bounds(graph, sets, method=method) for method in METHODS]
    for i, region in enumerate(sets):
        x = attack(lambda p: row_values(graph, eye, p), region, seed, count=8)
        for bound in bounds:
            assert_encloses(bound[i], row_values(graph, eye, x), 1e-12)
    # With the same relaxations the smaller region can only give the better bound.
    boxes = bound_nodes(graph, RegionBatch.of(around))
    rows = torch.cat([eye, -eye]).unsqueeze(0)
    tight = bound_rows(graph, RegionBatch.of(sets), boxes, rows).lower
    loose = bound_rows(graph, RegionBatch.of(around), boxes, rows).lower
    assert bool((tight >= loose - 1e-12).all())
    if name == "mlp":  # elsewhere a cut at a later box may be the best bound of both
        assert float((tight - loose)[:2].max()) > 1e-3


def test_a_linear_network_over_a_ball_is_exact() -> None:
    graph = mlp((3, 2))
    weight, bias = graph.parameters["linear1.weight"], graph.parameters["linear1.bias"]
    center = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for p, dual in ((1, math.inf), (2, 2), (math.inf, 1)):
        bound = compute_bounds(graph, LpBall(center, 0.7, p))
        reach = 0.7 * torch.linalg.vector_norm(weight, ord=dual, dim=1)
        middle = weight @ center + bias
        torch.testing.assert_close(bound.lower[0], middle - reach, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(bound.upper[0], middle + reach, rtol=1e-12, atol=1e-12)


def test_what_needs_backward_passes() -> None:
    """Values on which intervals are exact, and images of activations, are left alone."""
    assert tightened_names(mlp((4, 8, 6, 3))) == ("linear3",)
    assert tightened_names(mlp((4, 8, 6, 3)), box=False) == ("linear1", "linear3")
    pooled = NETWORKS["pooling"]()
    names = tightened_names(pooled)
    assert names
    assert all(pooled.node(name).op not in ("relu", "input") for name in names)
    mixed = NETWORKS["mixed"]()  # repeats in a gather make plain intervals inexact
    assert tightened_names(mixed)[:2] == ("linear3", "linear5")


@pytest.mark.parametrize("op", ["relu", "tanh"])
def test_max_pooling_of_activations_stays_sound(op: str) -> None:
    """A max pool reads an activation: its bounds must not come from one line used both ways."""
    graph = NETWORKS["pooling"](op, 0)
    region = random_boxes(graph.input_size, 1, 0, 0.5)[0]
    boxes = bound_nodes(graph, RegionBatch.of(region))
    x = region.corner(torch.randn(2000, region.size, dtype=torch.float64))
    for name, value in evaluate_all(graph, x).items():
        assert_encloses(boxes[name][0].map(lambda e: e.flatten()), value.flatten(1), 1e-12)
