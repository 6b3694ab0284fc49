"""Branch and bound over pairs of boxes: the radius up to which no two inputs collide, certified.

Pairs (X, Y) of boxes that cover all pairs of points of a ball are split, nearest to the center
first, until a test of ``certify.pairs`` excludes a collision in them. The least distance from the
center at which some pair is still open is a radius without collision at any time; the splits and
tests so far are its certificate, which ``certify.check_radius`` replays. Pairs that stay open
however small they are point to collisions, which are made exact.

For few inputs this is both faster and stronger than a mixed-integer program: it excludes pairs at
any distance, and trusts no solver.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from torch_prepared.certify.pairs import BoxTree, PairTests, Step, distance_below
from torch_prepared.certify.radius import RadiusCertificate, RadiusClaim, check_radius
from torch_prepared.certify.rounding import BoolArray, FloatArray, IntArray
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.rows import Floats
from torch_prepared.errors import CertificateError, UnsupportedOperationError
from torch_prepared.invert._ball import Ball
from torch_prepared.invert._exact import jacobian
from torch_prepared.invert._findings import Findings
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.invert._result import Certified, Evidence, Pair
from torch_prepared.invert._search import best_pair, collide_near, find_collisions

__all__ = ["Aim", "certify_radius"]

_BATCH = 512  #: pairs tested at once
_MOST_PAIRS = 4_000_000
_MOST_SPLIT = 4  #: inputs up to which splitting pairs pays
_MOST_ANCHORED = 8  #: the same where one point is fixed
_THIN = 2.0**-30  #: pairs of boxes not wider than this, relatively, are given up
_LOOK = 2.0**-7  #: width at which an open pair is first looked at for a collision
_REPLAY = 0.6  #: share of the time for the search; the rest is for the replay
_CLOSE = 5e-5  #: how near to the witness a proof aims, relatively
_SLACK = 1e-9  #: what search asks for beyond what the checker does, relatively
_ZOOMS = (1e-1, 1e-2, 1e-3, 1e-4)  #: radii of balls in which folds are looked for, relatively
_CANDIDATES = 3  #: exact attempts of each kind
_BISECTIONS = 12
_LAST_REPLAY = 5.0  #: seconds that a replay may take once the question was stopped


@dataclass(frozen=True, eq=False)
class Aim:
    """Which pairs are excluded, and which count as collisions.

    Attributes:
        anchor: (n,) the one point whose output is to be avoided, or None for any two.
        tolerance: positive for two networks.
        output_tolerance: outputs of the first network that differ by no more count as equal.
        separation: with it and one network, the least distance of pairs that count.
        accept: which exact collisions of the first network count.
        promising: the same, roughly, of points in float64.
    """

    anchor: Floats | None = None
    tolerance: float = 0.0
    output_tolerance: float = 0.0
    separation: float = 0.0
    accept: Callable[[Pair], bool] = lambda pair: True
    promising: Callable[[Floats, Floats], bool] = lambda x, y: True


def certify_radius(
    found: Findings, networks: Sequence[PiecewiseNetwork], deadline: Deadline, aim: Aim
) -> None:
    """Prove as large a radius as the time allows; collisions met on the way are offered.

    Args:
        found: receives collisions, the radius and its certificate.
        networks: one, or two for matching.
        deadline: when to stop; the certificate of what is known then is replayed by then, roughly.
        aim: what is asked.
    """
    try:
        question = _Question(found, networks, deadline, aim)
    except (CertificateError, UnsupportedOperationError):  # an activation that is not convex
        return
    n = networks[0].input_size
    if n <= (_MOST_SPLIT if aim.anchor is None else _MOST_ANCHORED):
        question.split()
    else:
        question.bisect()


class _PairTable:
    """Pairs by number, with what was done with each."""

    def __init__(self) -> None:
        self.count = 0
        self.x, self.y, self.step, self.child = (np.zeros(1024, dtype=np.int64) for _ in range(4))
        self.reach: FloatArray = np.zeros(1024)

    def add(self, x: IntArray, y: IntArray, reach: FloatArray) -> IntArray:
        """Numbers of new pairs, which are open."""
        new = self.count + np.arange(len(x))
        while self.count + len(x) > len(self.x):
            for name in ("x", "y", "step", "child", "reach"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        self.x[new], self.y[new], self.reach[new] = x, y, reach
        self.step[new], self.child[new] = -1, -1
        self.count += len(x)
        return new

    def proof(self, radius: float) -> list[int]:
        """Steps level by level; what lies outside of the radius is not split."""
        steps: list[int] = []
        level = np.zeros(1, dtype=np.int64)
        while len(level):
            outside = self.reach[level] >= radius
            here = np.where(outside, int(Step.OUTSIDE), self.step[level])
            steps.extend(here.tolist())
            split = level[here == Step.SPLIT]
            count = np.where(self.x[split] == self.y[split], 3, 2)
            first = np.repeat(self.child[split], count)
            level = first + np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
        return steps


class _Question:
    """One search; see :func:`certify_radius`."""

    def __init__(
        self,
        found: Findings,
        networks: Sequence[PiecewiseNetwork],
        deadline: Deadline,
        aim: Aim,
    ) -> None:
        self.found, self.networks, self.deadline = found, networks, deadline
        self.start = time.monotonic()
        self.anchor, self.aim = aim.anchor, aim
        self.net, self.center = networks[0], found.ball.center
        self.records = [n.record for n in networks]
        self.directions = _directions(self.net, self.center)
        self._begin(found.limit)

    def _begin(self, radius: float) -> None:
        """A tree over a ball, not split yet."""
        low, high = _cover(self.found.ball, radius)
        self.tree = BoxTree(low, high, self.anchor)
        self.tests = PairTests(
            self.tree,
            self.records,
            self.directions,
            self.aim.tolerance,
            _SLACK,
            output_tolerance=self.aim.output_tolerance,
            separation=self.aim.separation,
        )
        self.table = _PairTable()
        x, y = self.tree.root
        self.open = self.table.add(x, y, self._reach(x, y))
        self.look = _LOOK

    @property
    def goal(self) -> float:
        """Radius from which on there is nothing left to show."""
        limit = self.found.limit
        return limit if self.found.witness is None else (1.0 - _CLOSE) * limit

    @property
    def lower(self) -> float:
        """Radius of the open ball without a collision, if the checker agrees."""
        reach = self.table.reach[self.open].min(initial=math.inf)
        return float(min(reach, self.goal))

    def split(self) -> None:
        """Best first, until the goal or the end of the time."""
        search = self.deadline.share(_REPLAY)
        # An interruption leaves pairs open that were dealt with, never the other way round.
        with self.found.effort.until_stopped(), np.errstate(all="ignore"):
            while len(self.open) and self.lower < self.goal and not search.over:
                if self.table.count > _MOST_PAIRS or not self._advance(search):
                    break
        self._certify(self.lower, self.table.proof(self.lower))

    def _advance(self, search: Deadline) -> bool:
        """Test and split the open pairs nearest to the center; False when they are too thin."""
        reach = self.table.reach[self.open]
        count = min(_BATCH, len(reach))
        near = np.argpartition(reach, count - 1)[:count]
        near = near[reach[near] < self.goal]
        here = self.open[near]
        left = here
        for step in self.tests.useful:
            if len(left):
                good = self.tests.holds(step, self.table.x[left], self.table.y[left])
                self.table.step[left[good]] = int(step)
                left = left[~good]
        first = left[np.argsort(self.table.reach[left], kind="stable")[:1]]
        if len(first):
            width = float(self._width(first)[0])
            if width <= self.look:
                self.look = width / 8.0
                self._look(int(first[0]), search)
            if width <= _THIN:
                return False
        keep: BoolArray = np.ones(len(self.open), dtype=np.bool_)
        keep[near] = False
        thin = left[self._width(left) <= _THIN]
        left = np.setdiff1d(left, thin)
        x, y = self.table.x[left], self.table.y[left]
        parent, a, b = self.tree.children(x, y)
        new = self.table.add(a, b, self._reach(a, b))
        self.table.step[left] = int(Step.SPLIT)
        head = np.concatenate([np.ones(min(1, len(parent)), dtype=bool), np.diff(parent) > 0])
        self.table.child[left] = new[head]
        self.open = np.concatenate([self.open[keep], thin, new])
        return True

    def bisect(self) -> None:
        """One pair alone, at ever other radii: splitting many inputs is hopeless."""
        low, high = 0.0, self.found.limit
        best: Step | None = None
        for _ in range(_BISECTIONS):
            if self.deadline.over or high <= 1.01 * low:
                break
            radius = high if best is None and low == 0.0 and high == self.found.limit else 0.0
            radius = radius or (high / 4 if low == 0.0 else (low * high) ** 0.5)
            step = self._single(radius)
            if step is None:
                high = radius
            else:
                low, best = radius, step
                if radius == self.found.limit:
                    break
        if best is not None:
            self._begin(low)
            self._certify(low, [int(best)])

    def _single(self, radius: float) -> Step | None:
        """The test that excludes collisions in a whole ball, if one does."""
        self._begin(radius)
        x, y = self.tree.root
        return next((s for s in self.tests.useful if self.tests.holds(s, x, y)[0]), None)

    def _reach(self, x: IntArray, y: IntArray) -> FloatArray:
        """Least radius (p,) of a ball that meets both boxes (the first one, with an anchor)."""
        ball, tree = self.found.ball, self.tree
        reach = distance_below(ball.center, ball.norm, tree.lower[x], tree.upper[x])
        if self.anchor is None:
            other = distance_below(ball.center, ball.norm, tree.lower[y], tree.upper[y])
            reach = np.maximum(reach, other)
        return reach

    def _width(self, pairs: IntArray) -> FloatArray:
        x, y = self.table.x[pairs], self.table.y[pairs]
        return np.maximum(self.tree.width(x), self.tree.width(y))

    def _look(self, pair: int, search: Deadline) -> None:
        """Offer exact collisions near a pair that resists."""
        tree, ball = self.tree, self.found.ball
        x, y = int(self.table.x[pair]), int(self.table.y[pair])
        p = 0.5 * (tree.lower[x] + tree.upper[x])
        q = 0.5 * (tree.lower[y] + tree.upper[y])
        if np.array_equal(p, q) and self.anchor is not None:
            return
        share = search.share(0.2)
        for candidate in self._candidates(p, q, share):
            made = best_pair(
                self.net, [candidate], ball, share, self.anchor is not None,
                within=self.aim.output_tolerance,
            )  # fmt: skip
            if made is not None and self.aim.accept(made):
                self.found.offer(made, "open pairs of boxes, made exact")
            if share.over:
                return

    def _candidates(self, p: Floats, q: Floats, deadline: Deadline) -> list[tuple[Floats, Floats]]:
        """Pairs worth being made exact, near ``p`` and ``q``."""
        ball, both = self.found.ball, self.anchor is None
        if self.aim.output_tolerance:
            return [self._pushed_apart(p, q), (p, q)]
        made = collide_near(self.net, p, q, ball, 0, move_second=both)
        found = self._promising(made)
        if both and float(np.abs(p - q).max()) < 0.05 * ball.radius:
            for zoom in _ZOOMS:
                near = Ball(0.5 * (p + q), zoom * ball.radius, math.inf)
                made = find_collisions(self.net, near, 0.1 * near.radius, 0, deadline)
                found += self._promising(made)
        return found

    def _pushed_apart(self, p: Floats, q: Floats) -> tuple[Floats, Floats]:
        """The same points, moved along their difference to just more than the separation."""
        gap = p - q
        size = float(np.abs(gap).max())
        goal = (1.0 + _CLOSE) * self.aim.separation
        if not 0.0 < size < goal:
            return p, q
        more = gap * (goal / size - 1.0)
        return (p + more, q) if self.anchor is not None else (p + 0.5 * more, q - 0.5 * more)

    def _promising(self, pairs: list[tuple[Floats, Floats]]) -> list[tuple[Floats, Floats]]:
        """The few that collide nearest to the center, and by float arithmetic count."""
        ball = self.found.ball
        found: list[tuple[float, int, tuple[Floats, Floats]]] = []
        for pair in pairs:
            points = pair if self.anchor is None else pair[:1]
            reach = max(ball.length(v) for v in points)
            if reach < self.found.limit and self.aim.promising(*pair):
                found.append((reach, len(found), pair))
        return [pair for _, _, pair in sorted(found)[:_CANDIDATES]]

    def _certify(self, radius: float, steps: Sequence[int]) -> None:
        """Write the certificate of a radius and have it replayed."""
        if not radius > (0.0 if self.found.certified is None else self.found.proved):
            return
        n, ball = len(self.center), self.found.ball
        low = np.full(n, -math.inf) if ball.domain is None else ball.domain.lower.numpy()
        high = np.full(n, math.inf) if ball.domain is None else ball.domain.upper.numpy()
        aim = self.aim
        claim = RadiusClaim(
            self.center, radius, ball.norm, low, high, self.anchor,
            aim.tolerance, aim.output_tolerance, aim.separation,
        )  # fmt: skip
        certificate = RadiusCertificate.create(
            self.records, claim, self.tree.lower[0], self.tree.upper[0], self.directions, steps
        )
        left = None
        if self.deadline.seconds is not None:  # a proof is not thrown away for a slow machine
            left = max(self.deadline.left, 2.0 * (time.monotonic() - self.start), 1.0)
        if self.found.effort.stopped:
            left = _LAST_REPLAY
        check = check_radius(certificate, self.records, time_limit=left)
        if check.status.value != "certified":
            self.found.note(f"no certificate for {radius:.6g}: {check.reason}")
            return
        self.found.certified = Certified(certificate, check)
        self.found.prove(
            radius,
            Evidence.CERTIFIED,
            f"checker, {check.pairs} pairs of boxes",
            aim.tolerance or aim.separation,
        )


def _cover(ball: Ball, radius: float) -> tuple[Floats, Floats]:
    """Ends of a box around a ball and its domain, rounded outward."""
    low = np.nextafter(ball.center - radius, -math.inf)
    high = np.nextafter(ball.center + radius, math.inf)
    if ball.domain is not None:
        low = np.maximum(low, ball.domain.lower.numpy())
        high = np.minimum(high, ball.domain.upper.numpy())
    return low, high


def _directions(net: PiecewiseNetwork, center: Floats) -> Floats:
    """Directions (k, m) of the output: its axes, and those that the inputs' axes map to."""
    m, n = net.output_size, net.input_size
    if m == 2:
        angles = np.arange(8) * np.pi / 8
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    eye = np.eye(m)
    if m < n or n > _MOST_SPLIT:
        return eye
    rows = np.linalg.pinv(jacobian(net, center[None])[0], rcond=1e-8)
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.concatenate([eye, rows / np.where(size > 0.0, size, 1.0)])
