"""Plain-torch oracles of the linear operators: slow, obvious, valid on every device.

They take the same arguments as the registered operators and stand in for missing kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "concretize_reference",
    "interval_linear_reference",
    "relaxed_backward_grad_reference",
    "relaxed_backward_reference",
]

_EPS = torch.finfo(torch.float64).eps
_TINY = torch.finfo(torch.float64).tiny


def relaxed_backward_reference(
    rows: Tensor,
    lower_slope: Tensor,
    lower_offset: Tensor,
    upper_slope: Tensor,
    upper_offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rows (b, s, n) and coefficients (B, S, n) to pulled-back rows (b, s, n) and bias (b, s)."""
    positive = rows >= 0
    out = rows * torch.where(positive, lower_slope, upper_slope)
    bias = rows * torch.where(positive, lower_offset, upper_offset)
    return out, bias.sum(-1)


def relaxed_backward_grad_reference(
    grad_rows: Tensor,
    grad_bias: Tensor,
    rows: Tensor,
    lower_slope: Tensor,
    lower_offset: Tensor,
    upper_slope: Tensor,
    upper_offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows (b, s, n) and of the stacked coefficients (4, B, S, n)."""
    positive = rows >= 0
    from_bias = grad_bias.unsqueeze(-1)
    out = grad_rows * torch.where(positive, lower_slope, upper_slope)
    out = out + from_bias * torch.where(positive, lower_offset, upper_offset)
    plus, minus = torch.where(positive, rows, 0), torch.where(positive, 0, rows)
    terms = (plus * grad_rows, plus * from_bias, minus * grad_rows, minus * from_bias)
    return out, torch.stack([term.sum_to_size(lower_slope.shape) for term in terms])


def concretize_reference(rows: Tensor, center: Tensor, radius: Tensor) -> Tensor:
    """Rows (b, s, n), center and radius (B, n) to lower bounds (b, s)."""
    return (rows * center.unsqueeze(1) - rows.abs() * radius.unsqueeze(1)).sum(-1)


def interval_linear_reference(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Intervals (b, n) through weight (m, n) and bias (m,), rounded outward; see csrc/ops."""
    terms = lower.shape[-1]
    gamma = (terms + 4.0) * _EPS
    low, high, wide = lower.double(), upper.double(), weight.double()
    poison = torch.where(low <= high, 0.0, torch.nan)
    center = 0.5 * low + 0.5 * high + poison
    radius = torch.maximum(_up(high - center), _up(center - low))
    spread = _up(radius + _up(gamma * center.abs())) @ wide.abs().T
    spread = _up(_up(spread * (1.0 + 2.0 * gamma)) + 4.0 * (terms + 1.0) * _TINY)
    middle = center @ wide.T
    shift = 0.0 if bias is None else bias.double()
    below = _down(_down(middle - spread) + shift)
    above = _up(_up(middle + spread) + shift)
    return narrow_down(below, lower.dtype), narrow_up(above, lower.dtype)


def _up(x: Tensor) -> Tensor:
    """The number above x: at least the exact result that x is the nearest number of."""
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def _down(x: Tensor) -> Tensor:
    return -_up(-x)


def narrow_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Least number of type ``dtype`` that is not below the float64 x."""
    nearest = x.to(dtype)
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    return torch.where(nearest.double() < x, above, nearest)


def narrow_down(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Greatest number of type ``dtype`` that is not above the float64 x."""
    return -narrow_up(-x, dtype)
