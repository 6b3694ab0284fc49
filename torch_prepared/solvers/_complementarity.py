"""Monotone complementarity ``x >= 0, w = G x - q >= 0, x w = 0`` with a dense semidefinite G."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.core.rows import Floats

__all__ = ["ProximalStep", "interior_point", "kkt_residual", "self_product"]

_PIVOT_LIMIT = 40
_PATIENCE = 8  #: block swaps without progress before giving up
_CENTRAL_LIMIT = 80  #: interior-point iterations
_SHORTEST = 1e-4  #: an interior-point step this short is stagnation
_NARROWEST, _STRIPS = 64, 5  #: strips of a symmetric product; thinner ones are slow
_FREE_SHIFT = 1e-12  #: keeps dependent equality rows definite, relative to a unit diagonal


def kkt_residual(gram: Floats, q: Floats, x: Floats) -> float:
    """Largest ``|min(x, G x - q)|``: zero exactly at solutions."""
    return float(np.abs(np.minimum(x, gram @ x - q)).max(initial=0.0))


def self_product(rows: Tensor, other: Tensor) -> Tensor:
    """``rows @ other.T``, (b, m, m) from two (b, m, n), where it is symmetric: half the work.

    The result is exactly symmetric.
    """
    count, m, _ = rows.shape
    product = rows.new_empty(count, m, m)
    width = max(_NARROWEST, -(-m // _STRIPS))
    for start in range(0, m, width):
        stop = min(start + width, m)
        strip = other[:, start:] @ rows[:, start:stop].mT
        product[:, start:, start:stop] = strip
        product[:, start:stop, stop:] = strip[:, stop - start :].mT
    for start in range(0, m, width):
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


def interior_point(
    gram: Tensor,
    q: Tensor,
    stop: Callable[[Tensor, Tensor], Tensor],
    *,
    free: Tensor | None = None,
    rows: Tensor | None = None,
    accuracy: float = 1e-15,
) -> Tensor:
    """Nearly complementary x > 0 of a batch, by Mehrotra's predictor-corrector method.

    One factorization of G plus a positive diagonal per iteration, so a singular G needs no ridge.
    The caller measures the result: a sample's iterations end at accuracy, stagnation, or when
    ``stop(x, G x)`` says so, whatever the other samples do.

    Args:
        gram: (b, m, m) positive semidefinite, of unit diagonal, float64.
        q: (b, m), largest entry 1.
        stop: maps x and G x (b, m) to a mask (b,), e.g. whether x has become a ray of
            infeasibility.
        free: (m,) mask of entries without sign, whose w is 0 (equality rows); None: none.
        rows: (b, m, n) with ``G = rows @ rows.T``; speeds up n < m without free entries.
        accuracy: mean of ``x w`` at which to stop.

    Returns:
        (b, m) float64.

    Source: Mehrotra, "On the implementation of a primal-dual interior point method" (SIAM J.
    Optim. 2, 1992), applied to the quadratic dual.
    """
    system = _Shifted(gram, None if free is not None else rows)
    signed = torch.ones_like(q[0]) if free is None else (~free).to(q)
    count = max(float(signed.sum()), 1.0)
    x = torch.ones_like(q) * signed
    image = system.times(x)
    w = (image - q).clamp_min(1.0) * signed
    moving = torch.ones_like(q[:, 0], dtype=torch.bool)
    for _ in range(_CENTRAL_LIMIT):
        lack = image - q - w
        mean = (x * w).sum(1) / count
        moving &= ~((mean <= accuracy) & (lack.abs().amax(1) <= 100.0 * accuracy))
        if not bool(moving.any()):
            break
        moving &= system.factorize(torch.where(signed > 0, w / x, _FREE_SHIFT))
        dx, dw = system.newton(lack, -w, signed, rough=True)
        length = torch.minimum(_reach(x, dx), _reach(w, dw))[:, None]
        ahead = ((x + length * dx) * (w + length * dw) * signed).sum(1) / count
        share = torch.where(mean > 0, ahead / mean, 0.0)
        target = (share**3 * mean)[:, None] - dx * dw
        dx, dw = system.newton(lack, torch.where(signed > 0, target / x, 0.0) - w, signed)
        length = 0.995 * torch.minimum(_reach(x, dx), _reach(w, dw))[:, None]
        x_next, w_next = x + length * dx, w + length * dw
        inside = ((x_next > 0) & (w_next > 0) | (signed == 0)).all(1)
        moving &= inside & (length[:, 0] >= _SHORTEST) & x_next.isfinite().all(1)
        x = torch.where(moving[:, None], x_next, x)
        w = torch.where(moving[:, None], w_next, w)
        image = system.times(x)
        moving &= ~stop(x, image)
    return x


class _Shifted:
    """``G + diag(shift)``, factored in whichever of its two sizes, m or n, is smaller."""

    def __init__(self, gram: Tensor, rows: Tensor | None) -> None:
        self.gram = gram
        self.rows = None if rows is None or rows.shape[2] >= rows.shape[1] else rows

    def times(self, x: Tensor) -> Tensor:
        """``G x``, (b, m)."""
        if self.rows is None:
            return (self.gram @ x[:, :, None])[:, :, 0]
        return (self.rows @ (self.rows.mT @ x[:, :, None]))[:, :, 0]

    def factorize(self, shift: Tensor) -> Tensor:
        """Factor; returns which samples it worked for, (b,)."""
        self.shift = shift
        if self.rows is None:
            block = self.gram.clone()
            block.diagonal(dim1=1, dim2=2).add_(shift)
        else:  # Woodbury: a system in the n columns
            root = (self.rows * shift.rsqrt()[:, :, None]).mT
            block = self_product(root, root)
            block.diagonal(dim1=1, dim2=2).add_(1.0)
        self.factor, info = torch.linalg.cholesky_ex(block)
        worked: Tensor = info == 0
        return worked

    def newton(
        self, lack: Tensor, pull: Tensor, signed: Tensor, *, rough: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Changes of x and w; ``rough`` ones serve to choose a target, not to move."""
        rhs = pull - lack
        dx = self._solve(rhs)
        if self.rows is not None and not rough:  # one round repairs what Woodbury cancels
            dx = dx + self._solve(rhs - self.times(dx) - self.shift * dx)
        return dx, (rhs - self.shift * dx + lack) * signed

    def _solve(self, rhs: Tensor) -> Tensor:
        if self.rows is None:
            dx: Tensor = torch.cholesky_solve(rhs[:, :, None], self.factor)[:, :, 0]
            return dx
        plain = rhs / self.shift
        inner = torch.cholesky_solve(self.rows.mT @ plain[:, :, None], self.factor)
        solution: Tensor = plain - (self.rows @ inner)[:, :, 0] / self.shift
        return solution


def _factorize(block: Floats) -> Tensor | None:
    """Cholesky factor, by torch so that its number of threads rules; None if not definite."""
    factor, info = torch.linalg.cholesky_ex(torch.from_numpy(block))
    return factor if int(info) == 0 else None


def _solve(factor: Tensor, rhs: Floats) -> Floats:
    solution: Floats = torch.cholesky_solve(torch.from_numpy(rhs)[:, None], factor)[:, 0].numpy()
    return solution


def _reach(value: Tensor, change: Tensor) -> Tensor:
    """Longest step, at most 1, that keeps positive entries of ``value`` nonnegative, (b,)."""
    ratio = torch.where((change < 0) & (value > 0), -value / change, 1.0)
    return ratio.amin(1).clamp_max(1.0)
