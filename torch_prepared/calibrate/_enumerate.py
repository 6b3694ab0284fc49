"""The exact certified calibration error by trying every pattern of the bins' signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from torch_prepared.calibrate._bins import Floats, Integers, Intervals, bin_of
from torch_prepared.calibrate._result import round_up
from torch_prepared.errors import SpecError

__all__ = ["MAX_SIGN_BINS", "Options", "enumerate_signs"]

MAX_SIGN_BINS = 16


@dataclass(frozen=True, eq=False)
class Options:
    """What may happen to ``count`` samples: o options, each an interval with its correctness.

    ``sample`` (o,) says which sample an option belongs to.
    """

    data: Intervals
    sample: Integers
    count: int

    @classmethod
    def of(cls, data: Intervals) -> Options:
        """One option for every sample."""
        return cls(data, np.arange(len(data)), len(data))

    @classmethod
    def join(cls, parts: Sequence[Intervals], rows: Sequence[Integers], count: int) -> Options:
        """Options of the samples ``rows``, part by part."""
        data = Intervals(
            np.concatenate([p.lower for p in parts]),
            np.concatenate([p.upper for p in parts]),
            np.concatenate([p.correct for p in parts]),
        )
        return cls(data, np.concatenate(rows), count)


def enumerate_signs(options: Options, edges: Floats) -> tuple[float, Integers]:
    """The supremum of the calibration error, rounded up, and signs (M,) that attain it.

    ``CCE = (1/N) max over s of sum_n max over options and bins of their windows of g``, with
    ``g(+) = c - max(l, e_{m-1})`` and ``g(-) = min(u, e_m) - c``, in integers as in ``_dynamic``.

    Raises:
        SpecError: more than 16 bins, or (with 2^M N M above 2^36) too much work.
    """
    data, bins = options.data, len(edges) - 1
    if bins > MAX_SIGN_BINS or len(data) * bins << bins > 1 << 36:
        raise SpecError(
            f"signs: got {bins} bins and {len(data)} samples; expected at most {MAX_SIGN_BINS} "
            "bins and 2^36 steps; use method 'dp'"
        )
    unit = 1 << min(52, 61 - options.count.bit_length())
    under, over = _contributions(data, edges, unit)
    closed = np.iinfo(np.int64).min
    order = np.argsort(options.sample, kind="stable")
    starts = np.searchsorted(options.sample[order], np.arange(options.count))
    under, over = under[order], over[order]
    best, pattern = closed, 0
    for code in range(1 << bins):
        up = (code >> np.arange(bins)) & 1 == 1
        paid = np.where(up, under, over).max(axis=1)
        total = int(np.maximum.reduceat(paid, starts).sum())
        if total > best:
            best, pattern = total, code
    signs = np.where((pattern >> np.arange(bins)) & 1 == 1, 1, -1)
    return round_up(Fraction(best, unit * options.count)), signs.astype(np.int64)


def _contributions(data: Intervals, edges: Floats, unit: int) -> tuple[Integers, Integers]:
    """``g(+)`` and ``g(-)`` of every option in every bin (o, M), far below zero outside windows."""
    position = np.arange(1, len(edges))
    first, last = bin_of(data.lower, edges), bin_of(data.upper, edges)
    within = (first[:, None] <= position) & (position <= last[:, None])
    right = np.where(data.correct, unit, 0)[:, None]
    low = np.floor(np.maximum(data.lower[:, None], edges[:-1]) * unit).astype(np.int64)
    high = np.ceil(np.minimum(data.upper[:, None], edges[1:]) * unit).astype(np.int64)
    nothing = -(1 << 61)
    return np.where(within, right - low, nothing), np.where(within, high - right, nothing)
