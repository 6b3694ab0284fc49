"""``certify_calibration``: clean, attacked and certified calibration at several radii."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.bounds import Method
from torch_prepared.calibrate._bins import Floats, Numbers, bin_edges
from torch_prepared.calibrate._result import (
    CalibrationBound,
    CalibrationMetric,
    extend_uncertified,
    with_failures,
)
from torch_prepared.calibrate.attack import (
    AttackBudget,
    CalibrationAttack,
    attack_calibration,
    confidences,
)
from torch_prepared.calibrate.brier import brier_bound, brier_score
from torch_prepared.calibrate.confidence import Clip, ConfidenceInterval, certify_confidence
from torch_prepared.calibrate.ece import calibration_error, certified_ece
from torch_prepared.calibrate.smoothing import SmoothingBound, smoothed_confidence_bounds
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._source import Network, read_network
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph

__all__ = [
    "CalibrationReport",
    "RadiusReport",
    "certify_calibration",
    "certify_smoothed_calibration",
]

_ATTACK_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class RadiusReport:
    """Calibration at one radius.

    Args:
        radius: of the region around each input.
        interval: of every sample's confidence.
        ece: certified calibration error over the samples with a certified prediction; the trivial
            1 over no samples where there are none.
        brier: certified Brier score, likewise.
        ece_all: the same over all samples; each one without a certified prediction counts as 1.
        brier_all: likewise.
        attacked_ece: worst calibration error found at unchanged predictions, over all samples;
            None where no attack was run.
        attacked_brier: likewise.
        seconds: wall time.
    """

    radius: float
    interval: ConfidenceInterval
    ece: CalibrationBound
    brier: CalibrationBound
    ece_all: CalibrationBound
    brier_all: CalibrationBound
    attacked_ece: CalibrationAttack | None
    attacked_brier: CalibrationAttack | None
    seconds: float

    def to_json(self) -> dict[str, object]:
        """The numbers, as plain data."""
        return {
            "radius": self.radius,
            "samples": len(self.interval),
            "certified_predictions": int(self.interval.certified.sum()),
            "complete": self.interval.complete,
            "checked": self.interval.checked,
            "failure_probability": self.ece_all.failure,
            "certified_ece": self.ece.value if self.ece.samples else None,
            "certified_brier": self.brier.value if self.brier.samples else None,
            "certified_ece_all": self.ece_all.value,
            "certified_brier_all": self.brier_all.value,
            "attacked_ece": None if self.attacked_ece is None else self.attacked_ece.value,
            "attacked_brier": None if self.attacked_brier is None else self.attacked_brier.value,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, eq=False)
class CalibrationReport:
    """Calibration of one network on one set of samples.

    Args:
        confidence: (N,) float64 clean confidences.
        correct: (N,) bool, clean.
        edges: (M + 1,) of the bins.
        ece: clean calibration error.
        brier: clean Brier score.
        radii: one report per radius.
    """

    confidence: Tensor
    correct: Tensor
    edges: Floats
    ece: float
    brier: float
    radii: tuple[RadiusReport, ...]

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float(self.correct.double().mean())

    def to_json(self) -> dict[str, object]:
        """The numbers, as plain data."""
        return {
            "samples": len(self.correct),
            "bins": len(self.edges) - 1,
            "accuracy": self.accuracy,
            "ece": self.ece,
            "brier": self.brier,
            "radii": [one.to_json() for one in self.radii],
        }


def certify_calibration(
    model: Network,
    x: Tensor,
    labels: Tensor,
    radii: Sequence[float],
    *,
    p: float = math.inf,
    scale: Tensor | float = 1.0,
    clip: Clip | None = None,
    method: str | Method = Method.CROWN,
    temperature: float = 1.0,
    checked: bool = True,
    attack: bool = True,
    n_bins: int = 15,
    edges: Numbers | None = None,
    time_limit: float | None = None,
    progress: bool = False,
) -> CalibrationReport:
    """How badly calibrated a network can be made by perturbing every input, at each radius.

    Args:
        model: a module, an ONNX network or its path, or a graph; its outputs are logits.
        x: (N, ...) inputs.
        labels: (N,) right classes.
        radii: at least one, each >= 0.
        p: norm of the perturbations: 1, 2 or inf. Attacks know 2 and inf only.
        scale: unit of the radii in units of x: the region is ``||x' - x|| <= radius * scale``;
            for p = inf also per scalar of an input, for inputs scaled by channel.
        clip: limits of valid inputs, see ``specs.local_robustness``.
        method: of the bounds.
        temperature: the logits are divided by it; see ``certified_temperature``.
        checked: account for all rounding, see :func:`certify_confidence`.
        attack: also attack, to see how much of the bounds is reached.
        n_bins: of the calibration error.
        edges: fixed edges instead; see ``equal_count_edges``.
        time_limit: wall seconds for everything, shared by the radii.
        progress: show bars on stderr.

    Returns:
        A :class:`CalibrationReport`.

    Raises:
        SpecError: inputs, labels or options that do not fit.
        ModelFormatError: an unusable network.
        UnsupportedOperationError: an operator without a sound treatment.

    Soundness: see :func:`certify_confidence` for the intervals, ``certified_ece`` for the rest.
    """
    deadline = Deadline(time_limit)
    graph = _checked_graph(model, x, labels, radii, temperature)
    grid = bin_edges(n_bins, edges)
    exact, points = graph.to(torch.float64, "cpu"), x.detach().to("cpu", torch.float64)

    def forward(batch: Tensor) -> Tensor:
        return evaluate_graph(exact, batch).flatten(1) / temperature

    reports = []
    for position, radius in enumerate(radii):
        clock, share = time.monotonic(), deadline.share(1.0 / (len(radii) - position))
        eps = radius * torch.as_tensor(scale, dtype=torch.float64)
        attacks: tuple[CalibrationAttack | None, ...] = (None, None)
        if attack and p != 1:
            budget = AttackBudget(eps, p, clip)
            attacks = attack_calibration(
                forward, points, labels.cpu(), budget, edges=grid,
                time_limit=share.limit(_ATTACK_SHARE),
            )  # fmt: skip
        interval = certify_confidence(
            graph, x, eps, p=p, clip=clip, method=method, temperature=temperature,
            checked=checked,
            time_limit=share.limit(), progress=progress,
        )  # fmt: skip
        reports.append(_radius_report(radius, interval, labels, grid, attacks, None, clock))
    return _report(forward, points, labels, grid, reports)


def certify_smoothed_calibration(
    model: Network,
    x: Tensor,
    labels: Tensor,
    radii: Sequence[float],
    sigma: float,
    *,
    n: int = 10_000,
    n0: int = 100,
    alpha: float = 1e-3,
    delta: float = 1e-3,
    temperature: float = 1.0,
    method: str | SmoothingBound = SmoothingBound.CDF,
    n_bins: int = 15,
    edges: Numbers | None = None,
    seed: int = 0,
    progress: bool = False,
) -> CalibrationReport:
    """As :func:`certify_calibration` for the classifier smoothed by Gaussian noise, 2-norm radii.

    Every bound holds with probability at least ``1 - delta`` over the noise, the failures of
    single samples (see :func:`smoothed_confidence_bounds`) accounted for by ``with_failures``.
    Clean numbers are those of the smoothed classifier, estimated from the same noise.

    Args:
        model: as there.
        x: (N, ...) inputs.
        labels: (N,) right classes.
        radii: 2-norm radii, each >= 0, in the unit of x.
        sigma: standard deviation of the noise.
        n: noise draws per sample.
        n0: draws that choose its class.
        alpha: level of each one-sided bound of one sample.
        delta: probability that one radius's bound fails.
        temperature: the logits are divided by it before they are averaged as scores.
        method: ``"cdf"`` or ``"standard"``.
        n_bins: of the calibration error.
        edges: fixed edges instead.
        seed: of the noise.
        progress: show a bar on stderr.

    Raises:
        SpecError: see above.
    """
    graph = _checked_graph(model, x, labels, radii, temperature)
    grid, clock = bin_edges(n_bins, edges), time.monotonic()

    def forward(batch: Tensor) -> Tensor:
        return evaluate_graph(graph, batch).flatten(1) / temperature

    intervals = smoothed_confidence_bounds(
        forward, x.detach().to(graph.device, graph.dtype), radii, sigma, n=n, n0=n0, alpha=alpha,
        method=method, seed=seed, progress=progress,
    )  # fmt: skip
    reports = []
    for radius, interval in zip(radii, intervals, strict=True):
        reports.append(_radius_report(radius, interval, labels, grid, (None, None), delta, clock))
        clock = time.monotonic()
    return _summary(intervals[0].confidence, intervals[0].correct(labels.cpu()), grid, reports)


def _checked_graph(
    model: Network, x: Tensor, labels: Tensor, radii: Sequence[float], temperature: float
) -> Graph:
    if not (math.isfinite(temperature) and temperature > 0):
        raise SpecError(f"temperature: got {temperature}; expected a finite number > 0")
    if not isinstance(x, Tensor) or x.dim() < 2 or not len(x) or not x.is_floating_point():
        raise SpecError("inputs: expected a floating tensor (N, ...) with N >= 1")
    if labels.shape != x.shape[:1] or labels.is_floating_point():
        raise SpecError(
            f"labels: got {labels.dtype} {tuple(labels.shape)}; expected {len(x)} integers"
        )
    if not radii or not all(math.isfinite(r) and r >= 0 for r in radii):
        raise SpecError(f"radii: got {list(radii)}; expected finite numbers >= 0, at least one")
    graph = read_network(model, x[:1], x[:1].numel()).graph
    if x[:1].numel() != graph.input_size:
        raise SpecError(
            f"inputs: got {x[:1].numel()} scalars each; the network takes {graph.input_size}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= graph.output_size:
        raise SpecError(
            f"labels: got {low} to {high}; the network has classes 0 to {graph.output_size - 1}"
        )
    return graph


def _radius_report(
    radius: float,
    interval: ConfidenceInterval,
    labels: Tensor,
    edges: Floats,
    attacks: tuple[CalibrationAttack | None, ...],
    delta: float | None,
    clock: float,
) -> RadiusReport:
    """Bounds from intervals, with failures accounted for where ``delta`` is given."""
    keep, total = interval.certified, len(interval)
    certified = int(keep.sum())
    ece, brier = (CalibrationBound.trivial(metric) for metric in CalibrationMetric)
    if certified:
        data = interval.lower[keep], interval.upper[keep], interval.correct(labels.cpu())[keep]
        ece, brier = certified_ece(*data, edges=edges), brier_bound(*data)
        if delta is not None:
            ece, brier = (with_failures(b, total, interval.failure, delta) for b in (ece, brier))
    return RadiusReport(
        radius=radius,
        interval=interval,
        ece=ece,
        brier=brier,
        ece_all=extend_uncertified(ece, certified, total),
        brier_all=extend_uncertified(brier, certified, total),
        attacked_ece=attacks[0],
        attacked_brier=attacks[1],
        seconds=time.monotonic() - clock,
    )


def _report(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    edges: Floats,
    reports: Sequence[RadiusReport],
) -> CalibrationReport:
    z, prediction = confidences(forward, x)
    return _summary(z, prediction == labels.cpu(), edges, reports)


def _summary(
    z: Tensor, correct: Tensor, edges: Floats, reports: Sequence[RadiusReport]
) -> CalibrationReport:
    ece, brier = calibration_error(z, correct, edges=edges), brier_score(z, correct)
    return CalibrationReport(z, correct, edges, ece, brier, tuple(reports))
