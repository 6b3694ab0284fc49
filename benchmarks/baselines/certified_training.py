"""Certified fine-tuning of all layers: the certified margin itself is the training signal.

Loss: ``relu(margin_aimed - certified_margin) / unit`` over all properties plus ``distillation`` on
the reference inputs. The margins are CROWN's where backward passes for every layer are affordable,
which are the tightest that can be differentiated here; CROWN-IBP's, as in certified training, for
larger networks. Regions of few dimensions are trained on by ``BOXES`` random sub-boxes of all sizes
at a time, those around points of low margin among them, as bounds over such a region whole say
nothing. When the training bound is positive, or else every ``PROBE`` steps, the network goes to the
attack and the prover. After a success training goes on with less weight on the margin.

Source: Zhang et al., "Towards Stable and Efficient Training of Verifiably Robust Neural Networks"
(ICLR 2020); sub-boxes: Lin et al., "ART: Abstraction Refinement-Guided Training for Provably
Correct Neural Networks" (FMCAD 2020). Ours: distillation instead of the task loss, one region at
full size from the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.baselines._training import Student, Verdict
from torch_prepared.bounds import PropertyBatch, RegionBatch
from torch_prepared.bounds.api import Method, certified_margin
from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._base import Candidates, Editor, EditProblem
from torch_prepared.edit._margin import aimed_margin

__all__ = ["CertifiedTrainingEditor"]

PENALTY = 10.0
PROBE, PAUSE = 100, 20
RELAX, LEAST_WEIGHT = 0.7, 0.05
BOXES = 128
DEEPEST = 6


class CertifiedTrainingEditor(Editor):
    """Adam on certified margins and a distillation loss; proofs in between."""

    name = "certified_training"

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Candidates:
        """Networks that are proved, until time is up."""
        student = Student.of(problem, deadline)
        whole = PropertyBatch.of(problem.properties, torch.float32, student.graph.device)
        method = Method.CROWN if problem.tightens else Method.CROWN_IBP
        unit = aimed_margin(problem)
        weight, last, best = PENALTY, 0, float("inf")
        scale = 0.0
        points = whole.regions.box.center
        while student.progress < 1.0:
            batch = _sub_boxes(whole, points, student) if student.low_dimensional else whole
            margin = certified_margin(
                student.graph, batch, method=method, parameters=student.parameters
            ).margin
            kept = student.distillation()
            lowest, loss_kept = float(margin.detach().min()), float(kept.detach())
            scale = scale or max(abs(lowest), 1e3 * unit)
            since = student.steps - last
            ready = lowest > 0.2 * unit and since >= PAUSE and loss_kept < best
            if ready or since >= PROBE:
                last = student.steps
                note = f"certified training: {student.steps} steps, bound {lowest:.3g}"
                verdict: Verdict = student.verify(note)
                points = verdict.points.to(points)
                if verdict.candidate is not None:
                    yield verdict.candidate
                    best = min(best, loss_kept)
                    weight = max(RELAX * weight, LEAST_WEIGHT)
            short = torch.relu(2 * unit - margin)
            loss = weight * ((short / scale).mean() + (short / (1e3 * unit)).mean()) + kept
            if not student.step(loss):
                return


def _sub_boxes(whole: PropertyBatch, points: Tensor, student: Student) -> PropertyBatch:
    """``BOXES`` random parts of every region, half of them around ``points`` (b, n)."""
    generator = student.generator
    lower, upper = whole.regions.lower, whole.regions.upper
    count, size = len(whole), lower.shape[1]
    share = torch.rand(count, BOXES, size, generator=generator).to(lower)
    center = lower[:, None] + share * (upper - lower)[:, None]
    near = torch.rand(count, BOXES, 1, generator=generator).to(lower) < 0.5
    center = torch.where(near, points[:, None] + 0.1 * (center - points[:, None]), center)
    depth = torch.randint(2, DEEPEST, (count, BOXES, 1), generator=generator).to(lower)
    half = 0.5 ** (depth + 1) * (upper - lower)[:, None]
    low = torch.maximum(center - half, lower[:, None]).flatten(0, 1)
    high = torch.minimum(center + half, upper[:, None]).flatten(0, 1)
    regions = RegionBatch(torch.minimum(low, high), torch.maximum(low, high))
    return PropertyBatch(
        regions,
        whole.rows.repeat_interleave(BOXES, 0),
        whole.offset.repeat_interleave(BOXES, 0),
        whole.clause.repeat_interleave(BOXES, 0),
        whole.present.repeat_interleave(BOXES, 0),
    )
