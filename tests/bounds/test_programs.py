"""Native backward passes equal those in plain torch, for every graph that programs know."""

from __future__ import annotations

import pytest
import torch
from helpers import NETWORKS, random_boxes

from torch_prepared import ops
from torch_prepared.bounds import RegionBatch, _program, bound_nodes, bound_rows, crown
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.specs import LpBall

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}
KNOWN = {"mlp", "conv", "residual", "branching"}

pytestmark = pytest.mark.skipif(
    not ops.build_info().native, reason="the native library is not built"
)


def _bounds(graph: Graph, regions: RegionBatch, cuts: bool) -> tuple[dict[str, Interval], object]:
    boxes = bound_nodes(graph, regions)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(1, 5, graph.output_size, generator=generator).to(graph.dtype)
    return boxes, bound_rows(graph, regions, boxes, rows, cuts=cuts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", ["relu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_native_passes_equal_plain_ones(
    name: str, op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = NETWORKS[name](op, 1, dtype)
    assert (_program.Lowered.of(graph, graph.parameters) is not None) == (name in KNOWN)
    regions = RegionBatch.of(random_boxes(graph.input_size, 3, 2, 0.4), dtype)
    for cuts in (True, False):
        native = _bounds(graph, regions, cuts)
        with monkeypatch.context() as patch:
            patch.setattr(crown, "programs_apply", lambda tensors: False)
            plain = _bounds(graph, regions, cuts)
        slack = ROUNDING[dtype]
        for node, box in plain[0].items():
            for mine, theirs in zip(
                (native[0][node].lower, native[0][node].upper), (box.lower, box.upper), strict=True
            ):
                torch.testing.assert_close(mine, theirs, rtol=slack, atol=slack)
        for mine, theirs in zip(native[1], plain[1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=slack, atol=slack)


def test_rows_over_balls_keep_the_exact_support() -> None:
    graph = NETWORKS["residual"]("relu", 0)
    center = torch.zeros(graph.input_size, dtype=torch.float64)
    ball = RegionBatch.of([LpBall(center, 0.5, 2)])
    boxes = bound_nodes(graph, ball)
    rows = torch.eye(graph.output_size, dtype=torch.float64).unsqueeze(0)
    found = bound_rows(graph, ball, boxes, rows, cuts=False)
    torch.testing.assert_close(found.lower, found.const + ball.minimum(found.inputs))


def test_gradients_take_the_differentiable_path() -> None:
    graph = NETWORKS["conv"]("relu", 0)
    changed = {name: p.clone().requires_grad_() for name, p in graph.parameters.items()}
    regions = RegionBatch.of(random_boxes(graph.input_size, 2, 0, 0.3))
    boxes = bound_nodes(graph, regions, parameters=changed)
    assert boxes[graph.nodes[-1].name].lower.requires_grad
    with torch.no_grad():
        same = bound_nodes(graph, regions, parameters=changed)
    for name, box in boxes.items():
        torch.testing.assert_close(box.lower.detach(), same[name].lower, rtol=1e-9, atol=1e-9)
