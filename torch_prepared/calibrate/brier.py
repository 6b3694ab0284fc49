"""Brier scores: clean, and certified in closed form."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from torch_prepared.calibrate._bins import Integers, Intervals, Numbers
from torch_prepared.calibrate._result import (
    CalibrationBound,
    CalibrationMetric,
    Outcome,
    round_up,
)
from torch_prepared.errors import SpecError

__all__ = ["brier_bound", "brier_score", "certified_brier", "certified_brier_multiclass"]

_BLOCK = 1 << 20


def brier_score(confidence: Numbers, correct: Numbers) -> float:
    """Top-label Brier score ``mean (z - c)^2`` of confidences (N,) and correctness (N,).

    Raises:
        SpecError: see :func:`certified_ece`.
    """
    data = Intervals.of(confidence, confidence, correct)
    return float(np.mean((data.lower - data.correct) ** 2))


def certified_brier(
    lower: Tensor, upper: Tensor, correct: Tensor, *, reduction: str = "mean"
) -> Tensor:
    r"""Largest top-label Brier score of confidences within intervals, differentiable.

    :math:`\frac1N \sum_n c_n (1 - l_n)^2 + (1 - c_n) u_n^2`: the score is convex in each
    confidence and samples do not interact, so every sample sits at an end of its interval.

    Args:
        lower: (N,) float.
        upper: (N,) float.
        correct: (N,) bool: predictions that are right, for every input of their region.
        reduction: ``"mean"``, or ``"none"`` for (N,).

    Returns:
        Scalar or (N,), in the dtype and on the device of ``lower``.

    Raises:
        SpecError: other shapes, no samples, an unknown reduction, ends out of order or of [0, 1].

    Soundness:
        Exact for the interval model up to rounding, which :func:`brier_bound` accounts for.

    Source:
        Emde et al., "Towards Certification of Uncertainty Calibration under Adversarial
        Attacks" (ICLR 2025), Theorem 1.

    Example:
        >>> l, u = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.75])
        >>> float(certified_brier(l, u, torch.tensor([True, False])))
        0.40625
    """
    if reduction not in ("mean", "none"):
        raise SpecError(f"reduction: got {reduction!r}; expected 'mean' or 'none'")
    Intervals.of(lower, upper, correct)
    values = torch.where(correct.bool(), (1 - lower) ** 2, upper**2)
    return values.mean() if reduction == "mean" else values


def brier_bound(lower: Numbers, upper: Numbers, correct: Numbers) -> CalibrationBound:
    """:func:`certified_brier` in rational arithmetic, rounded upward once.

    Args:
        lower: (N,) numbers in [0, 1].
        upper: (N,) numbers in [0, 1].
        correct: (N,) bool.

    Raises:
        SpecError: see :func:`certified_ece`.
    """
    data = Intervals.of(lower, upper, correct)
    unit = 1 << 40
    # Distances in units of 2^-40, rounded up; their squares and sums are exact integers.
    wrong = np.ceil(data.upper * unit).astype(np.int64)
    right = unit - np.floor(data.lower * unit).astype(np.int64)
    distance = np.where(data.correct, right, wrong)
    total = sum(_sum_squares(distance[i : i + _BLOCK]) for i in range(0, len(data), _BLOCK))
    value = round_up(Fraction(total, unit * unit * len(data)))
    worst = np.where(data.correct, data.lower, data.upper)
    return CalibrationBound(
        CalibrationMetric.BRIER, value, Outcome.BOUND, len(data), confidence=worst
    )


def _sum_squares(distance: Integers) -> int:
    """Exact sum of squares of at most ``_BLOCK`` integers up to 2^40."""
    high, low = distance >> 20, distance & ((1 << 20) - 1)
    parts = (int((a * b).sum()) for a, b in ((high, high), (high, low), (low, low)))
    return next(parts) * (1 << 40) + next(parts) * (1 << 21) + next(parts)


def certified_brier_multiclass(
    lower: Tensor, upper: Tensor, label: Tensor, *, reduction: str = "mean"
) -> Tensor:
    r"""Upper bound of the Brier score over all classes, :math:`\sum_k (p_k - 1[k = y])^2`.

    Over ``lower <= p <= upper`` with ``sum p = 1`` the exact maximum is that of a convex function
    (hard in K). Chords :math:`p^2 \le (l + u) p - l u` make it linear, and a linear function over
    a box cut by the simplex is maximized greedily: start at ``lower`` and spend ``1 - sum lower``
    on the classes with the largest coefficients.

    Args:
        lower: (N, K) float, probabilities of every class from below.
        upper: (N, K) float.
        label: (N,) integers.
        reduction: ``"mean"``, or ``"none"`` for (N,).

    Returns:
        Scalar or (N,), at most ``max (u - l)^2 / 4`` above the maximum, since the greedy solution
        has at most one class strictly between its ends. Differentiable almost everywhere.

    Raises:
        SpecError: other shapes, NaN, ends out of order, or boxes that hold no distribution.

    Soundness: up to rounding of about ``K`` units in the last place, which is added.
    """
    if reduction not in ("mean", "none"):
        raise SpecError(f"reduction: got {reduction!r}; expected 'mean' or 'none'")
    if lower.dim() != 2 or lower.shape != upper.shape or label.shape != lower.shape[:1]:
        raise SpecError(
            f"multi-class Brier: got lower {tuple(lower.shape)}, upper {tuple(upper.shape)}, "
            f"label {tuple(label.shape)}; expected (N, K), (N, K), (N,)"
        )
    classes = lower.shape[1]
    if not len(label) or not bool(((label >= 0) & (label < classes)).all()):
        raise SpecError(f"multi-class Brier: expected labels 0 to {classes - 1}, at least one")
    tolerance = 64 * classes * torch.finfo(lower.dtype).eps
    sums = lower.detach().sum(1) <= 1 + tolerance, upper.detach().sum(1) >= 1 - tolerance
    ordered = (lower >= 0) & (lower <= upper) & (upper <= 1)
    if not bool(ordered.all() & sums[0].all() & sums[1].all()):
        raise SpecError(
            "multi-class Brier: expected 0 <= lower <= upper <= 1 with sum lower <= 1 <= sum upper"
        )
    hot = torch.nn.functional.one_hot(label.long(), classes).to(lower)
    coefficient = lower + upper - 2 * hot
    order = coefficient.argsort(dim=1, descending=True)
    room = (upper - lower).gather(1, order)
    budget = (1 - lower.sum(1, keepdim=True)).clamp(min=0)
    spent = room.cumsum(1) - room
    share = torch.minimum((budget - spent).clamp(min=0), room)
    best = (coefficient * lower).sum(1) + (share * coefficient.gather(1, order)).sum(1)
    values = best + 1 - (lower * upper).sum(1) + tolerance
    return values.mean() if reduction == "mean" else values
