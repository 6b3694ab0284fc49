r"""Batches of separable convex programs with linear rows: data, scaling, prox and residuals.

Sample by sample, minimize ``sum_j c_j x_j + w_j |x_j - r_j| + e_j (x_j - o_j)^2 / 2`` subject to
``A x <= b`` (``A x = b`` on equality rows) and ``lower <= x <= upper``. A linear program has
w = e = 0; a weighted 1-norm distance is ``w |x - r|`` without auxiliary columns; e is smoothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

__all__ = ["SeparableBatch", "times", "transposed"]

_RUIZ = 8  #: rounds of row and column equilibration
_REACH = 32.0  #: largest right-hand side after scaling: multipliers and x then balance in PDHG


def times(rows: Tensor, x: Tensor) -> Tensor:
    """``A x``, (b, m), from rows (b, m, n) or shared (m, n)."""
    if rows.dim() == 2:
        return x @ rows.T
    return (rows @ x[:, :, None])[:, :, 0]


def transposed(rows: Tensor, y: Tensor) -> Tensor:
    """``A^T y``, (b, n), from rows (b, m, n) or shared (m, n)."""
    if rows.dim() == 2:
        return y @ rows
    return (y[:, None, :] @ rows)[:, 0]


@dataclass(frozen=True, eq=False)
class SeparableBatch:
    """The data, float64 and finite but for open bounds.

    Attributes:
        rows: (b, m, n), or (m, n) shared.
        rhs: (b, m).
        cost, weight, center, curve, anchor, lower, upper: (b, n): c, w >= 0, r, e >= 0, o, bounds.
        equal: (m,) bool.
    """

    rows: Tensor
    rhs: Tensor
    cost: Tensor
    weight: Tensor
    center: Tensor
    curve: Tensor
    anchor: Tensor
    lower: Tensor
    upper: Tensor
    equal: Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """Samples b, rows m, columns n."""
        return len(self.rhs), self.rhs.shape[1], self.cost.shape[1]

    def take(self, index: Tensor) -> SeparableBatch:
        """Some of the samples."""
        picked = {}
        for field in fields(self):
            value = getattr(self, field.name)
            whole = field.name == "equal" or (field.name == "rows" and value.dim() == 2)
            picked[field.name] = value if whole else value[index]
        return SeparableBatch(**picked)

    def magnitude(self) -> Tensor:
        """Largest coefficient of the objective, (b,); 1 where all are 0."""
        size = torch.maximum(_largest(self.cost), _largest(self.weight))
        size = torch.maximum(size, _largest(self.curve))
        return torch.where(size > 0.0, size, 1.0)

    def prox(self, pull: Tensor, at: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """``argmin f(x) + pull @ x + sum (x - at)^2 / (2 step)`` and where it moves with ``pull``.

        Args:
            pull: (b, n).
            at: (b, n).
            step: broadcasts to (b, n).

        Returns:
            x (b, n), and the mask of entries strictly between kinks (b, n).
        """
        stiff = 1.0 / step + self.curve
        goal = (at / step + self.curve * self.anchor - self.cost - pull) / stiff
        return self.shrink(goal, self.weight / stiff)

    def shrink(self, goal: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        """``goal`` drawn to the center by at most ``reach``, then into the bounds; what moves."""
        away = goal - self.center
        # Soft thresholding: nothing is left of what is within reach.
        left = away - torch.maximum(torch.minimum(away, reach), -reach)
        free = self.center + left
        x = torch.maximum(torch.minimum(free, self.upper), self.lower)
        return x, (x == free) & ((left != 0.0) | (reach == 0.0))

    def value(self, x: Tensor) -> Tensor:
        """Objective, (b,)."""
        linear = self.cost * x + self.weight * (x - self.center).abs()
        return (linear + 0.5 * self.curve * (x - self.anchor).square()).sum(1)

    def residual(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Natural residuals of stationarity and of rows with complementarity, each (b,).

        The largest changes that a unit prox step makes to x, and that one gradient step of unit
        size makes to y, over ``max(1, |x|)`` and ``max(1, |y|, |b|)`` (largest entries).
        """
        moved, _ = self.prox(transposed(self.rows, y), x, torch.ones_like(x[:, :1]))
        excess = times(self.rows, x) - self.rhs
        risen = torch.where(self.equal, y + excess, (y + excess).clamp_min(0.0))
        change_x, change_y = (moved - x).abs(), (risen - y).abs()
        size_x = _largest(x).clamp_min(1.0)
        size_y = torch.maximum(_largest(y), _largest(self.rhs)).clamp_min(1.0)
        return _largest(change_x) / size_x, _largest(change_y) / size_y

    def optimality(self, x: Tensor, y: Tensor) -> Tensor:
        """Largest violation of the optimality conditions, (b,), in absolute terms; NaN counts.

        The slopes of the Lagrangian on either side of x_j must enclose 0, rows must hold, and of
        a multiplier and its row's slack one must vanish. Nothing is divided by ``|x|`` or
        ``|y|``: points that run off to infinity do not pass for solutions. Entries at a kink or
        bound must be there exactly.
        """
        slope = self.cost + transposed(self.rows, y) + self.curve * (x - self.anchor)
        left = slope + torch.where(x > self.center, self.weight, -self.weight)
        right = slope + torch.where(x >= self.center, self.weight, -self.weight)
        left = torch.where(x <= self.lower, -torch.inf, left)
        right = torch.where(x >= self.upper, torch.inf, right)
        uphill = torch.maximum(left, -right).clamp_min(0.0)
        outside = torch.maximum(self.lower - x, x - self.upper).clamp_min(0.0)
        excess = times(self.rows, x) - self.rhs
        slack = torch.minimum(y, -excess)
        lack = torch.where(self.equal, excess.abs(), torch.maximum(excess, slack.abs()))
        lack = torch.where(self.equal | (y >= 0.0), lack, torch.inf)
        scale = self.rhs.abs().amax(1).clamp_min(1.0) if y.shape[1] else 1.0
        sizes = (_largest(uphill), _largest(outside), _largest(lack) / scale)
        worst = torch.maximum(torch.maximum(sizes[0], sizes[1]), sizes[2])
        finite = x.isfinite().all(1) & y.isfinite().all(1)
        return torch.where(finite & ~worst.isnan(), worst, torch.inf)

    def scaled(self) -> tuple[SeparableBatch, Tensor, Tensor, Tensor]:
        """An equivalent batch whose rows matrix has 2-norm at most 1.

        Returns:
            The batch for ``x / columns``, then ``columns`` (b, n), ``row_scale`` (b or 1, m)
            and ``objective`` (b, 1): multipliers here are those there times
            ``row_scale * objective``.

        Source: Ruiz, "A scaling algorithm to equilibrate both rows and columns norms in matrices"
        (2001); Pock and Chambolle, "Diagonal preconditioning for first order primal-dual
        algorithms" (ICCV 2011), Lemma 2 with alpha = 1, which bounds the 2-norm by 1.
        """
        rows = self.rows if self.rows.dim() == 3 else self.rows[None]
        size = rows.abs()
        column = torch.ones_like(size[:, 0])
        row = torch.ones_like(size[:, :, 0])
        for round_ in range(_RUIZ + 1):
            now = size * row[:, :, None] * column[:, None, :]
            last = round_ == _RUIZ
            by_row = now.sum(2) if last else now.amax(2)
            by_column = now.sum(1) if last else now.amax(1)
            row = row * torch.where(by_row > 0.0, by_row, 1.0).rsqrt()
            column = column * torch.where(by_column > 0.0, by_column, 1.0).rsqrt()
        matrix = rows * row[:, :, None] * column[:, None, :]
        length = self._length(row, column)
        width = column * length
        bent = replace(
            self, cost=self.cost * column, weight=self.weight * column,
            curve=self.curve * column * width,
        )  # fmt: skip
        objective = bent.magnitude()[:, None]
        batch = replace(
            bent,
            rows=matrix if self.rows.dim() == 3 else matrix[0],
            rhs=self.rhs * row / length,
            cost=bent.cost / objective,
            weight=bent.weight / objective,
            center=self.center / width,
            curve=bent.curve / objective,
            anchor=self.anchor / width,
            lower=self.lower / width,
            upper=self.upper / width,
        )
        return batch, width, row, objective

    def _length(self, row: Tensor, column: Tensor) -> Tensor:
        """A fixed share of the largest right-hand side, center or bound, (b, 1); 1 if all are 0."""
        size = _largest(self.rhs * row)
        for value in (self.center, self.anchor, self.lower, self.upper):
            size = torch.maximum(size, _largest(torch.where(value.isinf(), 0.0, value) / column))
        return torch.where(size > 0.0, size / _REACH, 1.0)[:, None]


def _largest(value: Tensor) -> Tensor:
    """Largest absolute entry per sample, (b,); 0 without columns."""
    return value.abs().amax(1) if value.shape[1] else value.new_zeros(len(value))
