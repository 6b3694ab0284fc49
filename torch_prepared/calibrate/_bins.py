"""Confidence bins, and intervals of confidences checked once at the door.

Bin m of M holds the confidences in ``(e_{m-1}, e_m]``, the first one 0 as well. Bins are numbered
from 1, as in the formulas; ``e_0 = 0`` and ``e_M = 1``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from torch_prepared.errors import SpecError

__all__ = [
    "Bools",
    "Floats",
    "Integers",
    "Intervals",
    "Numbers",
    "bin_edges",
    "bin_gaps",
    "bin_of",
    "equal_count_edges",
    "to_array",
]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]
Numbers = ArrayLike | Tensor

MAX_BINS = 1024


def to_array(values: Numbers) -> NDArray[Any]:
    """A NumPy array of ``values``, detached and on the CPU when they are a tensor."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def bin_edges(n_bins: int = 15, edges: Numbers | None = None) -> Floats:
    """Edges (M + 1,) float64: ``edges`` after a check, or ``n_bins`` equal widths when None.

    Raises:
        SpecError: fewer than 1 or more than 1024 bins, or edges that do not increase strictly
            from 0 to 1.
    """
    if edges is None:
        if not 1 <= n_bins <= MAX_BINS:
            raise SpecError(f"bins: got {n_bins}; expected 1 to {MAX_BINS}")
        return np.arange(n_bins + 1) / n_bins
    given = to_array(edges).astype(np.float64)
    if given.ndim != 1 or not 2 <= len(given) <= MAX_BINS + 1:
        raise SpecError(f"edges: got shape {given.shape}; expected 2 to {MAX_BINS + 1} numbers")
    if given[0] != 0.0 or given[-1] != 1.0 or not (np.diff(given) > 0).all():
        raise SpecError("edges: expected numbers that increase strictly from 0 to 1; got others")
    return given


def equal_count_edges(confidence: Numbers, n_bins: int = 15) -> Floats:
    """Edges with about equally many of the given confidences in each bin, for ``edges=``.

    The edges are quantiles of *these* confidences, usually the clean ones, and then fixed: a
    bound for them does not cover an error whose bins move with the perturbed confidences. Bins
    that equal confidences would make empty are merged, so there may be fewer than ``n_bins``.

    Raises:
        SpecError: no confidences, NaN, or numbers outside of [0, 1].
    """
    values = Intervals.of(confidence, confidence, np.zeros(to_array(confidence).size, bool)).lower
    bin_edges(n_bins)
    inner = np.quantile(values, np.arange(1, n_bins) / n_bins, method="higher")
    inner = np.unique(inner[(inner > 0.0) & (inner < 1.0)])
    return np.concatenate([[0.0], inner, [1.0]])


def bin_of(confidence: Floats, edges: Floats) -> Integers:
    """The bin (N,), 1 to M, of each confidence (N,)."""
    return np.searchsorted(edges[1:-1], confidence, side="left").astype(np.int64) + 1


def bin_gaps(confidence: Floats, correct: Bools, bins: Integers, count: int) -> Floats:
    """``S_m = sum of (correct - confidence)`` over bin m, (M,)."""
    gaps = correct.astype(np.float64) - confidence
    return np.asarray(np.bincount(bins - 1, weights=gaps, minlength=count), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Intervals:
    """N confidences known up to intervals, and whether each prediction is right.

    Args:
        lower: (N,) float64.
        upper: (N,) float64.
        correct: (N,) bool.
    """

    lower: Floats
    upper: Floats
    correct: Bools

    @classmethod
    def of(cls, lower: Numbers, upper: Numbers, correct: Numbers) -> Intervals:
        """Checked copies in float64 on the CPU (exact for float32 and float64 input).

        Raises:
            SpecError: no samples, other shapes, NaN, ``lower > upper``, numbers outside of
                [0, 1], or a ``correct`` that is neither bool nor 0 and 1.
        """
        low, high, right = (to_array(v) for v in (lower, upper, correct))
        if low.ndim != 1 or not low.shape == high.shape == right.shape or not len(low):
            raise SpecError(
                f"confidences: got lower {low.shape}, upper {high.shape}, correct {right.shape}; "
                "expected the same (N,) with N >= 1"
            )
        if low.dtype.kind not in "fiub" or high.dtype.kind not in "fiub":
            raise SpecError(f"confidences: got {low.dtype} and {high.dtype}; expected numbers")
        if right.dtype != np.bool_ and not np.isin(right, (0, 1)).all():
            raise SpecError("correct: expected bool, or 0 and 1; got other numbers")
        low, high = low.astype(np.float64), high.astype(np.float64)
        bad = ~((low >= 0.0) & (low <= high) & (high <= 1.0))  # NaN is bad as well
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            raise SpecError(
                f"confidences: got lower {low[i]} and upper {high[i]} of sample {i}; expected "
                "0 <= lower <= upper <= 1"
            )
        return cls(low, high, right.astype(np.bool_))

    def __len__(self) -> int:
        return len(self.lower)
