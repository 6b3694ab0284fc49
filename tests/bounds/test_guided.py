"""Slopes chosen by backward bounds alone: kept through bounding, and never looser than CROWN."""

from __future__ import annotations

import pytest
import torch
from helpers import NETWORKS, mlp, random_boxes

from torch_prepared.bounds import RegionBatch, bound_nodes, bound_rows
from torch_prepared.bounds._guided import GuidedInterval, default_lines, default_start
from torch_prepared.core.interval import Interval
from torch_prepared.relax import ElementwiseOperator, lookup


def _pure_crown(graph, regions: RegionBatch, rows: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """CROWN as published, in dense matrices: no intersection with interval arithmetic."""
    layers: list[tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...] | None]] = []
    low, high = regions.lower, regions.upper
    center, radius = (low + high) / 2, (high - low) / 2

    def backward(start: torch.Tensor) -> torch.Tensor:
        coefficients, const = start, start.new_zeros(start.shape[:2])
        for weight, bias, lines in reversed(layers):
            if lines is not None:
                below, above, offset = lines
                positive, negative = coefficients.clamp_min(0), coefficients.clamp_max(0)
                const = const + (negative * offset).sum(-1)
                coefficients = positive * below + negative * above
            const = const + coefficients @ bias
            coefficients = coefficients @ weight
        ends = (coefficients @ center.unsqueeze(2)).squeeze(2)
        return const + ends - (coefficients.abs() @ radius.unsqueeze(2)).squeeze(2)

    linear = [node for node in graph.nodes if node.op == "linear"]
    for node in linear:
        weight, bias = (graph.parameters[node.params[key].name] for key in ("weight", "bias"))
        layers.append((weight, bias, None))
        if node is linear[-1]:
            return backward(rows.expand(len(regions), *rows.shape[1:]))
        eye = torch.eye(node.size, dtype=weight.dtype).expand(len(regions), -1, -1)
        lower, upper = backward(eye), -backward(-eye)
        stable = (lower >= 0) | (upper <= 0)
        chord = torch.where(stable, (lower >= 0).to(lower), upper / (upper - lower))
        offset = torch.where(stable, torch.zeros_like(lower), -chord * lower)
        below = torch.where(stable, chord, (upper > -(1 + 2**-16) * lower).to(lower))
        layers[-1] = (weight, bias, None)
        layers.append((torch.eye(node.size, dtype=weight.dtype), torch.zeros(node.size).to(weight),
                       tuple(part.unsqueeze(1) for part in (below, chord, offset))))  # fmt: skip
    raise AssertionError("no linear layer")


@pytest.mark.parametrize("seed", [0, 1, 2, 23])  # 23 turns a choice around
def test_rows_are_never_looser_than_crown_without_intersections(seed: int) -> None:
    """Two hidden layers: their intervals meet interval arithmetic once, so order is provable."""
    graph = mlp((3, 24, 24, 4), seed=seed)
    regions = RegionBatch.of(random_boxes(3, 6, seed, 0.6))
    rows = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    rows = torch.cat([rows, -rows], dim=1)
    found = bound_rows(
        graph, regions, bound_nodes(graph, regions, guided=True), rows, cuts=False
    ).lower
    pure = _pure_crown(graph, regions, rows)
    assert bool((found >= pure - 1e-9 * (1 + pure.abs())).all())


@pytest.mark.parametrize("op", ["relu", "leaky_relu"])
def test_boxes_remember_the_choice_of_the_backward_pass(op: str) -> None:
    operator, box = lookup(op), Interval(torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.9, 1.1]]))
    assert isinstance(operator, ElementwiseOperator)
    graph = NETWORKS["mlp"](op)
    node = next(n for n in graph.nodes if n.op == op)
    turned = GuidedInterval(box.lower, box.upper, torch.tensor([[True, False]]))
    plain, other = operator.lines(node, box), default_lines(operator, node, turned)
    assert torch.equal(other.lower_slope, plain.lower_slope.flip(1))
    assert torch.equal(other.upper_slope, plain.upper_slope)
    assert torch.equal(other.upper_offset, plain.upper_offset)
    assert default_start(operator, node, turned[0:1]).tolist() == [[1.0, 0.0]]
    assert torch.equal(default_lines(operator, node, box).lower_slope, plain.lower_slope)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_native_and_plain_passes_remember_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = NETWORKS[name]("relu", 3)
    regions = RegionBatch.of(random_boxes(graph.input_size, 4, 3, 0.5))
    native = bound_nodes(graph, regions, guided=True)
    assert not any(isinstance(b, GuidedInterval) for b in bound_nodes(graph, regions).values())
    monkeypatch.setattr("torch_prepared.bounds.crown._lower", lambda *arguments: None)
    for key, box in bound_nodes(graph, regions, guided=True).items():
        mine = native[key]
        if isinstance(mine, GuidedInterval) and isinstance(box, GuidedInterval):
            assert torch.equal(mine.steep, box.steep)
