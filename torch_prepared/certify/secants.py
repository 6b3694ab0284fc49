"""Bounds over pairs of boxes: can an x of one and a y of the other have the same output?

For a piecewise affine network ``f(x) - f(y) = S (x - y)`` holds exactly, where ``S`` is the product
of the weights and, for every activation, of the diagonal matrix of its secant slopes between x and
y. An activation ``h`` that is convex has secants ``(h(a) - h(b)) / (a - b)`` that grow with a and
with b, so their range over a in [p, q] and b in [r, s] is exactly [secant(p, r), secant(q, s)].

``S`` depends on the secant of any one scalar in an affine way and with rank one; therefore
``det(C S)`` is affine in each of them, and takes its extreme values where all are at their ends.
Activations that read exactly the same or exactly opposite numbers (``x = relu(x) - relu(-x)``) have
one secant between them; see :meth:`SecantNetwork.one_sign`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from torch_prepared.certify.linear_maps import Dense
from torch_prepared.certify.network import read_network
from torch_prepared.certify.operators import Activation, Affine, Arithmetic
from torch_prepared.certify.propagation import Propagation
from torch_prepared.certify.records import InputRecord, NetworkRecord
from torch_prepared.certify.rounding import (
    INFLATION,
    UNDERFLOW,
    UNIT,
    BoolArray,
    FloatArray,
    IntArray,
    gamma,
)
from torch_prepared.errors import UnsupportedOperationError

__all__ = ["BoxFacts", "SecantNetwork", "Slopes"]

MOST_INPUTS = 4  #: beyond, determinants by expansion cost too much
MOST_SWITCHES = 8  #: unsettled secants whose ends are all tried
_CHUNK = 2**20  # scalars of one batch of slope matrices times the widest value

Range = tuple[FloatArray, FloatArray]
"""Lower and upper ends."""


@dataclass(frozen=True)
class BoxFacts:
    """What is known of one network on b boxes; NaN where nothing is.

    Attributes:
        before: ends (b, h) of what the activations read, in order.
        along: ends (b, k) of the output along each direction.
    """

    before: Range
    along: Range

    def take(self, boxes: IntArray) -> BoxFacts:
        """Facts of some of the boxes."""
        (a, b), (c, d) = self.before, self.along
        return BoxFacts((a[boxes], b[boxes]), (c[boxes], d[boxes]))


@dataclass(frozen=True)
class Slopes:
    """Interval matrices (p, m, n) that hold every ``S`` of p pairs of boxes."""

    center: FloatArray
    radius: FloatArray


class SecantNetwork:
    """One network, its outputs looked at along ``directions`` (k, m).

    Args:
        network: structure and weights as stored.
        directions: any finite numbers; they only decide what can be shown.

    Raises:
        UnsupportedOperationError: an activation that is not ReLU or a convex leaky ReLU, or another
            operator that is not affine.
    """

    def __init__(self, network: NetworkRecord, directions: FloatArray) -> None:
        self.network = read_network(network)
        self.directions = directions
        self._activations: list[Activation] = []
        self._least: list[FloatArray] = []
        for operator in self.network.operators:
            if isinstance(operator, Activation) and operator.op in ("relu", "leaky_relu"):
                slope = float(operator.facts.derivative(np.array([-1.0]))[0])
                if 0.0 <= slope <= 1.0:
                    self._activations.append(operator)
                    self._least.append(np.full(operator.size, slope))
                    continue
            if not isinstance(operator, Affine):
                raise UnsupportedOperationError(
                    f"{operator.name}: expected affine operators, ReLU or leaky ReLU with a slope "
                    "of at most 1"
                )
        self._alpha: FloatArray = np.concatenate([np.zeros(0), *self._least])
        self._tied, self._opposite = self._ties()

    def _ties(self) -> tuple[IntArray, BoolArray]:
        """For each activation the first one that reads exactly the same or exactly the opposite.

        The secants of these are the same, or add up to ``1 + alpha``, for every pair of points.
        """
        producers = {o.name: o for o in self.network.operators}
        tied: list[IntArray] = [np.zeros(0, dtype=np.int64)]
        opposite: list[BoolArray] = [np.zeros(0, dtype=np.bool_)]
        start = 0
        for activation in self._activations:
            own, flipped = np.arange(activation.size), np.zeros(activation.size, dtype=np.bool_)
            source = producers.get(activation.sources[0])
            if isinstance(source, Affine) and len(source.maps) == 1:
                linear = source.maps[0]
                if isinstance(linear, Dense) and linear.positions == 1:
                    bias = np.zeros(len(own)) if source.bias is None else source.bias
                    own, flipped = _equal_rows(np.column_stack([linear.weight, bias]))
            tied.append(own + start)
            opposite.append(flipped)
            start += activation.size
        return np.concatenate(tied), np.concatenate(opposite)

    def enclose(self, lower: FloatArray, upper: FloatArray) -> BoxFacts:
        """Facts of boxes (b, n)."""
        box = InputRecord("box", lower.min(axis=0), upper.max(axis=0))
        with np.errstate(all="ignore"):  # what is not finite proves nothing
            plan = [a.sources[0] for a in self._activations]
            state = Propagation(
                self.network, box, lower, upper,
                known={}, tighten=plan, slopes={}, arithmetic=Arithmetic(),
            )  # fmt: skip
            count, k = len(lower), len(self.directions)
            rows = np.concatenate([self.directions, -self.directions])
            boxes = np.repeat(np.arange(count), 2 * k)
            found = state.lower_bounds(
                self.network.output_name, np.tile(rows, (count, 1)), np.zeros(len(boxes)), boxes
            ).reshape(count, 2 * k)
        lost = np.where(state.failed, np.nan, 0.0)[:, None]
        ends = [state.enclosures[name] for name in plan]
        nothing = np.zeros((count, 0))
        low = np.concatenate([nothing, *(e.lower for e in ends)], axis=1) + lost
        high = np.concatenate([nothing, *(e.upper for e in ends)], axis=1) + lost
        return BoxFacts((low, high), (found[:, :k], -found[:, k:]))

    def secants(self, x: BoxFacts, y: BoxFacts) -> Range:
        """Ends (p, h) of the secant slopes between points of p pairs of boxes."""
        with np.errstate(all="ignore"):
            low = _share(x.before[0], y.before[0], settled_first=True)
            high = _share(x.before[1], y.before[1], settled_first=False)
            low = np.minimum(low, high)  # where all that is read is 0, any secant is one
        return self._slope(low, -1.0), self._slope(high, 1.0)

    def _slope(self, share: FloatArray, side: float) -> FloatArray:
        """``alpha + (1 - alpha) share``, moved outward where it is rounded."""
        value = self._alpha + (1.0 - self._alpha) * share + side * 8.0 * UNIT
        value = np.clip(value, self._alpha, 1.0)
        settled = np.where(share <= 0.0, self._alpha, np.where(share >= 1.0, 1.0, value))
        return np.where(np.isnan(share), np.nan, settled)

    def slopes(self, secants: Range) -> Slopes:
        """Interval matrices of all products with secants in the given ranges (p, h)."""
        pairs, n, m = len(secants[0]), self.network.input_size, self.network.output_size
        widest = max([o.workspace for o in self.network.operators], default=n)
        step = max(1, _CHUNK // (widest * n))
        parts = [
            self._slopes(secants[0][i : i + step], secants[1][i : i + step])
            for i in range(0, pairs, step)
        ]
        if not parts:
            return Slopes(np.zeros((0, m, n)), np.zeros((0, m, n)))
        return Slopes(*(np.concatenate(p) for p in zip(*parts, strict=True)))

    def _slopes(self, low: FloatArray, high: FloatArray) -> tuple[FloatArray, FloatArray]:
        pairs, n = len(low), self.network.input_size
        eye = np.broadcast_to(np.eye(n), (pairs, n, n)).reshape(pairs * n, n)
        values: dict[str, Range] = {self.network.input_name: (eye, np.zeros_like(eye))}
        start = 0
        for operator in self.network.operators:
            if isinstance(operator, Affine):
                values[operator.name] = _through_affine(operator, values)
                continue
            part = slice(start, start + operator.size)
            start += operator.size
            middle = np.repeat(0.5 * low[:, part] + 0.5 * high[:, part], n, axis=0)
            half = np.repeat(0.5 * high[:, part] - 0.5 * low[:, part], n, axis=0)
            half = np.where(half > 0.0, half + 4.0 * UNIT, half)
            center, radius = values[operator.sources[0]]
            size = np.abs(center) + radius
            radius = middle * radius + half * size + 8.0 * UNIT * middle * size
            values[operator.name] = middle * center, radius * INFLATION + UNDERFLOW
        center, radius = values[self.network.output_name]
        shape = (pairs, n, self.network.output_size)
        return (
            center.reshape(shape).transpose(0, 2, 1),
            radius.reshape(shape).transpose(0, 2, 1),
        )

    def one_sign(self, secants: Range, inverse: FloatArray) -> BoolArray:
        """Whether ``det(C S)`` is never 0, so that ``S d = 0`` only for d = 0.

        Args:
            secants: ends (p, h); pairs with more than 8 unsettled ones are not tried.
            inverse: C (p, n, m), any numbers.
        """
        low, high = secants
        found: BoolArray = np.zeros(len(low), dtype=np.bool_)
        if self.network.input_size > MOST_INPUTS:
            return found
        unsettled = (low < high) & (self._tied == np.arange(low.shape[1]))
        counts = unsettled.sum(axis=1)
        known = np.isfinite(low).all(axis=1) & np.isfinite(high).all(axis=1)
        for k in np.unique(counts[known & (counts <= MOST_SWITCHES)]).tolist():
            every = np.flatnonzero(known & (counts == k))
            step = max(1, _CHUNK // (2**k * max(1, low.shape[1])))
            for start in range(0, len(every), step):
                chosen = every[start : start + step]
                found[chosen] = self._one_sign(
                    low[chosen], high[chosen], unsettled[chosen], inverse[chosen], k
                )
        return found

    def _one_sign(
        self,
        low: FloatArray,
        high: FloatArray,
        unsettled: BoolArray,
        inverse: FloatArray,
        k: int,
    ) -> BoolArray:
        """The same for pairs with k unsettled secants each."""
        place = np.nonzero(unsettled)[1].reshape(len(low), k)
        corners = (np.arange(2**k)[:, None] >> np.arange(k)) & 1  # (2^k, k)
        every = np.repeat(low[:, None], 2**k, axis=1)
        ends = np.where(
            corners[None] == 1,
            np.take_along_axis(high, place, axis=1)[:, None],
            np.take_along_axis(low, place, axis=1)[:, None],
        )
        np.put_along_axis(every, np.broadcast_to(place[:, None], ends.shape), ends, axis=2)
        flat = every.reshape(len(low) * 2**k, -1)
        made = multiply(np.repeat(inverse, 2**k, axis=0), self.slopes(self._follow(flat)))
        least, most = _determinant(made.center - made.radius, made.center + made.radius)
        positive = (least > 0.0).reshape(len(low), -1).all(axis=1)
        negative = (most < 0.0).reshape(len(low), -1).all(axis=1)
        return np.asarray(positive | negative)

    def _follow(self, secants: FloatArray) -> Range:
        """Ends of all secants where those that others are tied to have the given values."""
        value = secants[:, self._tied]
        other = np.where(value >= 1.0, self._alpha, 1.0 + self._alpha - value)
        other = np.where(value <= self._alpha, 1.0, other)
        settled = ~self._opposite | (value >= 1.0) | (value <= self._alpha)
        value = np.where(self._opposite, other, value)
        spread = np.where(settled, 0.0, 8.0 * UNIT)
        return value - spread, value + spread


def _equal_rows(rows: FloatArray) -> tuple[IntArray, BoolArray]:
    """For each row (k, n) the first that equals it or its negative, and whether it is negated."""
    rows = rows + 0.0  # negative zero becomes zero
    seen: dict[bytes, int] = {}
    first, negated = np.arange(len(rows)), np.zeros(len(rows), dtype=np.bool_)
    for i, row in enumerate(rows):
        opposite = seen.get((-row + 0.0).tobytes())
        if row.tobytes() in seen:
            first[i] = seen[row.tobytes()]
        elif opposite is not None:
            first[i], negated[i] = opposite, True
        else:
            seen[row.tobytes()] = i
    return first, negated


def multiply(inverse: FloatArray, slopes: Slopes) -> Slopes:
    """Interval matrices that hold ``C S``, for C (p, n, m)."""
    with np.errstate(all="ignore"):
        size = np.abs(inverse)
        center = inverse @ slopes.center
        reach = size @ (np.abs(slopes.center) + slopes.radius)
        radius = size @ slopes.radius + gamma(inverse.shape[2]) * reach
        # one more rounding when ends are formed
        radius = (radius + 4.0 * UNIT * np.abs(center)) * INFLATION + UNDERFLOW
    return Slopes(center, radius)


def _share(a: FloatArray, b: FloatArray, *, settled_first: bool) -> FloatArray:
    """Share of the segment from a to b that is above 0; at a = b = 0 either end is allowed."""
    big, small = np.maximum(a, b), np.minimum(a, b)
    share = big / (big - small)
    if settled_first:
        chosen = np.where(small >= 0.0, 1.0, np.where(big <= 0.0, 0.0, share))
    else:
        chosen = np.where(big <= 0.0, 0.0, np.where(small >= 0.0, 1.0, share))
    return np.where(np.isnan(a) | np.isnan(b), np.nan, chosen)


def _through_affine(operator: Affine, values: Mapping[str, Range]) -> Range:
    """The linear part applied to rows of center and radius."""
    inputs = [values[name] for name in operator.sources]
    center = sum_arrays([m.apply(c) for m, (c, _) in zip(operator.maps, inputs, strict=True)])
    magnitudes = [m.magnitude() for m in operator.maps]
    radius = sum_arrays([m.apply(r) for m, (_, r) in zip(magnitudes, inputs, strict=True)])
    size = sum_arrays(
        [m.apply(np.abs(c) + r) for m, (c, r) in zip(magnitudes, inputs, strict=True)]
    )
    slack = gamma(max(operator.terms, 1)) * size
    return center, (radius + slack) * INFLATION + UNDERFLOW


def sum_arrays(parts: list[FloatArray]) -> FloatArray:
    """Plain rounded sum of at least one array."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _determinant(low: FloatArray, high: FloatArray) -> Range:
    """Ends of the determinants of interval matrices (..., n, n), by expansion."""
    n = low.shape[-1]
    if n == 1:
        return low[..., 0, 0], high[..., 0, 0]
    total_low, total_high = np.zeros(low.shape[:-2]), np.zeros(low.shape[:-2])
    with np.errstate(all="ignore"):
        for j in range(n):
            rest = [i for i in range(n) if i != j]
            minor = _determinant(low[..., 1:, :][..., rest], high[..., 1:, :][..., rest])
            products = [a[..., 0, j] * b for a in (low, high) for b in minor]
            least = np.nextafter(np.minimum.reduce(products), -np.inf)
            most = np.nextafter(np.maximum.reduce(products), np.inf)
            if j % 2:
                least, most = -most, -least
            total_low = np.nextafter(total_low + least, -np.inf)
            total_high = np.nextafter(total_high + most, np.inf)
    return total_low, total_high
