"""Bounds of a calibration metric, and what may be added to them afterwards."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from scipy import stats

from torch_prepared.calibrate._bins import Floats, Integers
from torch_prepared.errors import SpecError

__all__ = [
    "CalibrationBound",
    "CalibrationMetric",
    "Outcome",
    "extend_uncertified",
    "failure_budget",
    "round_up",
    "with_failures",
]


class CalibrationMetric(enum.Enum):
    """What is bounded; both lie in [0, 1] and one sample moves N times the metric by at most."""

    ECE = "ece"  #: expected calibration error of the top label; 2
    BRIER = "brier"  #: top-label Brier score; 1

    @property
    def sensitivity(self) -> int:
        """How far one sample can move N times the metric, its correctness included."""
        return 2 if self is CalibrationMetric.ECE else 1


class Outcome(enum.Enum):
    """How far a value can be trusted, as a statement about the intervals it was made from."""

    BOUND = "bound"  #: no confidences in the intervals exceed it; all rounding is upward
    CLAIM = "claim"  #: a solver's bound, up to its tolerances; not a certificate
    ATTACK = "attack"  #: confidences that reach it are known; larger values may exist
    UNKNOWN = "unknown"  #: the solver had no answer; the value is the trivial 1


@dataclass(frozen=True, eq=False)
class CalibrationBound:
    """A worst case of a calibration metric over intervals of confidences.

    Args:
        metric: which one.
        value: in [0, 1].
        outcome: what kind of statement ``value`` is.
        samples: N, how many the metric averages over.
        failure: probability that the statement is wrong, beyond that of the intervals themselves;
            0 for intervals that always hold.
        signs: (M,) +1 where the worst case makes a bin under-confident, -1 over-confident.
        confidence: (N,) worst confidences. At the open lower edge of a bin the worst case is
            approached, not reached.
        bin: (N,) the bin, 1 to M, that each is counted in.
    """

    metric: CalibrationMetric
    value: float
    outcome: Outcome
    samples: int
    failure: float = 0.0
    signs: Integers | None = None
    confidence: Floats | None = None
    bin: Integers | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.value <= 1.0 or not 0.0 <= self.failure <= 1.0 or self.samples < 0:
            raise SpecError(
                f"calibration bound: got value {self.value}, failure {self.failure}, "
                f"{self.samples} samples; expected numbers in [0, 1] and a count"
            )

    @property
    def is_certificate(self) -> bool:
        """Whether no confidences within the intervals can exceed ``value``."""
        return self.outcome is Outcome.BOUND

    @classmethod
    def trivial(cls, metric: CalibrationMetric, samples: int = 0) -> CalibrationBound:
        """The bound 1, which always holds."""
        return cls(metric, 1.0, Outcome.BOUND, samples)


def with_failures(
    bound: CalibrationBound, n: int, alpha_total: float, delta: float
) -> CalibrationBound:
    """Account for intervals that each hold only with probability ``1 - alpha_total``.

    Let k be the ``1 - delta`` quantile of Binomial(n, alpha_total). With probability at least
    ``1 - delta`` at most k of n independent intervals fail, and each failure moves the metric by
    at most 2/N (ECE) or 1/N (Brier): the result is ``value + k * sensitivity / N``.

    Args:
        bound: over N samples.
        n: how many samples intervals were made for, ``n >= N``: when those without a certified
            prediction were left out, the selection depends on the noise, so all n may fail.
        alpha_total: probability that one sample's interval or prediction is wrong.
        delta: probability that the result may be wrong.

    Raises:
        SpecError: levels outside of (0, 1), or n < N.

    Soundness: the noise of different samples has to be independent.
    """
    if n < bound.samples:
        raise SpecError(f"with_failures: got n {n}; expected at least {bound.samples} samples")
    lost = failure_budget(n, alpha_total, delta)
    slack = Fraction(lost * bound.metric.sensitivity, max(bound.samples, 1))
    value = round_up(Fraction(bound.value) + slack)
    return replace(bound, value=value, failure=min(1.0, bound.failure + delta))


def failure_budget(n: int, alpha_total: float, delta: float) -> int:
    """Smallest k with P(Binomial(n, alpha_total) > k) <= delta.

    Raises:
        SpecError: levels outside of (0, 1), or a negative n.
    """
    if not (0.0 < alpha_total < 1.0 and 0.0 < delta < 1.0 and n >= 0):
        raise SpecError(
            f"failures: got alpha_total {alpha_total}, delta {delta}, n {n}; expected levels "
            "strictly between 0 and 1"
        )
    # The quantile comes from an inverse that may be off by one; the tail decides.
    k = max(int(stats.binom.isf(delta, n, alpha_total)) - 1, 0)
    while k < n and not stats.binom.sf(k, n, alpha_total) <= delta * (1 - 2.0**-30):
        k += 1
    return k


def extend_uncertified(bound: CalibrationBound, n_certified: int, n_total: int) -> CalibrationBound:
    """From the samples with a certified prediction to all: ``N_c/N value + (N - N_c)/N``.

    N times the metric is subadditive over a partition of the samples, and whatever happens to a
    sample without a certified prediction contributes at most 1.

    Raises:
        SpecError: counts that do not fit each other or the bound.
    """
    if not 0 <= n_certified <= n_total or n_certified != bound.samples or not n_total:
        raise SpecError(
            f"extend_uncertified: got {n_certified} of {n_total} samples for a bound over "
            f"{bound.samples}; expected as many as the bound has, of at least one"
        )
    share = Fraction(n_certified, n_total)
    value = round_up(share * Fraction(bound.value) + 1 - share)
    return replace(bound, value=value, samples=n_total, signs=None, confidence=None, bin=None)


def round_up(value: Fraction) -> float:
    """The smallest float not below ``value``, at most 1."""
    near = float(value)
    if Fraction(near) < value:
        near = float(np.nextafter(near, math.inf))
    return min(near, 1.0)
