"""All layers at once: certified margins raised, then the distance shrunk, by small steps.

*Growth.* Regions grow from their centers to full size. On small ones bounds are tight and the edit
is nearly that of single points; each size starts from the edit of the one before, so that the
weights are never driven by the looseness of bounds on a network that is far from provable. The next
size is the largest at which margins fall no further below 0 than one step can raise them, and each
step aims high: at most of the margin that the original network has at the center. An aim near 0 is
reached soonest by quieting every signal, until no two regions can be told apart; a high one is not.
When half of the time has gone, what is left is taken in one leap.

*Restoration*, for one size. At theta with margins v and Jacobian J the step is the smallest one
that linearly reaches a target,

    min |s|   subject to   J s >= target - v.

It counts when the margin that misses the target most comes nearer by a fair share of what was
promised, for the same relaxation slopes; otherwise the target comes closer, and after a second
failure the margins where the step led are linearized as well: a kink lies between, and both of its
sides count.

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
from torch_prepared.edit._distance import choose_distance
from torch_prepared.edit._linearize import Linearization, MarginFunction
from torch_prepared.edit._margin import aimed_margin
from torch_prepared.edit._pace import Pace
from torch_prepared.edit._steps import Distance
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.errors import InfeasibleEditError

__all__ = ["SequentialEditor"]

logger = logging.getLogger(__name__)

SIGNAL = 0.6  #: of the original margin of a region's center, kept in hand while regions grow
HELD = 0.5  #: of a margin that holds, at most, likewise
DEPTH = 1.0  #: times what is kept in hand, that margins may fall below 0 from size to size
DEEPER = 1.5  #: times as deep when time presses; half as deep after a step too far
LEAST_DEPTH = 0.05
LEAST_GROWTH, GROWTH_GAIN = 0.004, 0.1  #: of the full size; how exactly the next size is found
RESTORE_STEPS = 6  #: on regions that may grow more slowly
LAST_RESTORE_STEPS = 200
LAST_SHRINK_STEPS = 100
STALE_STEPS, STALE_GAIN = 12, 0.02
BACKTRACKS = 12
FAIR_SHARE = 0.1
REPORT_GAIN = 0.95
FIRST_PULL, LAST_PULL = 8.0, 1e4
NULL_ROWS = 4  #: of lowest margins, linearized where a step failed
FIRST_RETREAT, RETREAT = 4.0, 2.0  #: of the caution, after a failed step and after more of them


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
        for number, damping in enumerate(self.dampings, start=1):
            search = _Search.start(problem, damping, deadline)
            try:
                state = search.grow()
            except InfeasibleEditError as error:
                logger.info("sequential with damping %g: %s", damping, error)
                if search.pace.hopeless or deadline.over or number == len(self.dampings):
                    raise
            else:
                yield from search.finish(state)
                return


@dataclass
class _Search:
    problem: EditProblem
    margins: MarginFunction
    distance: Distance
    origin: Tensor
    aim: float
    pace: Pace
    damping: float
    goal: Tensor  #: (m,) margins to aim at while restoring
    notes: Checkpoint | None = None
    size: float = 0.0  #: of the regions that are reached

    @classmethod
    def start(cls, problem: EditProblem, damping: float, deadline: Deadline) -> _Search:
        vector = ParameterVector.chosen(problem.exact, problem.options.layers)
        team = problem.options.team
        whole = MarginFunction(problem.exact, problem.batch, vector)
        aim = aimed_margin(problem)
        return cls(
            problem,
            whole if team is None else team.margins(problem, vector),
            (choose_distance if team is None else team.distance)(problem, vector, damping),
            vector.flatten(problem.exact.parameters).detach().clone(),
            aim,
            Pace(deadline),
            damping,
            torch.full(whole.owners.shape, aim, dtype=torch.float64),
        )

    def resume(self) -> Progress:
        """Where an earlier run stood, else the original network."""
        self.notes = Checkpoint.of(self.problem, f"sequential-{self.damping:g}")
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
        with self.pace.candidate():
            self.note(state, now=True)
            yield self.candidate(state, "restored")
        told = state.distance
        for closer in self.shrink(state, LAST_SHRINK_STEPS):
            state = closer
            self.note(state)
            if state.distance < REPORT_GAIN * told:
                told = state.distance
                yield self.candidate(state, "shrunk")
        if state.distance < told:
            yield self.candidate(state, "shrunk")

    # Growth

    def grow(self) -> _State:
        """A feasible point for the full regions.

        Raises:
            InfeasibleEditError: no step helps any more, or time is over.
        """
        full, start = self.margins, self.resume()
        signal, self.goal = self._goals(full)
        depth = first_depth = DEPTH * max(SIGNAL * float(signal.abs().median()), self.aim)
        theta, slopes, self.size = start.theta, start.slopes, start.size
        began, clock = self.size, time.monotonic()
        while True:
            late = not self.pace.grows or depth < LEAST_DEPTH * first_depth
            target = 1.0 if late else self._reach(full, theta, depth)
            self.margins = full if target == 1.0 else full.scaled(target)
            try:
                most = LAST_RESTORE_STEPS if target == 1.0 else RESTORE_STEPS
                state = self.restore(theta, most, slopes)
            except InfeasibleEditError as error:
                if target == 1.0 or self.pace.deadline.over:
                    raise
                logger.info("growth to %g: %s", target, error)
                depth /= 2
                continue
            logger.info("grown to %g: distance %g", target, state.distance)
            self.size = target
            self.note(state)
            if target == 1.0:
                return state
            if self.pace.behind((target - began) / (1 - began), time.monotonic() - clock):
                depth *= DEEPER
            theta, slopes = state.theta, None

    def _goals(self, full: MarginFunction) -> tuple[Tensor, Tensor]:
        """The original margins at the centers (m,), and what to keep in hand of them.

        Of a margin that holds on the whole region, no more than half of what it is there. Just
        the aim where there is no time for growing.
        """
        with self.pace.bounds():
            own = full.choose(self.origin)[0]
        if self.pace.hopeless:
            raise InfeasibleEditError(
                f"got a network that takes {self.pace.bound_seconds:.1f} s to bound and "
                f"{self.pace.deadline.left:.1f} s; expected time to bound it several times"
            )
        if self.pace.growing <= 0.0:
            return own, torch.full_like(own, self.aim)
        signal = full.scaled(0.0).choose(self.origin)[0]
        spare = torch.where(own > self.aim, HELD * own, torch.inf)
        return signal, torch.minimum(SIGNAL * signal, spare).clamp_min(self.aim)

    def _reach(self, full: MarginFunction, theta: Tensor, depth: float) -> float:
        """The largest size at which no margin falls further than ``depth`` below 0, roughly."""

        def fits(size: float) -> bool:
            margins = full if size == 1.0 else full.scaled(size)
            return float(margins.choose(theta)[0].min()) >= -depth

        low, high = min(1.0, self.size + LEAST_GROWTH), 1.0
        if fits(high):
            return high
        while high - low > max(LEAST_GROWTH, GROWTH_GAIN * (low - self.size)):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    # Restoration

    def restore(self, theta: Tensor, most: int, slopes: Tensor | None = None) -> _State:
        """Raise margins towards the goal until every one reaches half the aim."""
        if slopes is None:
            state = self._at(theta, *self.margins.choose(theta)[::-1])
        else:
            held = self.margins.value(theta, slopes)
            state = self._at(theta, *self._better(theta, slopes, held))
        bundle, caution, easy = Bundle(self.distance), 0.1, True
        for step in range(most):
            if state.lowest >= 0.5 * self.aim:
                return state
            if self.pace.cramped:
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
            goal = self.goal[bundle.index]
            if self.pace.deadline.over:
                raise InfeasibleEditError(f"time over with the lowest margin at {state.lowest:g}")
            wanted = (1.5 * goal - value).clamp_min(0) / (1 + caution)
            lift = torch.where(value < goal, wanted, goal - value)
            rows = bundle.rows
            step = None if rows is None else self.distance.shortest(rows, moved, lift)
            if step is not None:
                theta = state.theta + step.delta
                trial = self.margins.value(theta, state.slopes)
                rise = self._lack(state.value) - self._lack(trial)
                if rise > FAIR_SHARE * float(wanted[(goal - value).argmax()]):
                    bundle.used(step.multipliers)
                    better = self._better(theta, state.slopes, trial)
                    return self._at(theta, *better), caution * (0.4 if attempt == 0 else 1.0)
                if attempt and not self.pace.cramped:
                    # There is a kink on the way: from now on its other side counts as well.
                    refused = self._at(theta, state.slopes, trial)
                    bundle.add(self._linearize(refused, few=True), theta)
            caution = max((RETREAT if attempt else FIRST_RETREAT) * caution, 0.05)
        raise InfeasibleEditError(f"no step raises the lowest margin above {state.lowest:g}")

    def _lack(self, value: Tensor) -> float:
        """By how much the goal is missed where it is missed most; NaN margins miss it by NaN."""
        return float((self.goal - value).clamp_min(0.0).max())

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
            if pull > LAST_PULL or stale or self.pace.ending or bundle.rows is None:
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
        few = few or self.pace.slow
        reach = max(self.aim, -state.lowest) * 3 + float(value.abs().median())
        wide = torch.where(self.goal > self.aim, self.goal, reach)
        order = value.argsort()
        low = order[(value < (self.aim if few else wide))[order]]
        rows = low[:NULL_ROWS] if few else low
        rows = rows if len(rows) else order[:1]
        with self.pace.gradients(len(rows)):
            return self.margins.linearize(state.theta, state.slopes, value, rows)
