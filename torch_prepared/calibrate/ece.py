"""Expected calibration error: clean, and its worst case over intervals of confidences."""

from __future__ import annotations

import enum

import numpy as np

from torch_prepared.calibrate._bins import (
    Bools,
    Floats,
    Intervals,
    Numbers,
    bin_edges,
    bin_gaps,
    bin_of,
    to_array,
)
from torch_prepared.calibrate._dynamic import best_response, solve_dynamic
from torch_prepared.calibrate._enumerate import Options, enumerate_signs
from torch_prepared.calibrate._heuristics import (
    Assignment,
    alternate,
    brier_ends,
    splitting_attack,
)
from torch_prepared.calibrate._integer import solve_integer
from torch_prepared.calibrate._result import CalibrationBound, CalibrationMetric, Outcome
from torch_prepared.errors import SpecError

__all__ = ["EceMethod", "calibration_error", "certified_ece", "certified_ece_uncertain"]

_SAMPLES_AT_ONCE = 2**27


class EceMethod(enum.Enum):
    """How to find the worst calibration error; see :func:`certified_ece`."""

    DYNAMIC = "dp"
    SIGNS = "signs"
    INTEGER = "mip"
    ENDS = "ends"
    ALTERNATING = "alternating"
    ADMM = "admm"

    @classmethod
    def named(cls, name: str | EceMethod) -> EceMethod:
        """The method called ``name``."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(m.value for m in cls)
            raise SpecError(f"method: got {name!r}; expected one of {known}") from None


def calibration_error(
    confidence: Numbers, correct: Numbers, *, n_bins: int = 15, edges: Numbers | None = None
) -> float:
    r"""Expected calibration error :math:`\frac1N \sum_m |\sum_{n \in B_m} (c_n - z_n)|`.

    Args:
        confidence: (N,) confidence of the predicted class, in [0, 1].
        correct: (N,) bool, whether the prediction is right.
        n_bins: number of bins of equal width.
        edges: edges of the bins instead; see :func:`equal_count_edges` for the adaptive error.

    Returns:
        The error in [0, 1]. Bins are ``(e_{m-1}, e_m]``, the first one closed.

    Raises:
        SpecError: other shapes, no samples, NaN, numbers outside of [0, 1], bad edges.
    """
    data, grid = Intervals.of(confidence, confidence, correct), bin_edges(n_bins, edges)
    gaps = bin_gaps(data.lower, data.correct, bin_of(data.lower, grid), len(grid) - 1)
    return float(np.abs(gaps).sum() / len(data))


def certified_ece(
    lower: Numbers,
    upper: Numbers,
    correct: Numbers,
    *,
    n_bins: int = 15,
    edges: Numbers | None = None,
    method: str | EceMethod = EceMethod.DYNAMIC,
    time_limit: float | None = None,
    seed: int = 0,
) -> CalibrationBound:
    r"""The supremum of :func:`calibration_error` over ``lower <= z <= upper``.

    ===============  ===============================================================================
    method           result
    ===============  ===============================================================================
    ``dp``           exact, in O(N log M + M^2): dynamic programming over the bins' signs
    ``signs``        exact, all 2^M sign patterns; at most 16 bins; kept as a cross-check
    ``mip``          mixed-integer program in HiGHS: a solver's claim, never a certificate
    ``ends``         an attack: every confidence at the end that is worst for the Brier score
    ``alternating``  an attack: best response to signs, signs of the response, restarts
    ``admm``         an attack: the alternating direction method on the relaxed integer program
    ===============  ===============================================================================

    Args:
        lower: (N,) numbers in [0, 1].
        upper: (N,) numbers in [0, 1], not below ``lower``.
        correct: (N,) bool: whether each prediction is right, for *every* input of its region.
        n_bins: number of bins of equal width, at most 1024.
        edges: fixed edges instead, from 0 to 1.
        method: a name above.
        time_limit: wall seconds for ``mip``.
        seed: of the attacks' starts.

    Returns:
        A :class:`CalibrationBound`; only ``dp`` and ``signs`` give ``is_certificate``.

    Raises:
        SpecError: other shapes, no samples, NaN, ``lower > upper``, numbers outside of [0, 1],
            edges that do not increase, an unknown method, too many bins for ``signs``.

    Soundness:
        ``dp`` and ``signs`` round upward: no confidences in the intervals exceed the value. That
        the intervals hold is the business of whoever made them.

    Source:
        The problem, its integer program and the use of the alternating direction method: Emde et
        al. (ICLR 2025). The exact algorithms: ours, see ``_dynamic``.

    Example:
        >>> certified_ece([0.6, 0.9], [0.8, 1.0], [True, True], n_bins=5).value
        0.25
    """
    data, grid = Intervals.of(lower, upper, correct), bin_edges(n_bins, edges)
    if len(data) >= _SAMPLES_AT_ONCE:
        raise SpecError(f"certified_ece: got {len(data)} samples; expected below 2^27")
    chosen, metric, count = EceMethod.named(method), CalibrationMetric.ECE, len(data)
    if chosen is EceMethod.DYNAMIC:
        value, signs = solve_dynamic(data, grid)
    elif chosen is EceMethod.SIGNS:
        value, signs = enumerate_signs(Options.of(data), grid)
    elif chosen is EceMethod.INTEGER:
        value, outcome = solve_integer(data, grid, time_limit)
        return CalibrationBound(metric, value, outcome, count)
    else:
        return _attack(chosen, data, grid, seed)
    confidence, bins = best_response(data, grid, signs)
    return CalibrationBound(
        metric, value, Outcome.BOUND, count, signs=signs, confidence=confidence, bin=bins
    )


def certified_ece_uncertain(
    lower: Numbers,
    upper: Numbers,
    possible: Numbers,
    *,
    n_bins: int = 12,
    edges: Numbers | None = None,
) -> CalibrationBound:
    """The supremum of the calibration error where even correctness may be open.

    Args:
        lower: (N, 2) confidences from below if the prediction is wrong (column 0), right (1).
        upper: (N, 2) likewise from above.
        possible: (N, 2) bool: which of the two can happen; ends of what cannot are ignored.
        n_bins: number of bins of equal width, at most 16: all sign patterns are tried.
        edges: fixed edges instead.

    Raises:
        SpecError: as for :func:`certified_ece`, or a sample for which nothing is possible.

    Soundness: as for :func:`certified_ece`.
    """
    low, high = to_array(lower).astype(np.float64), to_array(upper).astype(np.float64)
    open_: Bools = to_array(possible).astype(np.bool_)
    if low.ndim != 2 or low.shape[1] != 2 or not low.shape == high.shape == open_.shape:
        raise SpecError(
            f"uncertain confidences: got lower {low.shape}, upper {high.shape}, possible "
            f"{open_.shape}; expected (N, 2) each"
        )
    if not open_.any(axis=1).all():
        raise SpecError("possible: got a sample that can be neither right nor wrong")
    grid = bin_edges(n_bins, edges)
    parts = [
        Intervals.of(low[open_[:, c], c], high[open_[:, c], c], np.full(open_[:, c].sum(), c))
        for c in (0, 1)
        if open_[:, c].any()
    ]
    rows = [np.flatnonzero(open_[:, c]) for c in (0, 1) if open_[:, c].any()]
    value, signs = enumerate_signs(Options.join(parts, rows, len(low)), grid)
    return CalibrationBound(CalibrationMetric.ECE, value, Outcome.BOUND, len(low), signs=signs)


def _attack(method: EceMethod, data: Intervals, edges: Floats, seed: int) -> CalibrationBound:
    if method is EceMethod.ENDS:
        found: Assignment = brier_ends(data, edges)
    elif method is EceMethod.ALTERNATING:
        found = alternate(data, edges, np.random.default_rng(seed))
    else:
        found = splitting_attack(data, edges, np.random.default_rng(seed))
    return CalibrationBound(
        CalibrationMetric.ECE,
        min(found.value, 1.0),
        Outcome.ATTACK,
        len(data),
        signs=found.signs,
        confidence=found.confidence,
        bin=found.bin,
    )
