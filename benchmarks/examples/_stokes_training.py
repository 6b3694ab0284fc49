"""Five ways to train the same network on the same measurements.

==========  =====================================================================================
plain       gradient descent on the measurements alone
physics     plus the mean squares of divergence and wall velocity at random points: a
            physics-informed network
penalty     plus a DL2 penalty: how far the constraints are missed at adversarial points
guarded     the penalty at the random points instead, from a share of the tolerances on
provable    the loss of ``guarded`` with :class:`EditHook`, which keeps small regions provable in
            the second half; at the end the certificate for the whole square and all walls, after
            one more edit if need be
==========  =====================================================================================

Source of the penalty: Fischer et al., "DL2: Training and Querying Neural Networks with Logic" (ICML
2019), its translation of ``a <= b`` to ``max(a - b, 0)`` and its projected gradient search.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.examples._stokes_case import (
    FlowNetwork,
    Settings,
    StencilNetwork,
    guide_properties,
    measure_flow,
    required_properties,
)
from benchmarks.examples._stokes_judge import certify_within
from torch_prepared.core.capture import capture_module
from torch_prepared.edit._certify import Certified
from torch_prepared.hooks import AtEnd, EditHook, WhenMarginBelow
from torch_prepared.specs import Property

__all__ = ["METHODS", "Trained", "train", "violations"]

METHODS = ("plain", "physics", "penalty", "guarded", "provable")
POINTS = 256  #: fresh random cells per step; a quarter as many on each wall
CELL_WEIGHT, WALL_WEIGHT = 0.02, 0.3  #: of mean squares, in squared mean speeds
PENALTY = 0.02  #: of mean violations in tolerances; grows to this in the course of training
GUARDED = 0.6  #: share of the tolerances from which on the guarded penalty is charged
ATTACK_STEPS, ATTACK_REACH = 3, 0.1
HOOK_START = 0.5  #: share of the steps before the hook's first look
LAST_RATE = 2e-3  #: of the first learning rate

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Trained:
    """A trained network and what it cost.

    Args:
        model: the composite.
        method: one of ``METHODS``.
        train_cpu: process seconds of the loop, the hook included.
        train_wall: wall seconds likewise.
        hook_cpu: process seconds of the hook's looks.
        finish_cpu: process seconds of the certificate, and of the final edit if there was one.
        finish_wall: wall seconds likewise.
        looks: outcomes of the hook's looks.
        edited: whether the trained network needed a final edit to be proved.
        certified: the certificate with the checker's verdict; None when nothing is proved.
    """

    model: StencilNetwork
    method: str
    train_cpu: float
    train_wall: float
    hook_cpu: float = 0.0
    finish_cpu: float = 0.0
    finish_wall: float = 0.0
    looks: tuple[str, ...] = ()
    edited: bool = False
    certified: Certified | None = None


def train(settings: Settings, method: str, *, progress: bool = False) -> Trained:
    """Train from the settings' seed; the same initial weights and measurements for every method.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}; expected one of {', '.join(METHODS)}")
    torch.manual_seed(settings.seed)
    model = StencilNetwork(FlowNetwork(settings.width), settings.spacing)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    loss = _losses(settings, model, method, generator)
    hook = _hook(settings) if method == "provable" else None
    cpu, wall = time.process_time(), time.perf_counter()
    _descend(settings, model, loss, hook, progress)
    train_cpu, train_wall = time.process_time() - cpu, time.perf_counter() - wall
    if hook is None:
        return Trained(model, method, train_cpu, train_wall)
    cpu, wall = time.process_time(), time.perf_counter()
    certified = _certify(settings, model)
    edited = certified is None
    if certified is None:
        _final_hook(settings).finish(model)
        certified = _certify(settings, model)
    return Trained(
        model, method, train_cpu, train_wall,
        sum(record.cpu_seconds for record in hook.records),
        time.process_time() - cpu, time.perf_counter() - wall,
        tuple(record.outcome.value for record in hook.records), edited, certified,
    )  # fmt: skip


def _certify(settings: Settings, model: StencilNetwork) -> Certified | None:
    """The checked certificate of all that is required, or None when it is not proved."""
    graph = capture_module(model, torch.zeros(1, 2))
    return certify_within(graph, required_properties(settings), settings.finish_seconds)


def _descend(
    settings: Settings, model: nn.Module, loss: Loss, hook: EditHook | None, progress: bool
) -> None:
    """Adam, full batch, its rate along half a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.rate)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, settings.steps, LAST_RATE * settings.rate
    )
    for step in tqdm(range(1, settings.steps + 1), disable=not progress, leave=False):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        rates.step()
        if hook is not None:
            hook.after_step(model, step, optimizer=optimizer)


def _hook(settings: Settings) -> EditHook:
    """Guards small regions in the second half of training."""
    return EditHook(
        guide_properties(settings),
        schedule=WhenMarginBelow(
            settings.reserve / 3, settings.every, start=int(HOOK_START * settings.steps)
        ),
        margin=settings.reserve,
        on_failure="ignore",
    )


def _final_hook(settings: Settings) -> EditHook:
    """Edits for all that is required."""
    h = settings.spacing
    generator = torch.Generator().manual_seed(settings.seed)
    return EditHook(
        required_properties(settings),
        schedule=AtEnd(),
        preserve=h / 2 + (1 - h) * torch.rand(1000, 2, generator=generator),
        method="refine",
        margin=settings.reserve,
        time_limit=settings.finish_seconds,
        on_failure="ignore",
        threads=1,
        seed=settings.seed,
    )


def _losses(
    settings: Settings, model: StencilNetwork, method: str, generator: torch.Generator
) -> Loss:
    """The loss of a method, drawing its own points at every call."""
    seen, _ = measure_flow(settings)
    required = required_properties(settings)
    counts = (POINTS, *(POINTS // 4 for _ in required[1:]))
    calls = itertools.count(1)

    def sample() -> list[Tensor]:
        drawn = zip(required, counts, strict=True)
        return [p.region.sample(count, generator).float() for p, count in drawn]

    def plain() -> Tensor:
        return seen.residual(model.net).square().mean()

    def physics(values: list[Tensor]) -> Tensor:
        cells, walls = values[0].square().mean(), torch.cat(values[1:]).square().mean()
        return (
            plain()
            + CELL_WEIGHT * settings.continuity**2 * cells
            + WALL_WEIGHT * settings.wall**2 * walls
        )

    def at(points: list[Tensor]) -> list[Tensor]:
        return [violations(model, p, x) for p, x in zip(required, points, strict=True)]

    def penalized(adversarial: bool, allowed: float) -> Tensor:
        points = sample()
        values = at(points)
        loss = physics(values)
        if adversarial:
            values = at([_attack(model, p, x) for p, x in zip(required, points, strict=True)])
        missed = [torch.relu(v - allowed) for v in values]
        weight = PENALTY * min(next(calls) / settings.steps, 1.0)
        return loss + weight * (missed[0].mean() + torch.cat(missed[1:]).mean())

    losses: dict[str, Loss] = {
        "plain": plain,
        "physics": lambda: physics(at(sample())),
        "penalty": lambda: penalized(True, 1.0),
        "guarded": lambda: penalized(False, GUARDED),
        "provable": lambda: penalized(False, GUARDED),
    }
    return losses[method]


def violations(model: nn.Module, prop: Property, points: Tensor) -> Tensor:
    """Sizes of the constrained values over their tolerances (q,): allowed up to one."""
    value: Tensor = 1.0 - prop.safe.margin(model(points))
    return value


def _attack(model: nn.Module, prop: Property, points: Tensor) -> Tensor:
    """Inputs of the region near ``points`` where the constraint is missed further."""
    lower, upper = prop.region.lower.float(), prop.region.upper.float()
    for attempt in range(ATTACK_STEPS):
        x = points.clone().requires_grad_()
        (slope,) = torch.autograd.grad(violations(model, prop, x).sum(), x)
        reach = ATTACK_REACH * 0.5**attempt
        points = torch.clamp(points + reach * (upper - lower) * slope.sign(), lower, upper)
    return points
