r"""Exact solutions of separable programs by proximal-point and semismooth Newton steps.

Step k minimizes ``f(x) + |x - x_k|^2 / (2 eta) + |s - s_k|^2 / (2 eta)`` over ``A x + s = b``,
s >= 0 (s = 0 on equality rows). Its dual in y (m,) is smooth and piecewise quadratic; each Newton
step identifies the columns strictly between kinks and the rows without slack and solves for them
exactly. On linear programs the outer iteration ends after finitely many steps, so that what comes
out is a vertex and its multipliers up to rounding, not an approximation.

Source: Li, Sun and Toh, "An asymptotically superlinearly convergent semismooth Newton augmented
Lagrangian method for linear programming" (SIAM J. Optim. 30, 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.solvers._batched_gram import batch_indices, compress
from torch_prepared.solvers._batched_separable import SeparableBatch, times, transposed

__all__ = ["Exact", "keep_better", "solve_exactly", "solve_vertex"]

_OUTER, _INNER, _SEARCH = 25, 25, 12
_FLATTER = 0.5  #: share of the slope that a line search leaves
_GROWTH, _RETREAT, _LARGEST_STEP = 5.0, 0.05, 1e7
_ACCURATE = 1e-12
_COLUMN_SHIFT = 1e-9
_SHIFT = 1e-11  #: relative Newton regularization; it slows convergence, it does not bias it


@dataclass(frozen=True, eq=False)
class Exact:
    """Points of a batch and their structure.

    Attributes:
        x, y: (b, n), (b, m).
        free: (b, n) columns strictly between kinks.
        active: (b, m) rows without slack and with a positive multiplier, and equality rows.
        residual: (b,) :meth:`SeparableBatch.optimality`.
    """

    x: Tensor
    y: Tensor
    free: Tensor
    active: Tensor
    residual: Tensor


class _Step:
    """One proximal subproblem: its center and the current dual point."""

    def __init__(self, batch: SeparableBatch, x: Tensor, s: Tensor, y: Tensor, eta: Tensor) -> None:
        self.batch, self.x, self.s, self.y, self.eta = batch, x, s, y, eta
        self.soft = 1.0 / (1.0 / eta + batch.curve)  #: how far x moves per unit of pull
        self._goal = self.soft * (x / eta + batch.curve * batch.anchor - batch.cost)
        self._reach = batch.weight * self.soft

    def point(self, y: Tensor, pull: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, s, and where each moves, at multipliers y with ``pull = A^T y``."""
        x, free = self.batch.shrink(self._goal - self.soft * pull, self._reach)
        s = (self.s - self.eta * y).clamp_min(0.0)
        s = torch.where(self.batch.equal, 0.0, s)
        return x, s, free, s > 0.0


def solve_exactly(
    batch: SeparableBatch, x: Tensor, y: Tensor, outer: int = _OUTER, first_step: float = 1.0
) -> Exact:
    """Solve an equilibrated batch from a starting point; the residual says how well.

    Args:
        batch: see :meth:`SeparableBatch.scaled`.
        x: (b, n) start, not changed.
        y: (b, m) start.
        outer: most proximal-point steps.
        first_step: length of the first one, relative to the size of x; long ones suit few rows.
    """
    eta = (first_step * (1.0 + x.abs().amax(1, keepdim=True))).clamp_max(_LARGEST_STEP)
    best = Exact(
        x.clone(), y.clone(), torch.zeros_like(x, dtype=torch.bool),
        torch.zeros_like(y, dtype=torch.bool), torch.full_like(x[:, 0], torch.inf),
    )  # fmt: skip
    left = torch.arange(len(x), device=x.device)
    step = _Step(batch, x, _slack(batch, x), y, eta)
    for _ in range(outer):
        if not len(left):
            break
        x, s, free, moving, settled = _newton(step)
        y = torch.where(step.batch.equal, step.y, step.y.clamp_min(0.0))
        keep_better(best, left, step.batch, x, y, free, ~moving)
        keep_better(
            best, left, step.batch, *solve_vertex(step.batch, x, free, ~moving), free, ~moving
        )
        # A step whose dual was not minimized was too long: back to the best point, shorter.
        went = settled[:, None]
        x, y = torch.where(went, x, best.x[left]), torch.where(went, step.y, best.y[left])
        s = torch.where(went, s, _slack(step.batch, x))
        eta = (step.eta * torch.where(went, _GROWTH, _RETREAT)).clamp(1e-3, _LARGEST_STEP)
        keep = (~(best.residual[left] <= _ACCURATE)).nonzero()[:, 0]
        part = step.batch
        if len(keep) < len(left):
            left, part = left[keep], part.take(keep)
        step = _Step(part, x[keep], s[keep], y[keep], eta[keep])
    return best


def _slack(batch: SeparableBatch, x: Tensor) -> Tensor:
    return torch.where(batch.equal, 0.0, (batch.rhs - times(batch.rows, x)).clamp_min(0.0))


def keep_better(
    best: Exact, left: Tensor, batch: SeparableBatch, x: Tensor, y: Tensor, free: Tensor,
    tight: Tensor,
) -> None:  # fmt: skip
    """Put into ``best``, at the samples ``left``, the points of smaller residual."""
    residual = batch.optimality(x, y)
    better = residual < best.residual[left]
    index = left[better]
    best.x[index], best.y[index] = x[better], y[better]
    best.free[index], best.residual[index] = free[better], residual[better]
    best.active[index] = (tight & (batch.equal | (y > 0.0)))[better]


def solve_vertex(
    batch: SeparableBatch, x: Tensor, free: Tensor, tight: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve for the free columns and the tight rows where they are equally many, no curvature.

    Returns:
        x (b, n) and y (b, m); NaN where that does not apply.
    """
    square = (free.sum(1) == tight.sum(1)) & (batch.curve == 0.0).all(1)
    free, tight = free & square[:, None], tight & square[:, None]
    columns, valid = compress(free)
    rows, _ = compress(tight)
    each = batch_indices(columns)[:, :, None]
    matrix = batch.rows if batch.rows.dim() == 3 else batch.rows.expand(len(x), -1, -1)
    block = matrix[each, rows[:, :, None], columns[:, None, :]]
    block = torch.where(valid[:, :, None] & valid[:, None, :], block, 0.0)
    block.diagonal(dim1=1, dim2=2).add_((~valid).to(block))
    fixed = torch.where(free, 0.0, x)
    rhs = (batch.rhs - times(batch.rows, fixed)).gather(1, rows)
    slope = batch.cost + batch.weight * (x - batch.center).sign()
    rhs = torch.where(valid, rhs, 0.0)
    slope = torch.where(valid, slope.gather(1, columns), 0.0)
    factor, pivots, _ = torch.linalg.lu_factor_ex(block)
    inner = torch.linalg.lu_solve(factor, pivots, rhs[:, :, None])[:, :, 0]
    price = torch.linalg.lu_solve(factor, pivots, -slope[:, :, None], adjoint=True)[:, :, 0]
    x = torch.where(free, 0.0, x).scatter_add(1, columns, torch.where(valid, inner, 0.0))
    y = torch.zeros_like(batch.rhs).scatter_add(1, rows, torch.where(valid, price, 0.0))
    y = torch.where(batch.equal | (y > 0.0), y, 0.0)
    return torch.where(square[:, None], x, torch.nan), torch.where(square[:, None], y, torch.nan)


def _newton(step: _Step) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Move ``step.y`` to the minimum of the dual; x, s, their masks, and whether it got there."""
    batch = step.batch
    pull = transposed(batch.rows, step.y)
    x, s, free, moving = step.point(step.y, pull)
    goal = 1e-14 * batch.rhs.abs().amax(1).clamp_min(1.0) + 1e-16 * step.eta[:, 0]
    length = torch.ones_like(goal)
    for _ in range(_INNER):
        gradient = batch.rhs - times(batch.rows, x) - s
        open_ = (gradient.abs().amax(1) > goal) & (length > 1e-8)
        if not bool(open_.any()):
            break
        change = torch.where(open_[:, None], _direction(step, free, moving, gradient), 0.0)
        along = transposed(batch.rows, change)
        length = _length(step, pull, change, along, (gradient * change).sum(1))
        length = torch.where(open_, length, 0.0)
        step.y, pull = step.y + length[:, None] * change, pull + length[:, None] * along
        x, s, free, moving = step.point(step.y, pull)
        length = torch.where(open_, length, 1.0)
    gradient = batch.rhs - times(batch.rows, x) - s
    return x, s, free, moving, gradient.abs().amax(1) <= 1e4 * goal


def _length(step: _Step, pull: Tensor, change: Tensor, along: Tensor, slope: Tensor) -> Tensor:
    """How far to go along ``change``, (b,): where the slope has fallen to a tenth.

    The dual is convex and piecewise quadratic, so its slope along a line is increasing and
    piecewise linear: Newton steps on the slope, kept within a bracket, need no function values
    and so are not fooled by their rounding.
    """
    low, high = torch.zeros_like(slope), torch.ones_like(slope)
    length, done = high.clone(), torch.zeros_like(slope, dtype=torch.bool)
    for _ in range(_SEARCH):
        y, moved = step.y + length[:, None] * change, pull + length[:, None] * along
        x, s, free, moving = step.point(y, moved)
        now = (change * (step.batch.rhs - s)).sum(1) - (along * x).sum(1)
        done = (now.abs() <= _FLATTER * slope.abs()) | ((length == 1.0) & (now <= 0.0))
        if bool(done.all()):
            break
        bend = torch.where(free, step.soft * along.square(), 0.0).sum(1)
        bend = bend + torch.where(moving, step.eta * change.square(), 0.0).sum(1)
        high, low = torch.where(now > 0.0, length, high), torch.where(now > 0.0, low, length)
        guess = length - now / bend
        middle = 0.5 * (low + high)
        guess = torch.where((guess > low) & (guess < high), guess, middle)
        length = torch.where(done, length, guess)
    # Up to ``low`` the dual has fallen all the way.
    return torch.where(done | (low == 0.0), length, low)


def _direction(step: _Step, free: Tensor, moving: Tensor, gradient: Tensor) -> Tensor:
    """Newton direction from the columns that are free and the rows that have slack."""
    rows, eta = step.batch.rows, step.eta
    index, valid = compress(free)
    each = batch_indices(index)
    if rows.dim() == 2:
        columns = rows.T[index].mT
    else:
        columns = rows.mT[each, index].mT
    weight = torch.where(valid, step.soft.expand_as(free).gather(1, index), 0.0)
    slack = torch.where(moving, eta, 0.0)
    if 2 * columns.shape[2] <= columns.shape[1]:
        change = _by_columns(columns * weight.sqrt()[:, None, :], slack, -gradient)
    else:
        change = _by_rows((columns * weight[:, None, :]) @ columns.mT, slack, -gradient)
    return torch.where(change.isfinite().all(1, keepdim=True), change, -gradient)


def _by_rows(matrix: Tensor, slack: Tensor, rhs: Tensor) -> Tensor:
    """Solve ``(matrix + diag(slack)) d = rhs`` with a small shift, m x m; NaN where it fails."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal.add_(slack)
    shift = _SHIFT * (diagonal.amax(1, keepdim=True) + 1e-300)
    diagonal.add_(shift)
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        diagonal.add_(torch.where((info > 0)[:, None], 1e4 * shift, 0.0))
        factor, info = torch.linalg.cholesky_ex(matrix)
    change = torch.cholesky_solve(rhs[:, :, None], factor)[:, :, 0]
    return torch.where((info == 0)[:, None], change, torch.nan)


def _by_columns(root: Tensor, slack: Tensor, rhs: Tensor) -> Tensor:
    """The same with ``matrix = root @ root.T`` of low rank k, by Woodbury's formula, k x k.

    The formula cancels where the shift is small, so it is larger here and followed by refinement.
    """
    largest = root.square().sum(2).amax(1, keepdim=True)
    diagonal = slack + _COLUMN_SHIFT * (largest + 1e-300)
    inner = root.mT @ (root / diagonal[:, :, None])
    inner.diagonal(dim1=1, dim2=2).add_(1.0)
    factor, info = torch.linalg.cholesky_ex(inner)

    def solve(r: Tensor) -> Tensor:
        plain = r / diagonal[:, :, None]
        return plain - (root @ torch.cholesky_solve(root.mT @ plain, factor)) / diagonal[:, :, None]

    goal = rhs[:, :, None]
    change = solve(goal)
    for _ in range(2):
        lack = goal - root @ (root.mT @ change) - diagonal[:, :, None] * change
        change = change + solve(lack)
    return torch.where((info == 0)[:, None], change[:, :, 0], torch.nan)
