"""Smallest steps under linear rows, for every distance between two networks.

Quadratic distances: the projection onto half-spaces, through its dual of as many variables as rows.

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
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.core.rows import Floats, LinearRows
from torch_prepared.edit._base import EditProblem, Norm
from torch_prepared.edit._metric import Metric
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.solvers import LinearProgram, Status, project, solve

__all__ = ["AtomicDistance", "Distance", "QuadraticDistance", "Rows", "Step", "choose_distance"]

ROUNDS = 300
OPTIMAL = 1e-3  #: relative gap at which column generation stops


@dataclass(frozen=True)
class Rows:
    """Half-spaces' normals (m, p), float32, with what a distance keeps about them."""

    jacobian: Tensor
    inverse: Tensor
    gram: Tensor

    def take(self, kept: Tensor) -> Rows:
        """The rows at positions ``kept``."""
        return Rows(self.jacobian[kept], self.inverse[kept], self.gram[kept][:, kept])

    def effect(self, vector: Tensor) -> Tensor:
        """Inner products (m,) with a vector (p,), float64."""
        return (self.jacobian @ vector.float()).double()

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
    return QuadraticDistance(problem.metric(vector, problem.reference, damping))


def _gram(jacobian: Tensor, inverse: Tensor) -> Tensor:
    gram = jacobian.double() @ inverse.double().T
    return 0.5 * (gram + gram.T)
