"""Attacks on calibration that leave every prediction, hence the accuracy, as it is."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.calibrate._bins import Floats, Intervals, Numbers, bin_edges, bin_of
from torch_prepared.calibrate._dynamic import best_response, solve_dynamic
from torch_prepared.calibrate._result import CalibrationMetric
from torch_prepared.calibrate.brier import brier_score
from torch_prepared.calibrate.ece import calibration_error
from torch_prepared.core.deadline import Deadline
from torch_prepared.errors import SpecError

__all__ = [
    "AttackBudget",
    "CalibrationAttack",
    "Reference",
    "ace_attack",
    "attack_calibration",
    "confidences",
    "guarded_ascent",
]

Logits = Callable[[Tensor], Tensor]
Clip = tuple[float | Tensor, float | Tensor]
_BISECTIONS = 30
_OVERSHOOT = 2.5


class Reference(enum.Enum):
    """The class whose cross-entropy an attack moves."""

    LABEL = "label"
    PREDICTION = "prediction"


def _exact(value: float | Tensor) -> Tensor:
    """A number as a float64 tensor; the default would round it to float32 first."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class AttackBudget:
    """Where an attack may go, and how long it takes.

    Args:
        eps: radius in the unit of the inputs; for p = inf also one per scalar of an input.
        p: 2 or inf.
        clip: limits of valid inputs, or None.
        steps: gradient steps.
    """

    eps: float | Tensor
    p: float = math.inf
    clip: Clip | None = None
    steps: int = 20

    def __post_init__(self) -> None:
        size = _exact(self.eps)
        if self.p not in (2, math.inf) or self.steps < 0 or not bool((size >= 0).all()):
            raise SpecError(
                f"attack: got p {self.p}, steps {self.steps}; expected p 2 or inf, steps >= 0 and "
                "eps >= 0"
            )
        if self.p == 2 and size.numel() != 1:
            raise SpecError("attack: got eps per scalar with p = 2; expected one number")

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """The nearest point (p = 2: nearly) of the ball around ``x`` within the limits."""
        eps = _exact(self.eps).to(x)
        if self.p == math.inf:
            moved = torch.minimum(torch.maximum(moved, x - eps), x + eps)
        else:
            offset = (moved - x).flatten(1)
            length = offset.norm(dim=1, keepdim=True)
            shrink = torch.where(length > eps, eps / length, 1.0)
            moved = x + (offset * shrink).reshape(x.shape)
        if self.clip is None:
            return moved
        low, high = (_exact(end).to(x) for end in self.clip)
        # x itself may lie outside; clipping must not leave the ball then.
        return torch.minimum(torch.maximum(moved, torch.minimum(x, low)), torch.maximum(x, high))

    def step(self, gradient: Tensor) -> Tensor:
        """Steepest ascent that covers the radius several times over all steps."""
        size: Tensor = _exact(self.eps).to(gradient) * (_OVERSHOOT / max(self.steps, 1))
        if self.p == math.inf:
            return torch.mul(size, gradient.sign())
        flat = gradient.flatten(1)
        length = flat.norm(dim=1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
        return torch.mul(size, (flat / length).reshape(gradient.shape))

    def gain(self, gradient: Tensor) -> Tensor:
        """Largest first-order change (b,) within the ball."""
        size: Tensor = _exact(self.eps).to(gradient)
        if self.p == math.inf:
            return torch.mul(size, gradient.abs()).flatten(1).sum(1)
        return torch.mul(size, gradient.flatten(1).norm(dim=1))


@dataclass(frozen=True, eq=False)
class CalibrationAttack:
    """Inputs that hurt calibration, and what they reach.

    Args:
        metric: what was attacked.
        x: (N, ...) perturbed inputs; every prediction is that of the clean input.
        confidence: (N,) float64 of the predictions there.
        value: the metric on these confidences; no smaller than the clean one.
    """

    metric: CalibrationMetric
    x: Tensor
    confidence: Floats
    value: float


def confidences(model: Logits, x: Tensor, *, batch: int = 512) -> tuple[Tensor, Tensor]:
    """Confidence (N,) float64 and class (N,) int64 of every prediction, on the CPU.

    Raises:
        SpecError: logits that are not finite, or not (b, K) with K >= 2.
    """
    parts = []
    with torch.no_grad():
        for part in x.split(batch):
            logits = model(part)
            logits = logits.flatten(1)
            if logits.shape[1] < 2 or not bool(torch.isfinite(logits).all()):
                raise SpecError("model: expected finite logits (b, K) of two or more classes")
            # The class is the one that the logits themselves favor, whatever softmax rounds to.
            scores = torch.softmax(logits.double(), dim=1)
            top = logits.argmax(dim=1)
            parts.append((scores.gather(1, top[:, None])[:, 0].cpu(), top.cpu()))
    return torch.cat([z for z, _ in parts]), torch.cat([k for _, k in parts])


def guarded_ascent(
    model: Logits, x: Tensor, budget: AttackBudget, objective: Callable[[Tensor], Tensor]
) -> Tensor:
    """Raise ``objective(logits)`` (b,) within the ball while every prediction stays.

    A step that changes a sample's prediction is taken back, and that sample's next steps are
    halved. Returned is each sample's best point met, at worst ``x``; gradients to the model's
    parameters are not accumulated.
    """
    start = x.detach()
    with torch.no_grad():
        logits = model(start)
        keep, best_value = logits.argmax(dim=1), objective(logits)
    best = current = start
    share = torch.ones(len(x), *([1] * (x.dim() - 1)), dtype=x.dtype, device=x.device)
    for _ in range(budget.steps):
        probe = current.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(model(probe)).sum(), probe)
        gradient = torch.nan_to_num(gradient, 0.0, 0.0, 0.0)
        with torch.no_grad():
            moved = budget.project(current + share * budget.step(gradient), start)
            logits = model(moved)
            value = objective(logits)
            same = (logits.argmax(dim=1) == keep) & torch.isfinite(logits).all(dim=1)
            shape = same.reshape(share.shape)
            current = torch.where(shape, moved, current)
            share = torch.where(shape, share, share / 2)
            better = same & (value > best_value)
            best = torch.where(better.reshape(share.shape), moved, best)
            best_value = torch.where(better, value, best_value)
    return best


def ace_attack(
    model: Logits,
    x: Tensor,
    y: Tensor,
    budget: AttackBudget,
    *,
    direction: int,
    reference: Reference | str = Reference.PREDICTION,
) -> Tensor:
    r"""The (η, ω)-ACE attack: :math:`\max \eta\, CE(f(x'), \omega)` at unchanged predictions.

    ``(-1, prediction)`` makes the network over-confident, ``(+1, prediction)`` under-confident,
    ``(+1, label)`` is the attack that the paper reports.

    Args:
        model: logits (b, K) of inputs (b, ...), in evaluation mode.
        x: (b, ...) inputs, floating.
        y: (b,) labels; read for reference ``"label"`` only.
        budget: radius, norm, limits and steps.
        direction: η, +1 or -1.
        reference: ω.

    Returns:
        (b, ...) inputs within the budget, each with the prediction of its clean input.

    Raises:
        SpecError: another direction or reference.

    Source:
        Emde et al. (ICLR 2025), extending Galil & El-Yaniv, "Disrupting Deep Uncertainty
        Estimation Without Harming Accuracy" (NeurIPS 2021).
    """
    if direction not in (1, -1):
        raise SpecError(f"direction: got {direction}; expected +1 or -1")
    try:
        kind = Reference(reference)
    except ValueError:
        raise SpecError(f"reference: got {reference!r}; expected 'label' or 'prediction'") from None
    with torch.no_grad():
        target = model(x).argmax(dim=1) if kind is Reference.PREDICTION else y.to(x.device)

    def objective(logits: Tensor) -> Tensor:
        loss: Tensor = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        return direction * loss

    return guarded_ascent(model, x, budget, objective)


def attack_calibration(
    model: Logits,
    x: Tensor,
    y: Tensor,
    budget: AttackBudget,
    *,
    n_bins: int = 15,
    edges: Numbers | None = None,
    batch: int = 512,
    time_limit: float | None = None,
) -> tuple[CalibrationAttack, CalibrationAttack]:
    """The worst calibration that these attacks find over the whole set, predictions unchanged.

    ACE attacks both ways give each sample an interval of reached confidences. For the Brier score
    the worse end is taken. For the calibration error the exact worst case over those intervals
    names a confidence for every sample, which is then sought by bisection on the segment between
    the two perturbed inputs; this stays in the ball, since the ball is convex.

    Args:
        model: logits (b, K) of inputs (b, ...), in evaluation mode.
        x: (N, ...) inputs.
        y: (N,) labels.
        budget: radius, norm, limits and steps.
        n_bins: of the calibration error.
        edges: fixed edges instead.
        batch: inputs of the model at once.
        time_limit: wall seconds; batches not reached by then stay clean.

    Returns:
        The attack on the calibration error, and that on the Brier score.

    Raises:
        SpecError: shapes that do not fit, or scores that are not finite.
    """
    deadline = Deadline(time_limit)
    if y.shape != x.shape[:1] or not len(x):
        raise SpecError(f"labels: got {tuple(y.shape)} for {len(x)} inputs; expected one each")
    clean, prediction = confidences(model, x, batch=batch)
    correct = (prediction == y.cpu()).numpy()
    ends = []
    for direction in (1, -1):
        parts = [
            one if deadline.over else ace_attack(model, one, label, budget, direction=direction)
            for one, label in zip(x.split(batch), y.split(batch), strict=True)
        ]
        ends.append(torch.cat(parts))
    low, high = (_kept(model, end, x, prediction, batch) for end in ends)
    worst = torch.from_numpy(correct).to(x.device).reshape(-1, *[1] * (x.dim() - 1))
    brier_worst = torch.where(worst, low[0], high[0])
    grid = bin_edges(n_bins, edges)
    lower = np.minimum(low[1], clean.numpy())
    upper = np.maximum(high[1], clean.numpy())
    data = Intervals(lower, upper, correct)
    goal, bins = best_response(data, grid, solve_dynamic(data, grid)[1])
    found = _seek(model, (low[0], high[0]), prediction, goal, bins, grid, batch, deadline)
    brier = _finish(model, CalibrationMetric.BRIER, x, brier_worst, correct, grid, batch)
    return _finish(model, CalibrationMetric.ECE, x, found, correct, grid, batch), brier


def _kept(
    model: Logits, moved: Tensor, x: Tensor, prediction: Tensor, batch: int
) -> tuple[Tensor, Floats]:
    """Perturbed inputs, the clean one where a prediction differs in this batching; confidences."""
    found = confidences(model, moved, batch=batch)
    same = (found[1] == prediction).to(x.device).reshape(-1, *[1] * (x.dim() - 1))
    points = torch.where(same, moved, x)
    return points, confidences(model, points, batch=batch)[0].numpy()


def _seek(
    model: Logits,
    ends: tuple[Tensor, Tensor],
    prediction: Tensor,
    goal: Floats,
    bins: np.ndarray,
    edges: Floats,
    batch: int,
    deadline: Deadline,
) -> Tensor:
    """Points on the segments between ``ends`` whose confidence is near ``goal``, in its bin."""
    low, high = ends
    column = (-1, *[1] * (low.dim() - 1))
    left, right = torch.zeros(len(low)), torch.ones(len(low))
    best, best_miss = low, np.full(len(low), np.inf)
    target = torch.from_numpy(goal)
    for position in (left, right, *[None] * _BISECTIONS):
        if deadline.over and position is None:
            break
        share = (left + right) / 2 if position is None else position
        points = low + share.reshape(column).to(low) * (high - low)
        z, k = confidences(model, points, batch=batch)
        value = z.numpy()
        miss = np.abs(value - goal) + (bin_of(value, edges) != bins)
        miss = np.where((k == prediction).numpy(), miss, np.inf)
        better = miss < best_miss
        best_miss = np.where(better, miss, best_miss)
        best = torch.where(torch.from_numpy(better).to(low.device).reshape(column), points, best)
        if position is None:
            below = z <= target
            left, right = torch.where(below, share, left), torch.where(below, right, share)
    return best


def _finish(
    model: Logits,
    metric: CalibrationMetric,
    x: Tensor,
    found: Tensor,
    correct: np.ndarray,
    edges: Floats,
    batch: int,
) -> CalibrationAttack:
    """The attack, or the clean inputs where it made nothing worse."""
    candidates = []
    for points in (found, x):
        z = confidences(model, points, batch=batch)[0].numpy()
        value = (
            brier_score(z, correct)
            if metric is CalibrationMetric.BRIER
            else calibration_error(z, correct, edges=edges)
        )
        candidates.append(CalibrationAttack(metric, points, z, value))
    return max(candidates, key=lambda attack: attack.value)
