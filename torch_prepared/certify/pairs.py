"""Pairs of boxes that cover all pairs of points of a region, and what excludes a collision in them.

Search and checker share the rules of this module: how boxes are split, so that a proof need not
write them down, and what each test computes. The verdict is ``radius.check_radius``'s alone.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np

from torch_prepared.certify.records import NetworkRecord
from torch_prepared.certify.rounding import (
    INFLATION,
    UNDERFLOW,
    UNIT,
    BoolArray,
    FloatArray,
    IntArray,
    gamma,
)
from torch_prepared.certify.secants import BoxFacts, SecantNetwork, Slopes, multiply

__all__ = ["BoxTree", "PairTests", "Step", "distance_below"]

_BOXES = 256  # boxes enclosed at once
_PAIRS = 2048  # pairs tested at once


class Step(enum.IntEnum):
    """What is done with a pair (X, Y)."""

    SPLIT = 0  #: covered by smaller pairs
    OUTSIDE = 1  #: X or Y lies outside of the ball
    APART = 2  #: outputs differ along some direction
    STEEP = 3  #: ``C S d`` is never 0 (never as small as the tolerance allows), by intervals
    SIGN = 4  #: ``det(C S)`` is never 0
    NEAR = 5  #: outputs of the second network differ by less than the tolerance
    CLOSE = 6  #: all points of X and Y are less than the separation apart


class BoxTree:
    """Boxes by number: 0 is the root, each is split in the middle of its relatively longest side.

    Args:
        lower: (n,) of the root.
        upper: (n,).
        anchor: (n,) a point, as box 1 that is never split, or None.
    """

    def __init__(self, lower: FloatArray, upper: FloatArray, anchor: FloatArray | None) -> None:
        self.anchored = anchor is not None
        first = [(lower, upper)] if anchor is None else [(lower, upper), (anchor, anchor)]
        self.lower = np.stack([low for low, _ in first])
        self.upper = np.stack([high for _, high in first])
        self.left: IntArray = np.full(len(first), -1, dtype=np.int64)
        width = upper - lower
        self._scale = np.where(width > 0.0, width, 1.0)

    def __len__(self) -> int:
        return len(self.left)

    @property
    def root(self) -> tuple[IntArray, IntArray]:
        """The pair that covers everything."""
        return np.zeros(1, dtype=np.int64), np.full(1, int(self.anchored), dtype=np.int64)

    def width(self, boxes: IntArray) -> FloatArray:
        """Longest sides, in units of the root's."""
        sides = (self.upper[boxes] - self.lower[boxes]) / self._scale
        return np.asarray(sides.max(axis=1))

    def children(self, x: IntArray, y: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Pairs that cover the pairs (x, y), but for the order of the two, and their parents.

        A pair (X, X) becomes three; of another the longer box is split. Children of one parent are
        adjacent.
        """
        same = x == y
        first = np.ones(len(x), dtype=np.bool_)
        if not self.anchored:
            first = same | (self.width(x) >= self.width(y))
        self._split(np.unique(np.where(first, x, y)))
        left = self.left[np.where(first, x, y)]
        count = np.where(same, 3, 2)
        parent = np.repeat(np.arange(len(x)), count)
        rank = np.arange(len(parent)) - np.repeat(np.cumsum(count) - count, count)
        kept = np.where(first, y, x)[parent]
        # of a pair (X, X): (left, left), (left, right), (right, right)
        diagonal = same[parent]
        one = left[parent] + np.where(diagonal, rank == 2, rank)
        two = np.where(diagonal, left[parent] + (rank >= 1), kept)
        swap = ~first[parent]
        return parent, np.where(swap, two, one), np.where(swap, one, two)

    def _split(self, boxes: IntArray) -> None:
        boxes = boxes[self.left[boxes] < 0]
        if not len(boxes):
            return
        lower, upper = self.lower[boxes], self.upper[boxes]
        dim = ((upper - lower) / self._scale).argmax(axis=1)
        line = np.arange(len(boxes))
        low, high = lower[line, dim], upper[line, dim]
        middle = np.clip(0.5 * low + 0.5 * high, low, high)
        new_upper, new_lower = upper.copy(), lower.copy()
        new_upper[line, dim] = middle
        new_lower[line, dim] = middle
        self.left[boxes] = len(self) + 2 * line
        lowers = np.stack([lower, new_lower], axis=1).reshape(-1, lower.shape[1])
        uppers = np.stack([new_upper, upper], axis=1).reshape(-1, lower.shape[1])
        self.lower = np.concatenate([self.lower, lowers])
        self.upper = np.concatenate([self.upper, uppers])
        self.left = np.concatenate([self.left, np.full(2 * len(boxes), -1, dtype=np.int64)])


def distance_below(
    center: FloatArray, norm: float, lower: FloatArray, upper: FloatArray
) -> FloatArray:
    """Lower bounds (b,) of the distance from ``center`` to any point of boxes (b, n)."""
    gap = np.nextafter(np.maximum(lower - center, center - upper), -np.inf)
    gap = np.maximum(gap, 0.0)
    if norm == np.inf:
        return np.asarray(gap.max(axis=1))
    least = 1.0 - 8.0 * (gap.shape[1] + 4) * UNIT
    if norm == 1.0:
        return np.asarray(gap.sum(axis=1) * least)
    scale = np.maximum(gap.max(axis=1, keepdims=True), 1e-300)
    return np.asarray(np.sqrt(np.square(gap / scale).sum(axis=1)) * scale[:, 0] * least)


class PairTests:
    """Tests of pairs of boxes of a tree.

    Args:
        tree: the boxes.
        networks: one, or two for matching.
        directions: (k, m) for the first network.
        tolerance: for :attr:`Step.NEAR`.
        slack: relative; a search asks for this much more than the checker, whose rounding differs.
        output_tolerance: outputs of the first network that differ by no more count as equal.
        separation: with one network and an output tolerance, pairs at least so far apart are
            excluded, others are not asked about (maximum norm).

    Raises:
        UnsupportedOperationError: see :class:`SecantNetwork`.
    """

    def __init__(
        self,
        tree: BoxTree,
        networks: Sequence[NetworkRecord],
        directions: FloatArray,
        tolerance: float,
        slack: float = 0.0,
        *,
        output_tolerance: float = 0.0,
        separation: float = 0.0,
    ) -> None:
        self.tree, self.tolerance, self.slack = tree, tolerance, slack
        self.output_tolerance, self.separation = output_tolerance, separation
        self.first = SecantNetwork(networks[0], directions)
        self.second: SecantNetwork | None = None
        if len(networks) > 1:
            plain = SecantNetwork(networks[1], np.zeros((0, 1)))
            eye = np.eye(plain.network.output_size)
            self.second = SecantNetwork(networks[1], eye)
        self._facts: list[_FactTable] = [_FactTable(self.first)]
        if self.second is not None:
            self._facts.append(_FactTable(self.second))

    @property
    def useful(self) -> tuple[Step, ...]:
        """The tests that can hold for some pair, cheap ones first."""
        found = [] if self.separation == 0.0 else [Step.CLOSE]
        found += [Step.APART, Step.STEEP]
        found += [] if self.output_tolerance else [Step.SIGN]
        return (*found, *([] if self.second is None else [Step.NEAR]))

    def holds(self, step: Step, x: IntArray, y: IntArray) -> BoolArray:
        """Which pairs (p,) the step excludes; ``SPLIT`` and ``OUTSIDE`` are no tests."""
        found: BoolArray = np.zeros(len(x), dtype=np.bool_)
        test = {
            Step.APART: self._apart,
            Step.STEEP: self._steep,
            Step.SIGN: self._sign,
            Step.NEAR: self._near,
            Step.CLOSE: self._close,
        }[step]
        with np.errstate(all="ignore"):  # what is not finite excludes nothing
            for start in range(0, len(x), _PAIRS):
                part = slice(start, start + _PAIRS)
                found[part] = test(x[part], y[part])
        return found

    def _pair(self, table: int, x: IntArray, y: IntArray) -> tuple[BoxFacts, BoxFacts]:
        facts = self._facts[table]
        return facts.at(self.tree, x), facts.at(self.tree, y)

    def _apart(self, x: IntArray, y: IntArray) -> BoolArray:
        a, b = self._pair(0, x, y)
        size = self.slack * sum(np.abs(v) for v in (*a.along, *b.along))
        above, below = a.along[0] - b.along[1], b.along[0] - a.along[1]
        if self.output_tolerance:
            size = size + self._reach(self.first.directions)
            above, below = np.nextafter(above, -np.inf), np.nextafter(below, -np.inf)
        return np.asarray(((above > size) | (below > size)).any(axis=1))

    def _reach(self, rows: FloatArray) -> FloatArray:
        """Upper bounds of ``|rows @ g|`` for ``|g| <= output_tolerance``; rows (..., k, m)."""
        size = np.abs(rows).sum(axis=-1) * self.output_tolerance
        return np.asarray(size * INFLATION + UNDERFLOW)

    def _steep(self, x: IntArray, y: IntArray) -> BoolArray:
        secants = self.first.secants(*self._pair(0, x, y))
        slopes = self.first.slopes(secants)
        inverse = _inverse(slopes)
        made = multiply(inverse, slopes)
        n = made.center.shape[1]
        rest = np.abs(np.eye(n) - made.center) + made.radius
        rest += 4.0 * UNIT * (1.0 + np.abs(made.center))
        most = rest.sum(axis=2).max(axis=1) * (1.0 + gamma(n))
        regular = most < 1.0 - self.slack
        low, high = self._moved(made, x, y)
        size = self.slack * (np.abs(low) + np.abs(high))
        if self.output_tolerance:  # |d| <= |C S d| / (1 - |I - C S|), in the maximum norm
            reach = self._reach(inverse)
            least = (1.0 - self.slack) * (1.0 - 16.0 * UNIT) * self.separation * (1.0 - most)
            regular &= reach.max(axis=1) < least
            size = size + reach
        return np.asarray(regular | ((low > size) | (high < -size)).any(axis=1))

    def _sign(self, x: IntArray, y: IntArray) -> BoolArray:
        if self.output_tolerance:  # says that outputs differ, not by how much
            return np.zeros(len(x), dtype=np.bool_)
        secants = self.first.secants(*self._pair(0, x, y))
        return self.first.one_sign(secants, _inverse(self.first.slopes(secants)))

    def _near(self, x: IntArray, y: IntArray) -> BoolArray:
        if self.second is None:
            return np.zeros(len(x), dtype=np.bool_)
        a, b = self._pair(1, x, y)
        low, high = self._moved(self.second.slopes(self.second.secants(a, b)), x, y)
        most = np.fmin(high, np.nextafter(a.along[1] - b.along[0], np.inf))
        least = np.fmax(low, np.nextafter(a.along[0] - b.along[1], -np.inf))
        limit = self.tolerance * (1.0 - self.slack)
        return np.asarray(((most < limit) & (least > -limit)).all(axis=1))

    def _close(self, x: IntArray, y: IntArray) -> BoolArray:
        tree = self.tree
        one = np.nextafter(tree.upper[x] - tree.lower[y], np.inf)
        two = np.nextafter(tree.upper[y] - tree.lower[x], np.inf)
        return np.asarray(np.maximum(one, two).max(axis=1) < self.separation)

    def _moved(self, slopes: Slopes, x: IntArray, y: IntArray) -> tuple[FloatArray, FloatArray]:
        """Ends (p, m) of ``S d`` for d between points of the pairs."""
        tree = self.tree
        low = np.nextafter(tree.lower[x] - tree.upper[y], -np.inf)
        high = np.nextafter(tree.upper[x] - tree.lower[y], np.inf)
        products = [
            end * d[:, None, :]
            for end in (slopes.center - slopes.radius, slopes.center + slopes.radius)
            for d in (low, high)
        ]
        size = np.maximum.reduce([np.abs(p) for p in products]).sum(axis=2)
        error = (gamma(low.shape[1]) + 8.0 * UNIT) * size + 2.0**-800
        least = np.minimum.reduce(products).sum(axis=2) - error
        most = np.maximum.reduce(products).sum(axis=2) + error
        return least, most


class _FactTable:
    """Facts of the boxes that were asked for, by box number."""

    def __init__(self, network: SecantNetwork) -> None:
        self._network = network
        self._place: IntArray = np.full(0, -1, dtype=np.int64)
        self._stored: list[FloatArray] = []
        self._count = 0

    def at(self, tree: BoxTree, boxes: IntArray) -> BoxFacts:
        """Facts of boxes, from before where they were asked for already."""
        if len(self._place) < len(tree):
            more = np.full(2 * len(tree) - len(self._place), -1, dtype=np.int64)
            self._place = np.concatenate([self._place, more])
        new = np.unique(boxes[self._place[boxes] < 0])
        for start in range(0, len(new), _BOXES):
            part = new[start : start + _BOXES]
            self._store(self._network.enclose(tree.lower[part], tree.upper[part]))
            self._place[part] = self._count + np.arange(len(part))
            self._count += len(part)
        rows = self._place[boxes]
        low, high, least, most = (array[rows] for array in self._stored)
        return BoxFacts((low, high), (least, most))

    def _store(self, facts: BoxFacts) -> None:
        arrays = (*facts.before, *facts.along)
        if not self._stored:
            self._stored = [np.zeros((0, a.shape[1])) for a in arrays]
        room = len(self._stored[0]) - self._count
        for i, array in enumerate(arrays):
            if room < len(array):  # doubled, so that growing costs little in all
                spare = np.zeros((self._count + len(array), array.shape[1]))
                self._stored[i] = np.concatenate([self._stored[i][: self._count], array, spare])
            else:
                self._stored[i][self._count : self._count + len(array)] = array


def _inverse(slopes: Slopes) -> FloatArray:
    """C (p, n, m): pseudoinverses of the centers; zero where they are not finite."""
    good: BoolArray = np.asarray(np.isfinite(slopes.center).all(axis=(1, 2)))
    center = np.where(good[:, None, None], slopes.center, 0.0)
    try:
        return np.asarray(np.linalg.pinv(center, rcond=1e-12))
    except np.linalg.LinAlgError:
        return np.zeros((len(center), center.shape[2], center.shape[1]))
