r"""The exact certified calibration error by dynamic programming over the bins' signs.

N times the error is :math:`\sum_m |S_m| = \max_s \sum_m s_m S_m` over signs s. For fixed signs
samples separate, and because the best confidence in bin m grows with m, a right prediction wants
the *first* + bin of its window ``[a, b]`` and a wrong one the *last* - bin:

- right, first + bin i of the window: ``1 - max(l, e_{i-1})``; none: ``-(1 - u)``;
- wrong, last - bin q of the window: ``min(u, e_q)``; none: ``-l``.

A sample is paid when the sign that decides it is set. With ``P[p, i]`` the sum over right
predictions with ``p < a <= i`` (p the + bin before i, i = M + 1 the end), and ``Q[q, r]`` the sum
over wrong ones with ``q <= b < r``, the state is (last + bin, last - bin), one of which is the bin
just decided. Cost O(N log M + M^2).

Confidences are integers here, in units of ``2^-k``, rounded so that every term is at least its
exact value. Integer sums are exact, so the result bounds the supremum and exceeds it by at most
``2^-k`` (k = 47 for 10,000 samples), whatever the order of the samples.

Source: the sign decomposition and this recursion are ours; the problem is that of Emde et al.
(ICLR 2025), who state it as a mixed-integer program.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from torch_prepared.calibrate._bins import Floats, Integers, Intervals, bin_of
from torch_prepared.calibrate._result import round_up

__all__ = ["best_response", "solve_dynamic"]


def solve_dynamic(data: Intervals, edges: Floats) -> tuple[float, Integers]:
    """The supremum of the calibration error over the intervals, rounded up, and its signs (M,)."""
    unit = 1 << min(52, 61 - len(data).bit_length())
    right, wrong = _payments(data, edges, unit)
    total, signs = _best_signs(right, wrong)
    return round_up(Fraction(total, unit * len(data))), signs


def best_response(data: Intervals, edges: Floats, signs: Integers) -> tuple[Floats, Integers]:
    """For fixed signs the confidence (N,) and bin (N,) that each sample contributes most with."""
    bins = len(signs)
    first, last = bin_of(data.lower, edges), bin_of(data.upper, edges)
    position = np.arange(1, bins + 1)
    following = np.minimum.accumulate(np.where(signs > 0, position, bins + 1)[::-1])[::-1]
    previous = np.maximum.accumulate(np.where(signs < 0, position, 0))
    plus, minus = following[first - 1], previous[last - 1]
    chosen = np.where(data.correct, np.minimum(plus, last), np.maximum(minus, first))
    low = np.maximum(data.lower, edges[chosen - 1])
    high = np.minimum(data.upper, edges[chosen])
    return np.where(signs[chosen - 1] > 0, low, high), chosen


def _payments(data: Intervals, edges: Floats, unit: int) -> tuple[Integers, Integers]:
    """``P`` (M + 1, M + 2) indexed [p, i] and ``Q`` (M + 1, M + 2) indexed [q, r], int64."""
    bins = len(edges) - 1
    low = np.floor(data.lower * unit).astype(np.int64)
    high = np.ceil(data.upper * unit).astype(np.int64)
    windows = bin_of(data.lower, edges), bin_of(data.upper, edges)
    below = np.floor(edges * unit).astype(np.int64)
    above = np.ceil(edges * unit).astype(np.int64)
    right = _summed(windows, data.correct, low, high, bins)
    wrong = _summed(windows, ~data.correct, low, high, bins)
    return _pay_right(*right, below, unit), _pay_wrong(*wrong, above)


def _summed(
    windows: tuple[Integers, Integers],
    chosen: np.ndarray,
    low: Integers,
    high: Integers,
    bins: int,
) -> tuple[Integers, Integers, Integers]:
    """Count and sums of ``low`` and ``high`` by window, each (M + 1, M + 1) indexed [a, b]."""
    index = windows[0][chosen], windows[1][chosen]
    tables = np.zeros((3, bins + 1, bins + 1), dtype=np.int64)
    for table, values in zip(tables, (1, low[chosen], high[chosen]), strict=True):
        np.add.at(table, index, values)
    return tables[0], tables[1], tables[2]


def _pay_right(
    count: Integers, low: Integers, high: Integers, below: Integers, unit: int
) -> Integers:
    """Right predictions that start in bin a, decided by + bin i: one table [a, i], then sums."""
    bins = len(count) - 1
    lost = high - unit * count  # paid by windows that end before the + bin
    ended = np.pad(np.cumsum(lost, axis=1), ((0, 0), (1, 0)))  # [a, i]: windows with b < i
    alive = np.pad(np.cumsum(count[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))  # b >= i
    pay = ended.copy()
    pay[:, 1:-1] += alive[:, 1:-1] * (unit - below[:-1])
    start = np.arange(1, bins + 1)
    pay[start, start] = (unit * count - low).sum(axis=1)[1:]
    # P[p, i] sums the rows p < a <= i; rows above i start later and are left out.
    pay[np.arange(bins + 1)[:, None] > np.arange(bins + 2)[None, :]] = 0
    total = np.cumsum(pay[::-1], axis=0)[::-1]
    result = np.zeros_like(total)
    result[:-1] = total[1:]
    return result


def _pay_wrong(count: Integers, low: Integers, high: Integers, above: Integers) -> Integers:
    """Wrong predictions that end in bin b, decided by - bin q: one table [q, b], then sums."""
    bins = len(count) - 1
    later = np.cumsum(low[::-1], axis=0)[::-1]
    starts_after = np.pad(later[1:], ((0, 1), (0, 0)))  # [q, b]: windows with a > q
    alive = np.cumsum(count, axis=0)  # a <= q
    pay = alive * above[:, None] - starts_after
    pay[0] = -low.sum(axis=0)
    end = np.arange(1, bins + 1)
    pay[end, end] = high.sum(axis=0)[1:]
    # Q[q, r] sums the columns q <= b < r.
    pay[np.arange(bins + 1)[:, None] > np.arange(bins + 1)[None, :]] = 0
    result = np.zeros((bins + 1, bins + 2), dtype=np.int64)
    result[:, 1:] = np.cumsum(pay, axis=1)
    return result


def _best_signs(right: Integers, wrong: Integers) -> tuple[int, Integers]:
    """Longest path over states (last +, last -); returns its value and signs (M,)."""
    bins = len(right) - 1
    # plus[q]: bin i is + and q the last - before it; minus[p]: bin i is - and p the last +.
    plus = np.array([right[0, 1]])
    minus = np.array([wrong[0, 1]])
    from_minus = np.zeros(bins + 1, dtype=np.int64)
    from_plus = np.zeros(bins + 1, dtype=np.int64)
    for i in range(2, bins + 1):
        turn_up = minus + right[: i - 1, i]
        turn_down = plus + wrong[: i - 1, i]
        from_minus[i], from_plus[i] = int(turn_up.argmax()), int(turn_down.argmax())
        plus = np.append(plus + right[i - 1, i], turn_up.max())
        minus = np.append(minus + wrong[i - 1, i], turn_down.max())
    end = bins + 1
    finish_plus = plus + right[bins, end] + wrong[:bins, end]
    finish_minus = minus + wrong[bins, end] + right[:bins, end]
    up = bool(finish_plus.max() >= finish_minus.max())
    other = int((finish_plus if up else finish_minus).argmax())
    total = int(max(finish_plus.max(), finish_minus.max()))
    signs = np.zeros(bins, dtype=np.int64)
    for i in range(bins, 0, -1):
        signs[i - 1] = 1 if up else -1
        if other == i - 1 and i > 1:
            other = int(from_minus[i] if up else from_plus[i])
            up = not up
    return total, signs
