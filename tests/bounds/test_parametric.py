"""Rows in unknown weights: whatever the weights become, the rows enclose the network's outputs."""

from __future__ import annotations

from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch
from helpers import NETWORKS, Net, mlp, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from torch_prepared.bounds import (
    ParametricBounds,
    RegionBatch,
    bound_nodes,
    editable_layers,
    propagate_intervals,
)
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.core.rows import Floats
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax import AffinePair, ElementwiseOperator, Traits, evaluate_graph
from torch_prepared.relax import _registry as registry
from torch_prepared.solvers import Status, minimize_norm, solve
from torch_prepared.specs import Box

ACTIVATIONS = ["relu", "leaky_relu", "tanh", "sigmoid", "softplus", "elu"]
Boxes = dict[str, Interval]


def node_boxes(graph: Graph, region: Box, tighten: bool = True) -> Boxes:
    return bound_nodes(graph, RegionBatch.of(region), tighten=tighten)


def tightest(
    bounds: ParametricBounds, low: Floats, high: Floats, change: dict[str, Floats]
) -> tuple[Floats, Floats]:
    """Largest values of columns ``low`` and smallest of ``high``, each by an LP of its own."""
    rows = bounds.rows()
    assert not rows.equal.any()
    lower, upper = bounds.unknowns.lower, bounds.unknowns.upper
    for name, block in bounds.deltas.items():
        lower[block.columns] = upper[block.columns] = change.get(name, 0.0)
    ends = np.stack([lower, upper], axis=1)

    def minimum(column: int, sign: float) -> float:
        cost = np.zeros(bounds.unknowns.count)
        cost[column] = sign
        result = linprog(cost, -rows.matrix, -rows.rhs, bounds=ends, method="highs")
        assert result.status == 0, result.message
        return sign * result.fun

    return np.array([minimum(c, -1.0) for c in low]), np.array([minimum(c, 1.0) for c in high])


def random_change(
    bounds: ParametricBounds, kind: str, generator: np.random.Generator
) -> dict[str, Floats]:
    """Changes of all unknown parameters: none, small, large, or every sign flipped."""
    change = {}
    for name, block in bounds.deltas.items():
        base = bounds.graph.parameters[name].numpy()
        noise = generator.normal(size=block.shape)
        change[name] = {"none": 0 * noise, "small": 0.1 * noise, "large": 3 * noise}.get(
            kind, -2 * base + 0.1 * noise
        )
    return change


def changed_outputs(graph: Graph, change: dict[str, Floats], x: torch.Tensor) -> Floats:
    moved = {n: graph.parameters[n] + torch.from_numpy(d) for n, d in change.items()}
    return evaluate_graph(graph, x, moved).flatten(1).numpy()


@given(
    name=st.sampled_from(sorted(NETWORKS)),
    op=st.sampled_from(ACTIVATIONS),
    kind=st.sampled_from(["none", "small", "large", "flipped"]),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@settings(max_examples=12, deadline=None)
def test_rows_enclose_the_outputs_at_any_weights(
    name: str, op: str, kind: str, seed: int, data: st.DataObject
) -> None:
    """Largest feasible lower bounds are below, smallest upper bounds above, every output."""
    graph = NETWORKS[name](op, seed)
    bounds = ParametricBounds(graph, data.draw(st.sampled_from(editable_layers(graph))))
    regions = random_boxes(graph.input_size, 2, seed, 0.4)
    blocks = [
        bounds.add_enclosure(node_boxes(graph, region), tag=f"r{i}")
        for i, region in enumerate(regions)
    ]
    generator = np.random.default_rng(seed)
    change = random_change(bounds, kind, generator)
    for region, (low, high) in zip(regions, blocks, strict=True):
        picks = generator.choice(low.size, size=2, replace=False)
        lower, upper = tightest(bounds, low.columns[picks], high.columns[picks], change)
        x = region.sample(200, torch.Generator().manual_seed(seed))
        x = torch.cat([x, region.corner(torch.randn(200, region.size, dtype=torch.float64))])
        y = changed_outputs(bounds.graph, change, x)[:, picks]
        slack = 1e-6 * (1 + np.abs(y).max())
        assert (lower <= y.min(0) + slack).all()
        assert (upper >= y.max(0) - slack).all()


@pytest.mark.parametrize("layer", ["linear1", "linear3", "linear5"])
@pytest.mark.parametrize("op", ["relu", "leaky_relu"])
def test_without_a_change_the_rows_are_intervals(layer: str, op: str) -> None:
    """The tightest bounds at zero change equal interval propagation from the same boxes."""
    for seed in range(4):
        graph = mlp((4, 8, 6, 3), op, seed)
        region = random_boxes(4, 1, seed, 0.4)[0]
        tight = node_boxes(graph, region)
        before = [n.name for n in graph.nodes][: [n.name for n in graph.nodes].index(layer)]
        known = {name: tight[name] for name in before}
        boxes = propagate_intervals(graph, RegionBatch.of(region).box, known=known)
        bounds = ParametricBounds(graph, layer)
        low, high = bounds.add_enclosure(boxes, "r")
        lower, upper = tightest(bounds, low.columns, high.columns, {})
        last = boxes[graph.nodes[-1].name]
        if op == "relu" or layer == "linear5":
            np.testing.assert_allclose(lower, last.lower[0], rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(upper, last.upper[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["conv", "residual", "sequence"])
def test_composed_affine_nodes_are_at_least_as_tight_as_intervals(name: str) -> None:
    graph = NETWORKS[name]("relu", 2)
    region = random_boxes(graph.input_size, 1, 2, 0.3)[0]
    boxes = node_boxes(graph, region, tighten=False)
    last = boxes[graph.nodes[-1].name]
    for layer in editable_layers(graph):
        bounds = ParametricBounds(graph, layer)
        low, high = bounds.add_enclosure(boxes, "r")
        lower, upper = tightest(bounds, low.columns[:2], high.columns[:2], {})
        assert (lower >= last.lower[0, :2].numpy() - 1e-7).all()
        assert (upper <= last.upper[0, :2].numpy() + 1e-7).all()


@pytest.mark.parametrize("op", ["tanh", "sigmoid", "softplus", "elu"])
def test_smooth_lines_are_tight_where_they_are_expected_to_be(op: str) -> None:
    """At zero change the first activation's rows reproduce its interval."""
    net = Net((4,), 1)
    net.linear(5)
    net.act(op)
    graph = net.graph()
    boxes = node_boxes(graph, random_boxes(4, 1, 1, 0.4)[0])
    bounds = ParametricBounds(graph, "linear1")
    low, high = bounds.add_enclosure(boxes, "r")
    lower, upper = tightest(bounds, low.columns, high.columns, {})
    last = boxes[graph.nodes[-1].name]
    np.testing.assert_allclose(lower, last.lower[0], atol=1e-6)
    np.testing.assert_allclose(upper, last.upper[0], atol=1e-6)


def violated_edit(seed: int) -> tuple[Graph, list[Box], Floats, float]:
    """A one-hidden-layer network, two regions, and a row that is to exceed a margin."""
    graph = mlp((3, 5, 3), "relu", seed)
    regions = random_boxes(3, 2, seed, 0.3)
    row = np.array([[1.0, -1.0, 0.0]])
    worst = max(
        (evaluate_graph(graph, r.sample(50, torch.Generator())).numpy() @ row.T).max()
        for r in regions
    )
    return graph, regions, row, worst + 0.5


def smallest_change(
    graph: Graph, regions: list[Box], row: Floats, margin: float, exact=None
) -> tuple[float, dict[str, Floats]]:
    bounds = ParametricBounds(graph, "linear1", exact=exact)
    for i, region in enumerate(regions):
        bounds.add_property(node_boxes(graph, region), row, np.zeros(1), margin, tag=f"p{i}")
    columns = np.concatenate([b.columns.ravel() for b in bounds.deltas.values()])
    result = solve(minimize_norm(bounds.unknowns, bounds.rows(), columns, norm="1"))
    assert result.status is Status.OPTIMAL
    split = bounds.unknowns.split(result.x)
    return result.objective, {name: split[b.name] for name, b in bounds.deltas.items()}


def published_smallest_change(
    graph: Graph, regions: list[Box], row: Floats, margin: float
) -> float:
    """The same edit with a pair of columns per weight and region, as in Tao and Thakur (2024)."""
    names = ("linear1.weight", "linear1.bias", "linear3.bias")
    base = {n: p.numpy() for n, p in graph.parameters.items()}
    delta = {n: cp.Variable(base[n].shape) for n in names}
    weight = base["linear1.weight"] + delta["linear1.weight"]
    bias = base["linear1.bias"] + delta["linear1.bias"]
    rules = []
    for region in regions:
        ends = [np.broadcast_to(e.numpy(), weight.shape) for e in (region.lower, region.upper)]
        above, below = cp.Variable(weight.shape), cp.Variable(weight.shape)
        for end in ends:
            rules += [above >= cp.multiply(weight, end), below <= cp.multiply(weight, end)]
        u, low = cp.Variable(5), cp.Variable(5)
        rules += [u >= 0, u >= cp.sum(above, axis=1) + bias]
        inner = cp.sum(below, axis=1) + bias
        active = node_boxes(graph, region)["linear1"].lower[0].numpy() >= 0
        rules += [low <= cp.multiply(active, inner)]
        merged = (row @ base["linear3.weight"])[0]
        shift = row[0] @ (base["linear3.bias"] + delta["linear3.bias"])
        rules += [np.maximum(merged, 0) @ low + np.minimum(merged, 0) @ u + shift >= margin]
    problem = cp.Problem(cp.Minimize(sum(cp.sum(cp.abs(d)) for d in delta.values())), rules)
    return float(problem.solve(solver=cp.CLARABEL))


@pytest.mark.parametrize("seed", range(5))
def test_shared_columns_give_the_published_optimum(seed: int) -> None:
    graph, regions, row, margin = violated_edit(seed)
    ours, _ = smallest_change(graph, regions, row, margin)
    assert ours > 0.1
    assert ours == pytest.approx(published_smallest_change(graph, regions, row, margin), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_fixed_signs_give_the_same_optimum_when_none_flips(seed: int) -> None:
    graph, regions, row, margin = violated_edit(seed)
    everything, change = smallest_change(graph, regions, row, margin)
    base = graph.parameters["linear1.weight"].numpy()
    flipped = (base * (base + change["linear1.weight"]) < 0).ravel()
    guessed, again = smallest_change(graph, regions, row, margin, exact=np.zeros(base.size, bool))
    if not flipped.any():
        assert guessed == pytest.approx(everything, rel=1e-6)
    assert guessed <= everything + 1e-6  # fewer rows: a relaxation where signs flip
    repaired = flipped | (base * (base + again["linear1.weight"]) < 0).ravel()
    mended, final = smallest_change(graph, regions, row, margin, exact=repaired)
    if not ((base * (base + final["linear1.weight"]) < -1e-9).ravel() & ~repaired).any():
        assert mended == pytest.approx(everything, rel=1e-6)


def test_flips_are_those_of_weights_with_a_fixed_sign() -> None:
    """The last layer's weights occur in differences of two classes, which are exact anyway."""
    graph, regions, row, _ = violated_edit(0)
    for layer in ("linear1", "linear3"):
        base = graph.parameters[f"{layer}.weight"].numpy().ravel()
        bounds = ParametricBounds(graph, layer, exact=np.zeros(base.size, bool))
        bounds.add_property(node_boxes(graph, regions[0]), row, np.zeros(1), 0.0, tag="p")
        assert not bounds.flipped(np.zeros(base.size)).any()
        assert not bounds.flipped(0.5 * base).any()
        expected = (base != 0) & (layer == "linear1")
        assert (bounds.flipped(-2.0 * base) == expected).all()


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_solved_edits_hold_on_samples(name: str) -> None:
    """The property holds at every sampled input of both regions for the LP's weights."""
    graph = NETWORKS[name]("relu", 7)
    regions = random_boxes(graph.input_size, 2, 7, 0.2)
    row = np.eye(graph.output_size)[:1] - np.eye(graph.output_size)[1:2]
    for layer in editable_layers(graph):
        bounds = ParametricBounds(graph, layer)
        for i, region in enumerate(regions):
            bounds.add_property(node_boxes(graph, region), row, np.zeros(1), 0.2, tag=f"p{i}")
        columns = np.concatenate([b.columns.ravel() for b in bounds.deltas.values()])
        result = solve(minimize_norm(bounds.unknowns, bounds.rows(), columns, norm="1"))
        if result.status is Status.INFEASIBLE:
            continue  # an activation as the output may make it so
        split = bounds.unknowns.split(result.x)
        change = {n: split[b.name] for n, b in bounds.deltas.items()}
        for region in regions:
            y = changed_outputs(bounds.graph, change, region.sample(200, torch.Generator()))
            assert (y @ row.T >= 0.2 - 1e-5).all()


def rewired(graph: Graph, name: str, role: str, source: str) -> Graph:
    """``graph`` with a node reading another node's parameter in the same role."""
    ref = graph.node(source).params[role]
    nodes = (
        replace(n, params={**n.params, role: ref}) if n.name == name else n for n in graph.nodes
    )
    return replace(graph, nodes=tuple(nodes))


def test_a_bias_read_before_the_layer_stays_fixed() -> None:
    """Its change would move the boxes that the rows take as given."""
    graph = rewired(mlp((4, 4, 4, 4)), "linear5", "bias", "linear1")
    assert set(ParametricBounds(graph, "linear3").deltas) == {"linear3.weight", "linear3.bias"}
    every = {"linear1.weight", "linear1.bias", "linear3.bias"}  # both readers of linear1.bias move
    assert set(ParametricBounds(graph, "linear1").deltas) == every
    own = {"linear1.weight", "linear1.bias"}
    alone = ParametricBounds(mlp((4, 4, 4, 4)), "linear1", biases=False)
    assert set(alone.deltas) == own


@pytest.mark.parametrize("layer", ["linear1", "linear3"])
def test_a_shared_bias_is_followed_to_all_its_readers(layer: str) -> None:
    graph = rewired(mlp((4, 4, 4, 4)), "linear5", "bias", "linear1")
    bounds = ParametricBounds(graph, layer)
    region = random_boxes(4, 1, 3, 0.4)[0]
    low, high = bounds.add_enclosure(node_boxes(graph, region), "r")
    for seed in range(3):
        change = random_change(bounds, "large", np.random.default_rng(seed))
        lower, upper = tightest(bounds, low.columns, high.columns, change)
        y = changed_outputs(bounds.graph, change, region.sample(300, torch.Generator()))
        assert (lower <= y.min(0) + 1e-6).all()
        assert (upper >= y.max(0) - 1e-6).all()


def test_shared_and_fixed_weights_are_refused() -> None:
    graph = mlp((4, 4, 4, 3))
    shared = rewired(graph, "linear3", "weight", "linear1")
    assert editable_layers(shared) == ("linear5",)
    with pytest.raises(UnsupportedOperationError, match=r"linear1: .*editable layers: linear5"):
        ParametricBounds(shared, "linear1")
    frozen = replace(graph, editable=frozenset())
    with pytest.raises(UnsupportedOperationError, match="editable layers: none"):
        ParametricBounds(frozen, "linear1")
    with pytest.raises(UnsupportedOperationError, match="nonsense: got no layer of that name"):
        ParametricBounds(graph, "nonsense")


class Softsign(ElementwiseOperator):
    """``x / (1 + |x|)``: states no lines for unknown bounds."""

    op = "softsign"
    traits = Traits(monotone=True)

    def function(self, node, x):
        return x / (1 + x.abs())

    def affine(self, node, box, alpha=None) -> AffinePair:
        zero, one = torch.zeros_like(box.lower), torch.ones_like(box.lower)
        return AffinePair(zero, self.function(node, box.lower), zero, self.function(node, one))


def test_operators_without_rows_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Softsign()
    monkeypatch.setitem(registry._OPERATORS, operator.op, operator)
    graph = mlp((4, 5, 3), operator.op)
    boxes = {
        n.name: Interval(torch.zeros(1, *n.shape), torch.ones(1, *n.shape)) for n in graph.nodes
    }
    with pytest.raises(UnsupportedOperationError, match=r"softsign2: .*no relaxation"):
        ParametricBounds(graph, "linear1").add_enclosure(boxes, "r")
    low, high = ParametricBounds(graph, "linear3").add_enclosure(boxes, "r")
    assert low.size == high.size == 3


def test_add_property_leaves_the_graph_and_boxes_alone() -> None:
    graph = mlp()
    boxes = node_boxes(graph, random_boxes(4, 1)[0])
    before = {n: (b.lower.clone(), b.upper.clone()) for n, b in boxes.items()}
    weights = {n: p.clone() for n, p in graph.parameters.items()}
    bounds = ParametricBounds(graph, "linear1")
    bounds.add_property(boxes, np.ones((1, 3)), np.zeros(1), 1.0, tag="p")
    assert all(
        torch.equal(boxes[n].lower, lo) and torch.equal(boxes[n].upper, up)
        for n, (lo, up) in before.items()
    )
    assert all(torch.equal(graph.parameters[n], p) for n, p in weights.items())
