"""First-order primal-dual solver for batches of linear (and separable) programs, on any device.

Restarted Halpern iterations of the primal-dual hybrid gradient map, on the equilibrated program,
with a step size, primal weight and restart schedule per sample. It supplies the starting point
that :mod:`._batched_newton` turns into an exact one; alone it reaches four to six digits.

Source: Lu and Yang, "Restarted Halpern PDHG for linear programming" (2024); restart rules and
primal weights as in Applegate et al., "Practical large-scale linear programming using primal-dual
hybrid gradient" (NeurIPS 2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.solvers._batched_separable import SeparableBatch, times, transposed

__all__ = ["PDHGSettings", "PrimalDual", "run_pdhg"]

_STEP = 0.99  #: times 1 / |A|, and |A| <= 1 after scaling
_SUFFICIENT, _NECESSARY, _ARTIFICIAL = 0.2, 0.8, 0.36
_WEIGHT_LIMIT = 1e5  #: primal weights stay within its inverse and itself


@dataclass(frozen=True)
class PDHGSettings:
    """Limits of a run.

    Args:
        tolerance: natural residual, relative, at which a sample stops.
        iterations: most iterations.
        check: iterations between looks at residuals and restarts.
    """

    tolerance: float = 1e-4
    iterations: int = 2000
    check: int = 40


@dataclass(frozen=True, eq=False)
class PrimalDual:
    """Points x (b, n) and multipliers y (b, m) of a batch, with their residuals (b,)."""

    x: Tensor
    y: Tensor
    residual: Tensor


@dataclass
class _State:
    """What each unfinished sample carries between checks."""

    x: Tensor
    y: Tensor
    x_start: Tensor
    y_start: Tensor
    omega: Tensor
    count: Tensor
    first_error: Tensor
    last_error: Tensor

    def take(self, index: Tensor) -> _State:
        return _State(*(value[index] for value in vars(self).values()))


def run_pdhg(
    batch: SeparableBatch, start: tuple[Tensor, Tensor] | None = None,
    settings: PDHGSettings | None = None,
) -> PrimalDual:  # fmt: skip
    """Iterate every sample to the tolerance or the limit; deterministic.

    Args:
        batch: an equilibrated program (:meth:`SeparableBatch.scaled`): ``|A| <= 1``.
        start: x (b, n) and y (b, m) to begin from; None: the point of the bounds (and center)
            nearest to the center, and zeros.
        settings: limits; None: the defaults.
    """
    limits = settings or PDHGSettings()
    count, m, _ = batch.size
    if start is None:
        x = torch.maximum(torch.minimum(batch.center, batch.upper), batch.lower)
        y = batch.rhs.new_zeros(count, m)
    else:
        x, y = (value.clone() for value in start)
    best = PrimalDual(x.clone(), y.clone(), torch.maximum(*batch.residual(x, y)))
    left = (best.residual > limits.tolerance).nonzero()[:, 0]
    part = batch.take(left)
    state = _fresh(x[left], y[left])
    for total in range(0, limits.iterations, limits.check):
        if not len(left):
            break
        moved_x, moved_y, error = _iterate(part, state, limits.check)
        residual = torch.maximum(*part.residual(moved_x, moved_y))
        better = residual < best.residual[left]
        best.x[left[better]], best.y[left[better]] = moved_x[better], moved_y[better]
        best.residual[left[better]] = residual[better]
        _restart(state, moved_x, moved_y, error, total + limits.check)
        going = best.residual[left] > limits.tolerance
        if int(going.sum()) <= 0.7 * len(left):
            keep = going.nonzero()[:, 0]
            left, part, state = left[keep], part.take(keep), state.take(keep)
    return best


def _fresh(x: Tensor, y: Tensor) -> _State:
    one = torch.ones_like(x[:, :1])
    zero = torch.zeros_like(one[:, 0])
    infinite = torch.full_like(zero, torch.inf)
    return _State(x, y, x, y, one, torch.zeros_like(one), infinite, infinite.clone())


def _iterate(batch: SeparableBatch, state: _State, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Halpern iterations in place; the last mapped point and its fixed-point error (b,)."""
    tau, sigma = _STEP / state.omega, _STEP * state.omega
    for step in range(steps):
        x_new, _ = batch.prox(transposed(batch.rows, state.y), state.x, tau)
        excess = times(batch.rows, 2.0 * x_new - state.x) - batch.rhs
        y_new = state.y + sigma * excess
        y_new = torch.where(batch.equal, y_new, y_new.clamp_min(0.0))
        if step == 0:
            first = _error(state, x_new, y_new)
            state.first_error = torch.where(state.first_error.isinf(), first, state.first_error)
        if step == steps - 1:
            return x_new, y_new, _error(state, x_new, y_new)
        share = (state.count + 1.0) / (state.count + 2.0)
        state.x = state.x_start + share * (2.0 * x_new - state.x - state.x_start)
        state.y = state.y_start + share * (2.0 * y_new - state.y - state.y_start)
        state.count = state.count + 1.0
    return state.x, state.y, state.last_error


def _error(state: _State, x: Tensor, y: Tensor) -> Tensor:
    """Distance between a point and its image, in the metric of the map, (b,)."""
    far_x = (x - state.x).square().sum(1) * state.omega[:, 0]
    far_y = (y - state.y).square().sum(1) / state.omega[:, 0]
    return (far_x + far_y).sqrt()


def _restart(state: _State, x: Tensor, y: Tensor, error: Tensor, total: int) -> None:
    """Begin anew from (x, y) the samples whose error fell enough, or that ran long."""
    fell = error <= _SUFFICIENT * state.first_error
    turned = (error <= _NECESSARY * state.first_error) & (error > state.last_error)
    long = state.count[:, 0] >= _ARTIFICIAL * total
    again = (fell | turned | long)[:, None]
    far_x = torch.linalg.vector_norm(x - state.x_start, dim=1, keepdim=True)
    far_y = torch.linalg.vector_norm(y - state.y_start, dim=1, keepdim=True)
    balanced = (state.omega * far_y / far_x).sqrt()
    usable = again & (far_x > 1e-12) & (far_y > 1e-12)
    omega = torch.where(usable, balanced, state.omega)
    state.omega = omega.clamp(1.0 / _WEIGHT_LIMIT, _WEIGHT_LIMIT)
    state.x, state.x_start = torch.where(again, x, state.x), torch.where(again, x, state.x_start)
    state.y, state.y_start = torch.where(again, y, state.y), torch.where(again, y, state.y_start)
    state.count = torch.where(again, 0.0, state.count)
    state.first_error = torch.where(again[:, 0], torch.inf, state.first_error)
    state.last_error = torch.where(again[:, 0], torch.inf, error)
