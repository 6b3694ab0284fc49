"""Reliability diagrams over intervals of confidences: what every bin can come to show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torch_prepared.calibrate._bins import (
    Floats,
    Integers,
    Intervals,
    Numbers,
    bin_edges,
    bin_gaps,
    bin_of,
)

__all__ = ["Reliability", "ReliabilityEnvelope", "reliability", "reliability_envelope"]


@dataclass(frozen=True, eq=False)
class Reliability:
    """A reliability diagram.

    Args:
        edges: (M + 1,).
        count: (M,) samples by bin.
        accuracy: (M,) share of right predictions; NaN in empty bins.
        confidence: (M,) mean confidence; NaN in empty bins.
    """

    edges: Floats
    count: Integers
    accuracy: Floats
    confidence: Floats


@dataclass(frozen=True, eq=False)
class ReliabilityEnvelope:
    """Ranges of a reliability diagram over all confidences within intervals, bin by bin.

    Each bin's range is attained (or approached at an open edge), but not in all bins at once.

    Args:
        edges: (M + 1,).
        count_lower: (M,) samples that cannot leave the bin.
        count_upper: (M,) samples that can be in it.
        accuracy_lower: (M,) least share of right predictions while the bin is not empty; NaN
            where it cannot but be empty.
        accuracy_upper: (M,) largest.
        gap_lower: (M,) least ``sum of (correct - confidence) / N`` over the bin: the most
            over-confident it gets.
        gap_upper: (M,) largest. ``max(|gap_lower|, |gap_upper|)`` bounds the bin's part of the
            calibration error, up to rounding.
    """

    edges: Floats
    count_lower: Integers
    count_upper: Integers
    accuracy_lower: Floats
    accuracy_upper: Floats
    gap_lower: Floats
    gap_upper: Floats


def reliability(
    confidence: Numbers,
    correct: Numbers,
    *,
    n_bins: int = 15,
    edges: Numbers | None = None,
    bins: Integers | None = None,
) -> Reliability:
    """The reliability diagram of confidences (N,) and correctness (N,).

    Args:
        confidence: in [0, 1].
        correct: bool.
        n_bins: number of bins of equal width.
        edges: fixed edges instead.
        bins: (N,) the bin, 1 to M, that each sample is counted in, as a worst case gives them;
            where its confidence lies when None.

    Raises:
        SpecError: see ``certified_ece``.
    """
    data, grid = Intervals.of(confidence, confidence, correct), bin_edges(n_bins, edges)
    places = bin_of(data.lower, grid) if bins is None else bins
    size = len(grid) - 1
    count = np.bincount(places - 1, minlength=size).astype(np.int64)
    right = np.bincount(places - 1, weights=data.correct, minlength=size)
    gaps = bin_gaps(data.lower, data.correct, places, size)
    divisor = np.where(count > 0, count, np.nan)
    return Reliability(grid, count, right / divisor, (right - gaps) / divisor)


def reliability_envelope(
    lower: Numbers,
    upper: Numbers,
    correct: Numbers,
    *,
    n_bins: int = 15,
    edges: Numbers | None = None,
) -> ReliabilityEnvelope:
    """What every bin of the reliability diagram can show over ``lower <= z <= upper``.

    Args:
        lower: (N,) in [0, 1].
        upper: (N,).
        correct: (N,) bool: right for every input of the region.
        n_bins: number of bins of equal width.
        edges: fixed edges instead.

    Raises:
        SpecError: see ``certified_ece``.
    """
    data, grid = Intervals.of(lower, upper, correct), bin_edges(n_bins, edges)
    size, count = len(grid) - 1, len(data)
    first, last = bin_of(data.lower, grid), bin_of(data.upper, grid)
    tables = np.zeros((6, size))
    for m in range(1, size + 1):
        may = (first <= m) & (m <= last)
        must, right = may & (first == last), data.correct
        tables[:4, m - 1] = [
            (must & right).sum(), (must & ~right).sum(), (may & right).sum(), (may & ~right).sum(),
        ]  # fmt: skip
        low = right - np.minimum(data.upper, grid[m])
        high = right - np.maximum(data.lower, grid[m - 1])
        free = may & ~must
        tables[4, m - 1] = low[must].sum() + np.minimum(low[free], 0.0).sum()
        tables[5, m - 1] = high[must].sum() + np.maximum(high[free], 0.0).sum()
    must_right, must_wrong, may_right, may_wrong, least, most = tables
    return ReliabilityEnvelope(
        grid,
        (must_right + must_wrong).astype(np.int64),
        (may_right + may_wrong).astype(np.int64),
        _least_share(must_right, may_right, may_wrong),
        1.0 - _least_share(must_wrong, may_wrong, may_right),
        least / count,
        most / count,
    )


def _least_share(must: Floats, may: Floats, other_may: Floats) -> Floats:
    """Least share of one kind in a bin that is not empty: none of its free ones, all others."""
    total = must + other_may
    only = np.where(may > 0, 1.0, np.nan)  # nothing else can be there
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, must / total, only)
