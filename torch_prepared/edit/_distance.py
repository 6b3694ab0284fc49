"""Smallest steps under linear rows, for every distance between two networks.

Quadratic distances: the projection onto half-spaces, through its dual of as many variables as rows.

Behavior: what the outputs' changes on reference inputs cost is evaluated, and its Gauss-Newton
metric at the original weights only says which steps to take. A network that has moved far is no
longer described by that metric: it may call a change free that the outputs show clearly.

The other norms are gauges of a set of atoms: ``|d| = min sum c_a`` over ``d = sum c_a a, c >= 0``.
The 1-norm has the signed units as atoms, the largest-entry norm the sign vectors, and their sum
the vectors with k entries ``+-1 / (k + 1)``. So the smallest step is a linear program with one
column per atom and one row per half-space; columns are generated where the dual prices them, by
one sort of ``J' multipliers``, and p never enters the program.

Source: column generation, Dantzig and Wolfe (1960); atomic norms, Chandrasekaran et al., "The
convex geometry of linear inverse problems" (2012).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torch_prepared.core.rows import Floats, LinearRows
from torch_prepared.edit._base import EditProblem, Norm
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._loss import BehaviorLoss
from torch_prepared.edit._metric import Metric, behavior_metric
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.solvers import (
    DualProjection,
    LinearProgram,
    Status,
    gram_matrix,
    project,
    solve,
)

__all__ = [
    "AtomicDistance",
    "BehaviorDistance",
    "Distance",
    "QuadraticDistance",
    "Rows",
    "Step",
    "bordered",
    "choose_distance",
    "quadratic_distance",
]

ROUNDS = 300
OPTIMAL = 1e-3  #: relative gap at which column generation stops
NEWTON_STEPS, FEWEST_STEPS = 8, 2
NEWTON_FLOPS = 1e10  #: of evaluations, one per step; a step takes about five
NEWTON_GAIN = 0.95  #: how far a step must bring the distance down to be followed by another
DAMPING_FACTOR, MOST_DAMPING = 4.0, 1e8  #: of the metric, from step to step and of the ridge
MOST_DAMPINGS, FEWEST_DAMPINGS = 14, 2  #: tried in a row
MANY_ROWS = 128  #: beyond which a projection looks for the few that matter
SETTLED = 1e-10  #: violation that counts as none, in row norms and relative to the largest


@dataclass(frozen=True)
class Rows:
    """Half-spaces' normals (m, p) with what all metrics of one sketch need to know of them.

    Args:
        jacobian: (m, p).
        products: ``jacobian jacobian'`` (m, m), float64.
        image: (m, k), see :meth:`Metric.image`.
    """

    jacobian: Tensor
    products: Tensor
    image: Tensor

    def take(self, kept: Tensor) -> Rows:
        """The rows at positions ``kept``."""
        return Rows(self.jacobian[kept], self.products[kept][:, kept], self.image[kept])

    def effect(self, vector: Tensor) -> Tensor:
        """Inner products (m,) with a vector (p,), float64."""
        return (self.jacobian @ vector.to(self.jacobian)).double()

    def combine(self, weights: Tensor) -> Tensor:
        """The sum (p,), float64, of the rows by ``weights`` (m,)."""
        return (weights.to(self.jacobian) @ self.jacobian).double()


@dataclass(frozen=True)
class Step:
    """A step (p,), float64, and the multipliers (m,) of its rows.

    Args:
        delta: the step.
        multipliers: of the rows.
        damping: of the metric in which to look for the next one; 0 where there is no choice.
    """

    delta: Tensor
    multipliers: Floats
    damping: float = 0.0


class Distance(ABC):
    """How far a weight change goes, and the shortest one with given linear effects."""

    @abstractmethod
    def size(self, delta: Tensor) -> float:
        """The distance of a change (p,); the square of a quadratic one."""

    @abstractmethod
    def extend(self, rows: Rows | None, jacobian: Tensor) -> Rows:
        """``rows`` and then those of ``jacobian`` (k, p)."""

    @abstractmethod
    def step(self, rows: Rows, lift: Tensor) -> Step | None:
        """The smallest step with ``jacobian @ step >= lift`` (m,); None when none was found."""

    def nearest(self, rows: Rows, delta: Tensor, lift: Tensor) -> Step | None:
        """The step from ``delta`` (p,) to the smallest change with ``jacobian @ step >= lift``."""
        found = self.step(rows, lift + rows.effect(delta))
        return None if found is None else Step(found.delta - delta, found.multipliers)

    def shortest(self, rows: Rows, delta: Tensor, lift: Tensor) -> Step | None:
        """A short step from ``delta`` (p,) with ``jacobian @ step >= lift``, if one is found."""
        return self.step(rows, lift)

    def around(self, delta: Tensor) -> Distance:
        """The same distance, steps measured as suits a change (p,) that has gone far."""
        return self

    def after(self, step: Step) -> Distance:
        """The same distance, the next step looked for where ``step`` was found."""
        return self


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


@dataclass(frozen=True)
class AtomicDistance(Distance):
    """``|delta|_1``, ``|delta|_inf`` or their sum."""

    norm: Norm

    def size(self, delta: Tensor) -> float:
        size = delta.abs()
        one = 0.0 if self.norm is Norm.LINF else float(size.sum())
        return one if self.norm is Norm.L1 else one + float(size.max())

    def extend(self, rows: Rows | None, jacobian: Tensor) -> Rows:
        every = jacobian if rows is None else torch.cat([rows.jacobian, jacobian])
        m = len(every)
        return Rows(every, every.new_zeros(m, m), every.new_zeros(m, 0))

    def step(self, rows: Rows, lift: Tensor) -> Step | None:
        matrix = rows.jacobian.double()
        target = lift.numpy()
        if not (target > 0).any():
            return Step(torch.zeros(matrix.shape[1], dtype=torch.float64), np.zeros(len(target)))
        scale = np.maximum(matrix.abs().amax(dim=1).numpy(), 1e-300)
        atoms = [self._atom(row) for row in matrix]
        for _ in range(ROUNDS):
            images = np.stack([matrix[:, where] @ entries for where, entries in atoms], axis=1)
            answer = self._master(images / scale[:, None], target / scale)
            if answer is None:
                return None
            weights, prices = answer
            multipliers = prices / scale
            where, entries = self._atom(matrix.T @ torch.from_numpy(multipliers))
            price = float(multipliers @ (matrix[:, where] @ entries).numpy())
            if price <= 1 + OPTIMAL:
                break
            atoms.append((where, entries))
        step = torch.zeros(matrix.shape[1], dtype=torch.float64)
        for (where, entries), weight in zip(atoms, weights, strict=False):
            step[where] += weight * entries
        return Step(step, multipliers)

    def _master(self, images: Floats, target: Floats) -> tuple[Floats, Floats] | None:
        """Weights of the atoms and prices of the rows; rows may be missed at a huge cost."""
        m, k = images.shape
        penalty = 1e6 / max(float(np.abs(images).max()), 1e-300)
        matrix = np.concatenate([images, np.eye(m)], axis=1)
        cost = np.concatenate([np.ones(k), np.full(m, penalty)])
        program = LinearProgram(
            cost, LinearRows(matrix, target), np.zeros(m + k), np.full(m + k, np.inf)
        )
        answer = solve(program)
        if answer.status is not Status.OPTIMAL or answer.x is None or answer.duals is None:
            return None
        return answer.x[:k], np.maximum(answer.duals, 0.0)

    def _atom(self, price: Tensor) -> tuple[Tensor, Tensor]:
        """The atom of largest inner product with ``price`` (p,): positions and entries."""
        if self.norm is Norm.L1:
            where = price.abs().argmax()[None]
            return where, price[where].sign()
        if self.norm is Norm.LINF:
            return torch.arange(len(price)), price.sign()
        size, order = price.abs().sort(descending=True)
        count = torch.arange(1, len(size) + 1, dtype=size.dtype)
        k = int((size.cumsum(0) / (count + 1)).argmax()) + 1
        return order[:k], price[order[:k]].sign() / (k + 1)


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


def bordered(old: Tensor, cross: Tensor, fresh: Tensor) -> Tensor:
    """The symmetric matrix of blocks ``old`` (m, m), ``cross`` (m, k) and ``fresh`` (k, k)."""
    return torch.cat([torch.cat([old, cross], 1), torch.cat([cross.T, fresh], 1)])


def _project(metric: Metric, rows: Rows, lift: Tensor) -> Step | None:
    """The smallest step in a metric with ``jacobian @ step >= lift`` (m,)."""
    found = _few_multipliers(metric, rows, lift) if len(lift) > MANY_ROWS else None
    if found is None:
        found = project(metric.gram(rows.products, rows.image), lift)
    if found.status is Status.INFEASIBLE:
        return None
    weights = torch.from_numpy(found.multipliers)
    delta = metric.solve(rows.combine(weights)[None], (weights @ rows.image)[None])[0]
    return Step(delta, found.multipliers, metric.damping)


def _few_multipliers(metric: Metric, rows: Rows, lift: Tensor) -> DualProjection | None:
    """:func:`project` by the few of many rows that prove to matter; None where these get too many.

    The Gram matrix is formed of these alone, and grows by the rows that the last solution violates
    most. A ray of some rows is one of all.
    """
    norms = metric.lengths(rows.products.diagonal(), rows.image).clamp_min(1e-300)
    lack = lift / norms
    enough = SETTLED * float(lack.max())
    chosen = torch.zeros(len(lift), dtype=torch.bool)
    answer: DualProjection | None = None
    while True:
        missing = ((lack > enough) & ~chosen).nonzero()[:, 0]
        if not len(missing) and answer is not None:
            every = np.zeros(len(lift))
            every[chosen.numpy()] = answer.multipliers
            return replace(answer, multipliers=every)
        most = max(MANY_ROWS // 2, int(chosen.sum()))
        chosen[missing[lack[missing].argsort(descending=True, stable=True)[:most]]] = True
        if not len(missing) or 2 * int(chosen.sum()) > len(lift):
            return None
        cross, image = rows.products[chosen], rows.image[chosen]
        answer = project(metric.gram(cross[:, chosen], image), lift[chosen])
        if answer.status is Status.INFEASIBLE:
            return answer
        if answer.status is not Status.OPTIMAL:
            return None
        weights = torch.from_numpy(answer.multipliers)[None]
        effect = metric.gram(weights @ cross, weights @ image, rows.image)[0]
        lack = (lift - effect) / norms
