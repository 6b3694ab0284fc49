"""Affine forms pushed forward: never worse than intervals, exact where they should be, chosen."""

from __future__ import annotations

import pytest
import torch
from helpers import NETWORKS, Net, attack, mlp, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.bounds import Method, RegionBatch, bound_nodes, compute_bounds
from torch_prepared.bounds.cost import affordable_method, crown_bytes, crown_flops, forward_flops
from torch_prepared.bounds.forward import propagate_forms
from torch_prepared.core.graph import Graph
from torch_prepared.relax import evaluate_all, evaluate_graph
from torch_prepared.specs import LpBall

ACTIVATIONS = ["relu", "leaky_relu", "tanh", "sigmoid", "softplus", "elu", "gelu", "silu"]


@given(
    name=st.sampled_from(sorted(NETWORKS)),
    op=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 10**6),
    radius=st.sampled_from([0.0, 1e-3, 0.3, 2.0]),
)
@settings(max_examples=12, deadline=None)
def test_every_value_is_enclosed_and_within_intervals(
    name: str, op: str, seed: int, radius: float
) -> None:
    graph = NETWORKS[name](op, seed)
    regions = random_boxes(graph.input_size, 2, seed, radius)
    batch = RegionBatch.of(regions)
    boxes, form = propagate_forms(graph, batch)
    plain = bound_nodes(graph, batch, tighten=False)
    own = form.box(batch)
    for i, region in enumerate(regions):
        x = attack(lambda p: evaluate_graph(graph, p).flatten(1), region, seed, count=8)
        for node, value in evaluate_all(graph, x).items():
            slack = 1e-12 * (1 + float(value.abs().max()))
            for box in (boxes[node], *([own] if node == graph.nodes[-1].name else [])):
                assert bool((box.lower[i] - slack <= value).all())
                assert bool((value <= box.upper[i] + slack).all())
            assert bool((boxes[node].lower[i] >= plain[node].lower[i] - slack).all())
            assert bool((boxes[node].upper[i] <= plain[node].upper[i] + slack).all())


def difference_net() -> Graph:
    """x -> relu(Wx) - relu(Wx) plus a linear part: intervals lose everything, forms do not."""
    net = Net((3,), 0)
    start = net.linear(5)
    left, right = net.act("relu", start), net.act("relu", start)
    net.join(left, right, signs=(1, -1))
    net.linear(2)
    return net.graph()


def test_stable_neurons_and_affine_parts_lose_nothing() -> None:
    graph = mlp((3, 6, 4, 2))
    region = random_boxes(3, 1, 1, 1e-4)[0]
    crown = compute_bounds(graph, region)
    forward = compute_bounds(graph, region, method="forward")
    intervals = compute_bounds(graph, region, method="crown-ibp")
    torch.testing.assert_close(forward.width, crown.width, rtol=0.2, atol=0)
    assert float(forward.width.sum()) <= float(intervals.width.sum()) + 1e-12
    wide = RegionBatch.of(random_boxes(3, 1, 1, 1.0))
    boxes, form = propagate_forms(difference_net(), wide)
    plain = bound_nodes(difference_net(), wide, tighten=False)
    output = next(reversed(boxes))
    assert float(boxes[output].width.max()) < 0.9 * float(plain[output].width.max())
    assert form.slopes is not None


def test_balls_are_bounded_tighter_than_their_boxes() -> None:
    graph, center = mlp((6, 12, 3)), torch.linspace(-0.4, 0.5, 6, dtype=torch.float64)
    ball = LpBall(center, 0.5, 2)
    x = attack(lambda p: evaluate_graph(graph, p), ball, 0, count=16)
    y = evaluate_graph(graph, x)
    bound = compute_bounds(graph, ball, method="forward")
    boxed = compute_bounds(graph, random_boxes(6, 1)[0].__class__(ball.lower, ball.upper),
                           method="forward")  # fmt: skip
    assert bool((bound.lower[0] <= y + 1e-12).all())
    assert bool((y <= bound.upper[0] + 1e-12).all())
    assert float(bound.width.sum()) < float(boxed.width.sum())


def test_regions_in_parts_give_equal_bounds() -> None:
    graph = mlp((4, 20, 20, 3), "tanh")
    batch = RegionBatch.of(random_boxes(4, 5, 0, 0.4))
    whole, form = propagate_forms(graph, batch)
    parts, pieces = propagate_forms(graph, batch, max_memory=1)
    for name, box in whole.items():
        torch.testing.assert_close(parts[name].lower, box.lower, rtol=1e-12, atol=1e-12)
    assert form.slopes is not None
    assert pieces.slopes is not None
    torch.testing.assert_close(form.slopes, pieces.slopes, rtol=1e-12, atol=1e-12)


def wide_net(inputs: int, width: int, depth: int) -> Graph:
    return mlp((inputs, *[width] * depth, 3))


def test_the_method_is_chosen_by_cost() -> None:
    def chosen(graph: Graph, *, native: bool = False, saved: bool = False) -> str:
        return affordable_method(graph, 1, 1 << 28, native=native, saved=saved)

    assert chosen(mlp()) == "crown"
    deep = wide_net(4, 2000, 5)
    assert crown_flops(deep) > 2e11 > forward_flops(deep)
    assert chosen(deep) == "forward"
    assert chosen(deep, native=True) == "crown"
    assert crown_bytes(deep, 8) > 1 << 28
    assert chosen(deep, native=True, saved=True) == "forward"
    both = wide_net(12000, 1000, 6)
    assert chosen(both) == "crown-ibp"


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_auto_gives_the_bounds_of_what_it_chooses(name: str) -> None:
    graph = NETWORKS[name]()
    region = random_boxes(graph.input_size, 1)[0]
    auto = compute_bounds(graph, region, method=Method.AUTO)
    crown = compute_bounds(graph, region, method="crown")
    assert torch.equal(auto.lower, crown.lower)
