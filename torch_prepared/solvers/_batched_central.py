"""Interior points of monotone complementarity ``x >= 0, w = G x - q >= 0, x w = 0``, in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.solvers._batched_gram import DenseGram, Gram
from torch_prepared.solvers._complementarity import self_product

__all__ = ["interior_point"]

_LIMIT = 80  #: iterations
_START, _LEAST = 0.3, 0.2  #: x, and the least w, to begin with
_INSIDE = 0.995  #: share of the way to the boundary
_SHORTEST = 1e-4  #: a step this short is stagnation
_CORRECTORS = 2  #: of centrality, at most, in an iteration
_OUTLIER = 10.0  #: products this many times off their target are corrected
_AHEAD, _GAIN = 0.3, 1.01  #: how far beyond its length a step is corrected; what it must gain
_FREE_SHIFT = 1e-12  #: keeps dependent equality rows definite, relative to a unit diagonal
_ROUNDS = 10  #: conjugate-gradient steps on a system with a rounded factor
_ERROR = 0.1  #: of a solve, relative to the mean complementarity
_LARGE = 128  #: columns, beyond which a factorization costs more than what else an iteration does
_STEEP = 1e9  #: weight of a row, beyond which float32 factors and formulas do not do
_NOISE = 1e-15  #: rounding, relative to the right-hand side
_CROWDED = 0.75  #: samples still moving, below which the others are dropped

Stop = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class _Iterate:
    """x, w and ``G x``, each (b, m)."""

    x: Tensor
    w: Tensor
    image: Tensor

    def take(self, samples: Tensor) -> _Iterate:
        return _Iterate(self.x[samples], self.w[samples], self.image[samples])


def interior_point(
    gram: Gram,
    q: Tensor,
    stop: Stop,
    *,
    free: Tensor | None = None,
    accuracy: float = 1e-15,
) -> Tensor:
    """Nearly complementary x > 0 of a batch, by predictor steps with several correctors.

    One factorization of G plus a positive diagonal per iteration, so a singular G needs no ridge.
    The caller measures the result: a sample's iterations end at accuracy, stagnation, or when
    ``stop`` says so, whatever the other samples do.

    Args:
        gram: of unit diagonal.
        q: (b, m), largest entry 1.
        stop: maps the samples' positions (c,), x and G x (c, m) and the guess of ``x > 0`` at the
            solution to a mask (c,), e.g. whether x has become a ray of infeasibility.
        free: (m,) mask of entries without sign, whose w is 0 (equality rows); None: none.
        accuracy: mean of ``x w`` at which to stop.

    Returns:
        (b, m) float64.

    Source: Mehrotra, "On the implementation of a primal-dual interior point method" (SIAM J.
    Optim. 2, 1992), applied to the quadratic dual; Gondzio, "Multiple centrality corrections in a
    primal-dual method for linear programming" (Comput. Optim. Appl. 6, 1996); the guess is by the
    indicators of El-Bakry, Tapia and Zhang, "A study of indicators for identifying zero variables
    in interior-point methods" (SIAM Review 36, 1994): unlike x > w it knows no units.
    """
    signed = torch.ones_like(q[0]) if free is None else (~free).to(q)
    count = max(float(signed.sum()), 1.0)
    root = gram.root() if free is None else None
    system: _System = _WideSystem(gram) if root is None else _NarrowSystem(gram, root)
    x = torch.full_like(q, _START) * signed
    image = gram.times(x)
    now = _Iterate(x, (image - q).clamp_min(_LEAST) * signed, image)
    result = now.x.clone()
    left = torch.arange(len(q), device=q.device)
    moving = torch.ones_like(left, dtype=torch.bool)
    for _ in range(_LIMIT):
        mean, lack = (now.x * now.w).sum(1) / count, now.image - q[left] - now.w
        moving &= mean > accuracy
        if not bool(moving.any()):
            break
        if float(moving.sum()) < _CROWDED * len(left):
            keep = moving.nonzero()[:, 0]
            left, now, system = left[keep], now.take(keep), system.take(keep)
            mean, lack, moving = mean[keep], lack[keep], moving[keep]
        ahead, moved = _advance(system, now, lack, torch.where(moving, mean, torch.inf), signed)
        moving &= moved
        guess = (ahead.x * now.w > ahead.w * now.x) & moving[:, None]
        now.x = torch.where(moving[:, None], ahead.x, now.x)
        now.w = torch.where(moving[:, None], ahead.w, now.w)
        now.image = system.gram.times(now.x)
        result[left] = now.x
        moving &= ~stop(left, now.x, now.image, guess)
    return result


def _advance(
    system: _System, now: _Iterate, lack: Tensor, mean: Tensor, signed: Tensor
) -> tuple[_Iterate, Tensor]:
    """The next iterate, without its image, and the samples that could move, (b,)."""
    x, w = now.x, now.w
    worked = system.factorize(torch.where(signed > 0, w / x, _FREE_SHIFT))
    count = signed.sum().clamp_min(1.0)

    def newton(aim: Tensor, error: Tensor | None) -> tuple[Tensor, Tensor]:
        """Changes that move each product ``x w`` by ``aim - x w``, to first order."""
        rhs = torch.where(signed > 0, aim / x, 0.0) - w - lack
        dx = system.solve(rhs, error)
        return dx, (rhs - system.shift * dx + lack) * signed

    dx, dw = newton(torch.zeros_like(x), None)
    length = torch.minimum(_reach(x, dx), _reach(w, dw))[:, None]
    products = ((x + length * dx) * (w + length * dw) * signed).sum(1) / count
    target = (torch.where(mean > 0, products / mean, 0.0) ** 3 * mean)[:, None]
    aim = target - dx * dw
    error = _ERROR * mean[:, None]
    dx, dw = newton(aim, error)
    length = torch.minimum(_reach(x, dx), _reach(w, dw))[:, None]
    for _ in range(_CORRECTORS):
        trial = (length + _AHEAD).clamp_max(1.0)
        value = (x + trial * dx) * (w + trial * dw)
        off = torch.maximum(torch.minimum(value, _OUTLIER * target), target / _OUTLIER) - value
        more = aim + off.maximum(-_OUTLIER * target)
        other_x, other_w = newton(more, error)
        longer = torch.minimum(_reach(x, other_x), _reach(w, other_w))[:, None]
        gains = longer >= _GAIN * length
        if not bool(gains.any()):
            break
        dx, dw = torch.where(gains, other_x, dx), torch.where(gains, other_w, dw)
        aim, length = torch.where(gains, more, aim), torch.where(gains, longer, length)
    length = _INSIDE * length
    ahead = _Iterate(x + length * dx, w + length * dw, now.image)
    inside = ((ahead.x > 0) & (ahead.w > 0) | (signed == 0)).all(1) & ahead.x.isfinite().all(1)
    return ahead, worked & inside & (length[:, 0] >= _SHORTEST)


class _System(ABC):
    """``G + diag(shift)``, factored."""

    shift: Tensor

    def __init__(self, gram: Gram) -> None:
        self.gram = gram

    @abstractmethod
    def factorize(self, shift: Tensor) -> Tensor:
        """Factor; returns which samples it worked for, (b,)."""

    @abstractmethod
    def solve(self, rhs: Tensor, error: Tensor | None) -> Tensor:
        """(b, m) from (b, m), to about an absolute error (b, 1) of the equations; None: any."""

    @abstractmethod
    def take(self, samples: Tensor) -> _System:
        """Some of the samples; to be factored anew."""


class _WideSystem(_System):
    """In its own size m."""

    def __init__(self, gram: Gram) -> None:
        super().__init__(gram if isinstance(gram, DenseGram) else DenseGram(gram.whole()))

    def factorize(self, shift: Tensor) -> Tensor:
        self.shift = shift
        block = self.gram.whole().clone()
        block.diagonal(dim1=1, dim2=2).add_(shift)
        self.factor, info = torch.linalg.cholesky_ex(block)
        worked: Tensor = info == 0
        return worked

    def solve(self, rhs: Tensor, error: Tensor | None) -> Tensor:
        dx: Tensor = torch.cholesky_solve(rhs[:, :, None], self.factor)[:, :, 0]
        return dx

    def take(self, samples: Tensor) -> _WideSystem:
        return _WideSystem(self.gram.take(samples))


class _NarrowSystem(_System):
    """In the n < m columns of its rows R, by Woodbury's formula with ``I + R^T D^-1 R``.

    A factor rounded to float32 costs half and takes a few conjugate-gradient steps more; where
    these do not settle, the rest of the run has float64 factors.
    """

    def __init__(self, gram: Gram, rows: Tensor, low: Tensor | None = None) -> None:
        super().__init__(gram)
        large = rows.shape[2] > _LARGE
        self.rows, self.low = rows, (rows.float() if large else rows) if low is None else low

    def factorize(self, shift: Tensor) -> Tensor:
        self.shift, self.weight = shift, 1.0 / shift
        if bool((self.weight > _STEEP).any()):
            self.low = self.rows
        return self._factorize()

    def _factorize(self) -> Tensor:
        root = (self.low * self.weight.sqrt().to(self.low)[:, :, None]).mT
        block = self_product(root, root, lower=True)
        block.diagonal(dim1=1, dim2=2).add_(1.0)
        self.factor, info = torch.linalg.cholesky_ex(block)
        worked: Tensor = info == 0
        if self.low.dtype == torch.float32 and not bool(worked.all()):
            self.low = self.rows
            return self._factorize()
        return worked

    def solve(self, rhs: Tensor, error: Tensor | None) -> Tensor:
        if error is None:
            return self._lifted(rhs, self._roughly(self._back(self.weight * rhs)))
        goal = self._back(self.weight * rhs)
        y, settled = self._gradients(goal, error)
        if not settled and self.low.dtype == torch.float32:
            self.low = self.rows
            self._factorize()
            y, _ = self._gradients(goal, error)
        dx = self._lifted(rhs, y)
        if self.low.dtype == torch.float32:
            return dx
        # Steep weights cancel in the formula; one more round repairs that.
        rest = rhs - self.gram.times(dx) - self.shift * dx
        return dx + self._lifted(rest, self._roughly(self._back(self.weight * rest)))

    def _lifted(self, rhs: Tensor, y: Tensor) -> Tensor:
        """The solution for the right-hand side from that of the n x n system."""
        return self.weight * (rhs - (self.rows @ y[:, :, None])[:, :, 0])

    def take(self, samples: Tensor) -> _NarrowSystem:
        rows, same = self.rows[samples], self.low is self.rows
        return _NarrowSystem(self.gram.take(samples), rows, rows if same else self.low[samples])

    def _back(self, x: Tensor) -> Tensor:
        image: Tensor = (x[:, None, :] @ self.rows)[:, 0]
        return image

    def _roughly(self, goal: Tensor) -> Tensor:
        inner = goal[:, :, None].to(self.low)
        change: Tensor = torch.cholesky_solve(inner, self.factor)[:, :, 0].to(goal)
        return change

    def _gradients(self, goal: Tensor, error: Tensor) -> tuple[Tensor, bool]:
        """Preconditioned conjugate gradients for ``(I + R^T D^-1 R) y = goal``."""
        error = error.maximum(_NOISE * goal.abs().amax(1, keepdim=True))
        y, lack = torch.zeros_like(goal), goal
        along, energy = torch.zeros_like(goal), torch.ones_like(error)
        for turn in range(_ROUNDS):
            change = self._roughly(lack)
            now = (lack * change).sum(1, keepdim=True)
            along = change + (now / energy if turn else 0.0) * along
            energy = now
            image = along + self._back(self.weight * (self.rows @ along[:, :, None])[:, :, 0])
            length = energy / (along * image).sum(1, keepdim=True)
            length = torch.where(length.isfinite(), length, 0.0)
            y, lack = y + length * along, lack - length * image
            if not bool((lack.abs().amax(1, keepdim=True) > error).any()):  # NaN has ended, too
                return y, True
        return y, False


def _reach(value: Tensor, change: Tensor) -> Tensor:
    """Longest step, at most 1, that keeps positive entries of ``value`` nonnegative, (b,)."""
    ratio = torch.where((change < 0) & (value > 0), -value / change, 1.0)
    return ratio.amin(1).clamp_max(1.0)
