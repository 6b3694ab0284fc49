"""Operators as the checker sees them: an interval rule and a relaxation that pulls rows back.

``propagate`` takes the enclosures of an operator's inputs over a batch of b boxes and returns
bounds of its output together with a :class:`Relaxation` valid on those enclosures. The promise of
``Relaxation.pull_back(rows)``, returning ``(pieces, gain)``, is

    rows @ y >= sum_i pieces[i] @ x_i + gain        in exact reals,

for all inputs x_i within the enclosures, y being the operator's output in the chosen arithmetic.

Float coefficients need not be exact: with P = fl(A M) and |x| <= h,
``A M x >= P x - g_k |A| (|M| h)``, so all rounding costs one product of |A| with a fixed vector
``slack``, computed once per box. The same vector carries the deviation of float32 evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from torch_prepared.certify.facts import (
    EXACT_IN_FLOAT,
    ActivationFacts,
    LineOffsets,
    default_slopes,
)
from torch_prepared.certify.linear_maps import LinearMap
from torch_prepared.certify.rounding import (
    INFLATION,
    UNDERFLOW,
    UNIT,
    UNIT_FLOAT32,
    BoolArray,
    FloatArray,
    IntArray,
    gamma,
    row_dot,
    sum_below,
)

__all__ = [
    "Activation",
    "Affine",
    "Arithmetic",
    "Enclosure",
    "MaxPool",
    "Operator",
    "Relaxation",
    "SlopePair",
]

SlopePair = tuple[FloatArray | None, FloatArray | None]
"""Suggested slopes of the lower and the upper line, each (b or 1, n); None means the default."""

_FLOAT32_TINY = 2.0**-126  # covers float32 underflow, flushed to zero or not
_FLOAT32_LARGE = 2.0**127


@dataclass(frozen=True)
class Arithmetic:
    """How the network is evaluated: exact reals, or float32 in any summation order.

    Args:
        float32: whether rounding of the evaluation is to be bounded.
        activation_ulp: error of float32 transcendental functions in units of the last place of
            ``max(1, |value|, |x|)``; None when unknown.
    """

    float32: bool = False
    activation_ulp: float | None = None

    def affine_error(self, terms: int, size: FloatArray) -> FloatArray | float:
        """Deviation of a float32 sum of ``terms`` products whose magnitudes add up to ``size``."""
        if not self.float32 or terms == 0:
            return 0.0
        error = gamma(terms, UNIT_FLOAT32) * size + (terms + 2) * _FLOAT32_TINY
        return np.where(size < _FLOAT32_LARGE, error, np.nan)  # overflow cannot be excluded

    def activation_error(self, op: str, facts: ActivationFacts, size: FloatArray) -> FloatArray:
        """Deviation of a float32 activation; ``size`` bounds |value| and |x|."""
        if not self.float32 or op in EXACT_IN_FLOAT:
            return np.zeros_like(size)
        if facts.piecewise_linear:
            return gamma(1, UNIT_FLOAT32) * facts.lipschitz * size + _FLOAT32_TINY
        if self.activation_ulp is None:
            return np.full_like(size, np.nan)
        return self.activation_ulp * 2.0 * UNIT_FLOAT32 * np.maximum(1.0, size) * INFLATION


class Enclosure:
    """Intervals ``[lower, upper]`` (b, n) of a value, with what concretization needs of them."""

    def __init__(self, lower: FloatArray, upper: FloatArray) -> None:
        self.lower, self.upper = lower, upper
        self.center = 0.5 * lower + 0.5 * upper
        radius = np.maximum(upper - self.center, self.center - lower)
        self.radius = radius * (1.0 + 4.0 * UNIT) + UNDERFLOW
        self.reach = np.maximum(np.abs(lower), np.abs(upper))

    def concretize(self, rows: FloatArray, boxes: IntArray) -> FloatArray:
        """Lower bounds (r,) of ``rows[i] @ x`` over the intervals of box ``boxes[i]``.

        Not finite whenever a coefficient is not finite, because the radius is positive.
        """
        # both products are off by at most g_n |rows| reach, since center and radius <= reach;
        # gamma(n) is more than twice g_n
        spread = self.radius + gamma(rows.shape[1]) * self.reach
        return sum_below(row_dot(rows, self.center, boxes), -row_dot(np.abs(rows), spread, boxes))

    def underflow(self) -> FloatArray:
        """(b,): covers underflow in any coefficient of a row applied to this value."""
        total: FloatArray = UNDERFLOW * (1.0 + self.reach.sum(axis=1))
        return total


class Relaxation(Protocol):
    """Linear bounds of an operator on a batch of boxes."""

    def pull_back(self, rows: FloatArray, boxes: IntArray) -> tuple[list[FloatArray], FloatArray]:
        """Rows (r, n) on each input and the gain (r,); see the module's promise."""


class Operator(Protocol):
    """One node of the network; ``size`` scalars computed from the values named ``sources``."""

    name: str
    sources: tuple[str, ...]
    size: int

    @property
    def workspace(self) -> int:
        """Scalars held at once per pulled-back row."""

    def propagate(
        self, inputs: Sequence[Enclosure], slopes: SlopePair, arithmetic: Arithmetic
    ) -> tuple[FloatArray, FloatArray, Relaxation]:
        """Bounds (b, size) of the output and a relaxation valid on the inputs' enclosures."""

    def contested(self, inputs: Enclosure) -> BoolArray:
        """Which entries (b, n) of the input a tighter interval would help."""

    def is_flat_below(self, inputs: Enclosure) -> BoolArray:
        """Entries (b, n) of which no lower end would change anything, the upper one being known."""


class Affine:
    """``y = sum_i M_i x_i + bias``.

    Args:
        name: of the node.
        sources: names of the inputs.
        maps: one linear map per input; entries may be off by a relative 8 u.
        bias: (m,) or None; may be off by 8 u times ``offset_size``.
        offset_size: (m,) at least ``|bias|`` and all of its intermediate results; None for no
            bias.
        terms: longest sum behind one output, 0 when the operator only copies.
        size: m.
    """

    def __init__(
        self,
        name: str,
        sources: tuple[str, ...],
        maps: Sequence[LinearMap],
        *,
        bias: FloatArray | None,
        offset_size: FloatArray | None,
        terms: int,
        size: int,
    ) -> None:
        self.name, self.sources, self.size = name, sources, size
        self.maps, self.bias, self.terms = maps, bias, terms
        self._magnitudes = [m.magnitude() for m in maps]
        self._offset_size = offset_size
        backward = max(m.backward_terms for m in maps)
        # one rounding bound serves intervals, coefficients and the product with the bias
        self._rounding = gamma(max(terms, backward, 0 if bias is None else size))
        self.workspace = max(m.workspace for m in maps)

    def propagate(
        self, inputs: Sequence[Enclosure], slopes: SlopePair, arithmetic: Arithmetic
    ) -> tuple[FloatArray, FloatArray, Relaxation]:
        """See :class:`Operator`. Center and radius form, widened by ``slack``."""
        del slopes
        underflow = _total([e.underflow() for e in inputs])
        if self._rounding == 0.0:
            lower = self._sum_ends(inputs, upper=False)
            upper = self._sum_ends(inputs, upper=True)
            return lower, upper, _AffineRelaxation(self, None, underflow)
        pairs = list(zip(self._magnitudes, inputs, strict=True))
        size = _total([m.apply(e.reach) for m, e in pairs])
        radius = _total([m.apply(e.radius) for m, e in pairs])
        center = _total([m.apply(e.center) for m, e in zip(self.maps, inputs, strict=True)])
        if self.bias is not None and self._offset_size is not None:
            center, size = center + self.bias, size + self._offset_size
        error = self._rounding * size + arithmetic.affine_error(self.terms, size)
        slack = error * INFLATION + UNDERFLOW
        radius = radius + slack
        relaxation = _AffineRelaxation(self, slack, underflow)
        return center - radius, center + radius, relaxation

    def _sum_ends(self, inputs: Sequence[Enclosure], *, upper: bool) -> FloatArray:
        """End points of an exact operator: entries are only copied or negated."""
        total: FloatArray = np.zeros((inputs[0].lower.shape[0], self.size))
        for linear, e in zip(self.maps, inputs, strict=True):
            low, high = linear.apply(e.lower), linear.apply(e.upper)
            total = total + (np.maximum(low, high) if upper else np.minimum(low, high))
        return total

    def contested(self, inputs: Enclosure) -> BoolArray:
        """See :class:`Operator`: an affine operator is never relaxed."""
        return np.zeros(inputs.lower.shape, dtype=np.bool_)

    def is_flat_below(self, inputs: Enclosure) -> BoolArray:
        """See :class:`Operator`: its intervals depend on both ends."""
        return np.zeros(inputs.lower.shape, dtype=np.bool_)


def _total(parts: Sequence[FloatArray]) -> FloatArray:
    """Plain rounded sum of at least one array."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class _AffineRelaxation:
    def __init__(self, operator: Affine, slack: FloatArray | None, underflow: FloatArray) -> None:
        self._operator, self._slack, self._underflow = operator, slack, underflow

    def pull_back(self, rows: FloatArray, boxes: IntArray) -> tuple[list[FloatArray], FloatArray]:
        pieces = [m.transpose(rows) for m in self._operator.maps]
        terms = [-self._underflow[boxes]]
        if self._slack is not None:
            terms.append(-row_dot(np.abs(rows), self._slack, boxes))
        if self._operator.bias is not None:
            terms.append(np.matmul(rows, self._operator.bias))
        return pieces, sum_below(*terms)


class Activation:
    """An elementwise function known to :mod:`torch_prepared.certify.facts`."""

    def __init__(self, name: str, source: str, op: str, facts: ActivationFacts, size: int) -> None:
        self.name, self.size, self.workspace = name, size, size
        self.sources: tuple[str, ...] = (source,)
        self.op, self.facts = op, facts

    def propagate(
        self, inputs: Sequence[Enclosure], slopes: SlopePair, arithmetic: Arithmetic
    ) -> tuple[FloatArray, FloatArray, Relaxation]:
        """See :class:`Operator`. Slopes are taken as suggested; offsets are computed here."""
        (box,) = inputs
        lines = LineOffsets(self.facts, box.lower, box.upper)
        lower, upper = lines.offset(0.0, above=False), lines.offset(0.0, above=True)
        size = np.maximum(np.maximum(np.abs(lower), np.abs(upper)), box.reach)
        error = arithmetic.activation_error(self.op, self.facts, size)
        chosen = self._slopes(box, slopes)
        offsets = (
            lines.offset(chosen[0], above=False) - error,
            lines.offset(chosen[1], above=True) + error,
        )
        relaxation = _LineRelaxation(box, chosen, offsets, error)
        return lower - error, upper + error, relaxation

    def _slopes(self, box: Enclosure, slopes: SlopePair) -> tuple[FloatArray, FloatArray]:
        """Suggested or default slopes; the exact one where the function is linear."""
        low, high = slopes
        if low is None or high is None:
            default = default_slopes(self.facts, box.lower, box.upper)
            low = default[0] if low is None else low
            high = default[1] if high is None else high
        linear = self.facts.is_linear_on(box.lower, box.upper)
        exact = self.facts.derivative(box.center)
        return np.where(linear, exact, low), np.where(linear, exact, high)

    def contested(self, inputs: Enclosure) -> BoolArray:
        """See :class:`Operator`."""
        needed: BoolArray = ~self.facts.is_linear_on(inputs.lower, inputs.upper)
        return needed

    def is_flat_below(self, inputs: Enclosure) -> BoolArray:
        """See :class:`Operator`: where the function is constant from the upper end down."""
        linear = self.facts.is_linear_on(np.full_like(inputs.upper, -np.inf), inputs.upper)
        flat: BoolArray = linear & (self.facts.derivative(inputs.upper) == 0.0)
        return flat


class _LineRelaxation:
    """``slope x + offset`` below and above, per entry."""

    def __init__(
        self,
        box: Enclosure,
        slopes: tuple[FloatArray, FloatArray],
        offsets: tuple[FloatArray, FloatArray],
        error: FloatArray,
    ) -> None:
        steepness = np.maximum(np.abs(slopes[0]), np.abs(slopes[1]))
        shift = np.maximum(np.abs(offsets[0]), np.abs(offsets[1]))
        # each coefficient is one product; the gain is one sum of n products
        size = steepness * box.reach + shift + error
        slack = gamma(size.shape[1]) * size * INFLATION + UNDERFLOW
        self._slopes, self._offsets = slopes, (offsets[0] - slack, offsets[1] + slack)
        self._underflow = box.underflow()

    def pull_back(self, rows: FloatArray, boxes: IntArray) -> tuple[list[FloatArray], FloatArray]:
        positive, negative = np.maximum(rows, 0.0), np.minimum(rows, 0.0)
        (low, high), (below, above) = self._slopes, self._offsets
        gain = sum_below(
            row_dot(positive, below, boxes),
            row_dot(negative, above, boxes),
            -self._underflow[boxes],
        )
        positive *= _pick(low, boxes)
        negative *= _pick(high, boxes)
        positive += negative
        return [positive], gain


def _pick(vectors: FloatArray, boxes: IntArray) -> FloatArray:
    """The vector of every row's box, (r, n), or (1, n) where there is only one box."""
    return vectors if len(vectors) == 1 else vectors.take(boxes, axis=0)


class MaxPool:
    """``y_j = max_t x[windows[j, t]]``; entries -1 of ``windows`` (m, k) are padding."""

    def __init__(self, name: str, source: str, windows: IntArray, in_size: int) -> None:
        self.name = name
        self.sources: tuple[str, ...] = (source,)
        self.size, self.in_size, self.windows = windows.shape[0], in_size, windows
        self.workspace = 2 * max(self.size, in_size)

    def propagate(
        self, inputs: Sequence[Enclosure], slopes: SlopePair, arithmetic: Arithmetic
    ) -> tuple[FloatArray, FloatArray, Relaxation]:
        """See :class:`Operator`. Exact in every arithmetic."""
        del slopes, arithmetic
        (box,) = inputs
        padding = self.windows < 0
        lows = np.where(padding, -np.inf, box.lower[:, self.windows])  # (b, m, k)
        highs = np.where(padding, -np.inf, box.upper[:, self.windows])
        lower, upper = lows.max(axis=2), highs.max(axis=2)
        chosen = lows.argmax(axis=2)
        np.put_along_axis(highs, chosen[:, :, None], -np.inf, axis=2)
        dominant = lower >= highs.max(axis=2)
        return lower, upper, _PoolRelaxation(self, box, chosen, dominant, upper)

    def contested(self, inputs: Enclosure) -> BoolArray:
        """See :class:`Operator`: every entry may decide a window."""
        return np.ones(inputs.lower.shape, dtype=np.bool_)

    def is_flat_below(self, inputs: Enclosure) -> BoolArray:
        """See :class:`Operator`: any entry's lower end may dominate."""
        return np.zeros(inputs.lower.shape, dtype=np.bool_)


class _PoolRelaxation:
    """Below: the chosen entry of each window. Above: the same if dominant, else a constant."""

    def __init__(
        self,
        operator: MaxPool,
        box: Enclosure,
        chosen: IntArray,
        dominant: BoolArray,
        upper: FloatArray,
    ) -> None:
        self._operator, self._chosen, self._dominant = operator, chosen, dominant
        self._constant = np.where(dominant, 0.0, upper)
        # overlapping windows add up to k coefficients; the gain is one sum of m products
        reach = np.where(operator.windows < 0, 0.0, box.reach[:, operator.windows]).max(axis=2)
        size = reach + np.abs(self._constant)
        terms = max(operator.windows.shape[1], operator.size)
        self._slack = gamma(terms) * size * INFLATION + UNDERFLOW
        self._underflow = box.underflow()

    def pull_back(self, rows: FloatArray, boxes: IntArray) -> tuple[list[FloatArray], FloatArray]:
        dominant, chosen = self._dominant[boxes], self._chosen[boxes]
        moved = np.where(dominant, rows, np.maximum(rows, 0.0))
        piece = np.zeros((len(rows), self._operator.in_size))
        for tap in range(self._operator.windows.shape[1]):
            inside = self._operator.windows[:, tap] >= 0
            targets = self._operator.windows[inside, tap]  # distinct within one tap
            piece[:, targets] += np.where(chosen[:, inside] == tap, moved[:, inside], 0.0)
        gain = sum_below(
            row_dot(np.minimum(rows, 0.0), self._constant, boxes),
            -row_dot(np.abs(rows), self._slack, boxes),
            -self._underflow[boxes],
        )
        return [piece], gain
