r"""The certified calibration error as a mixed-integer program with M binaries.

.. math::

    \max \tfrac1N \sum_m E_m, \quad \sum_m a_{nm} = 1, \quad
    a_{nm} \max(l_n, e_{m-1}) \le w_{nm} \le a_{nm} \min(u_n, e_m), \\
    E_m \le S_m + 2 N_m (1 - s_m), \quad E_m \le -S_m + 2 N_m s_m, \quad
    S_m = \sum_n (c_n a_{nm} - w_{nm})

over the bins m of each sample's window; ``N_m`` counts windows that contain m. For fixed s the
rest is a product of simplices, so the assignments need not be declared binary.

Source: Emde et al. (ICLR 2025) assign bins by N M binaries; declaring only the M signs is ours.
"""

from __future__ import annotations

import numpy as np

from torch_prepared.calibrate._bins import Floats, Intervals, bin_of
from torch_prepared.calibrate._result import Outcome
from torch_prepared.core.rows import RowBuilder
from torch_prepared.solvers import HighsSolver, LinearProgram, Status, solve

__all__ = ["solve_integer"]

_GAP = 1e-9


def solve_integer(
    data: Intervals, edges: Floats, time_limit: float | None = None
) -> tuple[float, Outcome]:
    """HiGHS's upper bound of the calibration error, in [0, 1], and how far to trust it.

    An optimal solve gives ``CLAIM`` with the solver's own dual bound. Anything else gives the
    dual bound where there is one, else 1, as ``UNKNOWN``.
    """
    program = _program(data, edges)
    answer = solve(program, HighsSolver(mip_gap=_GAP), time_limit=time_limit, threads=1)
    value = -answer.dual_bound / len(data)
    if not np.isfinite(value):
        return 1.0, Outcome.UNKNOWN
    outcome = Outcome.CLAIM if answer.status is Status.OPTIMAL else Outcome.UNKNOWN
    return float(np.clip(value, 0.0, 1.0)), outcome


def _program(data: Intervals, edges: Floats) -> LinearProgram:
    """Minimize ``-sum E`` over columns: a and w of every window entry, then E (M), then s (M)."""
    bins = len(edges) - 1
    position = np.arange(1, bins + 1)
    within = (bin_of(data.lower, edges)[:, None] <= position) & (
        position <= bin_of(data.upper, edges)[:, None]
    )
    sample, m = np.nonzero(within)
    low = np.maximum(data.lower[sample], edges[m])
    high = np.minimum(data.upper[sample], edges[m + 1])
    entries = len(sample)
    a, w = np.arange(entries), np.arange(entries, 2 * entries)
    error, sign = 2 * entries + np.arange(bins), 2 * entries + bins + np.arange(bins)
    reach = 2.0 * within.sum(axis=0)
    builder = RowBuilder()
    builder.add(builder.eq(np.ones(len(data)))[sample], a, 1.0)
    above, below = builder.ge(np.zeros(entries)), builder.ge(np.zeros(entries))
    builder.add(above, w, 1.0)
    builder.add(above, a, -low)
    builder.add(below, a, high)
    builder.add(below, w, -1.0)
    right = data.correct[sample].astype(np.float64)
    for side in (1.0, -1.0):  # side * S + slack - E >= 0
        rows = builder.ge(-reach if side > 0 else np.zeros(bins))
        builder.add(rows, error, -1.0)
        builder.add(rows, sign, -side * reach)
        builder.add(rows[m], a, side * right)
        builder.add(rows[m], w, -side)
    columns = 2 * entries + 2 * bins
    cost = np.zeros(columns)
    cost[error] = -1.0
    lower, upper = np.zeros(columns), np.ones(columns)
    lower[error], upper[error] = -np.inf, reach
    return LinearProgram(
        cost, builder.build(columns), lower, upper, np.arange(columns) >= 2 * entries + bins
    )
