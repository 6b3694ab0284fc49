"""How far is the nearest other input with the same output?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from torch_prepared.certify.exact import evaluate_exactly, to_fractions, values_exactly
from torch_prepared.core.rows import Floats
from torch_prepared.errors import SpecError
from torch_prepared.invert._ball import Ball, as_norm
from torch_prepared.invert._exact import (
    Cell,
    Rationals,
    excess,
    largest_below,
    linear_cell,
    norm_above,
)
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
    exclude_pattern,
    minimize_radius,
    separate,
    start,
)
from torch_prepared.invert._result import Evidence, Pair, RadiusBound
from torch_prepared.invert._search import best_pair, find_preimages
from torch_prepared.invert._solve import Effort
from torch_prepared.invert.pairs import Aim, certify_radius
from torch_prepared.relax.pool import pool_windows
from torch_prepared.specs import Box

__all__ = ["nearest_preimage"]

METHODS = ("auto", "milp", "split")
_SEARCH_SHARE = 0.15
_SPLIT_SHARE = 0.5
_MARGIN = 1e-4  #: programs look so much farther than the witness, relatively


def nearest_preimage(
    network: Network,
    center: PointLike,
    *,
    r_max: float,
    norm: float | str = math.inf,
    of: PointLike | None = None,
    domain: Box | None = None,
    separation: float = 1e-3,
    output_tolerance: float = 0.0,
    method: str = "auto",
    effort: Effort | None = None,
) -> RadiusBound:
    r"""Bounds of the distance from ``center`` to the nearest other x with the same output.

    The pseudo-injectivity radius
    :math:`R^* = \sup\{R : f(x) \ne f(c)\ \forall x \ne c,\ \|x - c\| \le R\}`. A search finds a
    collision (``upper``), made exact in rational arithmetic. ``lower`` comes from the exact linear
    cell of the center, then from branch and bound over boxes with a replayed certificate (see
    ``pairs``), then from one mixed-integer program: minimize the radius such that the outputs agree
    and some ReLU is in another phase.

    Args:
        network: module, ONNX network or file, or graph; piecewise affine.
        center: (n,) in the unit of the inputs.
        r_max: largest radius of interest.
        norm: 1, 2 or inf.
        of: (n,) look for inputs with the output of this point instead; then ``center`` is only
            where distances are measured from.
        domain: inputs outside of it do not count.
        separation: where the center lies on a kink, preimages nearer than this (maximum norm) are
            not excluded by the program.
        output_tolerance: e, in the unit of the outputs. Above 0 the question is how far the nearest
            x is that differs from the center (from ``of``) by at least ``separation`` and whose
            output differs by e or less in every entry, and all answers are about such x.
        method: ``"milp"``, ``"split"``, or ``"auto"`` for the second, then the first.
        effort: time limit, threads, bounds.

    Returns:
        A :class:`RadiusBound`. With more inputs than outputs the radius is 0 almost everywhere,
        and is said to be where a flat direction exists in the center's cell.

    Raises:
        SpecError: numbers that do not fit or are not finite.
        UnsupportedOperationError: an operator that is not piecewise affine.

    Soundness: ``upper`` in exact arithmetic on the stored weights. ``lower``: see
        :class:`Evidence`; a claimed one holds up to the solver's tolerances (``_solve``).

    Source: Cui et al. (L4DC 2023), Problem 2; one-shot program, search and certificate are ours.
    """
    effort = effort or Effort()
    if method not in METHODS:
        raise SpecError(f"method: got {method!r}; expected one of {', '.join(METHODS)}")
    point = as_point(center)
    net = PiecewiseNetwork.of(network, len(point))
    ball = Ball(point, r_max, as_norm(norm), domain)
    if not 0 < separation < math.inf:
        raise SpecError(f"separation: got {separation}; expected a finite number above 0")
    goal = point if of is None else as_point(of, "of")
    if len(goal) != len(point):
        raise SpecError(f"of: got {len(goal)} numbers; expected {len(point)}")
    within = check_tolerance(output_tolerance)
    question = _Question(net, ball, goal, separation, within, effort)
    with effort.until_stopped():
        return question.answer(method)
    return question.found.result()


class _Question:
    """One call of :func:`nearest_preimage`."""

    def __init__(
        self,
        net: PiecewiseNetwork,
        ball: Ball,
        goal: Floats,
        separation: float,
        within: float,
        effort: Effort,
    ) -> None:
        deadline = effort.deadline()
        self.net, self.ball, self.goal, self.effort = net, ball, goal, effort
        self.elsewhere = not np.array_equal(goal, ball.center)
        self.separation, self.within = separation, within
        self.target: Rationals = evaluate_exactly(net.record, goal)
        middle, self._aim = to_fractions(ball.center), to_fractions(goal)
        self.cell = Cell() if self.elsewhere or within else linear_cell(net, ball.center)
        blind = within > 0.0 or not (self.elsewhere or self.cell.injective)
        self.found = Findings(
            ball,
            effort,
            lambda pair: norm_above(pair.x - middle, ball.norm),
            separation if blind else 0.0,
            lambda pair: norm_above(pair.x - self._aim, math.inf),
            deadline,
            within,
        )

    def _accept(self, pair: Pair) -> bool:
        """Whether the first point is far enough from the other, where that matters."""
        return self.within == 0.0 or largest_below(pair.x - self._aim) >= self.separation

    @property
    def core(self) -> float:
        """Half width of the open box in which the center is the only preimage."""
        return self.cell.radius if self.cell.injective else 0.0

    def answer(self, method: str) -> RadiusBound:
        """Search, then prove."""
        if self.elsewhere:
            own = evaluate_exactly(self.net.record, self.ball.center)
            pair = Pair(to_fractions(self.ball.center), self._aim)
            if not any(excess(own - self.target, self.within)) and self._accept(pair):
                return self.found.zero(pair, "the center has that output itself")
        elif self.cell.flat is not None:
            pair = Pair(self.cell.flat, to_fractions(self.ball.center))
            return self.found.zero(pair, "the network is flat in a direction at the center")
        if self.core:
            self.found.prove(self.core, Evidence.CERTIFIED, "the linear cell of the center")
        self._search()
        if method != "milp":
            share = self.found.deadline.share(_SPLIT_SHARE if method == "auto" else 1.0)
            apart = self.separation if self.within else 0.0
            aim = Aim(self.goal, 0.0, self.within, apart, self._accept)
            certify_radius(self.found, [self.net], share, aim)
        if method != "split" and not self.found.closed:
            self._solve()
        return self.found.result()

    def _search(self) -> None:
        share = self.found.deadline.share(_SEARCH_SHARE)
        target = self.target.astype(np.float64)
        least = 0.0 if self.elsewhere and not self.within else self.core or self.separation
        points = find_preimages(self.net, target, self.ball, least, self.effort.seed, share)
        pair = best_pair(
            self.net, ((x, self.goal) for x in points), self.ball, share, self.elsewhere,
            within=self.within,
        )  # fmt: skip
        if pair is not None and self._accept(pair):
            self.found.offer(pair, "search")

    def _solve(self) -> None:
        radius = min(self.ball.radius, (1.0 + _MARGIN) * self.found.limit)
        ball = self.ball.resized(radius)

        def listen(bound: float, points: Sequence[Floats]) -> None:
            pairs = [(points[0], self.goal)]
            pair = best_pair(
                self.net, pairs, self.ball, self.found.deadline, self.elsewhere, within=self.within
            )
            if pair is not None and self._accept(pair):
                self.found.offer(pair, "solver, made exact")

        answer = minimize_radius(self._build, ball, self.found.deadline, self.effort, listen)
        self.found.claim(answer, radius, "mixed-integer program")

    def _build(self, ball: Ball) -> Draft:
        draft = start(ball, 1, self.found.proved)
        target = (self.target.astype(np.float64), self.within)
        (output,) = encode(draft, self.net, self.effort, self.found.deadline, target)
        agree(draft, output.shifted(-target[0]), self.within)
        if not self.within and not self.elsewhere and self.cell.injective:
            exclude_pattern(draft, draft.copies[0], phases(self.net, ball.center))
        elif self.within or not self.elsewhere:
            own = draft.program.pick(draft.points[0])
            gaps = own.shifted(-self.goal).both_signs()
            most = ball.radius + np.abs(self.goal - ball.center)
            clear = self.within > 0.0
            separate(draft, gaps, self.separation, np.concatenate([most, most]), clear=clear)
        self.found.integers = max(self.found.integers, draft.integers)
        return draft


def phases(net: PiecewiseNetwork, center: Floats | Rationals) -> Mapping[str, NDArray[np.int64]]:
    """The activation pattern of a point, exactly evaluated.

    By nonlinear node: for a ReLU 1 where its input is positive, else 0; for a pooling window the
    flat position of its largest scalar.
    """
    values = values_exactly(net.record, center)
    found = {}
    for node in net.graph.nodes[1:]:
        if node.op in ("relu", "leaky_relu"):
            signs = [int(v > 0) for v in values[node.inputs[0]].reshape(-1)]
            found[node.name] = np.array(signs, dtype=np.int64)
        elif node.op == "max_pool":
            flat = values[node.inputs[0]].reshape(-1)
            windows = pool_windows(node, net.graph.node(node.inputs[0]).shape).tolist()
            best = [max((i for i in w if i >= 0), key=lambda i: flat[i]) for w in windows]
            found[node.name] = np.array(best, dtype=np.int64)
    return found
