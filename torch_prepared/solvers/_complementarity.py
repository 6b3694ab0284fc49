"""Monotone complementarity ``x >= 0, w = G x - q >= 0, x w = 0`` with a dense semidefinite G."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.core.rows import Floats

__all__ = ["ProximalStep", "kkt_residual", "self_product"]

_PIVOT_LIMIT = 40
_PATIENCE = 8  #: block swaps without progress before giving up
_NARROWEST, _STRIPS = 64, 5  #: strips of a symmetric product; thinner ones are slow


def kkt_residual(gram: Floats, q: Floats, x: Floats) -> float:
    """Largest ``|min(x, G x - q)|``: zero exactly at solutions."""
    return float(np.abs(np.minimum(x, gram @ x - q)).max(initial=0.0))


def self_product(rows: Tensor, other: Tensor, *, lower: bool = False) -> Tensor:
    """``rows @ other.T``, (b, m, m) from two (b, m, n), where it is symmetric: half the work.

    The result is exactly symmetric; with ``lower`` only its lower triangle is written.
    """
    count, m, _ = rows.shape
    product = rows.new_empty(count, m, m)
    width = max(_NARROWEST, -(-m // _STRIPS))
    for start in range(0, m, width):
        stop = min(start + width, m)
        strip = other[:, start:] @ rows[:, start:stop].mT
        product[:, start:, start:stop] = strip
        if not lower:
            product[:, start:stop, stop:] = strip[:, stop - start :].mT
    for start in () if lower else range(0, m, width):
        corner = product[:, start : start + width, start : start + width]
        corner.copy_(0.5 * (corner + corner.mT))
    return product


class ProximalStep:
    """Maximizes ``q @ x - x @ G x / 2 - eps |x - last|^2 / 2`` over x >= 0 by block pivoting.

    Swaps all indices of wrong sign at once and gives up when their number stops falling. The
    active set and its factor outlive a call, so that later steps cost a back-substitution.

    Source: Judice and Pires, "A block principal pivoting algorithm for large-scale strictly
    monotone linear complementarity problems" (Comput. Oper. Res. 21, 1994), without its slow
    single-index rule.
    """

    def __init__(self, gram: Floats, q: Floats, eps: float, active: NDArray[np.bool_]) -> None:
        self._gram, self._q, self._eps = gram, q, eps
        self._active = active.copy()
        self._factor: Tensor | None = None

    def solve(self, last: Floats) -> Floats | None:
        """The maximizer (m,), or None when a factorization fails or the swaps do not end."""
        fewest, patience = len(last) + 1, _PATIENCE
        for _ in range(_PIVOT_LIMIT):
            change = self._restricted(last)
            if change is None:
                return None
            x = np.where(self._active, last, 0.0) + change
            slack = self._gram @ x + self._eps * (x - last) - self._q
            noise = 1e-14 * max(1.0, float(np.abs(x).max(initial=0.0)))
            # Cancellation in an ill-conditioned factor: proportional to the change, so it dies out.
            drift = 1e-15 / self._eps * float(np.abs(change).max(initial=0.0))
            wrong = np.where(self._active, x < -noise - drift, slack < -noise)
            count = int(wrong.sum())
            if count == 0:
                return np.maximum(x, 0.0)
            if count < fewest:
                fewest, patience = count, _PATIENCE
            elif patience > 0:
                patience -= 1
            else:
                return None
            self._active = self._active ^ wrong
            self._factor = None
        return None

    def _restricted(self, last: Floats) -> Floats | None:
        """Change from ``last`` (cut to the active set) to the maximizer on that set."""
        index = np.flatnonzero(self._active)
        if self._factor is None:
            block = self._gram[np.ix_(index, index)]
            block[np.diag_indices_from(block)] += self._eps
            self._factor = _factorize(block)
            if self._factor is None:
                return None
        pull = self._q - self._gram @ np.where(self._active, last, 0.0)
        change = np.zeros(len(last))
        change[index] = _solve(self._factor, pull[index])
        return change


def _factorize(block: Floats) -> Tensor | None:
    """Cholesky factor, by torch so that its number of threads rules; None if not definite."""
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(block))
    return factor if int(info) == 0 else None


def _solve(factor: Tensor, rhs: Floats) -> Floats:
    solution: Floats = torch.cholesky_solve(torch.from_numpy(rhs)[:, None], factor)[:, 0].numpy()
    return solution
