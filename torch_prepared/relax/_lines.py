"""Valid lines below and above scalar functions, from curvature alone.

Three rules serve every activation here. With ``f`` differentiable on ``[l, u]``:

- chord: above a convex function; slope ``(f(u) - f(l)) / (u - l)``.
- tangent at ``d``: below a convex and above a concave function, for any d.
- S-shape (convex left of 0, concave right of it), upper line, ``l < 0 < u``: with
  ``phi(d) = f'(d)(d - l) - (f(d) - f(l))``, decreasing for d > 0, the tangent at any d >= 0 with
  ``phi(d) <= 0`` lies above f on [l, u]: on the concave side as a tangent, on the convex side
  because it is above f at both ends. If ``phi(u) > 0`` the chord does.

Gradients: the touching point solves ``phi = 0``; one Newton step carries its derivative, the value
stays the bracket's safe end.

Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
Functions" (NeurIPS 2018), the tangent rule of section 3.3; bracketing and gradients are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torch_prepared.core.interval import Interval

__all__ = ["Scalar", "chord", "convex_ceiling", "s_shaped_ceiling", "s_shaped_upper", "tangent"]

Scalar = Callable[[Tensor], Tensor]
Line = tuple[Tensor, Tensor]
_BISECTIONS = 50


def chord(f: Scalar, slope: Scalar, box: Interval) -> Line:
    """``(slope, offset)`` of the chord; for tiny widths the midpoint's tangent slope."""
    lower, upper = box.lower, box.upper
    f_lower, f_upper = f(lower), f(upper)
    width = upper - lower
    flat = width <= 1e-9 * (1 + lower.abs())
    safe = torch.where(flat, torch.ones_like(width), width)
    steep = torch.where(flat, slope((lower + upper) / 2), (f_upper - f_lower) / safe)
    return steep, torch.maximum(f_lower - steep * lower, f_upper - steep * upper)


def tangent(f: Scalar, slope: Scalar, at: Tensor) -> Line:
    """``(slope, offset)`` of the tangent at ``at``."""
    steep = slope(at)
    return steep, f(at) - steep * at


def s_shaped_upper(
    f: Scalar, slope: Scalar, curvature: Scalar, box: Interval, alpha: Tensor | None
) -> Line:
    """Upper line of a function that is convex left of 0 and concave right of it.

    ``alpha`` in [0, 1] moves the touching point from its leftmost valid place to the upper end.
    """
    lower, upper = torch.broadcast_tensors(box.lower, box.upper)
    start = _touching_point(f, slope, curvature, lower, upper)
    concave = lower >= 0
    left = torch.where(concave, lower, start)
    default = torch.where(concave, torch.full_like(lower, 0.5), torch.zeros_like(lower))
    share = default if alpha is None else alpha
    right = torch.maximum(upper, left)
    touch_slope, touch_offset = tangent(f, slope, left + share * (right - left))
    chord_slope, chord_offset = chord(f, slope, box)
    by_chord = (upper <= 0) | (start > upper)
    return (
        torch.where(by_chord, chord_slope, touch_slope),
        torch.where(by_chord, chord_offset, touch_offset),
    )


def _touching_point(
    f: Scalar, slope: Scalar, curvature: Scalar, lower: Tensor, upper: Tensor
) -> Tensor:
    """Smallest safe d in [0, upper] with phi(d) <= 0, or ``upper + 1`` when there is none."""

    def phi(d: Tensor, anchor: Tensor) -> Tensor:
        return slope(d) * (d - anchor) - (f(d) - f(anchor))

    with torch.no_grad():
        low, high = torch.zeros_like(upper), upper.clamp_min(0)
        none = phi(high, lower) > 0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            right = phi(middle, lower) > 0
            low, high = torch.where(right, middle, low), torch.where(right, high, middle)
        point = torch.where(none, upper + 1, high)
    if not (lower.requires_grad or upper.requires_grad):
        return point
    steepness = (curvature(point) * (point - lower)).detach()
    usable = (steepness < -1e-12) & ~none & (lower < 0)
    step = -phi(point, lower) / torch.where(usable, steepness, -torch.ones_like(steepness))
    return torch.where(usable, point + (step - step.detach()), point)


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

    The rising line touches f at some d > 0 and so is above f right of any place ``x0 <= 0`` where
    it is above: on [0, inf) as a tangent, on [x0, 0] because f is convex there. Left of ``x0`` the
    constant ``f(x0)`` is above. For a reference right of 0 it touches there; else it passes
    through the reference, which then is ``x0``.
    """
    far = torch.full_like(reference, 40.0)

    def root(low: Tensor, high: Tensor, positive_right: Scalar) -> tuple[Tensor, Tensor]:
        for _ in range(2 * _BISECTIONS):
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
