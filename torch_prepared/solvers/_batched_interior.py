r"""Interior-point start for batches of separable programs, and the exact vertex it points at.

With slacks s of the rows, ``x - r = p - q`` at kinks (p, q >= 0, prices ``w - t`` and ``w + t``)
and prices of the bounds, every iteration solves one system per sample,

``H dx + A^T dy = g,  A dx - (s / y) dy = f``,  H diagonal,

in whichever of its sizes, m or n, is smaller. On its way it tries the vertex that the larger of
each complementary pair suggests; most linear programs end there, exact, long before the
iterations converge.

Source: Mehrotra, "On the implementation of a primal-dual interior point method" (SIAM J. Optim.
2, 1992).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from torch_prepared.solvers._batched_newton import Exact, keep_better, solve_vertex
from torch_prepared.solvers._batched_separable import SeparableBatch, times, transposed
from torch_prepared.solvers._complementarity import self_product

__all__ = ["run_interior"]

_LIMIT = 60
_ACCURATE = 1e-12  #: mean complementarity at which a run ends
_FIRST, _RATIO = 3e-4, 0.1  #: mean complementarity where vertices are tried
_SHORTEST = 1e-6  #: a step this short is stagnation
_DIVERGED = 1e9  #: multipliers this large have become a ray
_SOFT = 1e-11  #: curvature of columns that have none; a proximal term, without bias
_SHIFT = 1e-14  #: of the normal matrix, relative to its diagonal
_INSIDE = 0.9995  #: share of the way to the boundary


@dataclass
class _Point:
    """An iterate, or a change of it.

    Rows have slack s and price y, (b, m); kinks p, q and t, bounds prices low and high, (b, n).
    """

    x: Tensor
    s: Tensor
    p: Tensor
    q: Tensor
    y: Tensor
    t: Tensor
    low: Tensor
    high: Tensor

    def take(self, index: Tensor) -> _Point:
        return _Point(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass
class _Pairs:
    """Complementary pairs: values (moved with x) and prices (moved with y), each a list."""

    values: list[Tensor]
    prices: list[Tensor]

    def products(self) -> list[Tensor]:
        return [v * z for v, z in zip(self.values, self.prices, strict=True)]


class _Model:
    """A batch with the masks of what has a slack, a kink, a lower and an upper bound."""

    def __init__(self, batch: SeparableBatch) -> None:
        self.batch = batch
        self.fixed = batch.lower >= batch.upper
        self.masks = [
            (~batch.equal).expand_as(batch.rhs),
            (batch.weight > 0.0) & ~self.fixed,
            (batch.weight > 0.0) & ~self.fixed,
            batch.lower.isfinite() & ~self.fixed,
            batch.upper.isfinite() & ~self.fixed,
        ]
        self.count = sum(
            (mask.sum(1).to(batch.rhs) for mask in self.masks), batch.rhs.new_zeros(())
        )
        self.count = self.count.clamp_min(1.0)
        self.used = [bool(mask.any()) for mask in self.masks]
        self.straight = ~(batch.curve > 0.0).any(1)
        self.narrow = batch.size[2] < batch.size[1] and not bool(batch.equal.any())

    def start(self, x: Tensor) -> _Point:
        """A point well inside every pair, near x (b, n)."""
        batch = self.batch
        room = 0.25 * (batch.upper - batch.lower).clamp_max(4.0)
        x = torch.maximum(torch.minimum(x, batch.upper - room), batch.lower + room)
        x = torch.where(self.fixed, batch.lower, x)
        gap = batch.rhs - times(batch.rows, x)
        lack = torch.where(batch.equal, gap.abs(), -gap).amax(1, keepdim=True).clamp_min(1e-2)
        away = x - batch.center
        p = away.clamp_min(0.0) + lack
        one = torch.ones_like(x)
        _, kink, _, low, high = self.masks
        return _Point(
            x, torch.where(batch.equal, 0.0, torch.maximum(gap, lack)),
            torch.where(kink, p, 1.0), torch.where(kink, p - away, 1.0),
            torch.where(batch.equal, 0.0, torch.ones_like(gap)),
            torch.zeros_like(x), low * one, high * one,
        )  # fmt: skip

    def pairs(self, at: _Point) -> _Pairs:
        """The pairs at a point, 1 and 1 where there is none."""
        batch = self.batch
        values = [at.s, at.p, at.q, at.x - batch.lower, batch.upper - at.x]
        prices = [at.y, batch.weight - at.t, batch.weight + at.t, at.low, at.high]
        return _Pairs(self._masked(values, 1.0), self._masked(prices, 1.0))

    def changes(self, d: _Point) -> _Pairs:
        """How the pairs move, 0 where there is none."""
        values = self._masked([d.s, d.p, d.q, d.x, -d.x], 0.0)
        return _Pairs(values, self._masked([d.y, -d.t, d.t, d.low, d.high], 0.0))

    def _masked(self, values: list[Tensor], other: float) -> list[Tensor]:
        triples = zip(values, self.masks, self.used, strict=True)
        return [torch.where(mask, value, other) for value, mask, used in triples if used]

    def spread(self, values: list[Tensor]) -> list[Tensor]:
        """Back to one entry per kind of pair; those not used are never read."""
        rest = iter(values)
        return [next(rest) if used else self.count for used in self.used]

    def mean(self, products: list[Tensor]) -> Tensor:
        """Mean of ``value * price`` over the pairs there are, (b,)."""
        total: Tensor = self.batch.rhs.new_zeros(())
        masks = [mask for mask, used in zip(self.masks, self.used, strict=True) if used]
        for product, mask in zip(products, masks, strict=True):
            total = total + torch.where(mask, product, 0.0).sum(1)
        return total.expand(len(self.batch.rhs)) / self.count


class _System:
    """Residuals and the factored Newton system at a point."""

    def __init__(self, model: _Model, at: _Point, pairs: _Pairs) -> None:
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
            matrix = self_product(scaled, scaled)
            matrix.diagonal(dim1=1, dim2=2).add_(torch.where(self.model.fixed, 1e100, stiff))
        else:
            scaled = rows * self.soft.sqrt()[:, None, :]
            matrix = self_product(scaled, scaled)
            matrix.diagonal(dim1=1, dim2=2).add_(self.ratio)
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal.mul_(1.0 + _SHIFT).add_(_SHIFT * diagonal.amax(1, keepdim=True) + 1e-300)
        self.factor, info = torch.linalg.cholesky_ex(matrix)
        worked: Tensor = info == 0
        return worked

    def solve(self, aim: list[Tensor]) -> _Point:
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
        change = _Point(dx, ds, zero, zero, dy, zero, zero, zero)
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
    model = _Model(batch)
    at = model.start(x)
    tries, short = torch.zeros_like(x[:, 0]), torch.zeros_like(left, dtype=torch.bool)
    for turn in range(_LIMIT + 1):
        pairs = model.pairs(at)
        mean = model.mean(pairs.products())
        ready = mean <= _FIRST * _RATIO**tries
        tries = tries + ready.to(tries)
        _try_vertices(best, left, model, at, pairs, ready)
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
            model = _Model(batch)
            pairs = model.pairs(at)
        at, short = _advance(model, at, pairs, _System(model, at, pairs), mean)
    return best, last


def _largest(value: Tensor) -> Tensor:
    return value.abs().amax(1)


def _advance(
    model: _Model, at: _Point, pairs: _Pairs, system: _System, mean: Tensor
) -> tuple[_Point, Tensor]:
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
    change = system.solve(aim)
    primal, dual = (_INSIDE * size for size in _lengths(model, pairs, model.changes(change)))
    sound = change.x.isfinite().all(1) & change.y.isfinite().all(1) & system.worked
    short = ~(torch.maximum(primal, dual)[:, 0] >= _SHORTEST) | ~sound
    primal = torch.where(sound[:, None], primal, 0.0)
    dual = torch.where(sound[:, None], dual, 0.0)
    moved_to = {}
    for field in fields(_Point):
        size = primal if field.name in ("x", "s", "p", "q") else dual
        d = torch.where(sound[:, None], getattr(change, field.name), 0.0)
        moved_to[field.name] = getattr(at, field.name) + size * d
    return _Point(**moved_to), short


def _lengths(model: _Model, pairs: _Pairs, moves: _Pairs) -> tuple[Tensor, Tensor]:
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


def _suggested(model: _Model, at: _Point, pairs: _Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Points with what is at a kink or bound exactly there, the free columns, the tight rows."""
    batch = model.batch
    values, prices = model.spread(pairs.values), model.spread(pairs.prices)
    x, free = at.x, ~model.fixed
    if model.used[1]:
        center = model.masks[1] & (values[1] <= prices[1]) & (values[2] <= prices[2])
        x, free = torch.where(center, batch.center, x), free & ~center
    for side, bound in ((3, batch.lower), (4, batch.upper)):
        if model.used[side]:
            there = model.masks[side] & (values[side] <= prices[side])
            x, free = torch.where(there, bound, x), free & ~there
    return x, free, batch.equal | (at.y > at.s)


def _try_vertices(
    best: Exact, left: Tensor, model: _Model, at: _Point, pairs: _Pairs, ready: Tensor
) -> None:
    """Solve exactly for the suggested vertices of the samples that are ``ready``."""
    index = ready.nonzero()[:, 0]
    if not len(index):
        return
    x, free, tight = (value[index] for value in _suggested(model, at, pairs))
    part = model.batch if len(index) == len(left) else model.batch.take(index)
    keep_better(best, left[index], part, *solve_vertex(part, x, free, tight), free, tight)


def _keep_points(best: Exact, left: Tensor, model: _Model, at: _Point, index: Tensor) -> None:
    """The interior points themselves, where no vertex was better."""
    if not len(index):
        return
    at = at.take(index)
    part = _Model(model.batch.take(index))
    x, free, tight = _suggested(part, at, part.pairs(at))
    keep_better(best, left[index], part.batch, x, at.y, free, tight)
