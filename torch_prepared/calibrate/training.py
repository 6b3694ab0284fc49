"""Training for calibration under attack: by calibration adversaries, and by certified bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_prepared.bounds import Method, RegionBatch, bound_nodes, bound_rows
from torch_prepared.calibrate._bins import Intervals, bin_edges, bin_of
from torch_prepared.calibrate._dynamic import best_response, solve_dynamic
from torch_prepared.calibrate._result import CalibrationMetric
from torch_prepared.calibrate.attack import AttackBudget, Logits, guarded_ascent
from torch_prepared.calibrate.confidence import Clip, confidence_bounds, margin_rows
from torch_prepared.core.graph import Graph
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import local_robustness

__all__ = [
    "CertifiedLoss",
    "TrainingStep",
    "calibration_adversary",
    "calibration_training_step",
    "certified_calibration_loss",
    "smoothed_logits",
]


@dataclass(frozen=True)
class TrainingStep:
    """Losses of one training step, at the perturbed inputs."""

    loss: float
    cross_entropy: float
    calibration: float


def smoothed_logits(model: Logits, noise: Tensor) -> Logits:
    """Log of the mean softmax over fixed noise (d, b, ...): what a smoothed classifier scores."""

    def forward(x: Tensor) -> Tensor:
        logits = torch.stack([model(x + one) for one in noise])
        mean: Tensor = torch.logsumexp(torch.log_softmax(logits, dim=2), dim=0)
        return mean - math.log(len(noise))

    return forward


def calibration_adversary(
    model: Logits,
    x: Tensor,
    y: Tensor,
    budget: AttackBudget,
    *,
    metric: CalibrationMetric | str = CalibrationMetric.BRIER,
    n_bins: int = 15,
) -> Tensor:
    """Inputs of one batch perturbed to hurt calibration, predictions unchanged.

    For the Brier score confidences of right predictions go down, of wrong ones up. For the
    calibration error they go toward the exact worst case of the batch over first-order estimates
    of what each confidence can reach.

    Args:
        model: logits (b, K) of inputs (b, ...); its mode is left alone.
        x: (b, ...) inputs.
        y: (b,) labels.
        budget: radius, norm, limits and steps.
        metric: ``"brier"`` or ``"ece"``.
        n_bins: of the calibration error.

    Returns:
        (b, ...) perturbed inputs, detached.

    Source:
        Emde et al. (ICLR 2025), whose inner step for the calibration error is the alternating
        direction method; the exact response is ours.
    """
    probe = x.detach().clone().requires_grad_(True)
    logits = model(probe)
    confidence, prediction = torch.softmax(logits, dim=1).max(dim=1)
    correct = prediction == y
    if CalibrationMetric(metric) is CalibrationMetric.BRIER:
        toward = torch.where(correct, -1.0, 1.0)
    else:
        (gradient,) = torch.autograd.grad(confidence.sum(), probe)
        reach = budget.gain(gradient).double()
        z = confidence.detach().double()
        floor = 1.0 / logits.shape[1]
        data = Intervals.of(
            (z - reach).clamp(min=floor, max=1.0).minimum(z).clamp(0, 1),
            (z + reach).clamp(max=1.0).maximum(z).clamp(0, 1),
            correct,
        )
        edges = bin_edges(n_bins)
        goal, _ = best_response(data, edges, solve_dynamic(data, edges)[1])
        toward = torch.where(torch.from_numpy(goal).to(z) >= z, 1.0, -1.0)
    direction = toward.to(x)

    def objective(scores: Tensor) -> Tensor:
        own = torch.log_softmax(scores, dim=1).gather(1, prediction[:, None])[:, 0]
        return direction * own

    return guarded_ascent(model, x, budget, objective).detach()


def calibration_training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    budget: AttackBudget,
    *,
    metric: CalibrationMetric | str = CalibrationMetric.BRIER,
    weight: float = 1.0,
    n_bins: int = 15,
    sigma: float = 0.0,
    draws: int = 2,
    generator: torch.Generator | None = None,
) -> TrainingStep:
    """One step of adversarial calibration training (Brier-ACT or ACCE-ACT).

    The loss at the perturbed inputs is cross-entropy plus ``weight`` times the top-label Brier
    score or the batch's calibration error, whose bins and correctness are constants of the
    gradient.

    Args:
        model: logits (b, K); parameters change in place by the optimizer.
        optimizer: of the model's parameters.
        x: (b, ...) inputs.
        y: (b,) labels.
        budget: of the adversary.
        metric: ``"brier"`` or ``"ece"``.
        weight: of the calibration term.
        n_bins: of the calibration error.
        sigma: standard deviation of noise to train a smoothed classifier; the adversary and the
            loss then see the mean score of ``draws`` noisy inputs. 0 trains the network itself.
        draws: see ``sigma``.
        generator: of the noise.

    Raises:
        SpecError: bad options.

    Source: Emde et al. (ICLR 2025), adversarial calibration training.
    """
    if not (weight >= 0 and sigma >= 0 and draws >= 1):
        raise SpecError(
            f"training: got weight {weight}, sigma {sigma}, draws {draws}; expected weight and "
            "sigma >= 0 and draws >= 1"
        )
    forward: Callable[[Tensor], Tensor] = model
    if sigma > 0:
        noise = torch.randn((draws, *x.shape), generator=generator, dtype=torch.float32)
        forward = smoothed_logits(model, sigma * noise.to(x))
    moved = calibration_adversary(forward, x, y, budget, metric=metric, n_bins=n_bins)
    optimizer.zero_grad()
    logits = forward(moved)
    entropy = nn.functional.cross_entropy(logits, y)
    penalty = _calibration_term(logits, y, CalibrationMetric(metric), n_bins)
    loss = entropy + weight * penalty
    loss.backward()
    optimizer.step()
    return TrainingStep(float(loss.detach()), float(entropy.detach()), float(penalty.detach()))


def _calibration_term(logits: Tensor, y: Tensor, metric: CalibrationMetric, n_bins: int) -> Tensor:
    """Brier score or calibration error of a batch, differentiable in the confidences."""
    confidence, prediction = torch.softmax(logits, dim=1).max(dim=1)
    gap = (prediction == y).to(confidence) - confidence
    if metric is CalibrationMetric.BRIER:
        return gap.square().mean()
    values = confidence.detach().double().clamp(0, 1).cpu().numpy()
    bins = torch.from_numpy(bin_of(values, bin_edges(n_bins)) - 1).to(gap.device)
    sums = gap.new_zeros(n_bins).index_add(0, bins, gap)
    return sums.abs().sum() / len(gap)


@dataclass(frozen=True, eq=False)
class CertifiedLoss:
    """A differentiable loss and what it consists of.

    Args:
        loss: scalar to minimize.
        certified_brier: sum over the certified samples divided by the batch's size.
        robust_entropy: mean cross-entropy at the bounds' worst logits.
        certified: (b,) bool.
    """

    loss: Tensor
    certified_brier: Tensor
    robust_entropy: Tensor
    certified: Tensor


def certified_calibration_loss(
    graph: Graph,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    p: float = math.inf,
    clip: Clip | None = None,
    method: str | Method = Method.CROWN_IBP,
    robust_weight: float = 0.5,
    brier_weight: float = 1.0,
) -> CertifiedLoss:
    r"""Loss whose certified Brier term is a bound and not an attack.

    :math:`(1 - \kappa)\,CE(f(x), y) + \kappa\,CE(\text{worst logits}, y) + \lambda\,CBS`, where CBS
    is ``(1 - l)^2`` for certified right and ``u^2`` for certified wrong predictions.

    Args:
        graph: structure of the network, e.g. ``capture_module(model, x[:1])``, captured once.
        parameters: its tensors by name, ``dict(model.named_parameters())``: the loss is
            differentiable in them.
        x: (b, ...) inputs.
        y: (b,) labels.
        eps: radius, see :func:`certify_confidence`.
        p: 1, 2 or inf.
        clip: limits of valid inputs.
        method: of the bounds.
        robust_weight: κ in [0, 1].
        brier_weight: λ >= 0.

    Raises:
        SpecError: bad options.
    """
    if not (0 <= robust_weight <= 1 and brier_weight >= 0):
        raise SpecError(
            f"training: got robust_weight {robust_weight}, brier_weight {brier_weight}; expected "
            "[0, 1] and >= 0"
        )
    classes = graph.output_size
    logits = evaluate_graph(graph, x, parameters).flatten(1)
    prediction = logits.detach().argmax(dim=1)
    regions = _regions(x.detach(), eps, p, clip, classes)
    rows = torch.cat([margin_rows(prediction, classes), margin_rows(y, classes)], dim=1).to(logits)
    chosen = Method.named(method)
    boxes = bound_nodes(graph, regions, parameters=parameters, tighten=chosen is Method.CROWN)
    both = bound_rows(
        graph, regions, boxes, torch.cat([rows, -rows], dim=1), parameters=parameters,
        shallow=chosen is Method.IBP,
    )  # fmt: skip
    lower, negated = both.lower.chunk(2, dim=1)
    interval = confidence_bounds(
        torch.minimum(lower, -negated)[:, :classes],
        torch.maximum(lower, -negated)[:, :classes],
        prediction,
    )
    right = prediction == y.to(prediction)
    score = torch.where(right, (1 - interval.lower) ** 2, interval.upper**2)
    brier = torch.where(interval.certified, score, 0.0).sum() / len(x)
    robust = torch.logsumexp(-lower[:, classes:], dim=1).mean()
    plain = nn.functional.cross_entropy(logits, y)
    loss = (1 - robust_weight) * plain + robust_weight * robust + brier_weight * brier
    return CertifiedLoss(loss, brier, robust, interval.certified)


def _regions(
    x: Tensor, eps: float | Tensor, p: float, clip: Clip | None, classes: int
) -> RegionBatch:
    """Regions around a batch; boxes at once, as steps of training are many."""
    if p != math.inf:
        sets = [local_robustness(one, 0, eps, classes, p, clip).region for one in x]
        return RegionBatch.of(sets, x.dtype, x.device)
    size = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    if not bool((size >= 0).all()):
        raise SpecError(f"training: got eps {eps}; expected >= 0")
    lower, upper = x - size, x + size
    if clip is not None:
        low, high = (torch.as_tensor(end, dtype=x.dtype, device=x.device) for end in clip)
        lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
    return RegionBatch(lower.flatten(1), upper.flatten(1))
