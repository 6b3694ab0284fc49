"""Certified metrics that gather batches: ``update``, ``compute``, ``reset``.

They follow the protocol of torchmetrics (``update`` per batch, ``compute`` over all, ``reset``,
calling the object gives the batch's value and updates) without depending on that package or
inheriting from it, so they cannot be members of its ``MetricCollection``. Over several processes
gather the objects and :meth:`~CertifiedMetric.merge_state` them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from torch_prepared.calibrate._bins import Intervals, Numbers, bin_edges
from torch_prepared.calibrate._result import CalibrationBound, CalibrationMetric, extend_uncertified
from torch_prepared.calibrate.brier import brier_bound
from torch_prepared.calibrate.ece import EceMethod, certified_ece
from torch_prepared.errors import SpecError

__all__ = ["CertifiedBrierScore", "CertifiedCalibrationError", "CertifiedMetric"]


class CertifiedMetric(ABC):
    """Gathers intervals of confidences on the CPU and bounds a calibration metric over all.

    Attributes:
        higher_is_better: False.
        is_differentiable: False; see ``certified_brier`` for a differentiable one.
    """

    higher_is_better = False
    is_differentiable = False

    def __init__(self) -> None:
        self._parts: list[Intervals] = []
        self._uncertified = 0

    def update(
        self, lower: Numbers, upper: Numbers, correct: Numbers, certified: Numbers | None = None
    ) -> None:
        """Add a batch.

        Args:
            lower: (b,) confidences from below.
            upper: (b,) from above.
            correct: (b,) bool.
            certified: (b,) bool: predictions that stay; each other sample counts as 1, the worst
                there is. All stay when None.

        Raises:
            SpecError: see ``certified_ece``; nothing is added then.
        """
        data = Intervals.of(lower, upper, correct)
        if certified is not None:
            keep = np.asarray(
                Intervals.of(np.zeros(len(data)), np.ones(len(data)), certified).correct
            )
            self._uncertified += int((~keep).sum())
            data = Intervals(data.lower[keep], data.upper[keep], data.correct[keep])
        if len(data):
            self._parts.append(data)

    def compute(self) -> CalibrationBound:
        """The bound over all samples so far.

        Raises:
            SpecError: no samples.
        """
        certified = sum(len(part) for part in self._parts)
        total = certified + self._uncertified
        if not total:
            raise SpecError("metric: got no samples; call update first")
        if not certified:
            return CalibrationBound.trivial(self.metric, total)
        bound = self._bound(_join(self._parts))
        return extend_uncertified(bound, certified, total) if self._uncertified else bound

    def reset(self) -> None:
        """Forget everything."""
        self._parts, self._uncertified = [], 0

    def merge_state(self, other: CertifiedMetric) -> None:
        """Add everything that ``other``, of the same class, has gathered."""
        if type(other) is not type(self):
            raise SpecError(
                f"metric: got {type(other).__name__} to merge into {type(self).__name__}; expected "
                "the same class"
            )
        self._parts += other._parts
        self._uncertified += other._uncertified

    def __call__(
        self, lower: Numbers, upper: Numbers, correct: Numbers, certified: Numbers | None = None
    ) -> CalibrationBound:
        """Update, and return the bound over this batch alone."""
        before = list(self._parts), self._uncertified
        self.reset()
        try:
            self.update(lower, upper, correct, certified)
            return self.compute()
        finally:
            self._parts = before[0] + self._parts
            self._uncertified += before[1]

    @property
    @abstractmethod
    def metric(self) -> CalibrationMetric:
        """What is bounded."""

    @abstractmethod
    def _bound(self, data: Intervals) -> CalibrationBound: ...


class CertifiedBrierScore(CertifiedMetric):
    """Certified top-label Brier score; see ``brier_bound``."""

    @property
    def metric(self) -> CalibrationMetric:
        """``BRIER``."""
        return CalibrationMetric.BRIER

    def _bound(self, data: Intervals) -> CalibrationBound:
        return brier_bound(data.lower, data.upper, data.correct)


class CertifiedCalibrationError(CertifiedMetric):
    """Certified expected calibration error; see ``certified_ece``.

    Args:
        n_bins: number of bins of equal width.
        edges: fixed edges instead.
        method: see ``certified_ece``.
    """

    def __init__(
        self,
        n_bins: int = 15,
        *,
        edges: Numbers | None = None,
        method: str | EceMethod = EceMethod.DYNAMIC,
    ) -> None:
        super().__init__()
        self._edges = bin_edges(n_bins, edges)
        self._method = EceMethod.named(method)

    @property
    def metric(self) -> CalibrationMetric:
        """``ECE``."""
        return CalibrationMetric.ECE

    def _bound(self, data: Intervals) -> CalibrationBound:
        return certified_ece(
            data.lower, data.upper, data.correct, edges=self._edges, method=self._method
        )


def _join(parts: Sequence[Intervals]) -> Intervals:
    return Intervals(
        np.concatenate([p.lower for p in parts]),
        np.concatenate([p.upper for p in parts]),
        np.concatenate([p.correct for p in parts]),
    )
