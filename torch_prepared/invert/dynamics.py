"""Time steppers and maps with parameters: fixing inputs, listing preimages, radii over a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from torch_prepared.certify.exact import evaluate_exactly
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.core.rows import Floats
from torch_prepared.errors import SpecError
from torch_prepared.invert._ball import Ball, as_norm
from torch_prepared.invert._network import Network, PiecewiseNetwork, PointLike, as_point
from torch_prepared.invert._programs import Draft, encode, exclude_pattern, minimize_radius, start
from torch_prepared.invert._result import Pair, RadiusBound
from torch_prepared.invert._search import best_pair, find_preimages
from torch_prepared.invert._solve import Answer, Effort
from torch_prepared.invert.preimage import phases
from torch_prepared.specs import Box

__all__ = ["Preimages", "RadiusMap", "fix_inputs", "list_preimages", "map_radii"]

_MOST = 64


def fix_inputs(network: Network, size: int, fixed: Mapping[int, float]) -> Graph:
    """The network as a function of its other inputs: a parameter of a map gets a value.

    Args:
        network: module, ONNX network or file, or graph, of ``size`` inputs.
        size: number n of its inputs.
        fixed: values by position in the flattened input, rounded to the network's dtype.

    Returns:
        A graph of ``n - len(fixed)`` inputs, in their old order; nothing else changes.

    Raises:
        SpecError: positions out of range, none left, or values that are not finite.
    """
    graph = PiecewiseNetwork.of(network, size).stored
    free = [i for i in range(size) if i not in fixed]
    inside = all(0 <= i < size for i in fixed)
    if not free or not inside or not all(map(math.isfinite, fixed.values())):
        raise SpecError(
            f"fixed: got {dict(fixed)} for {size} inputs; expected finite values at positions 0 to "
            f"{size - 1}, not all of them"
        )
    weight = torch.zeros(size, len(free), dtype=graph.dtype)
    weight[free, range(len(free))] = 1.0
    bias = torch.zeros(size, dtype=graph.dtype)
    for position, value in fixed.items():
        bias[position] = value
    first = graph.nodes[0]
    names = {"weight": "fixed.weight", "bias": "fixed.bias"}
    nodes = (
        Node("fixed.input", "input", (), (len(free),)),
        Node(
            "fixed.linear",
            "linear",
            ("fixed.input",),
            (size,),
            {role: ParameterRef(name) for role, name in names.items()},
        ),
        Node(first.name, "reshape", ("fixed.linear",), first.shape),
        *graph.nodes[1:],
    )
    parameters = {**graph.parameters, names["weight"]: weight, names["bias"]: bias}
    return Graph(nodes, parameters, graph.editable)


@dataclass(frozen=True, eq=False)
class Preimages:
    """Inputs with exactly one output.

    Attributes:
        pairs: exact collisions with the given point, nearest to the center first.
        complete: the solver claims that the region holds no others.
        seconds: wall time.
    """

    pairs: tuple[Pair, ...]
    complete: bool
    seconds: float

    @property
    def points(self) -> Floats:
        """All of them (k, n), rounded to float64."""
        return np.array([pair.floats[0] for pair in self.pairs])


def list_preimages(
    network: Network,
    of: PointLike,
    *,
    center: PointLike | None = None,
    r_max: float,
    norm: float | str = math.inf,
    domain: Box | None = None,
    most: int = 16,
    effort: Effort | None = None,
) -> Preimages:
    """The other inputs of a ball with the output of ``of``, one per activation pattern.

    Finds the nearest, excludes its activation pattern, and goes on until there is no more. Meant
    for networks with as many outputs as inputs, where a pattern holds one preimage in general.

    Args:
        network: module, ONNX network or file, or graph; piecewise affine.
        of: (n,) whose output is asked for.
        center: (n,) of the ball; ``of`` when None.
        r_max: radius of the ball.
        norm: 1, 2 or inf.
        domain: clips the ball.
        most: when to stop.
        effort: time limit, threads, bounds.

    Raises:
        SpecError: numbers that do not fit or are not finite.
        UnsupportedOperationError: an operator that is not piecewise affine.

    Soundness: every pair in exact arithmetic; ``complete`` up to the solver's tolerances.
    """
    effort = effort or Effort()
    goal = as_point(of, "of")
    net = PiecewiseNetwork.of(network, len(goal))
    middle = goal if center is None else as_point(center)
    ball = Ball(middle, r_max, as_norm(norm), domain)
    if not 0 < most <= _MOST:
        raise SpecError(f"most: got {most}; expected 1 to {_MOST}")
    deadline = effort.deadline()
    target = evaluate_exactly(net.record, goal).astype(np.float64)
    found = _search_all(net, goal, target, ball, most, effort, deadline)
    patterns = [phases(net, goal), *(phases(net, pair.x) for pair in found)]
    complete = False
    while len(found) < most:
        answer, points = _next(net, target, ball, patterns, effort, deadline)
        complete = answer.finished and answer.point is None
        if complete or not points:
            break
        pair = best_pair(net, [(points[-1], goal)], ball, deadline, only_first=True)
        if pair is None or not _keep(found, pair):
            break
        patterns.append(phases(net, pair.x))
    found.sort(key=lambda pair: ball.length(pair.floats[0]))
    return Preimages(tuple(found), complete, deadline.elapsed)


def _search_all(
    net: PiecewiseNetwork,
    goal: Floats,
    target: Floats,
    ball: Ball,
    most: int,
    effort: Effort,
    deadline: Deadline,
) -> list[Pair]:
    """Exact preimages that a search finds."""
    found: list[Pair] = []
    share = deadline.share(0.3)
    for x in find_preimages(net, target, ball, 0.0, effort.seed, share):
        if len(found) < most and not _known(x, goal, found):
            _keep(found, best_pair(net, [(x, goal)], ball, share, only_first=True))
    return found


def _next(
    net: PiecewiseNetwork,
    target: Floats,
    ball: Ball,
    patterns: Sequence[Mapping[str, NDArray[np.int64]]],
    effort: Effort,
    deadline: Deadline,
) -> tuple[Answer, list[Floats]]:
    """The nearest preimage in none of the patterns."""
    seen: list[Floats] = []

    def build(around: Ball) -> Draft:
        draft = start(around, 1)
        (output,) = encode(draft, net, effort, deadline, (target, 0.0))
        draft.program.equal(output, target)
        for pattern in patterns:
            exclude_pattern(draft, draft.copies[0], pattern)
        return draft

    def listen(_: float, points: Sequence[Floats]) -> None:
        seen.append(points[0])

    return minimize_radius(build, ball, deadline, effort, listen), seen


def _known(x: Floats, goal: Floats, found: Sequence[Pair]) -> bool:
    """Whether a float point is near one that is known, or near ``goal`` itself."""
    others = [goal, *(pair.floats[0] for pair in found)]
    return any(float(np.abs(x - other).max()) <= 1e-7 * (1 + np.abs(x).max()) for other in others)


def _keep(found: list[Pair], pair: Pair | None) -> bool:
    """Append a pair that is new."""
    if pair is None or any(bool(np.all(pair.x == old.x)) for old in found):
        return False
    found.append(pair)
    return True


@dataclass(frozen=True, eq=False)
class RadiusMap:
    """Radii at many centers.

    Attributes:
        centers: (k, n).
        results: one answer per center that was reached in time.
    """

    centers: Floats
    results: tuple[RadiusBound, ...]

    @property
    def lower(self) -> Floats:
        """(k,) NaN where time was over."""
        return self._column(lambda r: r.lower)

    @property
    def upper(self) -> Floats:
        """(k,) NaN where time was over, inf without a collision."""
        return self._column(lambda r: r.upper)

    @property
    def reached(self) -> NDArray[np.bool_]:
        """(k,) which centers were asked about in time."""
        return np.arange(len(self.centers)) < len(self.results)

    def _column(self, read: Callable[[RadiusBound], float]) -> Floats:
        values = np.full(len(self.centers), np.nan)
        values[: len(self.results)] = [read(r) for r in self.results]
        return values


def map_radii(
    question: Callable[[Floats, Effort], RadiusBound],
    centers: Floats,
    *,
    effort: Effort | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RadiusMap:
    """One question at every center, the time limit shared evenly among those that are left.

    Args:
        question: gets a center (n,) and an effort, e.g.
            ``lambda c, e: nearest_preimage(net, c, r_max=5.0, effort=e)``.
        centers: (k, n).
        effort: for all centers together.
        progress: called with (done, k).
    """
    effort = effort or Effort()
    deadline = effort.deadline()
    results: list[RadiusBound] = []
    for position, center in enumerate(centers):
        if deadline.over:
            break
        limit = deadline.limit(1 / (len(centers) - position))
        results.append(question(center, replace(effort, time_limit=limit, progress=None)))
        if progress is not None:
            progress(position + 1, len(centers))
    return RadiusMap(np.asarray(centers, dtype=np.float64), tuple(results))
