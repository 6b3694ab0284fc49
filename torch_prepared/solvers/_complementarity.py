"""Monotone complementarity ``x >= 0, w = G x - q >= 0, x w = 0`` with a dense semidefinite G."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.core.rows import Floats

__all__ = ["ProximalStep", "interior_point", "kkt_residual"]

_PIVOT_LIMIT = 40
_PATIENCE = 8  #: block swaps without progress before giving up
_CENTRAL_LIMIT = 80  #: interior-point iterations


def kkt_residual(gram: Floats, q: Floats, x: Floats) -> float:
    """Largest ``|min(x, G x - q)|``: zero exactly at solutions."""
    return float(np.abs(np.minimum(x, gram @ x - q)).max(initial=0.0))


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


def interior_point(gram: Floats, q: Floats, stop: Callable[[Floats], bool]) -> Floats:
    """A nearly complementary x > 0 by Mehrotra's predictor-corrector method.

    One factorization of G plus a positive diagonal per iteration, so a singular G needs no ridge.
    The caller measures the result: iterations end at accuracy, stagnation, or when ``stop(x)``.

    Args:
        gram: (m, m) positive semidefinite, of unit diagonal.
        q: (m,), largest entry 1.
        stop: asked after each iteration, e.g. whether x has become a ray of infeasibility.

    Source: Mehrotra, "On the implementation of a primal-dual interior point method" (SIAM J.
    Optim. 2, 1992), applied to the quadratic dual.
    """
    x = np.ones_like(q)
    w = np.maximum(gram @ x - q, 1.0)
    for _ in range(_CENTRAL_LIMIT):
        lack = gram @ x - q - w
        mean = float(x @ w) / len(x)
        if mean <= 1e-15 and float(np.abs(lack).max()) <= 1e-13:
            break
        block = gram.copy()
        block[np.diag_indices_from(block)] += w / x
        factor = _factorize(block)
        if factor is None:
            break
        dx, dw = _newton(gram, factor, lack, -w)
        length = min(_reach(x, dx), _reach(w, dw))
        ahead = float((x + length * dx) @ (w + length * dw)) / len(x)
        target = (ahead / mean) ** 3 * mean - dx * dw
        dx, dw = _newton(gram, factor, lack, target / x - w)
        length = 0.995 * min(_reach(x, dx), _reach(w, dw))
        x_next, w_next = x + length * dx, w + length * dw
        if not (bool((x_next > 0).all()) and bool((w_next > 0).all())) or length < 1e-10:
            break
        x, w = x_next, w_next
        if stop(x):
            break
    return x


def _newton(gram: Floats, factor: Tensor, lack: Floats, pull: Floats) -> tuple[Floats, Floats]:
    """Changes of x and w from the factored G + diag(w / x)."""
    dx = _solve(factor, pull - lack)
    return dx, gram @ dx + lack


def _factorize(block: Floats) -> Tensor | None:
    """Cholesky factor, by torch so that its number of threads rules; None if not definite."""
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(block))
    return factor if int(info) == 0 else None


def _solve(factor: Tensor, rhs: Floats) -> Floats:
    solution: Floats = torch.cholesky_solve(torch.from_numpy(rhs)[:, None], factor)[:, 0].numpy()
    return solution


def _reach(value: Floats, change: Floats) -> float:
    """Longest step, at most 1, that keeps ``value + step * change`` nonnegative."""
    falling = change < 0
    return min(1.0, float((-value[falling] / change[falling]).min(initial=np.inf)))
