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
from torch_prepared.solvers import LinearProgram, Status, project, solve

__all__ = [
    "AtomicDistance",
    "BehaviorDistance",
    "Distance",
    "QuadraticDistance",
    "Rows",
    "Step",
    "choose_distance",
    "quadratic_distance",
]

ROUNDS = 300
OPTIMAL = 1e-3  #: relative gap at which column generation stops
NEWTON_STEPS, FEWEST_STEPS = 25, 2
NEWTON_FLOPS = 1e10  #: of evaluations, one per step; a step takes about five
NEWTON_GAIN = 0.98  #: how far a step must bring the distance down to be followed by another
SHORTER, LEAST_SHARE = 0.4, 1e-3  #: of a step, while the distance does not fall


@dataclass(frozen=True)
class Rows:
    """Half-spaces' normals (m, p) with what a distance keeps about them."""

    jacobian: Tensor
    inverse: Tensor
    gram: Tensor

    def take(self, kept: Tensor) -> Rows:
        """The rows at positions ``kept``."""
        return Rows(self.jacobian[kept], self.inverse[kept], self.gram[kept][:, kept])

    def effect(self, vector: Tensor) -> Tensor:
        """Inner products (m,) with a vector (p,), float64."""
        return (self.jacobian @ vector.to(self.jacobian)).double()

    def combine(self, weights: Tensor) -> Tensor:
        """The step (p,), float64, whose multipliers are ``weights`` (m,)."""
        return (weights.to(self.inverse) @ self.inverse).double()


@dataclass(frozen=True)
class Step:
    """A step (p,), float64, and the multipliers (m,) of its rows."""

    delta: Tensor
    multipliers: Floats


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

    def around(self, delta: Tensor) -> Distance:
        """The same distance, steps measured as suits a change (p,) that has gone far."""
        return self


@dataclass(frozen=True)
class QuadraticDistance(Distance):
    """``delta' M delta``."""

    metric: Metric

    def size(self, delta: Tensor) -> float:
        return self.metric.norm_squared(delta)

    def extend(self, rows: Rows | None, jacobian: Tensor) -> Rows:
        inverse = self.metric.solve(jacobian)
        fresh = _gram(jacobian, inverse)
        if rows is None or not len(rows.jacobian):
            return Rows(jacobian, inverse, fresh)
        cross = rows.inverse.double() @ jacobian.double().T
        gram = torch.cat([torch.cat([rows.gram, cross], 1), torch.cat([cross.T, fresh], 1)])
        return Rows(torch.cat([rows.jacobian, jacobian]), torch.cat([rows.inverse, inverse]), gram)

    def step(self, rows: Rows, lift: Tensor) -> Step | None:
        answer = project(rows.gram, lift)
        if answer.status is Status.INFEASIBLE:
            return None
        return Step(rows.combine(torch.from_numpy(answer.multipliers)), answer.multipliers)


@dataclass(frozen=True)
class BehaviorDistance(QuadraticDistance):
    """The behavior loss plus the metric's damping times the squared 2-norm of the change.

    Steps are measured by the metric. The nearest change is found by projected quasi-Newton steps,
    each shortened until the true distance falls; the metric stands for the Hessian.

    Source: Schmidt, Kim and Sra, "Projected Newton-type methods in machine learning" (2011).

    Args:
        origin: (p,) float64, the original weights.
        loss: of the behavior.
        reference: the inputs on which behavior counts.
        seed: of the metric's sketch.
    """

    origin: Tensor
    loss: BehaviorLoss
    reference: Reference
    seed: int

    def size(self, delta: Tensor) -> float:
        return self.loss.value(self.origin + delta) + self._penalty(delta)

    def nearest(self, rows: Rows, delta: Tensor, lift: Tensor) -> Step | None:
        starts = self.step(rows, lift), super().nearest(rows, delta, lift)
        known = [start for start in starts if start is not None]
        if not known:
            return None
        best = min(known, key=lambda start: self.size(delta + start.delta))
        step, multipliers, size = best.delta, best.multipliers, self.size(delta + best.delta)
        for _ in range(self._steps):
            home = self._newton(delta + step)
            found = self.step(rows, lift - rows.effect(step) + rows.effect(home))
            if found is None:
                break
            move, share, before = found.delta - home, 1.0, size
            while share > LEAST_SHARE:
                size = self.size(delta + step + share * move)
                if size < before:
                    break
                share *= SHORTER
            else:
                break
            step, multipliers = step + share * move, found.multipliers
            if size > NEWTON_GAIN * before:
                break
        return Step(step, multipliers)

    def around(self, delta: Tensor) -> BehaviorDistance:
        loss = self.loss
        changed = loss.vector.split((self.origin + delta).float())
        metric = behavior_metric(
            loss.graph.with_parameters(changed), loss.vector, self.reference, self.seed,
            self.metric.damping, relative=False,
        )  # fmt: skip
        return replace(self, metric=metric)

    @property
    def _steps(self) -> int:
        """Newton steps worth their time."""
        return int(max(FEWEST_STEPS, min(NEWTON_STEPS, NEWTON_FLOPS / self.loss.flops)))

    def _newton(self, delta: Tensor) -> Tensor:
        """How far to step back by the metric and the true gradient; ``delta`` if they agree."""
        slope = 0.5 * self.loss.gradient(self.origin + delta) + self.metric.damping * delta
        return self.metric.solve(slope[None])[0]

    def _penalty(self, delta: Tensor) -> float:
        return self.metric.damping * float(delta.square().sum())


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
        return Rows(every, every.new_zeros(len(every), 0), every.new_zeros(len(every), len(every)))

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
    return BehaviorDistance(metric, origin, loss, reference, problem.options.seed)


def _gram(jacobian: Tensor, inverse: Tensor) -> Tensor:
    gram = jacobian.double() @ inverse.double().T
    return 0.5 * (gram + gram.T)
