"""Plain-torch oracle of activation_coefficients, the counterpart of csrc/common/relaxation.h."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from torch_prepared.ops._lines import leans_up
from torch_prepared.ops._reference import narrow_up
from torch_prepared.ops._reference_functions import EPS, TINY, Evaluated, Smooth, smooth_function

__all__ = ["activation_coefficients_grad_reference", "activation_coefficients_reference"]

_HUGE = 1e150
_KINDS = (
    "relu", "leaky_relu", "tanh", "sigmoid", "elu", "softplus", "gelu", "gelu_tanh", "silu",
)  # fmt: skip


class _Touch(IntEnum):
    CONSTANT, CHORD, POINT, THROUGH_LOWER, THROUGH_UPPER, AT_LOWER, AT_UPPER = range(7)


class _Choice(NamedTuple):
    slope: Tensor
    point: Tensor
    touch: Tensor


class _Side:
    """sigma (upper lines) or -sigma (lower lines) with its concave core on [l, u]."""

    def __init__(self, function: Smooth, upper: bool, low: Tensor, high: Tensor) -> None:
        self.function, self.upper, self.low, self.high = function, upper, low, high
        self.sign = 1.0 if upper else -1.0
        self.core_begin, self.core_end = function.core(upper, high)
        self.begin, self.end = (
            torch.maximum(low, self.core_begin),
            torch.minimum(high, self.core_end),
        )
        self.concave = self.begin < self.end

    def value(self, x: Tensor) -> Evaluated:
        value, error = self.function.value(x)
        return self.sign * value, error

    def derivative(self, x: Tensor) -> Evaluated:
        value, error = self.function.derivative(x)
        return self.sign * value, error

    def gap(self, d: Tensor, e: Tensor) -> Tensor:
        """How far the tangent at d passes above the curve at e."""
        return self.value(d)[0] + self.derivative(d)[0] * (e - d) - self.value(e)[0]

    def tangent_through(self, e: Tensor, good: Tensor, bad: Tensor) -> Tensor:
        """Tangent point whose tangent passes through (e, h(e)): Newton inside a bracket."""
        toward = torch.where(good > bad, 1.0, -1.0)
        found = torch.zeros_like(good, dtype=torch.bool)
        for power in range(0, 10):
            step = 8.0**power
            hit = ~found & (step < (good - bad).abs())
            hit &= self.gap(bad + toward * step, e) >= 0
            good, found = torch.where(hit, bad + toward * step, good), found | hit
        x = 0.5 * (good + bad)
        done = torch.zeros_like(found)
        for _ in range(48):
            gap = self.gap(x, e)
            good, bad = torch.where(gap >= 0, x, good), torch.where(gap >= 0, bad, x)
            newton = x - gap / (self.sign * self.function.second(x) * (e - x))
            inside = (newton - good) * (newton - bad) < 0
            close = (newton - x).abs() <= 1e-9 * x.abs()
            last = torch.where(close, x, 0.5 * (good + bad))
            x = torch.where(done, x, torch.where(inside, newton, last))
            done = done | close
        return x

    def chord_slope(self, begin: Tensor, end: Tensor) -> Tensor:
        slope = (self.value(end)[0] - self.value(begin)[0]) / (end - begin)
        limits = self.function.slope_min, self.function.slope_max
        return self.sign * (self.sign * slope).clamp(*limits)

    def choose(self, point: Tensor) -> _Choice:
        """A tight line: the tangent at a point of the range that is valid, or the chord."""
        left = self.concave & (self.core_begin > self.low)
        right = self.concave & (self.core_end < self.high)
        no_left = left & (self.gap(self.end, self.low) < 0)
        no_right = right & ~no_left & (self.gap(self.begin, self.high) < 0)
        chord = ~self.concave | no_left | no_right
        through_l = left & (self.gap(self.begin, self.low) < 0)
        through_u = right & (self.gap(self.end, self.high) < 0)
        first = self.tangent_through(self.low, self.end, self.begin)
        first = torch.where(through_l, first, self.begin)
        last = self.tangent_through(self.high, self.begin, self.end)
        last = torch.where(through_u, last, self.end)
        at_first = torch.where(left, _Touch.CONSTANT, _Touch.AT_LOWER)
        at_first = torch.where(through_l, _Touch.THROUGH_LOWER, at_first)
        at_last = torch.where(right, _Touch.CONSTANT, _Touch.AT_UPPER)
        at_last = torch.where(through_u, _Touch.THROUGH_UPPER, at_last)
        d, touch = point, torch.full_like(at_first, _Touch.POINT)
        d, touch = torch.where(d > last, last, d), torch.where(d > last, at_last, touch)
        d, touch = torch.where(d < first, first, d), torch.where(d < first, at_first, touch)
        at_chord = torch.where(no_left, self.end, torch.where(no_right, self.begin, self.low))
        d, touch = torch.where(chord, at_chord, d), torch.where(chord, _Touch.CHORD, touch)
        narrow = self.low == self.high
        d, touch = torch.where(narrow, self.low, d), torch.where(narrow, _Touch.POINT, touch)
        use_chord = touch == _Touch.CHORD
        slope = torch.where(use_chord, self.chord_slope(self.low, self.high), self.derivative(d)[0])
        if self.function.kinked:
            for way, end in ((_Touch.THROUGH_LOWER, self.low), (_Touch.THROUGH_UPPER, self.high)):
                slope = torch.where(touch == way, self.chord_slope(end, d), slope)
        return _Choice(slope, d, touch)

    def offset_at(self, s: Tensor, x: Tensor) -> Tensor:
        value, error = self.value(x)
        product = s * x
        return value - product + (error + 4 * EPS * (value.abs() + product.abs()) + TINY)

    def valid_offset(self, s: Tensor, d: Tensor) -> Tensor:
        """An offset valid for slope s on the whole interval; see csrc/common/relaxation.h."""
        offset = torch.maximum(self.offset_at(s, self.low), self.offset_at(s, self.high))
        slope, error = self.derivative(d)
        excess = slope - s
        reach = excess * torch.where(excess > 0, self.end - d, self.begin - d)
        doubt = (error + 4 * EPS * excess.abs()) * torch.maximum(self.end - d, d - self.begin)
        core = self.offset_at(s, d) + (reach + doubt) * (1 + 8 * EPS)
        return torch.where(self.concave, torch.maximum(offset, core), offset)

    def extreme(self) -> Tensor:
        """Offset of a horizontal line."""
        ends = []
        for x in (self.low, self.high):
            value, error = self.value(x)
            ends.append(value + torch.where(value.isinf(), 0.0, error))
        top = torch.maximum(*ends)
        return top if self.upper else top.clamp(min=-self.function.valley)


def _parse(kind: str, parameter: float, dtype: torch.dtype) -> float:
    """The parameter as kernels use it, narrowed to the bounds' dtype."""
    narrowed = float(torch.tensor(parameter, dtype=dtype))
    if kind not in _KINDS:
        expected = ", ".join(_KINDS)
        raise RuntimeError(
            f"activation_coefficients: argument 'kind': expected one of {expected}, got {kind}"
        )
    limit = {"leaky_relu": 1.0, "elu": 1e6}.get(kind)
    if limit is not None and not 0.0 <= narrowed <= limit:
        raise RuntimeError(
            f"activation_coefficients: argument 'param': expected a number in "
            f"[0, {limit:g}] for {kind}, got {parameter}"
        )
    return 0.0 if kind == "relu" else narrowed


def _invalid(lower: Tensor, upper: Tensor, alpha: Tensor | None) -> Tensor:
    bad = ~(lower <= upper)
    return bad if alpha is None else bad | alpha.isnan()


def activation_coefficients_reference(
    lower: Tensor, upper: Tensor, kind: str, param: float, alpha: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Lower slope and offset, upper slope and offset, and the number of invalid elements."""
    parameter = _parse(kind, param, lower.dtype)
    rule = _leaky_lines if kind in ("relu", "leaky_relu") else _smooth_lines
    bad = _invalid(lower, upper, alpha)
    low, high = (torch.where(bad, 0.0, x.double()) for x in (lower, upper))
    a = None if alpha is None else torch.where(bad, 0.0, alpha.double())
    lines = rule(kind, parameter, low, high, a, lower.dtype)
    a0, a1, a2, a3 = (torch.where(bad, torch.nan, x).contiguous() for x in lines)
    return a0, a1, a2, a3, bad.sum().reshape(1)


Lines = tuple[Tensor, Tensor, Tensor, Tensor]


def _smooth_lines(
    kind: str,
    parameter: float,
    low: Tensor,
    high: Tensor,
    alpha: Tensor | None,
    dtype: torch.dtype,
) -> Lines:
    function = smooth_function(kind, parameter)
    bounded = (low >= -_HUGE) & (high <= _HUGE)
    inner_l, inner_u = (torch.where(bounded, x, 0.0) for x in (low, high))
    middle = 0.5 * inner_l + 0.5 * inner_u
    lines: list[Tensor] = []
    for upper in (False, True):
        side = _Side(function, upper, inner_l, inner_u)
        choice = side.choose(middle if alpha is None else alpha)
        slope = torch.where(bounded, choice.slope, 0.0).to(dtype)
        offset = side.valid_offset(slope.double(), choice.point)
        flat = _Side(function, upper, low, high).extreme()
        offset = narrow_up(torch.where(bounded, offset, flat), dtype)
        lines += [slope, offset] if upper else [-slope, -offset]
    return lines[0], lines[1], lines[2], lines[3]


def _leaky_upper_slope(p: float, low: Tensor, high: Tensor) -> Tensor:
    chord = ((high - p * low) / (high - low)).nan_to_num(nan=p).clamp(p, 1.0)
    return torch.where(low.isinf(), p, torch.where(high.isinf(), 1.0, chord))


def _leaky_lines(
    kind: str,
    p: float,
    low: Tensor,
    high: Tensor,
    alpha: Tensor | None,
    dtype: torch.dtype,
) -> Lines:
    active, inactive = low >= 0, (high <= 0) & ~(low >= 0)
    fixed = active | inactive
    one = torch.ones_like(low)  # scalars alone would be narrowed to torch's default dtype
    stable = torch.where(active, one, p)
    upper = _leaky_upper_slope(p, low, high).to(dtype)
    s = upper.double()
    # Twice the rounding errors of the products and of the sum, so that no error is left.
    at_l = torch.where(low.isinf(), 0.0, (p - s) * low + 2 * EPS * (p + s) * low.abs() + TINY)
    at_u = torch.where(
        high.isinf(), torch.where(s < 1, math.inf, 0.0), high - s * high + 2 * EPS * high
    )
    offset = narrow_up(torch.maximum(at_l, at_u), dtype)
    usual = torch.where(leans_up(low, high), one, p)
    lower = usual if alpha is None else alpha.clamp(p, 1.0)
    zero = torch.zeros_like(offset)
    return (
        torch.where(fixed, stable, lower).to(dtype),
        zero,
        torch.where(fixed, stable, s).to(dtype),
        torch.where(fixed, zero, offset),
    )


def activation_coefficients_grad_reference(
    grad_lower_slope: Tensor,
    grad_lower_offset: Tensor,
    grad_upper_slope: Tensor,
    grad_upper_offset: Tensor,
    lower: Tensor,
    upper: Tensor,
    kind: str,
    param: float,
    alpha: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of lower, upper and alpha (empty when there is no alpha).

    The last has one axis more: the derivative, and the same but where alpha is clamped the
    derivative into its range.
    """
    parameter = _parse(kind, param, lower.dtype)
    grads = (grad_lower_slope, grad_lower_offset, grad_upper_slope, grad_upper_offset)
    wide = [g.double() for g in grads]
    low, high = lower.double(), upper.double()
    a = None if alpha is None else alpha.double()
    if kind in ("relu", "leaky_relu"):
        total = _leaky_gradient(parameter, low, high, a, wide)
    else:
        total = _smooth_gradient(smooth_function(kind, parameter), low, high, a, wide)
    to_lower, to_upper, to_alpha, inward = (x.to(lower.dtype).contiguous() for x in total)
    none = alpha is None
    return to_lower, to_upper, lower.new_empty(0) if none else torch.stack([to_alpha, inward])


def _leaky_gradient(
    p: float,
    low: Tensor,
    high: Tensor,
    alpha: Tensor | None,
    grads: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mixed = (low < 0) & (high > 0) & (high - low <= _HUGE)
    width = torch.where(mixed, high - low, 1.0)
    s = torch.where(mixed, (high - p * low) / width, 0.0)
    ds_dl, ds_du = (s - p) / width, (1 - s) / width
    to_lower = grads[2] * ds_dl + grads[3] * (p - s - low * ds_dl)
    to_upper = grads[2] * ds_du - grads[3] * low * ds_du
    free = mixed if alpha is None else mixed & (alpha >= p) & (alpha <= 1)
    zero = torch.zeros_like(s)
    return (
        torch.where(mixed, to_lower, zero),
        torch.where(mixed, to_upper, zero),
        torch.where(free, grads[0], zero),
        torch.where(mixed, grads[0], zero),
    )


def _smooth_gradient(
    function: Smooth,
    low: Tensor,
    high: Tensor,
    alpha: Tensor | None,
    grads: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bounded = (low >= -_HUGE) & (high <= _HUGE)
    low, high = torch.where(bounded, low, 0.0), torch.where(bounded, high, 0.0)
    to_lower, to_upper, to_alpha, inward = (torch.zeros_like(low) for _ in range(4))
    at_l, at_u = function.derivative(low)[0], function.derivative(high)[0]
    for upper in (False, True):
        g_slope, g_offset = grads[2:] if upper else grads[:2]
        side = _Side(function, upper, low, high)
        choice = side.choose(0.5 * low + 0.5 * high if alpha is None else alpha)
        s, d, touch = side.sign * choice.slope, choice.point, choice.touch
        width = torch.where(touch == _Touch.CHORD, high - low, 1.0)
        ds_dl, ds_du = (s - at_l) / width, (at_u - s) / width
        per_slope = g_slope - d * g_offset
        change = per_slope * function.second(d)
        owned = (touch != _Touch.CHORD) & (low != high)
        owned = torch.zeros_like(owned) if alpha is None else owned
        half = torch.where((touch == _Touch.POINT) & ~owned, 0.5 * change, 0.0)
        to_lower = to_lower + _select(
            touch,
            half,
            (_Touch.AT_LOWER, change),
            (_Touch.CHORD, g_slope * ds_dl + g_offset * (at_l - s - low * ds_dl)),
            (_Touch.THROUGH_LOWER, per_slope * (at_l - s) / (low - d)),
        )
        to_upper = to_upper + _select(
            touch,
            half,
            (_Touch.AT_UPPER, change),
            (_Touch.CHORD, g_slope * ds_du - g_offset * low * ds_du),
            (_Touch.THROUGH_UPPER, per_slope * (at_u - s) / (high - d)),
        )
        inward = inward + torch.where(owned, change, 0.0)
        to_alpha = to_alpha + torch.where(owned & (touch == _Touch.POINT), change, 0.0)
    zero = torch.zeros_like(low)
    return (
        torch.where(bounded, to_lower, zero),
        torch.where(bounded, to_upper, zero),
        torch.where(bounded, to_alpha, zero),
        torch.where(bounded, inward, zero),
    )


def _select(touch: Tensor, default: Tensor, *cases: tuple[_Touch, Tensor]) -> Tensor:
    """The value of the case that each element falls under."""
    for case, value in cases:
        default = torch.where(touch == case, value, default)
    return default
