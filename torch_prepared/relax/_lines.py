"""Lines that enclose an activation on *all* reals, for intervals whose ends are unknown.

``above`` lines lie above the largest value left of a point, ``below`` lines below the smallest
value right of it: the nondecreasing hulls of the function. So ``u' >= above_k(u)`` for all k and
``l' <= below_k(l)`` for all k bound the image of ``[l, u]``, whether the function is monotone or
not. All in float64; a line is a slope and an offset (k, n).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_prepared.ops import Smooth

__all__ = ["convex_ceiling", "gated_ceiling", "gated_floor", "s_shaped_ceiling"]

Scalar = Callable[[Tensor], Tensor]
Line = tuple[Tensor, Tensor]
_BISECTIONS = 100


def convex_ceiling(f: Scalar, reference: Tensor, reach: float = 4.0, steps: int = 4) -> Line:
    """Lines (k, n) whose maximum is above a nondecreasing convex f with slope in [0, 1].

    Chords between breakpoints around ``reference`` (n,), the constant left of the first and slope
    1 right of the last; breakpoints are denser near the reference.
    """
    shares = torch.linspace(-1, 1, 2 * steps + 1, dtype=reference.dtype, device=reference.device)
    grid = reference + reach * (shares * shares.abs()).unsqueeze(1)
    values = f(grid)
    slopes = (values[1:] - values[:-1]) / (grid[1:] - grid[:-1])
    offsets = torch.maximum(values[1:] - slopes * grid[1:], values[:-1] - slopes * grid[:-1])
    flat, one = torch.zeros_like(reference), torch.ones_like(reference)
    return (
        torch.cat([flat.unsqueeze(0), slopes, one.unsqueeze(0)]),
        torch.cat([values[:1], offsets, (values[-1] - grid[-1]).unsqueeze(0)]),
    )


def s_shaped_ceiling(f: Scalar, slope: Scalar, reference: Tensor) -> Line:
    """Two lines (2, n) whose maximum is above an S-shaped f on all reals, tight at ``reference``.

    f is convex left of 0 and concave right of it. The rising line touches f at some d > 0 and so
    is above f right of any place ``x0 <= 0`` where it is above: on [0, inf) as a tangent, on
    [x0, 0] because f is convex there. Left of ``x0`` the constant ``f(x0)`` is above. For a
    reference right of 0 it touches there; else it passes through the reference, which then is
    ``x0``.
    """
    far = torch.full_like(reference, 40.0)

    def root(low: Tensor, high: Tensor, positive_right: Scalar) -> tuple[Tensor, Tensor]:
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            right = positive_right(middle) > 0
            low, high = torch.where(right, low, middle), torch.where(right, middle, high)
        return low, high

    # phi(d) <= 0 beyond the touching point of the line through (reference, f(reference)).
    _, touching = root(
        torch.zeros_like(reference),
        far,
        lambda d: (f(d) - f(reference)) - slope(d) * (d - reference),
    )
    touch = torch.where(reference > 0, reference, touching)
    steep = slope(touch)
    offset = f(touch) - steep * touch
    through = torch.maximum(offset, f(reference) - steep * reference)
    offset = torch.where(reference > 0, offset, through)
    # f - line is positive far left and negative between x0 and the touching point.
    _, above = root(-far, torch.zeros_like(reference), lambda x: steep * x + offset - f(x))
    level = f(torch.where(reference > 0, above, reference))
    return torch.stack([steep, torch.zeros_like(steep)]), torch.stack([offset, level])


def gated_ceiling(facts: Smooth, inflection: float, reference: Tensor) -> Line:
    """Three lines (3, n) above ``f(x) = x g(x)`` and its values further left, tight at r.

    g rises from 0 to 1, and f' rises on [-c, c] and falls right of c = ``inflection``. The largest
    value left of x is ``max(0, f(x))``. Right of 0: ``f(x) / x = g(x)`` rises, so the line through
    0 and (r, f(r)) is above f on [0, r]; right of r no slope exceeds ``f'(max(r, c))``. With
    ``r <= 0`` the lines are 0 and x.
    """
    value = facts.value(reference)[0]
    right = reference > 0
    zero, one = torch.zeros_like(reference), torch.ones_like(reference)
    inner = torch.where(right, value / torch.where(right, reference, one), one)
    outer = torch.where(right, facts.derivative(reference.clamp_min(inflection))[0], zero)
    shift = torch.where(right, value - outer * reference, zero)
    return torch.stack([zero, inner, outer]), torch.stack([zero, zero, shift])


def gated_floor(
    facts: Smooth, inflection: float, bottom: float, least: float, reference: Tensor
) -> Line:
    """Two lines (2, n) below ``f(x) = x g(x)`` and its values further right, tight at r.

    As above; f falls left of ``bottom`` to its minimum ``least`` and rises right of it, by slopes
    that reach at least 1 from where they first do. With r right of the bottom: on [bottom, r] no
    slope exceeds ``f'(min(r, c))`` and right of r none is less than ``min(f'(r), 1)``; left of
    the bottom the first line lies below its value there, which is at most ``least``. Else the
    constant ``least``.
    """
    value = facts.value(reference)[0]
    right = reference > bottom
    zero = torch.zeros_like(reference)
    before = facts.derivative(reference.clamp(bottom, inflection))[0]
    after = facts.derivative(reference.clamp_min(bottom))[0].clamp_max(1.0)
    slopes = torch.stack([torch.where(right, s, zero) for s in (before, after)])
    return slopes, torch.where(right, value - slopes * reference, least)
