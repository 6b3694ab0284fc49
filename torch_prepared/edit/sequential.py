"""All layers at once: certified margins raised, then the distance shrunk, by small projections.

Restoration. At theta with margins v and Jacobian J of the rows that are too low, the step is the
smallest one in the metric M that linearly reaches a target,

    min s' M s / 2   subject to   J s >= (target - v),

solved through its dual of as many variables as rows. A step counts when the lowest *true* margin
rises by a fair share of what was promised; otherwise the target comes closer.

Shrinking. From a feasible theta the same projection, of theta_0 onto the linearized constraints
with a proximal term ``mu/2 s' M s``, gives a step; it counts when it stays feasible and the
distance falls. Every point visited is bounded anew, so linearization never enters a claim.

With the behavior metric (Gauss-Newton on reference inputs) the edit goes where the network's
decisions do not look.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.core.rows import Floats
from torch_prepared.edit._base import Candidate, Editor, EditProblem
from torch_prepared.edit._linearize import Linearization, MarginFunction
from torch_prepared.edit._margin import aimed_margin
from torch_prepared.edit._metric import Metric
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.errors import InfeasibleEditError
from torch_prepared.solvers import Status, gram_matrix, project

__all__ = ["SequentialEditor"]

logger = logging.getLogger(__name__)

RESTORE_STEPS = 200
SHRINK_STEPS = 60
BACKTRACKS = 12
FAIR_SHARE = 0.1
REPORT_GAIN = 0.9


@dataclass
class _State:
    """A point of weight space with everything known about it."""

    theta: Tensor
    line: Linearization
    distance: float

    @property
    def lowest(self) -> float:
        """The smallest certified margin."""
        return float(self.line.value.min())


@dataclass
class SequentialEditor(Editor):
    """Projections onto linearized certified margins; reaches every architecture CROWN does.

    Args:
        dampings: weights of the 2-norm in the behavior metric, relative to the mean curvature;
            the next one is tried where restoration gets stuck with the one before.
    """

    name = "sequential"
    dampings: tuple[float, ...] = (0.1, 1.0, 0.01)

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Iterator[Candidate]:
        search, state = self._restore(problem, deadline)
        yield search.candidate(state, "restored")
        told = state.distance
        for closer in search.shrink(state):
            state = closer
            if state.distance < REPORT_GAIN * told:
                told = state.distance
                yield search.candidate(state, "shrunk")
        if state.distance < told:
            yield search.candidate(state, "shrunk")

    def _restore(self, problem: EditProblem, deadline: Deadline) -> tuple[_Search, _State]:
        """The first feasible point, with the first metric that leads to one."""
        for number, damping in enumerate(self.dampings, start=1):
            search = _Search.start(problem, damping, deadline)
            try:
                return search, search.restore()
            except InfeasibleEditError as error:
                logger.info("sequential with damping %g: %s", damping, error)
                if deadline.over or number == len(self.dampings):
                    raise
        raise InfeasibleEditError("sequential: got no dampings; expected at least one")


@dataclass
class _Search:
    problem: EditProblem
    margins: MarginFunction
    metric: Metric
    origin: Tensor
    aim: float
    deadline: Deadline

    @classmethod
    def start(cls, problem: EditProblem, damping: float, deadline: Deadline) -> _Search:
        vector = ParameterVector.of(problem.exact, problem.options.layers)
        metric = problem.metric(vector, problem.reference, damping)
        return cls(
            problem,
            MarginFunction(problem.exact, problem.batch, vector),
            metric,
            vector.flatten(problem.exact.parameters).detach().clone(),
            aimed_margin(problem),
            deadline,
        )

    def candidate(self, state: _State, note: str) -> Candidate:
        """The state as stored parameters."""
        moved = self.margins.vector.split(state.theta)
        details = {"distance": state.distance, "promised_margin": state.lowest}
        return Candidate(self.problem.store(moved), note=note, details=details)

    def restore(self) -> _State:
        """Raise the lowest margin until every one reaches the aim.

        Raises:
            InfeasibleEditError: no step helps any more, or time is over.
        """
        state = self._at(self.origin)
        caution = 0.1
        for step in range(RESTORE_STEPS):
            if state.lowest >= 0.5 * self.aim:
                return state
            logger.info("restore %d: lowest margin %g", step, state.lowest)
            state, caution = self._restore_once(state, caution)
        raise InfeasibleEditError(
            f"lowest margin still {state.lowest:g} after {RESTORE_STEPS} steps"
        )

    def _restore_once(self, state: _State, caution: float) -> tuple[_State, float]:
        value = state.line.value[state.line.rows]
        inverse = self.metric.solve(state.line.jacobian)
        gram = gram_matrix(state.line.jacobian, lambda _: inverse)
        for attempt in range(BACKTRACKS):
            if self.deadline.over:
                raise InfeasibleEditError(f"time over with the lowest margin at {state.lowest:g}")
            wanted = (1.5 * self.aim - value).clamp_min(0) / (1 + caution)
            lift = torch.where(value < self.aim, wanted, self.aim - value)
            answer = project(gram, lift)
            if answer.status is not Status.INFEASIBLE:
                step = _combine(inverse, answer.multipliers)
                trial = self.margins.value(state.theta + step)
                rise = float(trial.clamp_max(self.aim).min()) - min(state.lowest, self.aim)
                if rise > FAIR_SHARE * float(wanted[value.argmin()]):
                    return self._at(state.theta + step), caution * (0.4 if attempt == 0 else 1.0)
            caution = max(4 * caution, 0.05)
        raise InfeasibleEditError(f"no step raises the lowest margin above {state.lowest:g}")

    def shrink(self, state: _State) -> Iterator[_State]:
        """Ever closer feasible points."""
        caution, stale = 1.0, 0
        for _ in range(SHRINK_STEPS):
            found = self._shrink_once(state, caution)
            if found is None:
                return
            closer, caution = found
            stale = stale + 1 if closer.distance > 0.99 * state.distance else 0
            state = closer
            yield state
            if stale >= 3:
                return

    def _shrink_once(self, state: _State, caution: float) -> tuple[_State, float] | None:
        line = state.line
        inverse = self.metric.solve(line.jacobian)
        gram = gram_matrix(line.jacobian, lambda _: inverse)
        moved = state.theta - self.origin
        value = line.value[line.rows]
        along = line.jacobian.double() @ moved
        for attempt in range(BACKTRACKS):
            if self.deadline.over:
                return None
            answer = project(gram, (self.aim - value) * (1 + caution) + along)
            if answer.status is not Status.INFEASIBLE:
                step = (_combine(inverse, answer.multipliers) - moved) / (1 + caution)
                theta = state.theta + step
                closer = self.metric.norm_squared(theta - self.origin)
                if (
                    closer < state.distance
                    and float(self.margins.value(theta).min()) >= 0.3 * self.aim
                ):
                    return self._at(theta), caution * (0.4 if attempt == 0 else 1.0)
            caution = max(4 * caution, 0.05)
        return None

    def _at(self, theta: Tensor) -> _State:
        """Bound and linearize at a point; rows far above the aim need no gradient."""
        value = self.margins.value(theta)
        reach = max(self.aim, float(-value.min())) * 3 + float(value.abs().median())
        return _State(
            theta,
            self.margins.linearize(theta, near=reach),
            self.metric.norm_squared(theta - self.origin),
        )


def _combine(rows: Tensor, multipliers: Floats) -> Tensor:
    """``rows' multipliers`` in float64."""
    return (rows.T @ torch.from_numpy(multipliers).to(rows)).double()
