"""Adversarial penalty fine-tuning of all layers, then proof: the DL2 recipe.

Loss: ``relu(margin_aimed - margin(x)) / size`` over adversarial points of every region (mean and
worst) plus ``distillation`` on the reference inputs. Adversarial points come from projected sign
gradients (``RESTARTS`` starts, ``ATTACK_STEPS`` steps, every optimizer step anew, from the worst of
``SCREENED`` fresh samples where inputs are few, and from the worst earlier points). When ``CLEAN``
attacks in a row find nothing the network goes to a stronger attack, whose violating points are
trained on ever after, and then to the prover. A violation or a proof that fails raises the aimed
margin, since penalty training itself has no notion of proof; a success lowers it, for an edit that
loses less.

Source: Fischer et al., "DL2: Training and Querying Neural Networks with Logic" (ICML 2019). Ours:
distillation instead of the task loss, so that no labels are needed; the search for the margin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines._training import Student
from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._base import Candidates, Editor, EditProblem
from torch_prepared.edit._margin import aimed_margin
from torch_prepared.specs import Property

__all__ = ["PenaltyEditor"]

PENALTY = 10.0
RESTARTS = 32
ATTACK_STEPS = 10
CLEAN = 5
GROWTH, NUDGE, DECAY = 2.0, 1.25, 0.8
PAUSE = 40
SCREENED = 1000
MOST_KNOWN = 64


class PenaltyEditor(Editor):
    """Adam on an adversarial penalty and a distillation loss; proofs in between."""

    name = "penalty"

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Candidates:
        """Networks that were attacked in vain and proved, until time is up."""
        student = Student.of(problem, deadline)
        unit = aimed_margin(problem)
        aimed, clean, last = 10 * unit, 0, -PAUSE
        worst: dict[int, Tensor] = {}
        known = [p.region.sample(0, student.generator).float() for p in problem.properties]
        while student.progress < 1.0:
            margins = []
            for i, prop in enumerate(problem.properties):
                points = self._attack(student, prop, worst.get(i))
                margin = prop.safe.margin(student(torch.cat([points, known[i].to(points)])))
                order = margin.detach()[: len(points)].argsort()
                worst[i] = points[order[: RESTARTS // 2]].detach()
                margins.append(margin)
            margin = torch.cat(margins)
            clean = clean + 1 if float(margin.detach().min()) > 0.5 * aimed else 0
            if clean >= CLEAN and student.steps >= last + PAUSE:
                clean, last = 0, student.steps
                verdict = student.verify(f"penalty: {student.steps} steps, margin {aimed:.3g}")
                known = [
                    torch.cat([old, point[None]])[-MOST_KNOWN:]
                    for old, point in zip(known, verdict.points, strict=True)
                ]
                if verdict.candidate is not None:
                    yield verdict.candidate
                    aimed *= DECAY
                else:
                    aimed *= NUDGE if verdict.attacked else GROWTH
            short = torch.relu(aimed - margin) / (1e3 * unit)
            loss = PENALTY * (short.mean() + short.max()) + student.distillation()
            if not student.step(loss):
                return

    @staticmethod
    def _attack(student: Student, prop: Property, earlier: Tensor | None) -> Tensor:
        """Points (q, n) of the region with a small margin."""
        lower = prop.region.lower.float().to(student.graph.device)
        upper = prop.region.upper.float().to(student.graph.device)
        points = prop.region.sample(RESTARTS, student.generator).to(lower)
        if student.low_dimensional:
            drawn = prop.region.sample(SCREENED, student.generator).to(lower)
            with torch.no_grad():
                order = prop.safe.margin(student(drawn)).argsort()
            points[: RESTARTS // 2] = drawn[order[: RESTARTS // 2]]
        if earlier is not None:
            points = torch.cat([points[: RESTARTS // 2], earlier])
        for step in range(ATTACK_STEPS):
            x = points.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(prop.safe.margin(student(x)).sum(), x)
            move = 0.25 * 0.7**step * (upper - lower) * gradient.sign()
            points = torch.clamp(points - move, lower, upper)
        return points
