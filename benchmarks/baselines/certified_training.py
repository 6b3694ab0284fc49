"""Certified fine-tuning of all layers: the certified margin itself is the training signal.

Loss: ``relu(margin_aimed - certified_margin) / unit`` over all properties plus ``distillation`` on
the reference inputs. Margins are CROWN-IBP bounds, as in certified training, which are cheap and
differentiable in all weights; networks whose CROWN-IBP margin starts out hopeless train by it all
the same. Every ``PROBE`` steps, and as soon as the training bound is positive, the network goes to
the prover, which uses its own tighter bounds. After a success training goes on with less weight on
the margin, for a certified network that distills better.

Source: Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks"
(ICLR 2020). Ours: distillation instead of the task loss, one region at full size from the start.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.baselines._training import Student
from torch_prepared.bounds import PropertyBatch
from torch_prepared.bounds.api import Method, certified_margin
from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._base import Candidate, Editor, EditProblem
from torch_prepared.edit._margin import aimed_margin

__all__ = ["CertifiedTrainingEditor"]

LEARNING_RATE = 1e-3
PENALTY = 10.0
PROBE = 100
RELAX = 0.5
RESERVE = 0.15


class CertifiedTrainingEditor(Editor):
    """Adam on CROWN-IBP margins and a distillation loss; proof attempts in between."""

    name = "certified_training"

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Iterator[Candidate]:
        """Networks whose training bound is positive, or every ``PROBE`` steps, until time is up."""
        student = Student.of(problem, LEARNING_RATE)
        batch = PropertyBatch.of(problem.properties, torch.float32, student.graph.device)
        unit = aimed_margin(problem)
        weight, best, steps, since = PENALTY, float("inf"), 0, 0
        scale = None
        reserve = 0.0 if deadline.seconds is None else RESERVE * deadline.seconds
        while deadline.left > reserve:
            margin = certified_margin(
                student.graph, batch, method=Method.CROWN_IBP, parameters=student.parameters
            ).margin
            kept = student.distillation()
            lowest = float(margin.detach().min())
            if scale is None:
                scale = max(abs(lowest), 1e3 * unit)
            since += 1
            if lowest > 0.5 * unit and float(kept.detach()) < 0.9 * best:
                best, since = float(kept.detach()), 0
                weight = max(RELAX * weight, 0.1)
                yield student.candidate(f"certified training: {steps} steps, bound {lowest:.3g}")
            elif since >= PROBE and best == float("inf"):
                since = 0
                yield student.candidate(f"certified training: {steps} steps, bound {lowest:.3g}")
            short = torch.relu(unit - margin)
            loss = weight * ((short / scale).mean() + (short / (1e3 * unit)).mean()) + kept
            if not student.step(loss):
                return
            steps += 1
