"""Batches, chunks, known intervals and refusals change nothing that they should not."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import NETWORKS, mlp, random_boxes
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_prepared.bounds import (
    PropertyBatch,
    RegionBatch,
    bound_nodes,
    certified_margin,
    compute_bounds,
)
from torch_prepared.bounds.cost import CACHED, regions_at_once
from torch_prepared.core.interval import Interval
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, Property, SafeSet

METHODS = ["ibp", "crown-ibp", "forward", "crown"]
ACTIVATIONS = ["relu", "tanh", "elu", "gelu"]
SETTINGS = settings(max_examples=7, deadline=None)
NAMES = st.sampled_from(sorted(NETWORKS))
SEEDS = st.integers(0, 10**6)


@given(name=NAMES, op=st.sampled_from(ACTIVATIONS), seed=SEEDS)
@example(name="residual", op="relu", seed=7)
@SETTINGS
def test_a_batch_equals_its_regions_one_by_one(name: str, op: str, seed: int) -> None:
    graph = NETWORKS[name](op, seed)
    regions = random_boxes(graph.input_size, 3, seed, 0.5)
    regions[1] = Box(regions[1].lower, regions[1].lower + 1e-3)  # mostly stable
    for method in METHODS:
        together = compute_bounds(graph, regions, method=method)
        for i, region in enumerate(regions):
            alone = compute_bounds(graph, region, method=method)
            torch.testing.assert_close(together.lower[i], alone.lower[0], rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(together.upper[i], alone.upper[0], rtol=1e-11, atol=1e-11)


@given(name=NAMES, op=st.sampled_from(ACTIVATIONS), seed=SEEDS)
@SETTINGS
def test_chunks_give_equal_bounds(name: str, op: str, seed: int) -> None:
    graph = NETWORKS[name](op, seed)
    regions = random_boxes(graph.input_size, 2, seed, 0.5)
    whole = compute_bounds(graph, regions)
    # One column at a time where that is quick, some dozens elsewhere.
    memory = 1 if graph.input_size < 10 else 100_000
    parts = compute_bounds(graph, regions, max_memory=memory)
    torch.testing.assert_close(parts.lower, whole.lower, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(parts.upper, whole.upper, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("method", [*METHODS, "auto"])
def test_parts_of_a_batch_have_their_own_rows(method: str) -> None:
    graph, regions = (
        NETWORKS["conv"]("relu", 3),
        random_boxes(NETWORKS["conv"]("relu", 3).input_size, 5, 3, 0.5),
    )
    rows = torch.randn(5, 2, graph.output_size, generator=torch.Generator().manual_seed(1)).double()
    whole = compute_bounds(graph, regions, rows, method=method)
    each = torch.stack(
        [
            compute_bounds(graph, region, own, method=method).lower[0]
            for region, own in zip(regions, rows, strict=True)
        ]
    )
    parts = compute_bounds(graph, regions, rows, method=method, max_memory=1)
    torch.testing.assert_close(whole.lower, each, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts.lower, each, rtol=1e-9, atol=1e-9)
    with pytest.raises(SpecError, match="got 4 sets; expected 1 or 5"):
        compute_bounds(graph, regions, rows[:4], method=method)


def test_regions_at_once_follow_the_budget() -> None:
    graph = mlp((4, 30, 3))
    one = regions_at_once(graph, 6, 1, 8)
    assert one == 1
    few, many = (regions_at_once(graph, 6, memory, 8) for memory in (1 << 20, 1 << 21))
    assert many in (2 * few, 2 * few + 1)
    assert few * 8 * (4 + 30 + 30 + 3) < 1 << 20
    assert regions_at_once(graph, 6, 1 << 40, 8) == regions_at_once(graph, 6, CACHED, 8)


@given(name=NAMES, op=st.sampled_from(ACTIVATIONS), seed=SEEDS)
@SETTINGS
def test_known_intervals_only_tighten_intervals(name: str, op: str, seed: int) -> None:
    graph = NETWORKS[name](op, seed)
    region = random_boxes(graph.input_size, 1, seed, 0.5)[0]
    inner = Box((region.lower + region.upper) / 2, region.upper)
    batch = RegionBatch.of(inner)
    known = bound_nodes(graph, RegionBatch.of(region))  # holds on the larger region
    for tighten in (False, True):
        plain = bound_nodes(graph, batch, tighten=tighten)
        helped = bound_nodes(graph, batch, tighten=tighten, known=known)
        for node, box in helped.items():
            assert bool((box.lower >= known[node].lower - 1e-12).all())
            assert bool((box.upper <= known[node].upper + 1e-12).all())
            if not tighten:
                assert bool((box.lower >= plain[node].lower - 1e-12).all())
                assert bool((box.upper <= plain[node].upper + 1e-12).all())
        x = inner.sample(100, torch.Generator().manual_seed(seed))
        y = evaluate_graph(graph, x)
        assert bool((helped[graph.nodes[-1].name].lower - 1e-12 <= y).all())


@given(name=NAMES, seed=SEEDS)
@SETTINGS
def test_shrinking_a_region_never_widens_intervals(name: str, seed: int) -> None:
    graph = NETWORKS[name]("relu", seed)
    outer = random_boxes(graph.input_size, 1, seed, 0.5)[0]
    inner = Box(outer.lower, (outer.lower + outer.upper) / 2)
    for node, box in bound_nodes(graph, RegionBatch.of(inner), tighten=False).items():
        wide = bound_nodes(graph, RegionBatch.of(outer), tighten=False)[node]
        assert bool((box.lower >= wide.lower - 1e-12).all())
        assert bool((box.upper <= wide.upper + 1e-12).all())


def test_permuting_hidden_neurons_moves_bounds_by_rounding_only() -> None:
    graph = mlp((4, 30, 3))
    region = random_boxes(4, 1)[0]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    changed = {
        "linear1.weight": graph.parameters["linear1.weight"][order],
        "linear1.bias": graph.parameters["linear1.bias"][order],
        "linear3.weight": graph.parameters["linear3.weight"][:, order],
    }
    for method in METHODS:
        plain = compute_bounds(graph, region, method=method)
        moved = compute_bounds(graph, region, method=method, parameters=changed)
        torch.testing.assert_close(plain.lower, moved.lower, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_inputs_are_never_mutated(name: str) -> None:
    graph = NETWORKS[name]()
    region = random_boxes(graph.input_size, 1)[0]
    rows = torch.ones(2, graph.output_size, dtype=torch.float64)
    safe = SafeSet.interval([-1.0] * graph.output_size, [1.0] * graph.output_size)
    batch = PropertyBatch.of([Property(region, safe)])
    known = bound_nodes(graph, batch.regions)
    held = [rows, batch.rows, batch.offset, region.lower, region.upper, *graph.parameters.values()]
    held += [end for box in known.values() for end in (box.lower, box.upper)]
    before = copy.deepcopy(held)
    for method in METHODS:
        compute_bounds(graph, region, rows, method=method)
        certified_margin(graph, batch, method=method, known=known)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_nan_from_outside_is_refused_by_name() -> None:
    graph, region = mlp(), random_boxes(4, 1)[0]
    prop = Property(region, SafeSet.argmax(0, 3))
    nan = torch.full((1, 8), torch.nan, dtype=torch.float64)
    one = torch.ones(1, 8, dtype=torch.float64)
    for low, high in ((nan, one), (one, nan), (one, -one)):
        with pytest.raises(SpecError, match=r"known interval of 'linear1'.*expected lower <="):
            certified_margin(graph, prop, known={"linear1": Interval(low, high)})
    for bad in (torch.nan, torch.inf):
        with pytest.raises(SpecError, match="rows: got NaN or infinite"):
            compute_bounds(graph, region, torch.full((1, 3), bad))


def test_misfits_are_refused_by_name() -> None:
    graph = mlp()
    with pytest.raises(SpecError, match="regions: got 3 numbers; expected 4"):
        compute_bounds(graph, random_boxes(3, 1))
    with pytest.raises(SpecError, match="rows: got 2 numbers; expected 3"):
        compute_bounds(graph, random_boxes(4, 1), torch.ones(1, 2))
    with pytest.raises(SpecError, match="regions: got 3 numbers; expected 4"):
        certified_margin(graph, Property(random_boxes(3, 1)[0], SafeSet.argmax(0, 3)))
    with pytest.raises(SpecError, match=r"regions: got sizes \[3, 4\]"):
        compute_bounds(graph, [*random_boxes(3, 1), *random_boxes(4, 1)])
    with pytest.raises(SpecError, match="method: got 'magic'; expected one of ibp, crown-ibp"):
        compute_bounds(graph, random_boxes(4, 1), method="magic")


@pytest.mark.parametrize(
    "op", ["relu", "leaky_relu", "tanh", "sigmoid", "softplus", "elu", "gelu", "silu"]
)
@pytest.mark.parametrize("name", ["mlp", "pooling"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, 3e38])
def test_overflowing_weights_prove_nothing(name: str, op: str, method: str, bad: float) -> None:
    """A NaN that arises inside is never dropped: the margin is NaN, not a number above zero."""
    graph = NETWORKS[name](op, 0, torch.float32)
    layer = next(n for n in graph.nodes if n.op in ("linear", "conv")).params["weight"].name
    weight = graph.parameters[layer].clone()
    weight[0] = bad
    weight[1] = -bad
    changed = {layer: weight}
    wide = Box(torch.full((graph.input_size,), -1e3), torch.full((graph.input_size,), 1e3))
    easy = SafeSet.interval([-1e30] * graph.output_size, [1e30] * graph.output_size)
    bound = certified_margin(graph, Property(wide, easy), method=method, parameters=changed)
    assert not bool((bound.margin > 0).any()) or op in ("tanh", "sigmoid")
    if bad != bad:
        assert bool(torch.isnan(bound.margin).all())
