"""All layers at once: certified margins raised, then the distance shrunk, by small steps.

*Growth.* First the regions are taken whole: quick where it works. Then, in what time is left, they
grow from their centers to full size. On small regions bounds are tight and the edit is nearly that
of single points; each size starts from the edit of the one before, so that the weights are never
driven by the looseness of bounds on a network that is far from provable.

*Restoration*, for one size. At theta with margins v and Jacobian J the step is the smallest one
that linearly reaches a target,

    min |s|   subject to   J s >= target - v.

It counts when the lowest *true* margin, for the same relaxation slopes, rises by a fair share of
what was promised; otherwise the target comes closer, and after a second failure the margins where
the step led are linearized as well: a kink lies between, and both of its sides count.

*Shrinking.* From a feasible theta the weights are pulled toward the original ones,

    min |theta - theta_0|^2 / 2 + mu |theta - theta_t|^2 / 2   subject to the linearized margins,

with rows of earlier and of refused points kept: the optimum lies on kinks, where one linearization
knows one side only. A step counts when it stays feasible and the distance falls.

Every point visited is bounded anew, so linearization never enters a claim. With the behavior
metric (Gauss-Newton on reference inputs) the edit goes where the network's decisions do not look.

Source: sequential programming with a bundle: Kiwiel, "Methods of Descent for Nondifferentiable
Optimization" (1985), ch. 5; growing regions and held slopes are ours.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._base import Candidate, Candidates, Editor, EditProblem
from torch_prepared.edit._bundle import Bundle
from torch_prepared.edit._checkpoint import Checkpoint, Progress
from torch_prepared.edit._distance import Distance, choose_distance
from torch_prepared.edit._linearize import Linearization, MarginFunction
from torch_prepared.edit._margin import aimed_margin
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.errors import InfeasibleEditError

__all__ = ["SequentialEditor"]

logger = logging.getLogger(__name__)

FIRST_GROWTH = 0.25
LEAST_GROWTH = 0.02
DIRECT_SHARE = 0.4  #: of the time limit, for regions of full size from the start
QUICK_SHARE = 0.015  #: of the time limit; where gradients take longer, growing is hopeless
LEAST_SHARE = 0.1  #: of the time limit; growing is not begun with less
GROWTH_SHARE = 0.5  #: of the time limit; afterwards regions have full size
SHRINK_SHARE = 0.75  #: of the time limit, when shrinking ends
RESTORE_STEPS = 15  #: on regions that may grow more slowly
LAST_RESTORE_STEPS = 200
SHRINK_STEPS = 3  #: between growths
LAST_SHRINK_STEPS = 100
STALE_STEPS, STALE_GAIN = 12, 0.02
BACKTRACKS = 12
FAIR_SHARE = 0.1
REPORT_GAIN = 0.95
FIRST_PULL, LAST_PULL = 8.0, 1e4
NULL_ROWS = 4  #: of lowest margins, linearized where a step failed
FIRST_RETREAT, RETREAT = 4.0, 2.0  #: of the caution, after a failed step and after more of them
PROGRESS = 5  #: steps in which what lacks must halve, or patience counts
SLOW_SHARE = 0.03  #: of the time limit; gradients that take longer are asked for few rows


@dataclass
class _State:
    """A point of weight space, with relaxation slopes, and everything known about it."""

    theta: Tensor
    slopes: Tensor
    value: Tensor
    distance: float

    @property
    def lowest(self) -> float:
        """The smallest certified margin."""
        return float(self.value.min())


@dataclass
class SequentialEditor(Editor):
    """Small steps on linearized certified margins; reaches every architecture CROWN does.

    Args:
        dampings: weights of the 2-norm in the behavior metric, relative to the mean curvature;
            the next one is tried where restoration gets stuck with the one before.
    """

    name = "sequential"
    dampings: tuple[float, ...] = (0.1, 1.0, 0.01)

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Candidates:
        direct: tuple[_Search, _State] | None = None
        try:
            direct = self._feasible(problem, deadline, False)
            yield direct[0].candidate(direct[1], "restored")
        except InfeasibleEditError as error:
            logger.info("sequential, regions whole: %s", error)
            if deadline.seconds is not None and deadline.left < LEAST_SHARE * deadline.seconds:
                raise
        try:
            search, state = self._feasible(problem, deadline, True)
        except InfeasibleEditError:
            if direct is None:
                raise
            search, state = direct
        yield from search.finish(state)

    def _feasible(
        self, problem: EditProblem, deadline: Deadline, grown: bool
    ) -> tuple[_Search, _State]:
        """The first feasible point, with the first metric that leads to one."""
        dampings = self.dampings if grown else self.dampings[:1]
        for number, damping in enumerate(dampings, start=1):
            search = _Search.start(problem, damping, deadline)
            try:
                return search, search.grow() if grown else search.leap()
            except InfeasibleEditError as error:
                logger.info("sequential with damping %g: %s", damping, error)
                if deadline.over or number == len(dampings):
                    raise
        raise InfeasibleEditError("sequential: got no dampings; expected at least one")


@dataclass
class _Search:
    problem: EditProblem
    margins: MarginFunction
    distance: Distance
    origin: Tensor
    aim: float
    deadline: Deadline
    damping: float
    notes: Checkpoint | None = None
    size: float = 0.0  #: of the regions that are reached
    gradient_seconds: float = 0.0
    pass_seconds: float = 0.0
    patience: float = 1.0
    reserve: float = 0.0

    @classmethod
    def start(cls, problem: EditProblem, damping: float, deadline: Deadline) -> _Search:
        vector = ParameterVector.chosen(problem.exact, problem.options.layers)
        team = problem.options.team
        whole = MarginFunction(problem.exact, problem.batch, vector)
        return cls(
            problem,
            whole if team is None else team.margins(problem, vector),
            (choose_distance if team is None else team.distance)(problem, vector, damping),
            vector.flatten(problem.exact.parameters).detach().clone(),
            aimed_margin(problem),
            deadline,
            damping,
        )

    def resume(self, stage: str) -> Progress:
        """Where an earlier run stood, else the original network."""
        self.notes = Checkpoint.of(self.problem, f"sequential-{stage}-{self.damping:g}")
        shape = (len(self.margins.batch), sum(node.size for node, _ in self.margins.bent))
        noted = None if self.notes is None else self.notes.load(len(self.origin), shape)
        return Progress(self.origin, None, 0.0) if noted is None else noted

    def note(self, state: _State, *, now: bool = False) -> None:
        """Remember where this run stands."""
        if self.notes is not None:
            self.notes.save(Progress(state.theta, state.slopes, self.size), now=now)

    def candidate(self, state: _State, note: str) -> Candidate:
        """The state as stored parameters, with its slopes in the proof where they are needed."""
        vector = self.margins.vector
        stored = self.problem.store(vector.split(state.theta))
        theta = vector.flatten({name: value.double().cpu() for name, value in stored.items()})
        own = float(self.margins.choose(theta)[0].min()) > 0.2 * self.aim
        proofs = None if own else self.margins.proofs(theta, state.slopes, self.problem.properties)
        details = {"distance": state.distance, "promised_margin": state.lowest}
        return Candidate(stored, note=note, proofs=proofs, details=details)

    def finish(self, state: _State) -> Iterator[Candidate]:
        """A feasible point and, as long as it pays, closer ones."""
        clock = time.monotonic()
        self.note(state, now=True)
        yield self.candidate(state, "restored")
        self.reserve = 1.5 * (time.monotonic() - clock)
        told = state.distance
        for closer in self.shrink(state, LAST_SHRINK_STEPS):
            state = closer
            self.note(state)
            if state.distance < REPORT_GAIN * told:
                told = state.distance
                yield self.candidate(state, "shrunk")
        if state.distance < told:
            yield self.candidate(state, "shrunk")

    def leap(self) -> _State:
        """A feasible point for the full regions at once, given up where growing may do better.

        Raises:
            InfeasibleEditError: no step helps any more, or it takes too long.
        """
        self.patience = DIRECT_SHARE
        start = self.resume("whole")
        state = self.restore(start.theta, LAST_RESTORE_STEPS, start.slopes)
        self.note(state, now=True)
        self.patience = 1.0
        return state

    @property
    def _cramped(self) -> bool:
        """Whether no pass fits in any more."""
        return self.deadline.seconds is not None and self.deadline.left < self.pass_seconds

    @property
    def _impatient(self) -> bool:
        """Whether time is better spent on growing, which takes many passes."""
        limit = self.deadline.seconds
        if limit is None:
            return False
        quick = self.pass_seconds < QUICK_SHARE * limit
        return quick and not self._late and self.deadline.elapsed > self.patience * limit

    # Growth

    def grow(self) -> _State:
        """A feasible point for the full regions.

        Raises:
            InfeasibleEditError: no step helps any more, or time is over.
        """
        full, start, growth = self.margins, self.resume("grown"), FIRST_GROWTH
        theta, slopes = start.theta, start.slopes
        self.size = start.size if slopes is not None else self._safe_size(full)
        while True:
            if self._late or growth < LEAST_GROWTH:
                growth = 1.0
            target = min(1.0, self.size + growth)
            whole = target == 1.0
            self.margins = full if whole else full.scaled(target)
            try:
                slow = growth < 2 * LEAST_GROWTH or (growth == 1.0)
                state = self.restore(theta, LAST_RESTORE_STEPS if slow else RESTORE_STEPS, slopes)
            except InfeasibleEditError as error:
                if slow or self.deadline.over:
                    raise
                logger.info("growth to %g: %s", target, error)
                growth /= 2
                continue
            logger.info("grown to %g: distance %g", target, state.distance)
            self.size = target
            self.note(state)
            if whole:
                return state
            for closer in self.shrink(state, SHRINK_STEPS):
                state = closer
            theta, slopes = state.theta, None

    def _safe_size(self, full: MarginFunction) -> float:
        """How far regions can grow, in steps, before the original network needs an edit."""
        size = 0.0
        while size + FIRST_GROWTH < 1.0:
            margins = full.scaled(size + FIRST_GROWTH)
            if float(margins.choose(self.origin)[0].min()) < 0.5 * self.aim:
                break
            size += FIRST_GROWTH
        return size

    @property
    def _late(self) -> bool:
        """Whether there is no time for growing slowly."""
        limit = self.deadline.seconds
        if limit is None:
            return False
        slow = self.gradient_seconds > SLOW_SHARE * limit
        return slow or self.deadline.left < (1 - GROWTH_SHARE) * limit

    # Restoration

    def restore(self, theta: Tensor, steps: int, slopes: Tensor | None = None) -> _State:
        """Raise the lowest margin until every one reaches half the aim."""
        if slopes is None:
            state = self._at(theta, *self.margins.choose(theta)[::-1])
        else:
            held = self.margins.value(theta, slopes)
            state = self._at(theta, *self._better(theta, slopes, held))
        bundle, caution, easy = Bundle(self.distance), 0.1, True
        history: list[float] = []
        for step in range(steps):
            if state.lowest >= 0.5 * self.aim:
                return state
            history.append(self.aim - state.lowest)
            slow = len(history) <= PROGRESS or history[-1] > 0.5 * history[-1 - PROGRESS]
            if self._cramped or (slow and self._impatient):
                break
            logger.debug("restore %d: lowest margin %g, caution %g", step, state.lowest, caution)
            bundle.add(self._linearize(state), state.theta, replace=easy)
            before = caution
            state, caution = self._restore_once(state, bundle, caution)
            easy = caution < before
            self.note(state)
        if state.lowest >= 0.5 * self.aim:
            return state
        raise InfeasibleEditError(f"lowest margin still {state.lowest:g} when time was over")

    def _restore_once(self, state: _State, bundle: Bundle, caution: float) -> tuple[_State, float]:
        moved = state.theta - self.origin
        for attempt in range(BACKTRACKS):
            value = bundle.lines(state.theta, state.value)
            if self.deadline.over:
                raise InfeasibleEditError(f"time over with the lowest margin at {state.lowest:g}")
            wanted = (1.5 * self.aim - value).clamp_min(0) / (1 + caution)
            lift = torch.where(value < self.aim, wanted, self.aim - value)
            rows = bundle.rows
            step = None if rows is None else self.distance.shortest(rows, moved, lift)
            if step is not None:
                theta = state.theta + step.delta
                trial = self.margins.value(theta, state.slopes)
                rise = float(trial.clamp_max(self.aim).min()) - min(state.lowest, self.aim)
                if rise > FAIR_SHARE * float(wanted[value.argmin()]):
                    bundle.used(step.multipliers)
                    better = self._better(theta, state.slopes, trial)
                    return self._at(theta, *better), caution * (0.4 if attempt == 0 else 1.0)
                if attempt and self.deadline.left > self.pass_seconds:
                    # There is a kink on the way: from now on its other side counts as well.
                    refused = self._at(theta, state.slopes, trial)
                    bundle.add(self._linearize(refused, few=True), theta)
            caution = max((RETREAT if attempt else FIRST_RETREAT) * caution, 0.05)
        raise InfeasibleEditError(f"no step raises the lowest margin above {state.lowest:g}")

    def _better(self, theta: Tensor, slopes: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """For each property the better of ``slopes`` and the operators' own; margins with them."""
        fresh, own = self.margins.choose(theta)
        owners = self.margins.owners
        lowest = [
            torch.full((len(slopes),), torch.inf, dtype=v.dtype).scatter_reduce(
                0, owners, v, "amin"
            )
            for v in (value, fresh)
        ]
        wins = lowest[1] > lowest[0]
        return torch.where(wins[:, None], own, slopes), torch.where(wins[owners], fresh, value)

    # Shrinking

    def shrink(self, state: _State, steps: int) -> Iterator[_State]:
        """Ever closer feasible points, the slopes held."""
        bundle, pull = Bundle(self.distance), FIRST_PULL
        bundle.add(self._linearize(state), state.theta)
        history = [state.distance]
        for _ in range(steps):
            stale = len(history) > STALE_STEPS and (
                history[-1] > (1 - STALE_GAIN) * history[-1 - STALE_STEPS]
            )
            if pull > LAST_PULL or stale or self._ending or bundle.rows is None:
                return
            trial = self._pulled(state, bundle, pull)
            if trial is None:
                pull *= 4
                continue
            closer = trial.distance < state.distance and trial.lowest >= 0.3 * self.aim
            logger.debug("shrink: %g, pull %g, lowest %g", trial.distance, pull, trial.lowest)
            bundle.add(self._linearize(trial, few=not closer), trial.theta)
            if closer:
                state, pull = trial, pull / 2
                yield state
            else:
                pull *= 2
            history.append(state.distance)

    @property
    def _ending(self) -> bool:
        """Whether the rest of the time belongs to checking what was found."""
        limit = self.deadline.seconds
        if limit is None:
            return False
        return self.deadline.left < max(self.reserve, (1 - SHRINK_SHARE) * limit)

    def _pulled(self, state: _State, bundle: Bundle, pull: float) -> _State | None:
        """The point next to ``state`` that the linearized margins allow nearest to the origin."""
        if bundle.rows is None:
            return None
        lift = (self.aim - bundle.lines(state.theta, state.value)) * (1 + pull)
        step = self.distance.nearest(bundle.rows, state.theta - self.origin, lift)
        if step is None:
            return None
        bundle.used(step.multipliers)
        theta = state.theta + step.delta / (1 + pull)
        return self._at(theta, state.slopes, self.margins.value(theta, state.slopes))

    # Points

    def _at(self, theta: Tensor, slopes: Tensor, value: Tensor) -> _State:
        return _State(theta, slopes, value, self.distance.size(theta - self.origin))

    def _linearize(self, state: _State, few: bool = False) -> Linearization:
        """Gradients of the margins that matter: low ones, fewer where a gradient takes long."""
        value = state.value
        reach = max(self.aim, -state.lowest) * 3 + float(value.abs().median())
        limit = self.deadline.seconds
        slow = limit is not None and self.gradient_seconds > SLOW_SHARE * limit
        order = value.argsort()
        low = order[value[order] < (self.aim if few or slow else reach)]
        rows = low[:NULL_ROWS] if few or slow else low
        rows = rows if len(rows) else order[:1]
        clock = time.monotonic()
        line = self.margins.linearize(state.theta, state.slopes, value, rows)
        self.pass_seconds = time.monotonic() - clock
        self.gradient_seconds = self.pass_seconds / max(len(rows), 1)
        return line
