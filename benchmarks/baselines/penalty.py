"""Adversarial penalty fine-tuning of all layers, then proof: the DL2 recipe.

Loss: ``mean relu(margin_aimed - margin(x)) / unit`` over adversarial points of every region, plus
``distillation`` on the reference inputs. Adversarial points come from projected sign gradients
(``RESTARTS`` starts, ``ATTACK_STEPS`` steps, re-run every optimizer step from fresh and from the
worst earlier points). When ``CLEAN`` attacks in a row find nothing, the network is handed to the
prover; if that fails the aimed margin grows by ``GROWTH`` and training goes on, since penalty
training itself has no notion of proof.

Source: Fischer et al., "DL2: Training and Querying Neural Networks with Logic" (ICML 2019). Ours:
distillation instead of the task loss, so that no labels are needed; the stopping rule.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.baselines._training import Student
from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._base import Candidate, Editor, EditProblem
from torch_prepared.edit._margin import aimed_margin
from torch_prepared.specs import Property

__all__ = ["PenaltyEditor"]

LEARNING_RATE = 1e-3
PENALTY = 10.0
RESTARTS = 32
ATTACK_STEPS = 10
CLEAN = 5
GROWTH = 2.0
RESERVE = 0.15


class PenaltyEditor(Editor):
    """Adam on an adversarial penalty and a distillation loss; proof attempts in between."""

    name = "penalty"

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Iterator[Candidate]:
        """Networks on which the attack finds nothing, with growing margins, until time is up."""
        student = Student.of(problem, LEARNING_RATE)
        unit = aimed_margin(problem)
        aimed, clean, steps, attempts = unit, 0, 0, 0
        worst: dict[int, Tensor] = {}
        reserve = 0.0 if deadline.seconds is None else RESERVE * deadline.seconds
        while deadline.left > reserve:
            margins = []
            for i, prop in enumerate(problem.properties):
                points = self._attack(student, prop, worst.get(i))
                margin = prop.safe.margin(student(points))
                worst[i] = points[margin.detach().argsort()[: RESTARTS // 2]].detach()
                margins.append(margin)
            margin = torch.cat(margins)
            clean = clean + 1 if float(margin.detach().min()) > 0.5 * aimed else 0
            if clean >= CLEAN:
                attempts += 1
                yield student.candidate(f"penalty: {steps} steps, margin {aimed:.3g} aimed at")
                aimed, clean = GROWTH * aimed, 0
            short = torch.relu(aimed - margin) / (1e3 * unit)
            loss = PENALTY * (short.mean() + short.max()) + student.distillation()
            if not student.step(loss):
                return
            steps += 1
        if attempts == 0:
            yield student.candidate(f"penalty: {steps} steps, stopped by time")

    @staticmethod
    def _attack(student: Student, prop: Property, earlier: Tensor | None) -> Tensor:
        """Points (q, n) of the region with a small margin."""
        lower = prop.region.lower.float().to(student.graph.device)
        upper = prop.region.upper.float().to(student.graph.device)
        points = prop.region.sample(RESTARTS, student.generator).to(lower)
        if earlier is not None:
            points = torch.cat([points[: RESTARTS // 2], earlier])
        for step in range(ATTACK_STEPS):
            x = points.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(prop.safe.margin(student(x)).sum(), x)
            move = 0.25 * 0.7**step * (upper - lower) * gradient.sign()
            points = torch.clamp(points - move, lower, upper)
        return points
