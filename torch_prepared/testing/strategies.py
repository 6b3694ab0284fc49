"""Boxes and points for tests of relaxations and bounds: the shapes of box that break formulas."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from torch_prepared.core.interval import Interval

__all__ = ["BoxKind", "boxes", "dyadic", "points_in", "random_box"]


class BoxKind(enum.Enum):
    """Where the two ends of every scalar's interval lie."""

    DYADIC = "dyadic"  #: multiples of 1/8 up to 4: sums and products in float64 are exact
    UNIT = "unit"  #: around zero, width about one
    WIDE = "wide"  #: up to tens, where S-shaped functions saturate on both sides
    POINT = "point"  #: lower = upper, zero included
    POSITIVE = "positive"  #: lower >= 0, often exactly 0
    NEGATIVE = "negative"  #: upper <= 0, often exactly 0
    HUGE = "huge"  #: up to 1e6 on either side
    TINY = "tiny"  #: width about 1e-12, at zero or elsewhere
    SKEWED = "skewed"  #: one end near zero, the other far away
    MIXED = "mixed"  #: every scalar of another kind


_SINGLE = [kind for kind in BoxKind if kind not in (BoxKind.DYADIC, BoxKind.MIXED)]


def dyadic(shape: Sequence[int], generator: torch.Generator, largest: int = 32) -> Tensor:
    """Random multiples of 1/8, at most ``largest / 8`` in magnitude, float64."""
    numbers = torch.randint(-largest, largest + 1, tuple(shape), generator=generator)
    return numbers.double() / 8


def random_box(
    kind: BoxKind,
    shape: Sequence[int],
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> Interval:
    """A box of the given shape and kind; its ends are numbers of ``dtype``."""
    if kind is BoxKind.MIXED:
        parts = [random_box(single, shape, generator, dtype) for single in _SINGLE]
        pick = torch.randint(len(parts), tuple(shape), generator=generator).unsqueeze(0)
        lowers, uppers = (torch.stack(ends) for ends in zip(*map(_ends, parts), strict=True))
        return Interval(lowers.gather(0, pick)[0], uppers.gather(0, pick)[0])
    first, second = _two_ends(kind, tuple(shape), generator)
    first, second = first.to(dtype), second.to(dtype)
    return Interval(torch.minimum(first, second), torch.maximum(first, second))


def _two_ends(
    kind: BoxKind, shape: tuple[int, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    if kind is BoxKind.DYADIC:
        return dyadic(shape, generator), dyadic(shape, generator)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    zero = torch.where(uniform(0, 1) < 0.3, 0.0, 1.0)
    if kind is BoxKind.WIDE:
        return uniform(-40, 40), uniform(-40, 40)
    if kind is BoxKind.POINT:
        value = uniform(-3, 3) * zero
        return value, value
    if kind in (BoxKind.POSITIVE, BoxKind.NEGATIVE):
        sign = 1.0 if kind is BoxKind.POSITIVE else -1.0
        low = uniform(0, 3) * zero
        return sign * low, sign * (low + uniform(0, 3))
    if kind is BoxKind.HUGE:
        return uniform(-1e6, 1e6), uniform(-1e6, 1e6)
    if kind is BoxKind.TINY:
        base = uniform(-1, 1) * zero
        return base + uniform(-1e-12, 1e-12), base + uniform(-1e-12, 1e-12)
    if kind is BoxKind.SKEWED:
        near = uniform(-1e-6, 1e-6)
        return near, uniform(-30, 30)
    return uniform(-1, 1), uniform(-1, 1)


def _ends(box: Interval) -> tuple[Tensor, Tensor]:
    return box.lower, box.upper


def boxes(
    shape: Sequence[int],
    kinds: Sequence[BoxKind] = tuple(BoxKind),
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[Interval]:
    """Boxes of one shape and any of the kinds."""

    def build(kind: BoxKind, seed: int) -> Interval:
        return random_box(kind, shape, torch.Generator().manual_seed(seed), dtype)

    return st.builds(build, st.sampled_from(list(kinds)), st.integers(0, 2**31))


def points_in(
    box: Interval,
    generator: torch.Generator,
    count: int = 16,
    breakpoints: Sequence[float] = (0.0,),
) -> Tensor:
    """Points (q, *shape) of the box: both ends, corners, center, breakpoints, random ones.

    Every point lies in the box exactly: convex combinations are clamped to it. Without breakpoints
    all points of a dyadic box are dyadic.
    """
    lower, upper = box.lower, box.upper
    shape = (count, *lower.shape)
    share = torch.randint(65, shape, generator=generator).to(lower) / 64
    coin = torch.rand(shape, generator=generator) < 0.5
    inner = lower + share * (upper - lower)
    corners = torch.where(coin, lower, upper)
    fixed = [lower, upper, box.center, *(torch.full_like(lower, b) for b in breakpoints)]
    fixed += [
        torch.full_like(lower, math.nextafter(b, b + d)) for b in breakpoints for d in (1, -1)
    ]
    return torch.cat([inner, corners, torch.stack(fixed)]).clamp(lower, upper)
