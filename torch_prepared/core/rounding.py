"""Outward rounding between floating-point formats."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_prepared.core.interval import Interval

__all__ = ["outward"]


def outward(lower: Tensor, upper: Tensor, dtype: torch.dtype) -> Interval:
    """The smallest interval with ends in ``dtype`` that holds ``[lower, upper]``.

    Args:
        lower: any shape, any floating dtype.
        upper: same shape.
        dtype: target format.

    Soundness: conversion rounds to nearest; an end that moved inward is stepped out by one unit
    in the last place, so no point of the interval is lost.
    """
    low, high = lower.to(dtype), upper.to(dtype)
    wide = torch.promote_types(lower.dtype, dtype)
    minus, plus = torch.tensor(-torch.inf, dtype=dtype), torch.tensor(torch.inf, dtype=dtype)
    inward_low = low.to(wide) > lower.to(wide)
    inward_high = high.to(wide) < upper.to(wide)
    return Interval(
        torch.where(inward_low, torch.nextafter(low, minus.to(low.device)), low),
        torch.where(inward_high, torch.nextafter(high, plus.to(high.device)), high),
    )
