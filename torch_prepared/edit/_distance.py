"""Smallest steps under linear rows, for every distance between two networks.

Quadratic distances: the projection onto half-spaces, through its dual of as many variables as rows.

Behavior: what the outputs' changes on reference inputs cost is evaluated, and its Gauss-Newton
metric at the original weights only says which steps to take. A network that has moved far is no
longer described by that metric: it may call a change free that the outputs show clearly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_prepared.edit._atomic import AtomicDistance
from torch_prepared.edit._base import EditProblem, Norm
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._loss import BehaviorLoss
from torch_prepared.edit._metric import Metric, MetricGram, behavior_metric
from torch_prepared.edit._steps import Distance, Rows, Step, bordered
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.solvers import Status, gram_matrix, project

__all__ = [
    "BehaviorDistance",
    "QuadraticDistance",
    "choose_distance",
    "quadratic_distance",
]

NEWTON_STEPS, FEWEST_STEPS = 8, 2
NEWTON_FLOPS = 1e10  #: of evaluations, one per step; a step takes about five
NEWTON_GAIN = 0.95  #: how far a step must bring the distance down to be followed by another
DAMPING_FACTOR, MOST_DAMPING = 4.0, 1e8  #: of the metric, from step to step and of the ridge
MOST_DAMPINGS, FEWEST_DAMPINGS = 14, 2  #: tried in a row


@dataclass(frozen=True)
class QuadraticDistance(Distance):
    """``delta' M delta``."""

    metric: Metric

    def size(self, delta: Tensor) -> float:
        return self.metric.norm_squared(delta)

    def extend(self, rows: Rows | None, jacobian: Tensor) -> Rows:
        fresh, image = gram_matrix(jacobian), self.metric.image(jacobian)
        if rows is None or not len(rows.jacobian):
            return Rows(jacobian, fresh, image)
        every = torch.cat([rows.jacobian, jacobian])
        cross = rows.jacobian.double() @ jacobian.double().T
        return Rows(every, bordered(rows.products, cross, fresh), torch.cat([rows.image, image]))

    def step(self, rows: Rows, lift: Tensor) -> Step | None:
        return _project(self.metric, rows, lift)


@dataclass(frozen=True)
class BehaviorDistance(QuadraticDistance):
    """The behavior loss plus a ridge: that times the squared 2-norm of the change.

    The metric, a sketch at one point, knows few directions and calls others free along which the
    outputs change all the same. So its damping is no more than a guess: steps are tried with more
    and with less of it, and the true distance decides, as Levenberg and Marquardt do it. The
    nearest change is found by projected quasi-Newton steps of that kind.

    Source: Schmidt, Kim and Sra, "Projected Newton-type methods in machine learning" (2011);
    Marquardt, "An algorithm for least-squares estimation of nonlinear parameters" (1963).

    Args:
        ridge: weight of the squared 2-norm.
        origin: (p,) float64, the original weights.
        loss: of the behavior.
        reference: the inputs on which behavior counts.
        seed: of the metric's sketch.
    """

    ridge: float
    origin: Tensor
    loss: BehaviorLoss
    reference: Reference
    seed: int

    def size(self, delta: Tensor) -> float:
        return self.loss.value(self.origin + delta) + self.ridge * float(delta.square().sum())

    def shortest(self, rows: Rows, delta: Tensor, lift: Tensor) -> Step | None:
        found = self._least(lambda metric: [_project(metric, rows, lift)], delta)
        return None if found is None else found[0]

    def nearest(self, rows: Rows, delta: Tensor, lift: Tensor) -> Step | None:
        home = lift + rows.effect(delta)

        def starts(metric: Metric) -> list[Step | None]:
            there = _project(metric, rows, home)
            back = None if there is None else replace(there, delta=there.delta - delta)
            return [_project(metric, rows, lift), back]

        start = self._least(starts, delta)
        if start is None:
            return None
        best, size = start
        for _ in range(self._steps):
            found = self._newton(rows, delta, lift, best, size)
            if found is None:
                break
            before, (best, size) = size, found
            if size > NEWTON_GAIN * before:
                break
        return best

    def around(self, delta: Tensor) -> BehaviorDistance:
        loss = self.loss
        changed = loss.vector.split((self.origin + delta).float())
        metric = behavior_metric(
            loss.graph.with_parameters(changed), loss.vector, self.reference, self.seed,
            self.ridge, relative=False,
        )  # fmt: skip
        return replace(self, metric=metric.damped(self.metric.damping))

    def after(self, step: Step) -> BehaviorDistance:
        return replace(self, metric=self.metric.damped(step.damping)) if step.damping else self

    @property
    def _steps(self) -> int:
        """Newton steps worth their time."""
        return int(max(FEWEST_STEPS, min(NEWTON_STEPS, NEWTON_FLOPS / self.loss.flops)))

    @property
    def _dampings(self) -> int:
        """Dampings worth trying for one step."""
        return int(max(FEWEST_DAMPINGS, min(MOST_DAMPINGS, NEWTON_FLOPS / self.loss.flops)))

    def _least(
        self, trial: Callable[[Metric], list[Step | None]], delta: Tensor
    ) -> tuple[Step, float] | None:
        """Of steps found with several dampings, the one that ends nearest, and where it ends."""

        def at(damping: float) -> tuple[Step, float] | None:
            found = [step for step in trial(self.metric.damped(damping)) if step is not None]
            sized = [(step, self.size(delta + step.delta)) for step in found]
            return min(sized, key=lambda pair: pair[1], default=None)

        best = at(self.metric.damping)
        if best is None:
            return None
        for factor in (DAMPING_FACTOR, 1.0 / DAMPING_FACTOR):
            damping, start = self.metric.damping, best
            for _ in range(self._dampings):
                damping *= factor
                allowed = self.ridge <= damping <= MOST_DAMPING * self.ridge
                found = at(damping) if allowed else None
                if found is None or found[1] >= best[1]:
                    break
                best = found
            if best is not start:
                break
        return best

    def _newton(
        self, rows: Rows, delta: Tensor, lift: Tensor, best: Step, size: float
    ) -> tuple[Step, float] | None:
        """One more step after ``best`` and where it ends; None when none comes closer."""
        here = delta + best.delta
        slope = 0.5 * self.loss.gradient(self.origin + here) + self.ridge * here
        image = self.metric.image(slope[None])
        damping = best.damping
        for _ in range(self._dampings):
            metric = self.metric.damped(damping)
            free = -metric.solve(slope[None], image)[0]
            found = _project(metric, rows, lift - rows.effect(best.delta + free))
            if found is not None:
                step = best.delta + free + found.delta
                closer = self.size(delta + step)
                if closer < size:
                    less = max(self.ridge, damping / DAMPING_FACTOR)
                    return Step(step, found.multipliers, less), closer
            damping *= DAMPING_FACTOR
        return None


def choose_distance(problem: EditProblem, vector: ParameterVector, damping: float) -> Distance:
    """The distance of the problem's norm: behavior when none was asked for."""
    norm = problem.options.norm
    if norm in (Norm.L1, Norm.LINF, Norm.L1_PLUS_LINF):
        return AtomicDistance(norm)
    return quadratic_distance(problem, vector, problem.to_keep, damping)


def quadratic_distance(
    problem: EditProblem, vector: ParameterVector, reference: Reference, damping: float
) -> QuadraticDistance:
    """The 2-norm, or behavior on ``reference``: evaluated where that is cheap.

    Raises:
        SpecError: a norm that is not quadratic.
    """
    metric = problem.metric(vector, reference, damping)
    if problem.options.norm is Norm.L2:
        return QuadraticDistance(metric)
    loss = BehaviorLoss.of(problem.graph, vector, reference, problem.options.seed)
    if loss is None:
        return QuadraticDistance(metric)
    origin = vector.flatten(problem.exact.parameters).detach().clone()
    return BehaviorDistance(metric, metric.damping, origin, loss, reference, problem.options.seed)


def _project(metric: Metric, rows: Rows, lift: Tensor) -> Step | None:
    """The smallest step in a metric with ``jacobian @ step >= lift`` (m,)."""
    answer = project(MetricGram(metric, rows.products, rows.image), lift)
    if answer.status is Status.INFEASIBLE:
        return None
    weights = torch.from_numpy(answer.multipliers)
    delta = metric.solve(rows.combine(weights)[None], (weights @ rows.image)[None])[0]
    return Step(delta, answer.multipliers, metric.damping)
