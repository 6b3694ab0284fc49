"""How far apart can two inputs of a ball with the same output be?"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from torch_prepared.core.deadline import Deadline
from torch_prepared.core.rows import Floats
from torch_prepared.errors import SolverError
from torch_prepared.invert._ball import Ball, as_norm
from torch_prepared.invert._encoding import Affine
from torch_prepared.invert._network import Network, PiecewiseNetwork, PointLike, as_point
from torch_prepared.invert._programs import Draft, encode, start
from torch_prepared.invert._result import CollisionBound, Outcome, Pair
from torch_prepared.invert._search import best_pair
from torch_prepared.invert._solve import Answer, Effort, minimize, polish
from torch_prepared.specs import Box

__all__ = ["collide_within", "max_collision"]

_INSIDE = 1e-6  #: witnesses are looked for in a ball smaller by so much, relatively
_SOLVED = 1e-3


def max_collision(
    network: Network,
    center: PointLike,
    radius: float,
    *,
    norm: float | str = math.inf,
    anchor: bool = False,
    split_coordinates: bool = True,
    domain: Box | None = None,
    effort: Effort | None = None,
) -> CollisionBound:
    r"""Bounds of :math:`p^* = \max\{\|x - y\|_\infty : x, y \in B, f(x) = f(y)\}`.

    f is injective on the ball B exactly when p* = 0 (Theorem 1 of the source).

    Args:
        network: module, ONNX network or file, or graph; piecewise affine.
        center: (n,) center of B.
        radius: of B, in the unit of the inputs.
        norm: 1, 2 or inf: that of B. For the 2-norm B is replaced by a polytope around it.
        anchor: y is the center (Theorem 2: is the center the only one with its output?).
        split_coordinates: one program per coordinate of ``x - y``, with tighter relaxations, in
            place of one with an integer per coordinate.
        domain: clips B.
        effort: time limit, threads, bounds.

    Returns:
        A :class:`CollisionBound`.

    Raises:
        SpecError: numbers that do not fit or are not finite.
        UnsupportedOperationError: an operator that is not piecewise affine.

    Soundness: ``upper`` holds up to the solver's tolerances (see ``_solve``): points closer than
        about 1e-6 over the least slope of f cannot be told apart. ``lower`` in exact arithmetic.

    Source: Cui et al. (L4DC 2023), equations 5 and 6, and Theorems 1 and 2.
    """
    point = as_point(center)
    net = PiecewiseNetwork.of(network, len(point))
    ball = Ball(point, radius, as_norm(norm), domain)
    return collide_within(net, ball, effort or Effort(), anchor, split_coordinates)


def collide_within(
    net: PiecewiseNetwork, ball: Ball, effort: Effort, anchor: bool, split: bool
) -> CollisionBound:
    """:func:`max_collision` for arguments that were read already."""
    deadline = Deadline(effort.time_limit)
    upper, lower, integers, finished = 0.0, 0.0, 0, True
    witness: Pair | None = None
    message = "every program was solved"
    tasks = list(_tasks(len(ball.center), anchor, split))
    for position, signs in enumerate(tasks):
        try:
            draft = _draft(net, ball, effort, anchor, signs)
        except SolverError as error:
            reason = str(error)
            return CollisionBound(
                lower, _diameter(ball), witness, Outcome.OPEN, integers, deadline.elapsed, reason
            )
        integers = max(integers, draft.integers)
        share = deadline.share(1.0 / (len(tasks) - position))
        answer = minimize(draft.program, draft.columns["distance"], share, effort, sign=-1.0)
        upper = max(upper, min(-answer.bound, _diameter(ball)))
        finished = finished and answer.finished
        message = message if answer.finished else answer.message
        pair = _witness(net, ball, draft, answer, anchor, effort)
        if pair is not None and pair.distance() > lower:
            lower, witness = pair.distance(), pair
    lower = min(lower, upper)
    solved = finished or upper - lower <= _SOLVED * max(upper, 1e-9)
    outcome = Outcome.SOLVED if solved else Outcome.OPEN
    return CollisionBound(lower, upper, witness, outcome, integers, deadline.elapsed, message)


def _tasks(n: int, anchor: bool, split: bool) -> Iterator[tuple[tuple[int, int], ...]]:
    """Signed coordinates whose difference is maximized, one set per program.

    Exchanging x and y changes signs, so that without an anchor one sign is enough.
    """
    both = [(j, s) for j in range(n) for s in ((1, -1) if anchor else (1,))]
    if split:
        yield from ((one,) for one in both)
    else:
        yield tuple(both)


def _draft(
    net: PiecewiseNetwork,
    ball: Ball,
    effort: Effort,
    anchor: bool,
    signs: tuple[tuple[int, int], ...],
) -> Draft:
    draft = start(ball, 1 if anchor else 2)
    program = draft.program
    outputs = encode(draft, net, effort)
    x = program.pick(draft.points[0])
    if anchor:
        program.equal(outputs[0], net.values(ball.center[None])[0])
        gaps = x.shifted(-ball.center)
    else:
        program.equal(outputs[0] - outputs[1])
        gaps = x - program.pick(draft.points[1])
    most = _diameter(ball)
    distance = program.add("distance", np.zeros(1), np.full(1, most))
    draft.columns["distance"] = int(distance[0])
    rows = np.array([j for j, _ in signs])
    scale = np.array([float(s) for _, s in signs])
    picked = gaps[rows]
    matrix = picked.widen(program.columns).multiply(scale[:, None]).tocsr()
    signed = Affine(matrix, picked.offset * scale)
    top = program.pick(np.repeat(distance, len(signs)))
    if len(signs) == 1:
        program.at_least(signed - top)
        return draft
    chosen = program.add("chosen", np.zeros(len(signs)), np.ones(len(signs)), integer=True)
    index = program.at_least(signed - top, np.full(len(signs), -2.0 * most))
    program.rows.add(index, chosen, -2.0 * most)  # distance <= gap + 2 most (1 - chosen)
    program.rows.add(program.rows.ge(np.ones(1)), chosen, 1.0)
    return draft


def _diameter(ball: Ball) -> float:
    return 2.0 * ball.radius


def _witness(
    net: PiecewiseNetwork, ball: Ball, draft: Draft, answer: Answer, anchor: bool, effort: Effort
) -> Pair | None:
    """An exact pair near the solution, moved off the ball's surface first."""
    if answer.point is None or answer.problem is None:
        return None
    distance = float(answer.point[draft.columns["distance"]])
    if distance <= 1e-7 * max(1.0, ball.radius):
        return None
    candidates = []
    narrow = (np.array([draft.reach]), (1.0 - _INSIDE) * ball.radius)
    for point in (polish(answer.problem, answer.point, effort, narrow), answer.point):
        y: Floats = ball.center if anchor else point[draft.points[1]]
        candidates.append((point[draft.points[0]], y))
    return best_pair(net, candidates, ball, Deadline(30.0), move_both=not anchor)
