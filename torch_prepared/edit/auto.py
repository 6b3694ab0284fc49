"""Chains editors within the time budget and lets the driver keep the best certified edit."""

from __future__ import annotations

import dataclasses
import logging

from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._base import Candidates, Editor, EditProblem, Norm, following
from torch_prepared.edit._certify import LOW_DIMENSION
from torch_prepared.edit.one_shot import OneShotEditor
from torch_prepared.edit.refine import FEWEST_LEAVES, RefineEditor, affordable_leaves
from torch_prepared.edit.sequential import SequentialEditor
from torch_prepared.errors import InfeasibleEditError, SolverError

__all__ = ["AutoEditor"]

logger = logging.getLogger(__name__)

FALLBACK_SHARE = 0.6  #: of the time, at most, for the first certified edit
LAST_SHARE = 0.05  #: of the time, kept for the last resort while nothing is certified
MANY_WEIGHTS = 100_000  #: beyond which steps of all layers are slow, so that the last comes first
FIRST_REFINE_SHARE = 0.4  #: of the time left, for that


class AutoEditor(Editor):
    """A one-shot edit of the last layer as a safety net, then the editor that suits the regions.

    Regions with at most 16 coordinates of positive width are split (``refine``, of networks with
    many weights the last layer first), and bounded whole (``sequential``) if that fails; others,
    where splitting is hopeless, and those of networks too large to bound many parts in time, are
    bounded whole only. Where nothing holds, one-shot edits of all layers are tried at last.
    """

    name = "auto"

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Candidates:
        reasons: list[str] = []
        found = held = False
        for editor, share in self._plan(problem, deadline):
            if isinstance(editor, OneShotEditor) and problem.options.norm is Norm.BEHAVIOR:
                continue
            last_resort = isinstance(editor, OneShotEditor) and not editor.first_only
            if last_resort and held:
                return
            if isinstance(editor, SequentialEditor) and not held:
                share -= LAST_SHARE
            stream, improved = editor.candidates(problem, deadline.share(share)), False
            try:
                candidate = next(stream, None)
                while candidate is not None:
                    found = True
                    note = f"{editor.name}: {candidate.note}"
                    answer = yield dataclasses.replace(candidate, note=note, editor=editor.name)
                    improved |= bool(answer)
                    candidate = following(stream, answer)
            except (InfeasibleEditError, SolverError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                    raise
                reasons.append(f"{editor.name}: {error}")
                logger.info("auto: %s", reasons[-1])
            held |= improved
            if improved and not _is_first_try(editor):
                return
        if not found:
            raise InfeasibleEditError("; ".join(reasons))

    def _plan(self, problem: EditProblem, deadline: Deadline) -> list[tuple[Editor, float]]:
        """Editors in order, each with its share of the time that is left when it starts."""
        regions = problem.batch.regions
        wide = int((regions.upper > regions.lower).sum(dim=1).max())
        if problem.options.norm in (Norm.L1, Norm.LINF, Norm.L1_PLUS_LINF):
            return [(OneShotEditor(), 1.0)]
        net = (OneShotEditor(first_only=True), FALLBACK_SHARE)
        splits = wide <= LOW_DIMENSION and affordable_leaves(problem, deadline) >= FEWEST_LEAVES
        refine = [(RefineEditor(), 0.95)] if splits else []
        weights = sum(value.numel() for value in problem.graph.parameters.values())
        if splits and weights > MANY_WEIGHTS and problem.options.layers is None:
            refine.insert(0, (RefineEditor(last_only=True), FIRST_REFINE_SHARE))
        return [net, *refine, (SequentialEditor(), 1.0), (OneShotEditor(), 1.0)]


def _is_first_try(editor: Editor) -> bool:
    """Whether editors after this one are expected to keep more."""
    first = isinstance(editor, RefineEditor) and editor.last_only
    return first or isinstance(editor, OneShotEditor)
