"""Temperature by certified calibration: a provable rescaling of the last layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from torch_prepared.calibrate._result import CalibrationBound, CalibrationMetric
from torch_prepared.calibrate.brier import brier_bound
from torch_prepared.calibrate.confidence import confidence_bounds
from torch_prepared.calibrate.ece import certified_ece
from torch_prepared.errors import SpecError

__all__ = ["CertifiedTemperature", "certified_temperature"]


@dataclass(frozen=True, eq=False)
class CertifiedTemperature:
    """A temperature and what it does to the certified metric on certified samples.

    Args:
        temperature: logits are divided by it.
        before: the bound at temperature 1.
        after: the bound at ``temperature``; never larger.
    """

    temperature: float
    before: CalibrationBound
    after: CalibrationBound


def certified_temperature(
    margin_lower: Tensor,
    margin_upper: Tensor,
    prediction: Tensor,
    labels: Tensor,
    *,
    metric: CalibrationMetric | str = CalibrationMetric.ECE,
    n_bins: int = 15,
    largest: float = 32.0,
    steps: int = 65,
) -> CertifiedTemperature:
    """The temperature with the least certified calibration error (or Brier score) on a grid.

    Dividing the logits by T divides every margin, so bounds of margins at temperature 1 are
    bounds at every T, predictions stay certified, and each candidate costs one exact bound.

    Args:
        margin_lower: (N, K) bounds of ``f_k - f_j``, as in ``ConfidenceInterval.margins``.
        margin_upper: (N, K).
        prediction: (N,) classes k.
        labels: (N,).
        metric: ``"ece"`` or ``"brier"``.
        n_bins: of the calibration error.
        largest: temperatures from ``1 / largest`` to ``largest``, evenly in their logarithm.
        steps: how many of them; 1 itself is always tried.

    Raises:
        SpecError: bad options, or no sample with a certified prediction.

    Soundness:
        For logits divided by T in exact arithmetic. A network whose last layer is divided is
        another network, with rounded weights: bound it again.
    """
    if not (largest > 1 and steps >= 2):
        raise SpecError(f"temperature: got largest {largest}, steps {steps}; expected > 1 and >= 2")
    chosen = CalibrationMetric(metric)
    keep = confidence_bounds(margin_lower, margin_upper, prediction).certified
    if not bool(keep.any()):
        raise SpecError("temperature: got no sample with a certified prediction; lower eps")
    low, high = margin_lower[keep].double(), margin_upper[keep].double()
    kept, correct = prediction[keep], (prediction == labels)[keep]

    def bound(temperature: float) -> CalibrationBound:
        interval = confidence_bounds(low / temperature, high / temperature, kept)
        if chosen is CalibrationMetric.BRIER:
            return brier_bound(interval.lower, interval.upper, correct)
        return certified_ece(interval.lower, interval.upper, correct, n_bins=n_bins)

    before = bound(1.0)
    best, temperature = before, 1.0
    for candidate in np.geomspace(1 / largest, largest, steps):
        found = bound(float(candidate))
        if found.value < best.value:
            best, temperature = found, float(candidate)
    return CertifiedTemperature(temperature, before, best)
