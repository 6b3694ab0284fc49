"""Chains editors within the time budget and lets the driver keep the best certified edit."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._base import Candidate, Editor, EditProblem, Norm
from torch_prepared.edit._certify import LOW_DIMENSION
from torch_prepared.edit.one_shot import OneShotEditor
from torch_prepared.edit.refine import RefineEditor
from torch_prepared.edit.sequential import SequentialEditor
from torch_prepared.errors import InfeasibleEditError, SolverError

__all__ = ["AutoEditor"]

logger = logging.getLogger(__name__)

FALLBACK_SHARE = 0.15


class AutoEditor(Editor):
    """A quick one-shot edit as a safety net, then the editor that suits the regions.

    Regions with at most 16 coordinates of positive width are split (``refine``), and bounded whole
    (``sequential``) if that fails; others, where splitting is hopeless, are bounded whole only.
    """

    name = "auto"

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Iterator[Candidate]:
        reasons: list[str] = []
        found = False
        for editor, share in self._plan(problem):
            if isinstance(editor, OneShotEditor) and problem.options.norm is Norm.BEHAVIOR:
                continue
            part = deadline.share(share)
            try:
                for candidate in editor.candidates(problem, part):
                    found = True
                    note = f"{editor.name}: {candidate.note}"
                    yield dataclasses.replace(candidate, note=note, editor=editor.name)
                if not isinstance(editor, OneShotEditor):
                    return
            except (InfeasibleEditError, SolverError) as error:
                reasons.append(f"{editor.name}: {error}")
                logger.info("auto: %s", reasons[-1])
        if not found:
            raise InfeasibleEditError("; ".join(reasons))

    def _plan(self, problem: EditProblem) -> list[tuple[Editor, float]]:
        """Editors in order, each with its share of the time that is left when it starts."""
        regions = problem.batch.regions
        wide = int((regions.upper > regions.lower).sum(dim=1).max())
        if problem.options.norm in (Norm.L1, Norm.LINF, Norm.L1_PLUS_LINF):
            return [(OneShotEditor(), 1.0)]
        net = (OneShotEditor(first_only=True), FALLBACK_SHARE)
        if wide > LOW_DIMENSION:
            return [net, (SequentialEditor(), 1.0)]
        return [net, (RefineEditor(), 0.95), (SequentialEditor(), 1.0)]
