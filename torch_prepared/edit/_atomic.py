"""Distances that are not quadratic: the 1-norm, the largest entry, and their sum.

They are gauges of a set of atoms: ``|d| = min sum c_a`` over ``d = sum c_a a, c >= 0``. The 1-norm
has the signed units as atoms, the largest-entry norm the sign vectors, and their sum the vectors
with k entries ``+-1 / (k + 1)``. So the smallest step is a linear program with one column per atom
and one row per half-space; columns are generated where the dual prices them, by one sort of
``J' multipliers``, and p never enters the program.

Source: column generation, Dantzig and Wolfe (1960); atomic norms, Chandrasekaran et al., "The
convex geometry of linear inverse problems" (2012).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.core.rows import Floats, LinearRows
from torch_prepared.edit._base import Norm
from torch_prepared.edit._steps import Distance, Rows, Step
from torch_prepared.solvers import LinearProgram, Status, solve

__all__ = ["AtomicDistance"]

ROUNDS = 300
OPTIMAL = 1e-3  #: relative gap at which column generation stops


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
