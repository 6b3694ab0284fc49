"""One edit from start to end: look, propose, round, certify, compare, keep the best, report.

Kept properties cost nothing while no edit threatens them: every candidate is certified on them,
and those that one loses join the edit set, with which the editor starts again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from tqdm import tqdm

from torch_prepared._version import __version__
from torch_prepared.certify import ProofTree, Verdict
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork
from torch_prepared.edit._base import (
    Answer,
    Candidate,
    Candidates,
    EditOptions,
    Editor,
    EditProblem,
    following,
)
from torch_prepared.edit._behavior import Drawdown, Reference
from torch_prepared.edit._certify import Certified, certify_network, check_and_mend, prove
from torch_prepared.edit._conflict import find_conflicts
from torch_prepared.edit._report_locality import measure_locality
from torch_prepared.edit._result import Attempt, Delta, EditReport, EditResult
from torch_prepared.edit._source import Source
from torch_prepared.edit._standing import Prover, attack_quickly, judge
from torch_prepared.edit.report import (
    Generalization,
    Role,
    Standing,
    State,
    report_properties,
)
from torch_prepared.errors import InfeasibleEditError, SpecError
from torch_prepared.specs import Property

__all__ = ["Run", "Task"]

logger = logging.getLogger(__name__)

CHECK_GRACE = 0.2  #: share of the time limit that the checker may take beyond it
GLANCE_SHARE, GLANCE_MOST = 0.04, 2.0  #: of the time limit, for each attack of the report
HOLDOUT_SHARE, HOLDOUT_MOST = 0.08, 30.0  #: likewise, for proofs of those held out
KEEP_SHARE = 0.25  #: of the time left, for proving before the edit what shall be kept
ROUND_SHARE = 0.75  #: of the time left, for an editor whose edits may lose kept properties
CHECKED_PER_SECOND = 900  #: leaves that the checker replays, for planning
LOSSES = 2  #: candidates of one editor that may lose kept properties before it starts again


@dataclass(frozen=True)
class Task:
    """What :func:`~torch_prepared.edit.edit_network` was asked to do, checked.

    Args:
        source: the network.
        properties: those to edit for.
        keep: those that hold and must still hold.
        holdout: those to report on only.
        reference: inputs on which the behavior should stay.
        domain: ends (n,) of the inputs that matter, when stated.
        options: of the editor.
        method: name of the editor.
        editor: its class.
        deadline: for everything.
        progress: whether to show a bar.
    """

    source: Source
    properties: tuple[Property, ...]
    keep: tuple[Property, ...]
    holdout: tuple[Property, ...]
    reference: Reference
    domain: tuple[Tensor, Tensor] | None
    options: EditOptions
    method: str
    editor: type[Editor]
    deadline: Deadline
    progress: bool

    @property
    def every(self) -> tuple[Property, ...]:
        """All that the certificate covers: edited, then kept."""
        return (*self.properties, *self.keep)

    def limit(self, share: float, most: float) -> float:
        """Seconds: a share of the time limit, but not too many."""
        seconds = self.deadline.seconds
        return most if seconds is None else max(min(most, share * seconds), 0.05)


@dataclass(frozen=True)
class _Best:
    candidate: Candidate
    certified: Certified
    drawdown: Drawdown
    method: str


@dataclass
class Run:
    """Tries candidates and keeps the best one that is certified on everything."""

    task: Task
    seconds: dict[str, float] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    best: _Best | None = None
    message: str = ""
    reasons: dict[int, str] = field(default_factory=dict)
    conflicts: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        task = self.task
        self.keeper = Prover(task.keep)
        self.outsider = Prover(task.holdout)
        self.keep_seconds = 0.0
        self.unproved: list[str] = []
        limit = task.deadline.seconds
        reserve = task.limit(GLANCE_SHARE, GLANCE_MOST)
        reserve += task.limit(HOLDOUT_SHARE, HOLDOUT_MOST) if task.holdout else 0.0
        work = None if limit is None else max(limit - reserve, 0.5 * limit)
        self.work = Deadline(work, task.deadline.start)

    def edit(self) -> EditResult[nn.Module | OnnxNetwork | Graph]:
        """Certify the network as it is, else edit it."""
        first = self._problem(range(len(self.task.properties)))
        kept = self._look(first)
        self.conflicts = find_conflicts(self.task.every)
        if self.conflicts:
            pairs = "; ".join(" and ".join(map(repr, pair)) for pair in self.conflicts)
            self.message = f"no network satisfies together: {pairs} (at a common input)"
            return self._result()
        active = [i for i in range(len(self.task.every)) if i not in kept]
        margins = self.before[: len(self.task.properties)]
        if all(standing.lower > 0 for standing in margins):
            if self._certify(Candidate({}, "unchanged"), active, "none") == set():
                self.message = "the properties hold already; the network is returned unchanged"
                return self._result()
        try:
            self._search(active)
        except KeyboardInterrupt:
            self.message = "interrupted"
            if self.best is None:
                raise
        return self._result()

    def _look(self, problem: EditProblem) -> set[int]:
        """Attack and bound the original; returns positions of kept properties that hold.

        Raises:
            SpecError: a property to keep is violated.
        """
        task, graph = self.task, self.task.source.graph
        with self._timed("attack"):
            glance = task.limit(GLANCE_SHARE, GLANCE_MOST)
            everyone = (*task.every, *task.holdout)
            self.attack = attack_quickly(graph, everyone, task.options.seed, glance)
        first, last = len(task.properties), len(task.every)
        broken = [i for i in range(first, last) if bool(self.attack.violated[i])]
        if broken:
            names = ", ".join(repr(task.every[i].name) for i in broken)
            raise SpecError(
                f"keep: {names} does not hold before the edit (an input has margin "
                f"{float(self.attack.margins[broken].min()):.3g}); expected properties that hold; "
                "give it among those to edit for, or leave it out"
            )
        with self._timed("bounds"):
            margins = problem.batch.margins(problem.row_bounds).tolist()
            logger.info("certified margins before the edit: %s", margins)
        clock = time.monotonic()
        with self._timed("keep"):
            found, lower = self.keeper.prove(
                graph, range(len(task.keep)), self.work.share(KEEP_SHARE)
            )
        self.keep_seconds = time.monotonic() - clock
        proved = {first + i for i in found}
        held, outside = self._hold_out(graph)
        proved |= {i for i, margin in enumerate(margins) if margin > 0}
        proved |= {last + i for i in held}
        self.before = judge(self.attack, [*margins, *lower.tolist(), *outside], proved)
        self.unproved = [task.every[i].name for i in range(first, last) if i not in proved]
        return {first + i for i in found}

    def _hold_out(self, graph: Graph) -> tuple[set[int], list[float]]:
        """Positions of held-out properties that bounds prove, and all their lower bounds."""
        with self._timed("report"):
            limit = Deadline(self.task.limit(HOLDOUT_SHARE, HOLDOUT_MOST))
            found, lower = self.outsider.prove(graph, range(len(self.task.holdout)), limit)
        return set(found), lower.tolist()

    def _problem(self, active: Sequence[int]) -> EditProblem:
        task = self.task
        chosen = tuple(task.every[i] for i in active)
        return EditProblem(task.source.graph, chosen, task.reference, task.options)

    def _search(self, active: list[int]) -> None:
        """Edit; kept properties that are lost join the edit set, and all starts again."""
        while True:
            lost = self._round(active)
            if not lost or self.work.over:
                return
            names = ", ".join(repr(self.task.every[i].name) for i in sorted(lost))
            logger.info("lost: %s; edited for from now on", names)
            self.message = f"the edit loses {names}"
            active = sorted({*active, *lost})

    def _round(self, active: list[int]) -> set[int]:
        """One run of the editor; positions of the kept properties that its edits lose."""
        task, lost, losses = self.task, set[int](), 0
        answer: Answer | None = None
        loose = len(active) < len(task.every)
        stream = task.editor().candidates(self._problem(active), self._editing(loose))
        bar = tqdm(disable=not task.progress, unit="edit", desc=task.method, leave=False)
        try:
            while (candidate := self._next(stream, answer)) is not None:
                lost = self._certify(candidate, active, candidate.editor or task.method)
                answer = Answer(self.attempts[-1].certified)
                if self.best is not None and self.best.candidate is candidate:
                    answer = Answer.BEST
                losses += bool(lost)
                bar.update()
                if self.work.over or losses >= LOSSES:
                    break
        except InfeasibleEditError as error:
            if self.best is None and not lost:
                before = f"{self.message}; then " if self.message.startswith("the edit lo") else ""
                self.message = f"{before}{error}"
        finally:
            bar.close()
        return lost

    def _editing(self, loose: bool) -> Deadline:
        """Time for the editor, what it takes to prove and check kept properties put aside."""
        if not loose:
            return self.work
        left = self.work.left
        aside = self.keep_seconds + self.keeper.leaves / CHECKED_PER_SECOND
        usable = max(left - aside, 0.3 * left)
        return Deadline(None if self.work.seconds is None else ROUND_SHARE * usable)

    def _next(self, stream: Candidates, answer: Answer | None) -> Candidate | None:
        with self._timed("edit"):
            return following(stream, answer)

    def _certify(self, candidate: Candidate, active: Sequence[int], method: str) -> set[int]:
        """Have a candidate checked; keep it when it is certified and the best so far.

        Returns:
            Positions of kept properties outside of ``active`` that it loses.
        """
        task = self.task
        graph = task.source.graph.with_parameters(candidate.parameters)
        grace = None
        if task.deadline.seconds is not None:
            grace = max(self.work.left, CHECK_GRACE * task.deadline.seconds)
        first = len(task.properties)
        loose = [i for i in range(first, len(task.every)) if i not in active]
        with self._timed("keep"):
            kept, _ = self.keeper.prove(graph, [i - first for i in loose], Deadline(grace))
        lost = {i for i in loose if i - first not in kept}
        if lost:
            reasons = dict.fromkeys(lost, "bounds no longer prove it after the edit")
            self._record(candidate, method, None, None, reasons)
            return lost
        with self._timed("bounds"):
            mine: Sequence[ProofTree] | None = candidate.proofs
            if mine is None:
                mine, _ = prove(graph, [task.every[i] for i in active])
        proofs = dict(zip(active, mine, strict=True)) | {first + k: p for k, p in kept.items()}
        metadata = {"generator": f"torch_prepared {__version__}", "method": method}
        certify = certify_network if task.options.team is None else task.options.team.certify
        with self._timed("check"):
            every = [proofs[i] for i in sorted(proofs)]
            certified = check_and_mend(certify, graph, task.every, every, metadata, Deadline(grace))
        drawdown = task.reference.drawdown(graph) if certified.holds else None
        if drawdown is not None and (
            self.best is None or drawdown.total < self.best.drawdown.total
        ):
            self.best = _Best(candidate, certified, drawdown, method)
        checks = certified.check.per_property
        reasons = {i: c.reason for i, c in enumerate(checks) if c.status is not Verdict.CERTIFIED}
        self._record(candidate, method, certified, drawdown, reasons)
        return set()

    def _record(
        self,
        candidate: Candidate,
        method: str,
        certified: Certified | None,
        drawdown: Drawdown | None,
        reasons: dict[int, str],
    ) -> None:
        """Note an attempt; of those that failed the one with the fewest failures explains why."""
        attempt = Attempt(
            method=method,
            note=candidate.note,
            seconds=self.task.deadline.elapsed,
            certified=drawdown is not None,
            margin=float("nan") if certified is None else certified.check.margin,
            score=None if drawdown is None else drawdown.score,
            failed=tuple(self.task.every[i].name for i in sorted(reasons)),
        )
        self.attempts.append(attempt)
        logger.info("%s", attempt)
        if reasons and (not self.reasons or len(reasons) <= len(self.reasons)):
            self.reasons = reasons
            if certified is not None:
                self.message = next(iter(reasons.values())) or "not proved"

    def _result(self) -> EditResult[nn.Module | OnnxNetwork | Graph]:
        """The best edit with its report, or an unchanged copy."""
        task, best = self.task, self.best
        after: list[Standing] | None = None
        if best is not None:
            if best.method != "none":
                self.message = f"certified by {best.method}"
            after = self._look_again(best)
            if any(s.state is State.VIOLATED for s in after[: len(task.every)]):
                # A bug in bounds, checker or evaluation; whichever it is, nothing is certified.
                self.message = "SOUNDNESS ALARM: an attack violates a certified property"
                logger.error("%s", self.message)
                best = after = None
        self.message = self.message or f"{task.method} proposed no edit in the time there was"
        if self.unproved:
            self.message += f"; not proved before, so edited for: {', '.join(self.unproved)}"
        changed = {} if best is None else best.candidate.parameters
        check = None if best is None else best.certified.check
        locality = None
        if best is not None:
            with self._timed("report"):
                graph = task.source.graph
                locality = measure_locality(
                    graph, graph.with_parameters(changed), task.properties, task.reference,
                    task.domain, task.options.seed,
                )  # fmt: skip
        properties = report_properties(
            {Role.EDIT: task.properties, Role.KEEP: task.keep, Role.HOLDOUT: task.holdout},
            self.before,
            after,
            {} if best is not None else self.reasons,
        )
        self.seconds["total"] = task.deadline.elapsed
        report = EditReport(
            method="none" if best is None else best.method,
            seconds=dict(self.seconds),
            margin=float("nan") if check is None else check.margin,
            delta=Delta.between(task.source.graph, changed),
            drawdown=None if best is None else best.drawdown,
            locality=locality,
            properties=properties,
            generalization=Generalization.of(properties),
            conflicts=self.conflicts,
            attempts=tuple(self.attempts),
            message=self.message,
        )
        return EditResult(
            status=Verdict.UNKNOWN if check is None else check.status,
            model=task.source.rebuild(changed),
            certificate=None if best is None else best.certified.certificate,
            check=check,
            report=report,
            worst_inputs=self.attack.inputs[: len(task.every)],
        )

    def _look_again(self, best: _Best) -> list[Standing]:
        """Standings of the edited network: the checker's word, an attack, bounds for the rest."""
        task = self.task
        graph = task.source.graph.with_parameters(best.candidate.parameters)
        held, outside = self._hold_out(graph)
        with self._timed("attack"):
            glance = task.limit(GLANCE_SHARE, GLANCE_MOST)
            everyone, seed = (*task.every, *task.holdout), task.options.seed
            attack = attack_quickly(graph, everyone, seed, glance, self.attack.inputs)
        checks = best.certified.check.per_property
        lower = [*(check.margin for check in checks), *outside]
        standings = judge(attack, lower, {len(checks) + i for i in held})
        return [
            Standing(State.CERTIFIED, s.lower, s.upper)
            if i < len(checks) and s.state is not State.VIOLATED
            else s
            for i, s in enumerate(standings)
        ]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Add the wall time of a block to a phase."""
        clock = time.monotonic()
        try:
            yield
        finally:
            spent = self.seconds.get(phase, 0.0) + time.monotonic() - clock
            self.seconds[phase] = spent
