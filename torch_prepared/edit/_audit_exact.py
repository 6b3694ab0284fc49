"""The largest difference of two small ReLU networks on a box, by mixed-integer programming.

The input is written as the bias of a first layer, so that the program over changed biases is one
over inputs: its cells are the ReLUs of both networks that can switch on the box.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torch_prepared.certify import PointClaims
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.edit._audit_difference import bound_difference, difference_graph
from torch_prepared.edit.pointwise._layer import FreeLayer
from torch_prepared.edit.pointwise._linear import maximize_row
from torch_prepared.edit.pointwise._program import build_program
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax import evaluate_graph, lookup
from torch_prepared.solvers.smt import ReluProgram
from torch_prepared.specs import Box

__all__ = ["LargestDifference", "largest_difference"]

MOST_CELLS = 1000
MOST_INPUTS = 2000
_WIDEN, _LEAST = 1.001, 1e-5  #: branch and bound ends at a gap of 1e-4
_TOLERANCE = 1e-6  #: by which HiGHS may violate rows, added to its bounds
_SHORTEST = 0.05  #: seconds
_SAMPLES = 2000
_SHIFT, _SCALE = "~shift", "~scale"


@dataclass(frozen=True)
class LargestDifference:
    """``lower <= max over a box of the largest |after(x) - before(x)| <= upper``.

    Args:
        lower: reached at ``x``, evaluated in float64.
        upper: the larger of the solver's dual bounds: a claim within its tolerances, not a proof.
        x: (n,) an input of the box.
        cells: ReLUs that can switch; 0 also where there were too many to begin.
        complete: whether the two agree to a thousandth.
    """

    lower: float
    upper: float
    x: Tensor
    cells: int
    complete: bool


def largest_difference(
    before: Graph,
    after: Graph,
    region: Box,
    *,
    time_limit: float | None = None,
    threads: int | None = None,
) -> LargestDifference:
    """How far two networks do differ on a box.

    Args:
        before: a ReLU network.
        after: another one of the same shapes.
        region: inputs.
        time_limit: seconds; what is then open is bounded by CROWN.
        threads: CPU threads.

    Raises:
        SpecError: shapes that do not fit.
        UnsupportedOperationError: a nonlinear operator other than ReLU.
    """
    deadline = Deadline(time_limit)
    graph = difference_graph(before, after)
    for node in graph.nodes[1:]:
        if node.op != "relu" and not lookup(node.op).traits.affine:
            raise UnsupportedOperationError(
                f"{node.name}: operator '{node.op}'; exact differences need ReLUs and affine "
                "operators; expected those, or a bound without 'exact'"
            )
    rough = bound_difference(before, after, region, certify=False)
    x = 0.5 * region.lower + 0.5 * region.upper
    best = _Best(graph, region, x, float(_evaluate(graph, x).abs().max()))
    if rough.bound == 0.0:
        return LargestDifference(0.0, 0.0, x, 0, True)
    best.look(*region.sample(_SAMPLES, torch.Generator().manual_seed(0)))
    if graph.input_size > MOST_INPUTS:
        return LargestDifference(best.value, rough.bound, x, 0, False)
    program, center, radius = _program(graph, region)
    if program.cells > MOST_CELLS or not np.isfinite([*program.low, *program.high]).all():
        return LargestDifference(best.value, rough.bound, x, 0, False)
    most = np.minimum(rough.bound, rough.per_output.numpy() * _WIDEN + _LEAST)
    order = np.argsort(-most).tolist()
    for position, j in enumerate(order):
        if most[j] <= best.value:
            break
        limits = [deadline.share(part / (len(order) - position)) for part in (0.5, 1.0)]
        bounds = []
        for row, limit in zip((j, j + len(order)), limits, strict=True):
            bound, d = maximize_row(
                program, row, time_limit=limit.limit(least=_SHORTEST), threads=threads
            )
            bounds.append(bound)
            if d is not None:
                best.look(center + radius * torch.from_numpy(np.clip(d, -1.0, 1.0)))
        most[j] = min(most[j], max(bounds) + _TOLERANCE * (1.0 + abs(max(bounds))))
    upper = max(float(most.max()), best.value)
    ended = upper <= best.value * _WIDEN + _LEAST
    return LargestDifference(best.value, upper, best.x, program.cells, ended)


@dataclass
class _Best:
    """The input with the largest difference so far."""

    graph: Graph
    region: Box
    x: Tensor
    value: float

    def look(self, *points: Tensor) -> None:
        """Keep the best of ``points`` (n,), moved into the box, if it is better."""
        x = torch.stack(points).clamp(self.region.lower, self.region.upper)
        with torch.no_grad():
            values = evaluate_graph(self.graph, x).flatten(1).abs().amax(dim=1)
        first = int(values.argmax())
        if float(values[first]) > self.value:
            self.x, self.value = x[first], float(values[first])


def _evaluate(graph: Graph, x: Tensor) -> Tensor:
    with torch.no_grad():
        return evaluate_graph(graph, x[None]).reshape(-1)


def _program(graph: Graph, region: Box) -> tuple[ReluProgram, Tensor, Tensor]:
    """Rows ``+y_j`` then ``-y_j`` over d in [-1, 1], where the input is ``center + radius * d``."""
    center = 0.5 * region.lower + 0.5 * region.upper
    radius = torch.maximum(region.upper - center, center - region.lower)
    radius = torch.nextafter(radius, torch.full_like(radius, torch.inf))
    size, first = graph.input_size, graph.nodes[0]
    shift = {"weight": ParameterRef(f"{_SHIFT}.weight"), "bias": ParameterRef(f"{_SHIFT}.bias")}
    scale = {"scale": ParameterRef(f"{_SCALE}.scale"), "shift": ParameterRef(f"{_SCALE}.shift")}
    head = (
        Node("~origin", "input", (), (size,)),
        Node(_SHIFT, "linear", ("~origin",), (size,), shift),
        Node(_SCALE, "scale", (_SHIFT,), (size,), scale),
        replace(first, op="reshape", inputs=(_SCALE,)),
    )
    parameters = {
        **graph.parameters,
        f"{_SHIFT}.weight": torch.eye(size, dtype=torch.float64),
        f"{_SHIFT}.bias": torch.zeros(size, dtype=torch.float64),
        f"{_SCALE}.scale": radius,
        f"{_SCALE}.shift": center,
    }
    moved = Graph((*head, *graph.nodes[1:]), parameters, frozenset({f"{_SHIFT}.bias"}))
    layer = FreeLayer.of(moved, (_SHIFT,), None)
    outputs = graph.output_size
    rows = np.concatenate([np.eye(outputs), -np.eye(outputs)])
    count = len(rows)
    point, clause = np.zeros(count, dtype=np.int64), np.arange(count)
    claims = PointClaims(np.zeros((1, size)), rows, np.zeros(count), point, clause)
    prefix = layer.prefix(claims.inputs)
    program = build_program(layer, prefix, claims, clause, np.zeros(count), reach=1.0)
    return program, center, radius
