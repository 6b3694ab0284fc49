r"""Confidence of a smoothed classifier, bounded by sampling noise.

The smoothed classifier averages softmax scores under Gaussian noise,
:math:`g(x) = E\, p(x + \sigma \xi)`. Moving x by at most R in the 2-norm changes the probability
of any event of the noise from q to at least :math:`\Phi(\Phi^{-1}(q) - R/\sigma)`; an average of
scores is an integral of such probabilities, which gives bounds at every R from one sample.

Source: Kumar, Levine, Feizi, Goldstein, "Certifying Confidence via Randomized Smoothing" (NeurIPS
2020); the uniform bound on distribution functions is Massart's form of Dvoretzky-Kiefer-Wolfowitz.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor
from tqdm import tqdm

from torch_prepared.calibrate._bins import Floats
from torch_prepared.calibrate.confidence import ConfidenceInterval
from torch_prepared.errors import SpecError

__all__ = ["SmoothingBound", "shifted_mean_bounds", "smoothed_confidence_bounds"]

_SLACK = 1e-12  # far above the rounding of the sums and of the normal distribution's functions


class SmoothingBound(enum.Enum):
    """``STANDARD`` bounds the mean score (Hoeffding); ``CDF`` its whole distribution."""

    STANDARD = "standard"
    CDF = "cdf"

    @classmethod
    def named(cls, name: str | SmoothingBound) -> SmoothingBound:
        """The bound called ``name``."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(m.value for m in cls)
            raise SpecError(f"method: got {name!r}; expected one of {known}") from None


def smoothed_confidence_bounds(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    radii: Sequence[float],
    sigma: float,
    *,
    n: int = 100_000,
    n0: int = 100,
    alpha: float = 1e-3,
    method: str | SmoothingBound = SmoothingBound.CDF,
    thresholds: int = 10_000,
    compare_all: bool = False,
    batch: int = 1024,
    seed: int = 0,
    progress: bool = False,
) -> tuple[ConfidenceInterval, ...]:
    """Intervals for the smoothed classifier's confidence, one per radius, from the same noise.

    Args:
        model: logits (b, K) of inputs (b, ...); deterministic, in evaluation mode. It is run as
            it is: the statement is about these very scores.
        x: (N, ...) inputs.
        radii: 2-norm radii, each >= 0.
        sigma: standard deviation of the noise, in the unit of x.
        n: noise draws that bound the confidence.
        n0: earlier draws that choose the class to be predicted.
        alpha: level of each one-sided bound.
        method: ``"cdf"`` or ``"standard"``.
        thresholds: steps of the distribution function that ``"cdf"`` keeps.
        compare_all: certify a prediction also where its score stays above every other class's,
            by one more bound for each of them; otherwise where it stays above 1/2.
        batch: inputs of the model at once.
        seed: of the noise; every sample has its own stream.
        progress: show a bar on stderr.

    Returns:
        One :class:`ConfidenceInterval` per radius, with ``failure = 2 alpha`` (``(K + 1) alpha``
        with ``compare_all``): for each sample, independently of the others, that interval and
        prediction are right *at all radii* with probability at least ``1 - failure``. Feed it to
        ``with_failures``.

    Raises:
        SpecError: bad options, or scores that are not finite.
    """
    chosen = SmoothingBound.named(method)
    _check(x, radii, sigma, n, n0, alpha, thresholds, batch)
    rows: list[tuple[int, float, list[tuple[float, float, bool]]]] = []
    classes = 0
    for i in tqdm(range(len(x)), desc="noise", unit="sample", disable=not progress, leave=False):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + i) % (1 << 63))
        first = _noisy_scores(model, x[i], sigma, n0, batch, generator)
        top, classes = int(first.mean(axis=0).argmax()), first.shape[1]
        scores = _noisy_scores(model, x[i], sigma, n, batch, generator)
        found = []
        for radius in radii:
            shift = radius / sigma
            low, high = shifted_mean_bounds(scores[:, top], shift, alpha, chosen, thresholds)
            rival = 0.5
            if compare_all and low <= 0.5:
                others = [k for k in range(classes) if k != top]
                rival = max(
                    shifted_mean_bounds(scores[:, k], shift, alpha, chosen, thresholds)[1]
                    for k in others
                )
            found.append((low, high, low > rival))
        rows.append((top, float(scores[:, top].mean()), found))
    level = min(1.0, ((classes - 1 if compare_all else 0) + 2) * alpha)
    return tuple(_collect(rows, position, level) for position in range(len(radii)))


def shifted_mean_bounds(
    scores: Floats,
    shift: float,
    alpha: float,
    method: SmoothingBound = SmoothingBound.CDF,
    thresholds: int = 10_000,
) -> tuple[float, float]:
    r"""Bounds of a mean score after the noise's center moved by ``shift`` standard deviations.

    Args:
        scores: (n,) independent scores in [0, 1].
        shift: R / sigma, >= 0.
        alpha: level of each side.
        method: with :math:`\eta = \sqrt{\ln(1/\alpha) / 2n}`: ``STANDARD``
            :math:`\Phi(\Phi^{-1}(\bar s - \eta) - R/\sigma)`; ``CDF``
            :math:`\sum_i (t_i - t_{i-1}) \Phi(\Phi^{-1}(q_i) - R/\sigma)` with ``q_i`` the share of
            scores at or above ``t_i``, less :math:`\eta`.
        thresholds: number of the ``t_i``, quantiles of the scores.

    Returns:
        Lower and upper bound, in [0, 1]; each fails with probability at most ``alpha``.
    """
    eta = math.sqrt(math.log(1 / alpha) / (2 * len(scores)))
    if method is SmoothingBound.STANDARD:
        mean = float(scores.mean())
        low = float(_moved(np.array([mean - eta - _SLACK]), shift)[0])
        high = 1.0 - float(_moved(np.array([1.0 - mean - eta - _SLACK]), shift)[0])
    else:
        low = _survival_integral(scores, eta, shift, thresholds)
        high = 1.0 - _survival_integral(1.0 - scores, eta, shift, thresholds)
    return max(low - _SLACK, 0.0), min(high + _SLACK, 1.0)


def _survival_integral(scores: Floats, eta: float, shift: float, thresholds: int) -> float:
    """Lower bound of the shifted mean from the empirical survival function, less ``eta``."""
    ordered = np.sort(scores)
    count = len(ordered)
    kept = min(count, thresholds)
    index = np.ceil(np.arange(1, kept + 1) * (count / kept)).astype(np.int64) - 1
    steps = ordered[np.minimum(index, count - 1)]
    above = (count - np.searchsorted(ordered, steps, side="left")) / count
    widths = np.diff(np.maximum(steps, 0.0), prepend=0.0)
    return float(widths @ _moved(above - eta - _SLACK, shift))


def _moved(probability: Floats, shift: float) -> Floats:
    """Smallest probability of an event after the shift; 0 for arguments at or below 0."""
    inside = np.clip(probability, 0.0, 1.0)
    return np.asarray(ndtr(ndtri(inside) - shift), dtype=np.float64)


def _noisy_scores(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: float,
    count: int,
    batch: int,
    generator: torch.Generator,
) -> Floats:
    """Softmax scores (count, K) of one input under fresh noise, float64."""
    parts = []
    for first in range(0, count, batch):
        shape = (min(batch, count - first), *x.shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(x)
        with torch.no_grad():
            logits = model(x + sigma * noise)
        parts.append(torch.softmax(logits.double().flatten(1), dim=1).cpu())
    scores = torch.cat(parts)
    if scores.shape[1] < 2 or not bool(torch.isfinite(scores).all()):
        raise SpecError(
            f"model: got {scores.shape[1]} scores, some perhaps NaN; expected finite logits of two "
            "or more classes"
        )
    return scores.numpy().clip(0.0, 1.0)


def _collect(
    rows: Sequence[tuple[int, float, list[tuple[float, float, bool]]]], position: int, level: float
) -> ConfidenceInterval:
    """The intervals of all samples at one radius."""
    at = [found[position] for _, _, found in rows]
    return ConfidenceInterval(
        torch.tensor([low for low, _, _ in at], dtype=torch.float64),
        torch.tensor([high for _, high, _ in at], dtype=torch.float64),
        torch.tensor([sure for _, _, sure in at]),
        torch.tensor([top for top, _, _ in rows]),
        torch.tensor([mean for _, mean, _ in rows], dtype=torch.float64),
        failure=level,
        checked=True,
    )


def _check(
    x: Tensor,
    radii: Sequence[float],
    sigma: float,
    n: int,
    n0: int,
    alpha: float,
    thresholds: int,
    batch: int,
) -> None:
    if x.dim() < 2 or not len(x) or not bool(torch.isfinite(x).all()):
        raise SpecError("inputs: expected finite (N, ...) with N >= 1")
    if not radii or not all(math.isfinite(r) and r >= 0 for r in radii):
        raise SpecError(f"radii: got {list(radii)}; expected finite numbers >= 0, at least one")
    if not (math.isfinite(sigma) and sigma > 0 and 0 < alpha <= 0.5):
        raise SpecError(f"smoothing: got sigma {sigma}, alpha {alpha}; expected > 0 and in (0, .5]")
    if min(n, n0, thresholds, batch) < 1:
        raise SpecError("smoothing: expected n, n0, thresholds and batch of at least 1")
