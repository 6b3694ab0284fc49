"""On how large a ball is a network injective? On how large a ball does one determine another?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from torch_prepared.certify.exact import evaluate_exactly, to_fractions
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.rows import Floats
from torch_prepared.errors import SpecError
from torch_prepared.invert._ball import Ball, as_norm
from torch_prepared.invert._encoding import Affine
from torch_prepared.invert._exact import largest_below, linear_cell
from torch_prepared.invert._findings import Findings
from torch_prepared.invert._network import (
    Network,
    PiecewiseNetwork,
    PointLike,
    as_point,
    check_tolerance,
)
from torch_prepared.invert._programs import (
    Draft,
    agree,
    encode,
    minimize_radius,
    separate,
    start,
)
from torch_prepared.invert._result import Evidence, Outcome, Pair, RadiusBound
from torch_prepared.invert._search import best_pair, find_collisions, one_thread
from torch_prepared.invert._solve import Answer, Effort
from torch_prepared.invert.collision import collide_within
from torch_prepared.invert.jacobian import largest_injective_radius
from torch_prepared.invert.pairs import Aim, certify_radius
from torch_prepared.specs import Box

__all__ = ["injectivity_radius", "matching_radius"]

_METHODS = ("oneshot", "bisect")
_SEARCH_SHARE = 0.15
_PAIR_SHARE = 0.6  #: of the time left, for the proof by pairs of boxes
_SEARCHED = 4  #: inputs up to which samples can cover a ball
_MARGIN = 1e-4
_STAGE_SHARE = 0.3  #: of the time left, for a ball smaller than the largest of interest
_NEAR = 1e-2  #: collisions much closer than the separation are looked for, too
_BISECTIONS = 25


def injectivity_radius(
    network: Network,
    center: PointLike,
    *,
    r_max: float,
    norm: float | str = math.inf,
    separation: float = 1e-3,
    output_tolerance: float = 0.0,
    domain: Box | None = None,
    method: str = "oneshot",
    effort: Effort | None = None,
) -> RadiusBound:
    r"""Bounds of :math:`r^* = \sup\{r : f \text{ injective on the ball of radius } r\}`.

    Args:
        network: module, ONNX network or file, or graph; piecewise affine.
        center: (n,) in the unit of the inputs.
        r_max: largest radius of interest.
        norm: 1, 2 or inf.
        separation: a claimed ``lower`` excludes pairs at least so far apart (maximum norm). Its
            optimum decreases to r* with the separation.
        output_tolerance: e, in the unit of the outputs. Above 0 the question is how large a ball
            holds no two points at least ``separation`` apart whose outputs differ by e or less in
            every entry, and all that is found or proved is about such pairs.
        domain: inputs outside of it do not count.
        method: ``"oneshot"``: per coordinate one program that minimizes the radius; ``"bisect"``:
            :func:`max_collision` at ever other radii, as in the source.
        effort: time limit, threads, bounds.

    Returns:
        A :class:`RadiusBound`. With fewer outputs than inputs r* is 0 (unless outputs have a
        tolerance: pairs that are apart need room).

    Raises:
        SpecError: numbers that do not fit or are not finite.
        UnsupportedOperationError: an operator that is not piecewise affine.

    Soundness: ``upper`` in exact arithmetic on the stored weights; ``proved`` by interval
        Jacobians, for all pairs; a claimed ``lower`` for separated pairs, up to the solver's
        tolerances.

    Source: Cui et al. (L4DC 2023), Problem 1; the one-shot programs are ours.
    """
    effort = effort or Effort()
    if method not in _METHODS:
        raise SpecError(f"method: got {method!r}; expected {' or '.join(_METHODS)}")
    point = as_point(center)
    net = PiecewiseNetwork.of(network, len(point))
    ball = Ball(point, r_max, as_norm(norm), domain)
    _check_separation(separation, ball)
    within = check_tolerance(output_tolerance)

    def accept(pair: Pair) -> bool:
        return within == 0.0 or largest_below(pair.x - pair.y) >= separation

    found = _findings(ball, effort, separation, lambda pair: pair.distance(), within)
    with effort.until_stopped():
        if within == 0.0:
            cell = linear_cell(net, point)
            if cell.flat is not None:
                pair = Pair(cell.flat, to_fractions(point))
                return found.zero(pair, "the network is flat in a direction at the center")
            if net.output_size < net.input_size:
                return found.zero(None, "fewer outputs than inputs: not injective on any ball")
        _search(net, found, separation if within else _NEAR * separation, accept)
        aim = Aim(output_tolerance=within, separation=separation if within else 0.0, accept=accept)
        certify_radius(found, [net], found.deadline.share(_PAIR_SHARE), aim)
        if found.proved == 0.0 and within == 0.0:
            _prove_by_slopes(net, ball, found)
        if not found.closed:
            if method == "oneshot":
                _one_shot(net, found, separation, accept)
            else:
                _bisect(net, found, separation, accept)
    return found.result()


def matching_radius(
    first: Network,
    second: Network,
    center: PointLike,
    *,
    r_max: float,
    norm: float | str = math.inf,
    tolerance: float = 1e-3,
    output_tolerance: float = 0.0,
    domain: Box | None = None,
    effort: Effort | None = None,
) -> RadiusBound:
    r"""Bounds of the radius on which ``second`` is a function of ``first``.

    :math:`\sup\{r : f_1(x) = f_1(y) \Rightarrow f_2(x) = f_2(y)\ \forall x, y \in B(c, r)\}`; both
    directions together say that an invertible map transforms one network's outputs into the
    other's. With the original and an edited or pruned network: no information was lost.

    Args:
        first: f1; module, ONNX network or file, or graph; piecewise affine.
        second: f2, on the same inputs.
        center: (n,).
        r_max: largest radius of interest.
        norm: 1, 2 or inf.
        tolerance: a claimed ``lower`` excludes pairs whose f2 differs by at least so much in some
            output.
        output_tolerance: e, in the unit of f1's outputs: excluded are pairs whose f1 differs by e
            or less in every output (and whose f2 differs by ``tolerance``), in place of equal f1.
        domain: inputs outside of it do not count.
        effort: time limit, threads, bounds.

    Returns:
        A :class:`RadiusBound`; ``separation`` is in the unit of f2's outputs. The witness agrees
        exactly in f1 (or within ``output_tolerance``) and differs by at least ``tolerance`` in f2.

    Raises:
        SpecError: numbers that do not fit or are not finite.
        UnsupportedOperationError: an operator that is not piecewise affine.

    Soundness: as :func:`injectivity_radius`; where f1 is injective everything is a function of it.

    Source: Cui et al. (L4DC 2023), Problem 3 and Theorem 4.
    """
    effort = effort or Effort()
    point = as_point(center)
    net = PiecewiseNetwork.of(first, len(point), "first network")
    other = PiecewiseNetwork.of(second, len(point), "second network")
    ball = Ball(point, r_max, as_norm(norm), domain)
    if not 0 < tolerance < math.inf:
        raise SpecError(f"tolerance: got {tolerance}; expected a number above 0")
    within = check_tolerance(output_tolerance)

    def difference(pair: Pair) -> float:
        there = evaluate_exactly(other.record, pair.x) - evaluate_exactly(other.record, pair.y)
        return largest_below(there)

    found = _findings(ball, effort, tolerance, difference, within)

    def differs(x: Floats, y: Floats) -> bool:
        there = other.values(np.stack([x, y]))
        return float(np.abs(there[0] - there[1]).max()) >= tolerance

    def accept(pair: Pair) -> bool:
        return difference(pair) >= tolerance

    with effort.until_stopped():
        _search(net, found, _NEAR * ball.radius, accept, differs)
        share = found.deadline.share(_PAIR_SHARE)
        aim = Aim(None, tolerance, within, accept=accept, promising=differs)
        certify_radius(found, [net, other], share, aim)
        if found.proved == 0.0 and net.output_size >= net.input_size and within == 0.0:
            _prove_by_slopes(net, ball, found)
        if not found.closed:
            _match(net, other, found, tolerance, accept)
    return found.result()


def _check_separation(separation: float, ball: Ball) -> None:
    if not 0 < separation < 2 * ball.radius:
        raise SpecError(
            f"separation: got {separation}; expected above 0 and below {2 * ball.radius:.6g}, the "
            "ball's diameter"
        )


def _findings(
    ball: Ball,
    effort: Effort,
    separation: float,
    distance: Callable[[Pair], float],
    within: float,
) -> Findings:
    return Findings(
        ball,
        effort,
        lambda pair: pair.reach(ball.center, ball.norm),
        separation,
        distance,
        output_tolerance=within,
    )


def _prove_by_slopes(net: PiecewiseNetwork, ball: Ball, found: Findings) -> None:
    with one_thread():
        radius = largest_injective_radius(net, ball)
    if radius > 0.0:
        found.prove(radius, Evidence.INTERVAL, "interval Jacobian")


def _search(
    net: PiecewiseNetwork,
    found: Findings,
    least: float,
    accept: Callable[[Pair], bool],
    promising: Callable[[Floats, Floats], bool] = lambda x, y: True,
) -> None:
    """Sample for collisions where the input is small; only exact ones count."""
    if net.input_size > _SEARCHED:
        return
    share = found.deadline.share(_SEARCH_SHARE)
    ball, seed = found.ball, 0
    for _ in range(4):  # samples of a smaller ball see smaller folds
        pairs = find_collisions(net, ball, least, seed, share)
        likely = (p for p in pairs if promising(*p))
        pair = best_pair(net, likely, ball, share, within=found.output_tolerance)
        if pair is None or not accept(pair):
            return
        found.offer(pair, "search")
        if not 0.0 < found.upper < 0.9 * ball.radius:
            return
        ball = ball.resized(1.1 * found.upper)


def _one_shot(
    net: PiecewiseNetwork, found: Findings, separation: float, accept: Callable[[Pair], bool]
) -> None:
    """Per coordinate the least radius of a pair that is ``separation`` apart along it."""

    def build(ball: Ball, j: int) -> Draft:
        draft = start(ball, 2, found.proved)
        outputs = encode(draft, net, found.effort, found.deadline)
        agree(draft, outputs[0] - outputs[1], found.output_tolerance)
        gaps = draft.program.pick(draft.points[0]) - draft.program.pick(draft.points[1])
        clear = found.output_tolerance > 0.0
        separate(draft, gaps[np.array([j])], separation, np.ones(1), clear=clear)
        return draft

    _grow(net, found, net.input_size, build, accept)


def _match(
    net: PiecewiseNetwork,
    other: PiecewiseNetwork,
    found: Findings,
    tolerance: float,
    accept: Callable[[Pair], bool],
) -> None:
    """Per output of f2 the least radius of a pair that f1 cannot tell apart and f2 can."""

    def build(ball: Ball, i: int) -> Draft:
        draft = start(ball, 2, found.proved)
        outputs = encode(draft, net, found.effort, found.deadline)
        agree(draft, outputs[0] - outputs[1], found.output_tolerance)
        there = encode(draft, other, found.effort, found.deadline)
        gap: Affine = (there[0] - there[1])[np.array([i])]
        separate(draft, gap, tolerance, np.ones(1), clear=found.output_tolerance > 0.0)
        return draft

    _grow(net, found, other.output_size, build, accept)


def _grow(
    net: PiecewiseNetwork,
    found: Findings,
    tasks: int,
    build: Callable[[Ball, int], Draft],
    accept: Callable[[Pair], bool],
) -> None:
    """Programs over ever larger balls: small ones are fast and leave a bound if time runs out."""
    part = _STAGE_SHARE
    while not found.closed and not found.deadline.over:
        goal = max(2.0 * found.lower, found.limit / 16)
        last = goal >= 0.7 * found.limit
        goal = (1.0 + _MARGIN) * found.limit if last else goal
        share = found.deadline.share(1.0 if last else part)
        _solve_tasks(net, found, tasks, build, accept, goal, share)
        reached = found.lower >= (1.0 - _MARGIN) * min(goal, found.limit)
        if last or (not reached and part == 1.0):
            return
        part = _STAGE_SHARE if reached else 1.0


def _solve_tasks(
    net: PiecewiseNetwork,
    found: Findings,
    tasks: int,
    build: Callable[[Ball, int], Draft],
    accept: Callable[[Pair], bool],
    goal: float,
    deadline: Deadline,
) -> None:
    """Minimize the radius of every task up to ``goal``; the claim is the least of their bounds."""
    bounds, done, seconds, words = math.inf, True, 0.0, "infeasible"
    tested = found.ball.radius
    for task in range(tasks):
        radius = min(goal, found.ball.radius, (1.0 + _MARGIN) * found.limit)
        share = deadline.share(1.0 / (tasks - task))

        def listen(_: float, points: Sequence[Floats]) -> None:
            pairs, within = [(points[0], points[1])], found.output_tolerance
            pair = best_pair(net, pairs, found.ball, found.deadline, within=within)
            if pair is None:
                pair = best_pair(
                    net, pairs, found.ball, found.deadline, move_both=True, within=within
                )
            if pair is not None and accept(pair):
                found.offer(pair, "solver, made exact")

        def draft(ball: Ball, task: int = task) -> Draft:
            made = build(ball, task)
            found.integers = max(found.integers, made.integers)
            return made

        answer = minimize_radius(draft, found.ball.resized(radius), share, found.effort, listen)
        bounds, tested = min(bounds, answer.bound), min(tested, radius)
        done, seconds = done and answer.finished, seconds + answer.seconds
        words = words if answer.finished else answer.message
    done = done and tested >= found.limit
    total = Answer(bounds, None, done, seconds, words)
    found.claim(total, tested, "mixed-integer programs")


def _bisect(
    net: PiecewiseNetwork, found: Findings, separation: float, accept: Callable[[Pair], bool]
) -> None:
    """Radii between the bounds until they are within the separation."""
    low, high = found.lower, found.limit
    radius = high
    for _ in range(_BISECTIONS):
        if found.deadline.over or high - low <= max(separation, 2 * found.effort.mip_gap * high):
            return
        effort = replace(found.effort, time_limit=found.deadline.limit())
        tested = collide_within(
            net, found.ball.resized(radius), effort, within=found.output_tolerance
        )
        found.integers = max(found.integers, tested.integers)
        if tested.witness is not None and accept(tested.witness):
            found.offer(tested.witness, "solver, made exact")
        if tested.upper < separation:
            low = max(low, radius)
            found.claim(Answer(radius, None, False, 0.0, ""), radius, "mixed-integer programs")
        elif tested.outcome is Outcome.OPEN and tested.lower <= 0.0:
            return
        else:
            high = radius
        radius = (low + high) / 2
