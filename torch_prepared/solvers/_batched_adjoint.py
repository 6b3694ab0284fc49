"""The adjoint of a separable program's KKT system on its active set."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_prepared.solvers._batched_gram import batch_indices, compress
from torch_prepared.solvers._batched_separable import SeparableBatch, transposed

__all__ = ["Adjoint"]

_SINGULAR = 1e-9  #: relative residual beyond which the system counts as singular


class Adjoint:
    """Solves ``E v + A_SF^T w = g_F, A_SF v = h_S`` for the free columns F and active rows S.

    Where the system is singular (degenerate vertices) its least-squares solution of least norm is
    taken: one of the one-sided derivatives' averages, and 0 where there is none.

    Args:
        batch: the program.
        free: (b, n) mask F.
        active: (b, m) mask S.
    """

    def __init__(self, batch: SeparableBatch, free: Tensor, active: Tensor) -> None:
        self.batch = batch
        self.columns, self.is_column = compress(free)
        self.rows, self.is_row = compress(active)
        each = batch_indices(self.columns)[:, :, None]
        matrix = batch.rows if batch.rows.dim() == 3 else batch.rows.expand(len(free), -1, -1)
        block = matrix[each, self.rows[:, :, None], self.columns[:, None, :]]
        both = self.is_row[:, :, None] & self.is_column[:, None, :]
        self.block = torch.where(both, block, 0.0)
        curve = batch.curve.gather(1, self.columns)
        self.curve = torch.where(self.is_column, curve, 1.0)

    def solve(self, g: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V (b, n), w (b, m) and ``g - A^T w`` (b, n), what reaches columns that are held."""
        goal = torch.where(self.is_column, g.gather(1, self.columns), 0.0)
        step = torch.where(self.is_row, h.gather(1, self.rows), 0.0)
        strict = bool((self.curve > 0.0).all()) and self.curve.shape[1] > self.block.shape[1]
        inner_v, inner_w = self._schur(goal, step) if strict else self._whole(goal, step)
        inner_v = torch.where(self.is_column, inner_v, 0.0)
        inner_w = torch.where(self.is_row, inner_w, 0.0)
        v = torch.zeros_like(g).scatter_add(1, self.columns, inner_v)
        w = torch.zeros_like(h).scatter_add(1, self.rows, inner_w)
        return v, w, g - transposed(self.batch.rows, w)

    def _schur(self, goal: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Curvature everywhere: a system in the active rows alone."""
        flat = self.block / self.curve[:, None, :]
        matrix = flat @ self.block.mT
        matrix.diagonal(dim1=1, dim2=2).add_((~self.is_row).to(matrix))
        rhs = (flat @ goal[:, :, None])[:, :, 0] - step
        w = _least_norm(matrix, rhs)
        return (goal - (w[:, None, :] @ self.block)[:, 0]) / self.curve, w

    def _whole(self, goal: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        k, size = self.curve.shape[1], self.curve.shape[1] + self.block.shape[1]
        matrix = self.block.new_zeros(len(goal), size, size)
        matrix[:, :k, :k] = torch.diag_embed(self.curve)
        matrix[:, k:, :k] = self.block
        matrix[:, :k, k:] = self.block.mT
        matrix.diagonal(dim1=1, dim2=2)[:, k:].add_((~self.is_row).to(matrix))
        both = _least_norm(matrix, torch.cat([goal, step], 1))
        return both[:, :k], both[:, k:]


def _least_norm(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solutions (b, k); by pseudo-inverse for samples whose matrix is singular."""
    if not matrix.shape[1]:
        return rhs
    column = rhs[:, :, None]
    factor, pivots, info = torch.linalg.lu_factor_ex(matrix)
    x = torch.linalg.lu_solve(factor, pivots, column)
    x = x + torch.linalg.lu_solve(factor, pivots, column - matrix @ x)
    lack = (column - matrix @ x).abs().amax((1, 2))
    accurate = lack <= _SINGULAR * column.abs().amax((1, 2))  # NaN is not
    bad = (info != 0) | ~accurate
    for sample in bad.nonzero()[:, 0].tolist():
        x[sample] = torch.linalg.pinv(matrix[sample], rtol=1e-11, hermitian=True) @ column[sample]
    solution: Tensor = x[:, :, 0]
    return solution
