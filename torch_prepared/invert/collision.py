"""How far apart can two inputs of a ball with the same output, or their images, be?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from torch_prepared.certify.exact import evaluate_exactly
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.rows import Floats
from torch_prepared.errors import SolverError
from torch_prepared.invert._ball import Ball, as_norm
from torch_prepared.invert._encoding import Affine
from torch_prepared.invert._exact import largest_below
from torch_prepared.invert._network import (
    Network,
    PiecewiseNetwork,
    PointLike,
    as_point,
    check_tolerance,
)
from torch_prepared.invert._programs import Draft, agree, encode, start
from torch_prepared.invert._result import CollisionBound, Outcome, Pair
from torch_prepared.invert._search import best_pair
from torch_prepared.invert._solve import Answer, Effort, bound_network, minimize, polish
from torch_prepared.specs import Box

__all__ = ["collide_within", "max_collision", "max_mismatch"]

_INSIDE = 1e-6  #: witnesses are looked for in a ball smaller by so much, relatively
_SOLVED = 1e-3
_EXACT = 30.0  #: seconds that making one witness exact may take at most

Task = tuple[tuple[int, int], ...]
"""Signed entries, the largest of which one program maximizes."""


def max_collision(
    network: Network,
    center: PointLike,
    radius: float,
    *,
    norm: float | str = math.inf,
    anchor: bool = False,
    split_coordinates: bool = True,
    output_tolerance: float = 0.0,
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
        output_tolerance: e: :math:`\|f(x) - f(y)\|_\infty \le e` in place of equal outputs.
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
    within = check_tolerance(output_tolerance)
    return collide_within(
        net, ball, effort or Effort(), anchor=anchor, split=split_coordinates, within=within
    )


def max_mismatch(
    first: Network,
    second: Network,
    center: PointLike,
    radius: float,
    *,
    norm: float | str = math.inf,
    output_tolerance: float = 0.0,
    domain: Box | None = None,
    effort: Effort | None = None,
) -> CollisionBound:
    r"""Bounds of the largest difference of f2's outputs where those of f1 are the same.

    :math:`p^*_{12} = \max\{\|f_2(x) - f_2(y)\|_\infty : x, y \in B, f_1(x) = f_1(y)\}`.

    f2 is a function of f1 on the ball B exactly when it is 0; with p*_21 = 0 as well, an invertible
    map transforms the outputs of one into those of the other. Otherwise every function of f1 is
    wrong about some output of f2 by at least half of it somewhere in B.

    Args:
        first: f1; module, ONNX network or file, or graph; piecewise affine.
        second: f2, on the same inputs.
        center: (n,) center of B.
        radius: of B, in the unit of the inputs.
        norm: 1, 2 or inf: that of B. For the 2-norm B is replaced by a polytope around it.
        output_tolerance: e: :math:`\|f_1(x) - f_1(y)\|_\infty \le e` in place of equal outputs.
        domain: clips B.
        effort: time limit, threads, bounds.

    Returns:
        A :class:`CollisionBound` in the unit of f2's outputs. Its witness agrees in f1, in exact
        arithmetic, and differs by ``lower`` in f2.

    Raises:
        SpecError: numbers that do not fit or are not finite.
        UnsupportedOperationError: an operator that is not piecewise affine.

    Soundness: as :func:`max_collision`, whose tolerances f2 may magnify by its slopes.

    Source: Cui et al. (L4DC 2023), Problem 3 and Theorem 4; one program per output of f2, whose
        sign the exchange of x and y makes irrelevant, is ours.
    """
    point = as_point(center)
    net = PiecewiseNetwork.of(first, len(point), "first network")
    other = PiecewiseNetwork.of(second, len(point), "second network")
    ball = Ball(point, radius, as_norm(norm), domain)
    within = check_tolerance(output_tolerance)
    tasks = [((i, 1),) for i in range(other.output_size)]
    return _Question(net, ball, effort or Effort(), within, other=other).answer(tasks)


def collide_within(
    net: PiecewiseNetwork,
    ball: Ball,
    effort: Effort,
    *,
    anchor: bool = False,
    split: bool = True,
    within: float = 0.0,
) -> CollisionBound:
    """:func:`max_collision` for arguments that were read already."""
    # Exchanging x and y changes signs, so that without an anchor one sign is enough.
    both = [(j, s) for j in range(len(ball.center)) for s in ((1, -1) if anchor else (1,))]
    tasks: list[Task] = [(one,) for one in both] if split else [tuple(both)]
    return _Question(net, ball, effort, within, anchor=anchor).answer(tasks)


class _Question:
    """The largest distance of points, or of their images in another network."""

    def __init__(
        self,
        net: PiecewiseNetwork,
        ball: Ball,
        effort: Effort,
        within: float,
        *,
        anchor: bool = False,
        other: PiecewiseNetwork | None = None,
    ) -> None:
        self.net, self.ball, self.effort, self.within = net, ball, effort, within
        self.anchor, self.other = anchor, other
        self.deadline = effort.deadline()
        self.lower, self.integers = 0.0, 0
        self.witness: Pair | None = None

    def answer(self, tasks: Sequence[Task]) -> CollisionBound:
        """Solve one program after the other; what is not solved counts with all there can be."""
        try:
            most = self._most()
        except SolverError as error:
            return self._result(math.inf, False, str(error))
        upper, finished, message = 0.0, True, "every program was solved"
        for position, task in enumerate(tasks):
            bound, ended, words = float(max(most[j] for j, _ in task)), False, "interrupted"
            with self.effort.until_stopped():
                share = self.deadline.share(1.0 / (len(tasks) - position))
                answer, pair = self._solve(task, most, share)
                bound, ended, words = min(bound, -answer.bound), answer.finished, answer.message
                self._offer(pair)
            upper, finished = max(upper, bound), finished and ended
            message = message if ended else words
        return self._result(upper, finished, message)

    def _solve(self, task: Task, most: Floats, share: Deadline) -> tuple[Answer, Pair | None]:
        """One program, and an exact pair near its solution."""
        if share.over:
            return Answer(-math.inf, None, False, 0.0, "time over"), None
        try:
            draft = self._draft(task, most)
        except SolverError as error:
            return Answer(-math.inf, None, False, 0.0, str(error)), None
        column = draft.columns["distance"]
        answer = minimize(draft.program, column, share, self.effort, sign=-1.0)
        return answer, self._witness(draft, answer)

    def _result(self, upper: float, finished: bool, message: str) -> CollisionBound:
        upper = max(upper, self.lower)  # an exact witness outweighs a claim
        close = upper - self.lower <= _SOLVED * max(upper, 1e-9)
        solved = finished or (close and math.isfinite(upper))
        outcome = Outcome.SOLVED if solved else Outcome.OPEN
        stopped = not solved and self.effort.stopped
        return CollisionBound(
            self.lower,
            upper,
            self.witness,
            outcome,
            self.integers,
            self.deadline.elapsed,
            "interrupted" if stopped else message,
            self.within,
            stopped,
        )

    def _offer(self, pair: Pair | None) -> None:
        """An exact pair, or None; kept if it is the farthest apart."""
        if pair is None:
            return
        gap = pair.x - pair.y
        if self.other is not None:
            record = self.other.record
            gap = evaluate_exactly(record, pair.x) - evaluate_exactly(record, pair.y)
        distance = largest_below(gap)
        if distance > self.lower:
            self.lower, self.witness = distance, pair

    def _most(self) -> Floats:
        """Bounds (k,) of what is maximized, by entry.

        Raises:
            SolverError: the second network has no finite bounds over the ball.
        """
        if self.other is None:
            return np.full(len(self.ball.center), 2.0 * self.ball.radius)
        boxes = bound_network(self.other, self.ball, self.effort.bounds)
        last = boxes[self.other.graph.nodes[-1].name]
        lower, upper = last.lower.flatten().numpy(), last.upper.flatten().numpy()
        most = np.nextafter(upper - lower, np.inf)
        if not bool(np.isfinite(most).all()):
            raise SolverError(
                "second network: got bounds that are not finite over the ball; expected a smaller "
                "radius or smaller weights"
            )
        return np.asarray(most)

    def _draft(self, task: Task, most: Floats) -> Draft:
        ball = self.ball
        draft = start(ball, 1 if self.anchor else 2)
        program = draft.program
        target = (self.net.values(ball.center[None])[0], self.within) if self.anchor else None
        outputs = encode(draft, self.net, self.effort, self.deadline, target)
        x = program.pick(draft.points[0])
        if target is not None:
            agree(draft, outputs[0].shifted(-target[0]), self.within)
            gaps = x.shifted(-ball.center)
        else:
            agree(draft, outputs[0] - outputs[1], self.within)
            gaps = x - program.pick(draft.points[1])
        if self.other is not None:
            images = encode(draft, self.other, self.effort, self.deadline)
            gaps = images[0] - images[1]
        top = float(max(most[j] for j, _ in task))
        distance = program.add("distance", np.zeros(1), np.full(1, top))
        draft.columns["distance"] = int(distance[0])
        picked = gaps[np.array([j for j, _ in task])]
        scale = np.array([float(s) for _, s in task])
        matrix = picked.widen(program.columns).multiply(scale[:, None]).tocsr()
        signed = Affine(matrix, picked.offset * scale)
        slack = signed - program.pick(np.repeat(distance, len(task)))
        self._choose(draft, slack, 2.0 * top)
        self.integers = max(self.integers, draft.integers)
        return draft

    def _choose(self, draft: Draft, slack: Affine, reach: float) -> None:
        """Some entry of ``slack`` (k,), which is never below ``-reach``, is at least 0."""
        program = draft.program
        if slack.size == 1:
            program.at_least(slack)
            return
        chosen = program.add("chosen", np.zeros(slack.size), np.ones(slack.size), integer=True)
        index = program.at_least(slack, np.full(slack.size, -reach))
        program.rows.add(index, chosen, -reach)  # distance <= gap + reach (1 - chosen)
        program.rows.add(program.rows.ge(np.ones(1)), chosen, 1.0)

    def _witness(self, draft: Draft, answer: Answer) -> Pair | None:
        """An exact pair near the solution, moved off the ball's surface first."""
        if answer.point is None or answer.problem is None:
            return None
        distance = float(answer.point[draft.columns["distance"]])
        if distance <= 1e-7 * max(1.0, self.ball.radius):
            return None
        clear = {draft.reach: (0.0, (1.0 - _INSIDE) * self.ball.radius), **draft.narrow}
        candidates = []
        for point in (polish(answer.problem, answer.point, self.effort, clear), answer.point):
            y: Floats = self.ball.center if self.anchor else point[draft.points[1]]
            candidates.append((point[draft.points[0]], y))
        limit = Deadline(_EXACT)
        return best_pair(
            self.net, candidates, self.ball, limit, move_both=not self.anchor, within=self.within
        )
