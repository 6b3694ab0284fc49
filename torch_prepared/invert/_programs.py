"""The mixed-integer programs of every question, and the loop that closes in on round balls.

Source: Cui, Bertalan, Pappas, Morari, Kevrekidis & Fazlyab, "Certified Invertibility in Neural
Networks via Mixed-Integer Programming" (L4DC 2023), equations 5 and 6. Ours: one program that
minimizes the radius instead of a bisection, with an activation-pattern cut (one copy) or a least
separation (two copies); outer cuts for the 2-norm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from torch_prepared.core.deadline import Deadline
from torch_prepared.core.rows import Floats
from torch_prepared.errors import SolverError
from torch_prepared.invert._ball import Ball
from torch_prepared.invert._encoding import Affine, Copy, Integers, Program, encode_copy
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.invert._solve import Answer, Effort, Progress, bound_network, minimize, polish
from torch_prepared.invert._tighten import Target, tighten_boxes

__all__ = [
    "Draft",
    "agree",
    "encode",
    "exclude_pattern",
    "minimize_radius",
    "separate",
    "start",
]

_ROUNDS = 24
_TIGHTEN = 0.25  #: share of the time left that tightening bounds may take
_ON_BALL = 1e-6
_CLEAR = 1e-6  #: by how much witnesses keep clear of the edges of what is allowed, relatively
_FEASIBLE = 3e-7  #: the same absolutely, above the tolerance of linear programs


@dataclass
class Draft:
    """A program under construction.

    Attributes:
        program: columns and rows.
        ball: where the points live.
        reach: column of the radius, between 0 and the ball's.
        points: input columns (n,) of every point.
        copies: evaluations of networks.
        columns: further columns by name.
        narrow: bounds of columns that are solved with again for a witness, which solver tolerances
            then do not push over the edge of what is allowed.
    """

    program: Program
    ball: Ball
    reach: int
    points: list[Integers] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    columns: dict[str, int] = field(default_factory=dict)
    narrow: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def integers(self) -> int:
        """Number of integer columns."""
        return int(self.program.integer.sum())


def start(ball: Ball, points: int, least: float = 0.0) -> Draft:
    """A program with a radius column and ``points`` inputs within it.

    ``least`` is a radius within which there is known to be no solution.
    """
    program = Program()
    floor = min(least, ball.radius)
    reach = program.add("reach", np.full(1, floor), np.full(1, ball.radius))
    draft = Draft(program, ball, int(reach[0]))
    for k in range(points):
        columns = ball.columns(program, f"point{k}")
        draft.points.append(columns)
        ball.confine(program, f"point{k}", program.pick(columns), program.pick(reach))
    return draft


def encode(
    draft: Draft,
    net: PiecewiseNetwork,
    effort: Effort,
    deadline: Deadline,
    target: Target | None = None,
) -> list[Affine]:
    """Evaluate ``net`` at every point of the draft; bounds over the ball are shared.

    ``target`` is the output at every point, where that is known; the rows for it are the caller's.
    Bounds may be tightened by it, until a share of the deadline.
    """
    boxes = bound_network(net, draft.ball, effort.bounds)
    if effort.bounds == "obbt" and target is not None:  # without a target it does not pay
        share = deadline.share(_TIGHTEN)
        boxes = tighten_boxes(net, draft.ball, boxes, effort, share, target)
    outputs = []
    for columns in draft.points:
        tag = f"copy{len(draft.copies)}"
        copy = encode_copy(draft.program, tag, net.graph, boxes, columns)
        draft.copies.append(copy)
        outputs.append(copy.output)
    return outputs


def agree(draft: Draft, gap: Affine, within: float) -> None:
    """No entry of ``gap`` (m,) is larger than ``within`` in magnitude."""
    program = draft.program
    if within == 0.0:
        program.equal(gap)
        return
    inner = max(0.0, within - max(_CLEAR * within, _FEASIBLE))
    edge = _constant(draft, within, inner)
    both = gap.both_signs()
    program.at_least(program.pick(np.repeat(edge, both.size)) - both)


def _constant(draft: Draft, value: float, clear: float) -> Integers:
    """A column of one value, and of another one where a witness is polished."""
    column = draft.program.add(f"constant{len(draft.narrow)}", np.full(1, value), np.full(1, value))
    draft.narrow[int(column[0])] = (clear, clear)
    return column


def separate(
    draft: Draft, gaps: Affine, least: float, most: Floats, *, clear: bool = False
) -> None:
    """Some entry of ``gaps`` (k,) is at least ``least``.

    Args:
        draft: receives k integers, none when k is 1.
        gaps: differences; exchanging the two points changes their signs, so that for a pair the
            positive sign loses nothing.
        least: positive.
        most: (k,) bounds of ``|gaps|``.
        clear: witnesses keep clear of ``least``.
    """
    program = draft.program
    if clear:
        farther = least + max(_CLEAR * least, _FEASIBLE)
        edge = _constant(draft, least, farther)
        gaps = gaps - program.pick(np.repeat(edge, gaps.size))
        least, most = 0.0, most + farther
    if gaps.size == 1:
        program.at_least(gaps, least)
        return
    chosen = program.add("chosen", np.zeros(gaps.size), np.ones(gaps.size), integer=True)
    rows = program.at_least(gaps, -most)  # gaps >= least where chosen, else >= -most
    program.rows.add(rows, chosen, -(least + most))
    one = program.rows.ge(np.ones(1))
    program.rows.add(one, chosen, 1.0)


def exclude_pattern(draft: Draft, copy: Copy, pattern: Mapping[str, NDArray[np.int64]]) -> None:
    """Some switch differs from ``pattern`` (see ``preimage.phases``).

    Without any unstable switch there is no other pattern, and the program becomes infeasible. A
    pattern that no point of the region has, by switches that are settled, excludes nothing.
    """
    columns, signs = [], []
    for found in copy.switches:
        here = pattern[found.node]
        if found.choices is None:
            settled = np.delete(np.arange(len(here)), found.index)
            if not np.array_equal(here[settled] > 0, np.isin(settled, found.active)):
                return
            columns.append(found.columns)
            signs.append(np.where(here[found.index] > 0, -1.0, 1.0))
        else:
            keep = here[found.index] == found.choices
            if keep.sum() < len(here):
                return
            columns.append(found.columns[keep])
            signs.append(np.full(int(keep.sum()), -1.0))
    sign = np.concatenate([np.empty(0), *signs])
    row = draft.program.rows.ge(np.array([1.0 - (sign < 0).sum()]))
    draft.program.rows.add(row, np.concatenate([np.empty(0, np.int64), *columns]), sign)


Build = Callable[[Ball], Draft]


def minimize_radius(
    build: Build,
    ball: Ball,
    deadline: Deadline,
    effort: Effort,
    listen: Callable[[float, Sequence[Floats]], None],
) -> Answer:
    """Minimize the radius column of ``build(ball)``; for the 2-norm with cuts until it is round.

    Args:
        build: makes the program for a ball.
        ball: gets further cuts.
        deadline: when to stop.
        effort: options.
        listen: called after every solve with the bound so far and the points of the solution.

    Returns:
        The answer with the best bound; ``finished`` when the last solution lies on the true ball.
    """
    best, seconds = -np.inf, 0.0
    message, answer = "time over", Answer(-np.inf, None, False, 0.0, "time over")
    for _ in range(_ROUNDS):
        if deadline.over:
            return Answer(best, answer.point, False, seconds, "time over")
        try:
            draft = build(ball)
        except SolverError as error:
            return Answer(best, None, False, seconds, str(error))
        answer = minimize(draft.program, draft.reach, deadline, effort, listen=_listener(effort))
        seconds, best, message = seconds + answer.seconds, max(best, answer.bound), answer.message
        if answer.point is None:
            return Answer(best, None, answer.finished, seconds, message)
        points = [answer.point[columns] for columns in draft.points]
        listen(best, points)
        if draft.narrow and answer.problem is not None:
            clear = polish(answer.problem, answer.point, effort, draft.narrow)
            listen(best, [clear[columns] for columns in draft.points])
        reach = float(answer.point[draft.reach])
        outside = [p for p in points if ball.length(p) > reach + _ON_BALL * max(1.0, reach)]
        if not answer.finished or not outside:
            return Answer(best, answer.point, answer.finished, seconds, message)
        if not all([ball.cut_off(p) for p in outside]):
            break
    return Answer(best, answer.point, False, seconds, message)


def _listener(effort: Effort) -> Progress | None:
    """Pass the solver's running bound on; its objective is no exact collision yet."""
    if effort.progress is None:
        return None
    return lambda bound, _: effort.tell(max(bound, 0.0), np.inf)
