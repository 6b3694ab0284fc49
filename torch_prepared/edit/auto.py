"""Chains editors within the time budget and lets the driver keep the best certified edit."""

from __future__ import annotations

import dataclasses
import logging

from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._base import Answer, Candidates, Editor, EditProblem, Norm, following
from torch_prepared.edit._certify import LOW_DIMENSION
from torch_prepared.edit.one_shot import OneShotEditor
from torch_prepared.edit.refine import FEWEST_LEAVES, RefineEditor, affordable_leaves
from torch_prepared.edit.sequential import SequentialEditor
from torch_prepared.errors import InfeasibleEditError, SolverError

__all__ = ["AutoEditor"]

logger = logging.getLogger(__name__)

FALLBACK_SHARE = 0.6  #: of the time, at most, for the first certified edit
LAST_SHARE = 0.05  #: of the time, kept for the last resort while nothing is certified
MANY_WEIGHTS = 100_000  #: beyond which steps of all layers are slow: single layers come first
LAYER_SHARES = 0.3, 0.7  #: of the time left, for the last layer by ``refine``, for others by LPs
PATIENCE = 3.0  #: LPs of more layers are begun while so many like the first fit in the time


class AutoEditor(Editor):
    """A one-shot edit of the last layer as a safety net, then the editor that suits the regions.

    Regions with at most 16 coordinates of positive width are split (``refine``), and bounded whole
    (``sequential``) if that fails; others, where splitting is hopeless, and those of networks too
    large to bound many parts in time, are bounded whole only. Where steps of all layers are slow,
    single layers have their turn before them, by ``refine`` and by ``one_shot``. Where nothing
    holds, one-shot edits of all layers are tried at last.
    """

    name = "auto"

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Candidates:
        reasons: list[str] = []
        found = held = False
        net_seconds = 0.0
        for editor, share in self._plan(problem, deadline):
            clock = Deadline()
            if isinstance(editor, OneShotEditor):
                if problem.options.norm is Norm.BEHAVIOR:
                    continue
                # The last resort is for when nothing is held; others must fit in the time.
                if held and (not editor.begin or deadline.left < PATIENCE * net_seconds):
                    continue
            if isinstance(editor, SequentialEditor) and not held:
                share -= LAST_SHARE
            stream, improves = editor.candidates(problem, deadline.share(share)), False
            try:
                candidate = next(stream, None)
                while candidate is not None:
                    found = True
                    note = f"{editor.name}: {candidate.note}"
                    answer = yield dataclasses.replace(candidate, note=note, editor=editor.name)
                    held |= bool(answer)
                    improves |= answer is Answer.BEST
                    candidate = following(stream, answer)
            except (InfeasibleEditError, SolverError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
                    raise
                reasons.append(f"{editor.name}: {error}")
                logger.info("auto: %s", reasons[-1])
            net_seconds = net_seconds or clock.elapsed
            if improves and not _is_first_try(editor):
                return
        if not found:
            raise InfeasibleEditError("; ".join(reasons))

    def _plan(self, problem: EditProblem, deadline: Deadline) -> list[tuple[Editor, float]]:
        """Editors in order, each with its share of the time that is left when it starts."""
        regions = problem.batch.regions
        wide = int((regions.upper > regions.lower).sum(dim=1).max())
        if problem.options.norm in (Norm.L1, Norm.LINF, Norm.L1_PLUS_LINF):
            return [(OneShotEditor(), 1.0)]
        narrow = wide <= LOW_DIMENSION
        splits = narrow and affordable_leaves(problem, deadline) >= FEWEST_LEAVES
        weights = sum(value.numel() for value in problem.graph.parameters.values())
        slow = narrow and weights > MANY_WEIGHTS and problem.options.layers is None
        plan: list[tuple[Editor, float]] = [(OneShotEditor(end=1), FALLBACK_SHARE)]
        others = (OneShotEditor(begin=1, extra=1.0), LAYER_SHARES[1])
        if slow and splits:
            plan.append((RefineEditor(last_only=True), LAYER_SHARES[0]))
        if slow:
            plan.append(others)
        if splits:
            plan.append((RefineEditor(), 0.95))
        if splits and not slow:
            plan.append(others)
        return [*plan, (SequentialEditor(), 1.0), (OneShotEditor(), 1.0)]


def _is_first_try(editor: Editor) -> bool:
    """Whether editors after this one are expected to keep more."""
    first = isinstance(editor, RefineEditor) and editor.last_only
    return first or isinstance(editor, OneShotEditor)
