r"""Interior-point start for batches of separable programs, and the exact vertex it points at.

With slacks s of the rows, ``x - r = p - q`` at kinks (p, q >= 0, prices ``w - t`` and ``w + t``)
and prices of the bounds, every iteration solves one system per sample,

``H dx + A^T dy = g,  A dx - (s / y) dy = f``,  H diagonal,

in whichever of its sizes, m or n, is smaller. On its way it tries the vertex that the larger of
each complementary pair suggests, or the one that shrinks less; most linear programs end there,
exact, long before the iterations converge.

Source: Mehrotra, "On the implementation of a primal-dual interior point method" (SIAM J. Optim.
2, 1992); Gondzio, "Multiple centrality corrections in a primal-dual method for linear
programming" (Comput. Optim. Appl. 6, 1996); El-Bakry, Tapia and Zhang, "A study of indicators for
identifying zero variables in interior-point methods" (SIAM Review 36, 1994).
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from torch_prepared.solvers._batched_barrier import Model, Pairs, Point
from torch_prepared.solvers._batched_newton import Exact, keep_better, solve_vertex
from torch_prepared.solvers._batched_separable import SeparableBatch, times, transposed
from torch_prepared.solvers._complementarity import self_product

__all__ = ["run_interior"]

_LIMIT = 60
_ACCURATE = 1e-12  #: mean complementarity at which a run ends
_FIRST, _RATIO = 3e-4, 0.1  #: mean complementarity where vertices are tried
_EARLIEST = 1e-2  #: mean complementarity where what shrinks first suggests vertices as well
_SHORTEST = 1e-6  #: a step this short is stagnation
_DIVERGED = 1e9  #: multipliers this large have become a ray
_SOFT = 1e-11  #: curvature of columns that have none; a proximal term, without bias
_SHIFT = 1e-14  #: of the normal matrix, relative to its diagonal
_INSIDE = 0.9995  #: share of the way to the boundary
_CORRECTORS = 2  #: of centrality, at most, in an iteration
_LARGE = 128  #: least size of its systems where an iteration saved is worth more solves
_OUTLIER = 10.0  #: products this many times off their target are corrected
_AHEAD, _GAIN = 0.3, 1.01  #: how far beyond its length a step is corrected; what it must gain


class _System:
    """Residuals and the factored Newton system at a point."""

    def __init__(self, model: Model, at: Point, pairs: Pairs) -> None:
        batch = model.batch
        self.model, self.at, self.rows = model, at, batch.rows
        self.pull = batch.cost + batch.curve * (at.x - batch.anchor) + transposed(self.rows, at.y)
        self.pull = torch.where(model.fixed, 0.0, self.pull + at.t - at.low + at.high)
        self.lack = times(self.rows, at.x) + at.s - batch.rhs
        self.values, self.prices = model.spread(pairs.values), model.spread(pairs.prices)
        stiff = batch.curve + _SOFT
        if model.used[1]:
            (_, p, q, *_), (_, zp, zq, *_) = self.values, self.prices
            self.bend = torch.where(model.masks[1], 1.0 / (p / zp + q / zq), 0.0)
            self.apart = torch.where(model.masks[1], at.p - at.q - (at.x - batch.center), 0.0)
            stiff = stiff + self.bend
        for side in (3, 4):
            if model.used[side]:
                steep = self.prices[side] / self.values[side]
                stiff = stiff + torch.where(model.masks[side], steep, 0.0)
        self.soft = torch.where(model.fixed, 0.0, 1.0 / stiff)
        self.ratio = torch.where(batch.equal, 0.0, at.s / torch.where(batch.equal, 1.0, at.y))
        self.worked = self._factorize(stiff)

    def _factorize(self, stiff: Tensor) -> Tensor:
        """Factor; which samples it worked for, (b,)."""
        rows = self.rows if self.rows.dim() == 3 else self.rows[None]
        if self.model.narrow:
            scaled = (rows * self.ratio.rsqrt()[:, :, None]).mT
            matrix = self_product(scaled, scaled, lower=True)
            matrix.diagonal(dim1=1, dim2=2).add_(torch.where(self.model.fixed, 1e100, stiff))
        else:
            scaled = rows * self.soft.sqrt()[:, None, :]
            matrix = self_product(scaled, scaled, lower=True)
            matrix.diagonal(dim1=1, dim2=2).add_(self.ratio)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal.mul_(1.0 + _SHIFT).add_(_SHIFT * diagonal.amax(1, keepdim=True) + 1e-300)
        self.factor, info = torch.linalg.cholesky_ex(matrix)
        worked: Tensor = info == 0
        return worked

    def solve(self, aim: list[Tensor]) -> Point:
        """The change that moves the product of every pair by ``aim``, to first order."""
        at, model, batch = self.at, self.model, self.model.batch
        rows_aim, p_aim, q_aim, low_aim, high_aim = model.spread(aim)
        (_, p, q, low, high), (price, zp, zq, *_) = self.values, self.prices
        goal, need = -self.pull, -self.lack
        if model.used[0]:
            need = need - torch.where(batch.equal, 0.0, rows_aim / price)
        if model.used[1]:
            inner = torch.where(model.masks[1], p_aim / zp - q_aim / zq, 0.0) + self.apart
            goal = goal + inner * self.bend
        if model.used[3]:
            goal = goal + torch.where(model.masks[3], low_aim / low, 0.0)
        if model.used[4]:
            goal = goal - torch.where(model.masks[4], high_aim / high, 0.0)
        dx, dy, moved = self._solve(goal, need)
        zero = torch.zeros_like(dx)
        ds = torch.where(batch.equal, 0.0, -self.lack - moved)
        change = Point(dx, ds, zero, zero, dy, zero, zero, zero)
        if model.used[1]:
            change.t = (dx - inner) * self.bend
            change.p = torch.where(model.masks[1], (p_aim + p * change.t) / zp, 0.0)
            change.q = torch.where(model.masks[2], (q_aim - q * change.t) / zq, 0.0)
        if model.used[3]:
            change.low = torch.where(model.masks[3], (low_aim - at.low * dx) / low, 0.0)
        if model.used[4]:
            change.high = torch.where(model.masks[4], (high_aim + at.high * dx) / high, 0.0)
        return change

    def _solve(self, goal: Tensor, need: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``H dx + A^T dy = goal, A dx - ratio dy = need``; dx, dy and ``A dx``."""
        if self.model.narrow:
            weight = 1.0 / self.ratio
            whole = goal + transposed(self.rows, weight * need)
            whole = torch.where(self.model.fixed, 0.0, whole)
            dx = torch.cholesky_solve(whole[:, :, None], self.factor)[:, :, 0]
            moved = times(self.rows, dx)
            return dx, weight * (moved - need), moved
        whole = times(self.rows, self.soft * goal) - need
        dy = torch.cholesky_solve(whole[:, :, None], self.factor)[:, :, 0]
        return self.soft * (goal - transposed(self.rows, dy)), dy, need + self.ratio * dy


def run_interior(batch: SeparableBatch, x: Tensor, tolerance: float) -> tuple[Exact, Tensor]:
    """Solve an equilibrated batch as far as interior points and vertices can; deterministic.

    Args:
        batch: see :meth:`SeparableBatch.scaled`; finite.
        x: (b, n) where to begin.
        tolerance: residual at which a vertex is the answer.

    Returns:
        The best vertices or last interior points with their residuals, and the multipliers
        (b, m) at the end, a ray of infeasibility where they diverge.
    """
    best = Exact(
        x.clone(), torch.zeros_like(batch.rhs), torch.zeros_like(x, dtype=torch.bool),
        torch.zeros_like(batch.rhs, dtype=torch.bool), torch.full_like(x[:, 0], torch.inf),
    )  # fmt: skip
    last = torch.zeros_like(batch.rhs)
    left = torch.arange(len(x), device=x.device)
    model = Model(batch)
    at = model.start(x)
    before = at
    tries, short = torch.zeros_like(x[:, 0]), torch.zeros_like(left, dtype=torch.bool)
    for turn in range(_LIMIT + 1):
        pairs = model.pairs(at)
        mean = model.mean(pairs.products())
        ready = mean <= _FIRST * _RATIO**tries
        tries = tries + ready.to(tries)
        _try_vertices(best, left, model, at, pairs, ready)
        if turn and _costly(model):
            hopeful = (mean <= _EARLIEST) & ~(best.residual[left] <= tolerance)
            _try_vertices(best, left, model, at, pairs, hopeful, model.pairs(before))
        solved = best.residual[left] <= tolerance
        over = solved | short | (mean <= _ACCURATE) | (_largest(at.y) > _DIVERGED)
        if turn == _LIMIT:
            over = torch.ones_like(over)
        if bool(over.any()):
            last[left[over]] = at.y[over]
            _keep_points(best, left, model, at, (over & ~solved).nonzero()[:, 0])
            going = (~over).nonzero()[:, 0]
            if not len(going):
                break
            left, tries, at = left[going], tries[going], at.take(going)
            batch, mean = batch.take(going), mean[going]
            model = Model(batch)
            pairs = model.pairs(at)
        before = at
        at, short = _advance(model, at, pairs, _System(model, at, pairs), mean)
    return best, last


def _costly(model: Model) -> bool:
    return min(model.batch.size[1:]) >= _LARGE


def _largest(value: Tensor) -> Tensor:
    return value.abs().amax(1)


def _advance(
    model: Model, at: Point, pairs: Pairs, system: _System, mean: Tensor
) -> tuple[Point, Tensor]:
    """One predictor-corrector step; and the samples that could not move, (b,)."""
    products = pairs.products()
    ahead = model.changes(system.solve([-product for product in products]))
    primal, dual = _lengths(model, pairs, ahead)
    moved = [
        (v + primal * dv) * (z + dual * dz)
        for v, dv, z, dz in zip(
            pairs.values, ahead.values, pairs.prices, ahead.prices, strict=True
        )
    ]  # fmt: skip
    share = (model.mean(moved) / mean).clamp(0.0, 1.0) ** 3
    target = (share * mean)[:, None]
    aim = [
        target - product - dv * dz
        for product, dv, dz in zip(products, ahead.values, ahead.prices, strict=True)
    ]
    change, primal, dual = _centered(model, pairs, system, aim, target)
    primal, dual = _INSIDE * primal, _INSIDE * dual
    sound = change.x.isfinite().all(1) & change.y.isfinite().all(1) & system.worked
    short = ~(torch.maximum(primal, dual)[:, 0] >= _SHORTEST) | ~sound
    primal = torch.where(sound[:, None], primal, 0.0)
    dual = torch.where(sound[:, None], dual, 0.0)
    moved_to = {}
    for field in fields(Point):
        size = primal if field.name in ("x", "s", "p", "q") else dual
        d = torch.where(sound[:, None], getattr(change, field.name), 0.0)
        moved_to[field.name] = getattr(at, field.name) + size * d
    return Point(**moved_to), short


def _centered(
    model: Model, pairs: Pairs, system: _System, aim: list[Tensor], target: Tensor
) -> tuple[Point, Tensor, Tensor]:
    """The change towards ``aim``, corrected while that lengthens it; lengths of its two parts."""
    change = system.solve(aim)
    primal, dual = _lengths(model, pairs, model.changes(change))
    for _ in range(_CORRECTORS if _costly(model) else 0):
        moves = model.changes(change)
        far, beyond = (primal + _AHEAD).clamp_max(1.0), (dual + _AHEAD).clamp_max(1.0)
        more = []
        for k, (value, price) in enumerate(zip(pairs.values, pairs.prices, strict=True)):
            product = (value + far * moves.values[k]) * (price + beyond * moves.prices[k])
            wanted = product.minimum(_OUTLIER * target).maximum(target / _OUTLIER)
            more.append(aim[k] + (wanted - product).maximum(-_OUTLIER * target))
        other = system.solve(more)
        longer, farther = _lengths(model, pairs, model.changes(other))
        gains = longer + farther >= _GAIN * (primal + dual)
        if not bool(gains.any()):
            break
        change = change.replaced(gains, other)
        aim = [torch.where(gains, new, old) for new, old in zip(more, aim, strict=True)]
        primal = torch.where(gains, longer, primal)
        dual = torch.where(gains, farther, dual)
    return change, primal, dual


def _lengths(model: Model, pairs: Pairs, moves: Pairs) -> tuple[Tensor, Tensor]:
    """Longest steps of values and prices, (b, 1); the same where curvature ties x to prices."""
    primal, dual = _reach(pairs.values, moves.values), _reach(pairs.prices, moves.prices)
    both = torch.minimum(primal, dual)
    straight = model.straight
    return (
        torch.where(straight, primal, both)[:, None],
        torch.where(straight, dual, both)[:, None],
    )


def _reach(values: list[Tensor], changes: list[Tensor]) -> Tensor:
    """Longest step, at most 1, that keeps the values positive, (b,)."""
    length = torch.ones_like(values[0][:, 0])
    for value, change in zip(values, changes, strict=True):
        worst = (change / value).amin(1)  # the most negative relative change
        length = torch.minimum(length, -1.0 / worst.clamp_max(-1e-300))
    return length


def _suggested(
    model: Model, at: Point, pairs: Pairs, before: Pairs | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Points with what is at a kink or bound exactly there, the free columns, the tight rows.

    Of each pair that vanishes which is smaller, or shrank more since ``before``.
    """
    batch = model.batch
    values, prices = model.spread(pairs.values), model.spread(pairs.prices)
    if before is not None:
        old_values, old_prices = model.spread(before.values), model.spread(before.prices)
        values, prices = (
            [v * z for v, z in zip(values, old_prices, strict=True)],
            [z * v for v, z in zip(old_values, prices, strict=True)],
        )
    x, free = at.x, ~model.fixed
    if model.used[1]:
        center = model.masks[1] & (values[1] <= prices[1]) & (values[2] <= prices[2])
        x, free = torch.where(center, batch.center, x), free & ~center
    for side, bound in ((3, batch.lower), (4, batch.upper)):
        if model.used[side]:
            there = model.masks[side] & (values[side] <= prices[side])
            x, free = torch.where(there, bound, x), free & ~there
    tight = batch.equal.expand_as(batch.rhs)
    return x, free, tight | (prices[0] > values[0]) if model.used[0] else tight


def _try_vertices(
    best: Exact, left: Tensor, model: Model, at: Point, pairs: Pairs, ready: Tensor,
    before: Pairs | None = None,
) -> None:  # fmt: skip
    """Solve exactly for the suggested vertices of the samples that are ``ready``."""
    if not bool(ready.any()):
        return
    x, free, tight = _suggested(model, at, pairs, before)
    if before is not None:  # on the way, only what would be a vertex
        ready = ready & (free.sum(1) == tight.sum(1))
    index = ready.nonzero()[:, 0]
    if not len(index):
        return
    x, free, tight = x[index], free[index], tight[index]
    part = model.batch if len(index) == len(left) else model.batch.take(index)
    keep_better(best, left[index], part, *solve_vertex(part, x, free, tight), free, tight)


def _keep_points(best: Exact, left: Tensor, model: Model, at: Point, index: Tensor) -> None:
    """The interior points themselves, where no vertex was better."""
    if not len(index):
        return
    at = at.take(index)
    part = Model(model.batch.take(index))
    x, free, tight = _suggested(part, at, part.pairs(at), None)
    keep_better(best, left[index], part.batch, x, at.y, free, tight)
