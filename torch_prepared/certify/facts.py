"""Activation facts: the one table of what the checker believes about elementwise functions.

A function is described by breakpoints and by its curvature on each piece between them. From that
alone :class:`LineOffsets` computes, for *any* slope s, a sound offset of a line above or below the
function on an interval; slopes are therefore never trusted, only offsets matter. The interval
rule is the same thing with slope 0.

Assumption on the platform: NumPy's float64 ``tanh``, ``exp``, ``expm1``, ``log1p`` and the C
library's ``erf`` are correct to a few units in the last place. Function values get an error of 8
ulp of ``1 + |value| + |x|`` (none for piecewise-linear functions beyond their own roundings).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from torch_prepared.certify.rounding import UNDERFLOW, UNIT, BoolArray, FloatArray
from torch_prepared.errors import UnsupportedOperationError

__all__ = [
    "ActivationFacts",
    "Curvature",
    "LineOffsets",
    "activation_facts",
    "default_slopes",
]

_EVALUATION = 16.0 * UNIT  # 8 ulp
_LINEAR_EVALUATION = 4.0 * UNIT  # one product and one subtraction, doubled
_BISECTIONS = 45
# Threshold of u / -l for the lower line of ReLU, a little off the tie of areas: symmetric weights
# make many exact ties, where rounding might choose another slope here than in the bound engine.
_OFF_TIE = 1.0 + 2.0**-16


class Curvature(Enum):
    """Shape of a function on one piece."""

    LINEAR = "linear"
    CONVEX = "convex"
    CONCAVE = "concave"
    UNKNOWN = "unknown"  # a sliver enclosing an inflection point that is no float


@dataclass(frozen=True)
class ActivationFacts:
    """A continuous function, differentiable inside each piece.

    Args:
        value: the function.
        derivative: its derivative; at a breakpoint the derivative of the piece to its left.
        breaks: increasing breakpoints b_1 < ... < b_k.
        curvatures: of (-inf, b_1], [b_1, b_2], ..., [b_k, inf).
        lipschitz: bound of ``|derivative|`` everywhere (used on UNKNOWN slivers only).
        stationary: ``(slope, convex) -> x`` with ``derivative(x) ~ slope`` on a convex or concave
            piece; a guess whose quality affects tightness only. None means bisection.
    """

    value: Callable[[FloatArray], FloatArray]
    derivative: Callable[[FloatArray], FloatArray]
    breaks: tuple[float, ...]
    curvatures: tuple[Curvature, ...]
    lipschitz: float
    stationary: Callable[[FloatArray, bool], FloatArray] | None = None

    @property
    def piecewise_linear(self) -> bool:
        """Whether every piece is linear."""
        return all(c is Curvature.LINEAR for c in self.curvatures)

    def is_linear_on(self, lower: FloatArray, upper: FloatArray) -> BoolArray:
        """Where ``[lower, upper]`` lies within one linear piece."""
        edges = (-math.inf, *self.breaks, math.inf)
        result: BoolArray = np.zeros(lower.shape, dtype=np.bool_)
        for k, curvature in enumerate(self.curvatures):
            if curvature is Curvature.LINEAR:
                result |= (edges[k] <= lower) & (upper <= edges[k + 1])
        return result

    def error(self, value: FloatArray, x: FloatArray) -> FloatArray:
        """Bound of the rounding error of the computed ``value`` at x."""
        if self.piecewise_linear:
            return _LINEAR_EVALUATION * np.abs(value) + UNDERFLOW
        return _EVALUATION * (1.0 + np.abs(value) + np.abs(x))


class LineOffsets:
    """Offsets of lines above and below a function on intervals, for any slopes.

    With g(x) = sign * (f(x) - slope * x), sign = 1 above and -1 below, the task is an upper bound
    of sup g. On pieces where g is convex or linear the supremum is at an end point. Where g is
    concave, any tangent is above it: ``g(x) <= g(p) + |g'(p)| * width`` for every p in the piece;
    p is chosen near the maximizer.

    Args:
        facts: the function.
        lower: left ends; any shape that broadcasts with ``upper`` and slopes.
        upper: right ends.
    """

    def __init__(self, facts: ActivationFacts, lower: FloatArray, upper: FloatArray) -> None:
        self._facts = facts
        points = [lower, *(np.clip(b, lower, upper) for b in facts.breaks), upper]
        self._ends = [_Sample.at(facts, x) for x in points]  # of the pieces

    def offset(self, slope: FloatArray | float, *, above: bool) -> FloatArray:
        """Offset t such that ``slope * x + t`` is above (or below) the function.

        Args:
            slope: finite slopes.
            above: whether the line shall be above the function, else below.

        Returns:
            Offsets, NaN where an argument is NaN.

        Soundness: exact reals; every rounding is covered by an error term added outward.
        """
        facts, sign = self._facts, 1.0 if above else -1.0
        scores = [end.score(slope, sign) for end in self._ends]
        best = scores[0]
        for candidate in scores[1:]:
            best = np.maximum(best, candidate)
        for k, curvature in enumerate(facts.curvatures):
            if curvature is Curvature.LINEAR:
                continue
            left, right = self._ends[k].x, self._ends[k + 1].x
            width = (right - left) * (1.0 + 4.0 * UNIT)
            if curvature is Curvature.UNKNOWN:
                steepness = (facts.lipschitz + np.abs(slope)) * (1.0 + 4.0 * UNIT)
                ends = np.maximum(scores[k], scores[k + 1])
                best = np.maximum(best, ends + steepness * width)
            elif curvature is (Curvature.CONCAVE if above else Curvature.CONVEX):
                p = _stationary_point(facts, np.asarray(slope), left, right, convex=not above)
                tilt = np.abs(facts.derivative(p) - slope) + _EVALUATION * (1.0 + np.abs(slope))
                tangent = _Sample.at(facts, p).score(slope, sign)
                best = np.maximum(best, tangent + tilt * width * (1.0 + 4.0 * UNIT))
        return sign * (best + 4.0 * UNIT * np.abs(best) + UNDERFLOW)


@dataclass(frozen=True)
class _Sample:
    """A function's value at points x, and what rounding may have done to it."""

    x: FloatArray
    value: FloatArray
    rounding: FloatArray

    @classmethod
    def at(cls, facts: ActivationFacts, x: FloatArray) -> _Sample:
        value = facts.value(x)
        return cls(x, value, facts.error(value, x) + _LINEAR_EVALUATION * np.abs(value))

    def score(self, slope: FloatArray | float, sign: float) -> FloatArray:
        """At least ``sign * (value - slope * x)``."""
        line = slope * self.x
        gap = self.value - line if sign > 0 else line - self.value
        score: FloatArray = gap + (self.rounding + _LINEAR_EVALUATION * np.abs(line))
        return score


def _stationary_point(
    facts: ActivationFacts, slope: FloatArray, left: FloatArray, right: FloatArray, *, convex: bool
) -> FloatArray:
    """A point of [left, right] where the derivative is close to ``slope``, as far as possible."""
    if facts.stationary is not None:
        return np.clip(facts.stationary(slope, convex), left, right)
    low, high = np.broadcast_arrays(left + 0.0 * slope, right + 0.0 * slope)
    for _ in range(_BISECTIONS):
        middle = 0.5 * low + 0.5 * high
        go_right = (facts.derivative(middle) < slope) == convex
        low, high = np.where(go_right, middle, low), np.where(go_right, high, middle)
    return np.clip(0.5 * low + 0.5 * high, left, right)


def default_slopes(
    facts: ActivationFacts, lower: FloatArray, upper: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The deterministic slopes (lower line, upper line) used where a certificate gives none.

    Among the chord and the derivative at equally spaced points, the line that is tightest at the
    middle of the interval. For ReLU this is: upper ``u / (u - l)``, lower 1 if
    ``u > -(1 + 2^-16) l`` else 0.
    """
    width = upper - lower
    chord = (facts.value(upper) - facts.value(lower)) / np.where(width > 0, width, 1.0)
    if facts.piecewise_linear and len(facts.breaks) == 1:
        left, right = facts.derivative(lower), facts.derivative(upper)
        side = np.where(upper > -_OFF_TIE * lower, right, left)
        bends_up = right >= left
        return np.where(bends_up, side, chord), np.where(bends_up, chord, side)
    steps = np.linspace(0.0, 1.0, 9).reshape(-1, *([1] * lower.ndim))
    slopes = np.concatenate([chord[None], facts.derivative(lower + steps * width)])
    middle = 0.5 * lower + 0.5 * upper
    offsets = LineOffsets(facts, lower, upper)
    above = slopes * middle + offsets.offset(slopes, above=True)
    below = slopes * middle + offsets.offset(slopes, above=False)
    return (
        np.take_along_axis(slopes, np.argmax(below, axis=0)[None], axis=0)[0],
        np.take_along_axis(slopes, np.argmin(above, axis=0)[None], axis=0)[0],
    )


def activation_facts(op: str, attrs: Mapping[str, object], where: str) -> ActivationFacts:
    """The facts of operator ``op``.

    Raises:
        UnsupportedOperationError: the operator, or a parameter value, has no entry here.
    """
    if op == "leaky_relu":
        return _bent_line(_slope(attrs, where), 1.0)
    if op == "elu":
        return _elu(_slope(attrs, where))
    if op == "gelu" and (form := attrs.get("approximate", "none")) != "none":
        if form != "tanh":
            raise UnsupportedOperationError(
                f"{where}: got gelu with approximate={form!r}; expected 'none' or 'tanh'"
            )
        return _GELU_TANH
    if op not in _TABLE:
        raise UnsupportedOperationError(
            f"{where}: got operator {op!r}; the checker knows {', '.join(sorted(ACTIVATIONS))}"
        )
    return _TABLE[op]


def _slope(attrs: Mapping[str, object], where: str) -> float:
    alpha = attrs.get("alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha < 1e6:
        raise UnsupportedOperationError(
            f"{where}: got alpha={alpha!r}; expected a number in [0, 1e6)"
        )
    return float(alpha)


def _bent_line(left: float, right: float) -> ActivationFacts:
    return ActivationFacts(
        value=lambda x: np.where(x > 0, right * x, left * x),
        derivative=lambda x: np.where(x > 0, right, left),
        breaks=(0.0,),
        curvatures=(Curvature.LINEAR, Curvature.LINEAR),
        lipschitz=max(abs(left), abs(right)),
    )


def _elu(alpha: float) -> ActivationFacts:
    if alpha == 0.0:
        return _TABLE["relu"]
    return ActivationFacts(
        value=lambda x: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0))),
        derivative=lambda x: np.where(x > 0, 1.0, alpha * np.exp(np.minimum(x, 0.0))),
        breaks=(0.0,),
        curvatures=(Curvature.CONVEX, Curvature.LINEAR),
        lipschitz=max(1.0, alpha),
        stationary=lambda s, _: np.log(np.clip(s / alpha, 0.0, 1.0)),
    )


def _sigmoid(x: FloatArray) -> FloatArray:
    decayed = np.exp(-np.abs(x))  # in [0, 1]: no overflow
    return np.where(x >= 0, 1.0 / (1.0 + decayed), decayed / (1.0 + decayed))


def _sigmoid_slope(x: FloatArray) -> FloatArray:
    decayed = np.exp(-np.abs(x))
    return decayed / np.square(1.0 + decayed)


def _softplus(x: FloatArray) -> FloatArray:
    return np.maximum(x, 0.0) + np.log1p(np.exp(-np.abs(x)))


def _normal_cdf(x: FloatArray) -> FloatArray:
    scaled = np.ravel(x * math.sqrt(0.5))
    values = np.fromiter(map(math.erf, scaled.tolist()), dtype=np.float64, count=scaled.size)
    return 0.5 * (1.0 + values.reshape(x.shape))


def _gelu_slope(x: FloatArray) -> FloatArray:
    density = np.exp(-0.5 * np.square(x)) / math.sqrt(2.0 * math.pi)
    return _normal_cdf(x) + x * density


def _gelu_tanh_gate(x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``q = sqrt(8 / pi) (x + 0.044715 x^3)`` and its derivative; beyond 30 the gate is 0 or 1."""
    scale, near = math.sqrt(8.0 / math.pi), np.clip(x, -30.0, 30.0)
    square = np.square(near)
    return scale * near * (1.0 + 0.044715 * square), scale * (1.0 + 0.134145 * square)


def _gelu_tanh(x: FloatArray) -> FloatArray:
    """``x (1 + tanh(q / 2)) / 2``, written with the logistic function."""
    return x * _sigmoid(_gelu_tanh_gate(x)[0])


def _gelu_tanh_slope(x: FloatArray) -> FloatArray:
    gate, rise = _gelu_tanh_gate(x)
    return _sigmoid(gate) + np.clip(x, -30.0, 30.0) * rise * _sigmoid_slope(gate)


def _silu_slope(x: FloatArray) -> FloatArray:
    return _sigmoid(x) + x * _sigmoid_slope(x)


def _valley(
    value: Callable[[FloatArray], FloatArray],
    derivative: Callable[[FloatArray], FloatArray],
    inflection: float,
) -> ActivationFacts:
    """Concave, convex, concave with inflections at +-inflection, enclosed with 1e-12 to spare."""
    outer, inner = inflection + 1e-12, inflection - 1e-12
    return ActivationFacts(
        value=value,
        derivative=derivative,
        breaks=(-outer, -inner, inner, outer),
        curvatures=(
            Curvature.CONCAVE,
            Curvature.UNKNOWN,
            Curvature.CONVEX,
            Curvature.UNKNOWN,
            Curvature.CONCAVE,
        ),
        lipschitz=1.25,
    )


# gelu_tanh'' is zero where 1 + 6 a x^2 = k x tanh(q / 2) (1 + 3 a x^2)^2; a = 0.044715, q = 2 g(x)
_GELU_TANH = _valley(_gelu_tanh, _gelu_tanh_slope, 1.4185040087908283)

_S_SHAPE = (Curvature.CONVEX, Curvature.CONCAVE)


def _side(convex: bool) -> float:
    return -1.0 if convex else 1.0


_TABLE: dict[str, ActivationFacts] = {
    "relu": _bent_line(0.0, 1.0),
    "abs": _bent_line(-1.0, 1.0),
    "tanh": ActivationFacts(
        value=np.tanh,
        derivative=lambda x: 1.0 - np.square(np.tanh(x)),
        breaks=(0.0,),
        curvatures=_S_SHAPE,
        lipschitz=1.0,
        # 1 - tanh(x)^2 = s
        stationary=lambda s, convex: (
            _side(convex) * np.arctanh(np.sqrt(1.0 - np.clip(s, 0.0, 1.0)))
        ),
    ),
    "sigmoid": ActivationFacts(
        value=_sigmoid,
        derivative=_sigmoid_slope,
        breaks=(0.0,),
        curvatures=_S_SHAPE,
        lipschitz=0.25,
        # p (1 - p) = s with p = sigmoid(x)
        stationary=lambda s, convex: (
            _side(convex) * 2.0 * np.arctanh(np.sqrt(1.0 - np.clip(4.0 * s, 0.0, 1.0)))
        ),
    ),
    "softplus": ActivationFacts(
        value=_softplus,
        derivative=_sigmoid,
        breaks=(),
        curvatures=(Curvature.CONVEX,),
        lipschitz=1.0,
        # sigmoid(x) = s
        stationary=lambda s, _: np.log(np.clip(s, 0.0, 1.0)) - np.log1p(-np.clip(s, 0.0, 1.0)),
    ),
    # gelu'' = density(x) (2 - x^2)
    "gelu": _valley(lambda x: x * _normal_cdf(x), _gelu_slope, math.sqrt(2.0)),
    # silu'' = 0 where x tanh(x / 2) = 2
    "silu": _valley(lambda x: x * _sigmoid(x), _silu_slope, 2.3993572805154677),
}

ACTIVATIONS = frozenset(_TABLE) | {"leaky_relu", "elu"}
"""Names of all operators that :func:`activation_facts` knows."""

EXACT_IN_FLOAT = frozenset({"relu", "abs"})
"""Activations whose floating-point evaluation never rounds."""
