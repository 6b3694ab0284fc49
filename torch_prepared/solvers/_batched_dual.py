"""Duals of many small projections at once: the batched form of :func:`.projection.project`.

A batch goes through three methods, each taking only the samples the one before left open: block
pivoting (a few factorizations where the rows are independent), an interior-point run whose active
set pivoting then settles, and the single-sample :func:`project`. Every answer is judged by its own
KKT residual or Farkas ray, so no sample depends on how another one fares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.solvers._batched_central import interior_point
from torch_prepared.solvers._batched_gram import Gram, compress
from torch_prepared.solvers._result import Status
from torch_prepared.solvers.projection import project

__all__ = ["CODES", "Duals", "solve_duals"]

CODES = (Status.OPTIMAL, Status.INFEASIBLE, Status.UNKNOWN)  #: meaning of ``Duals.code``
_OPTIMAL, _INFEASIBLE, _UNKNOWN = range(3)
_RESIDUAL_TOLERANCE = 1e-10  #: KKT residual at which a dual counts as solved
_FARTHEST = 1e4  #: a step this many times longer than the way to one half-space: infeasible
_LENGTH_NOISE = 2e-8  #: rounding of |J^T ray| relative to the sum of |ray_i J_i|
_CENTRAL_ACCURACY = 1e-14  #: mean complementarity at which an interior-point run ends
_STEADY = 0.04  #: share of the rows guessed that may change before pivoting is tried
_FAINT = (1e-4, 1e-2, 0.3)  #: shares of a ray's largest entry below which a row may be noise
_PIVOTS = 12
_PATIENCE, _HASTE = 3, 1  #: block swaps without progress before giving up; within iterations
_RIDGE = 1e-13  #: relative to a unit diagonal; removed again by iterative refinement


@dataclass(frozen=True, eq=False)
class Duals:
    """Answer of :func:`solve_duals`.

    Attributes:
        multipliers: (b, m) float64; nonnegative except on equality rows; 0 without an answer.
        code: (b,) index into :data:`CODES`.
        residual: (b,) largest entry of ``|min(u, G u - q)|`` at unit diagonal, over the largest q.
        ray: (b, m) Farkas ray where infeasible, else 0: see :class:`.projection.DualProjection`.
    """

    multipliers: Tensor
    code: Tensor
    residual: Tensor
    ray: Tensor


def solve_duals(
    gram: Gram, q: Tensor, equal: Tensor | None = None, *, start: Tensor | None = None
) -> Duals:
    """Multipliers of the projections of 0 onto ``{d : J d >= q}`` from ``G = J M^{-1} J^T``.

    Args:
        gram: symmetric positive semidefinite.
        q: (b, m) float64, finite.
        equal: (m,) rows with ``J d == q``, whose multipliers have no sign; None: none.
        start: (b, m) mask of the rows expected to be active; None: the violated ones.
    """
    if not q.numel():
        none = torch.zeros_like(q)
        return Duals(none, q.new_zeros(len(q), dtype=torch.long), q.new_zeros(len(q)), none)
    norms = gram.norms()
    dead = norms == 0.0
    asks = q > 0.0 if equal is None else (q > 0.0) | (equal & (q != 0.0))
    stuck = dead & asks
    scale = torch.where(dead, 0.0, 1.0 / norms)
    target = torch.where(dead, -1.0, q * scale)
    size = torch.where(asks & ~dead, target.abs(), 0.0).amax(1, keepdim=True)
    target = target / torch.where(size > 0.0, size, 1.0)
    free = None if equal is None or not bool(equal.any()) else equal & ~dead.all(0)
    # A row of zeros that asks for nothing is never active, so only equality needs its diagonal.
    lone = torch.zeros_like(dead) if free is None else dead & free
    found = _solve_unit(gram.scaled(scale, lone), target, free, start)
    idle = size[:, 0] == 0.0
    blocked = stuck.any(1)
    multipliers = torch.where(idle[:, None], 0.0, found.multipliers * scale * size)
    ray = torch.where(blocked[:, None], stuck * q.sign(), found.ray * scale)
    code = torch.where(idle, _OPTIMAL, found.code)
    code = torch.where(blocked, _INFEASIBLE, code)
    residual = torch.where(idle, 0.0, found.residual)
    answered = (code == _OPTIMAL)[:, None]
    refuted = (code == _INFEASIBLE)[:, None]
    return Duals(
        torch.where(answered, multipliers, 0.0), code, residual, torch.where(refuted, ray, 0.0)
    )


def _solve_unit(gram: Gram, q: Tensor, free: Tensor | None, start: Tensor | None) -> Duals:
    """:func:`solve_duals` with unit diagonal and ``max(q) == 1``."""
    batch = len(q)
    found = Duals(
        torch.zeros_like(q), torch.full((batch,), _UNKNOWN, device=q.device),
        torch.full_like(q[:, 0], torch.inf), torch.zeros_like(q),
    )  # fmt: skip
    guess = q > 0.0 if start is None else start
    # Pivoting hopes for independent rows: in vain where rows are many and many of them violated.
    hopeful = guess.sum(1) <= (q.shape[1] if gram.rank is None else gram.rank // 2)
    first = hopeful.nonzero()[:, 0]
    if len(first):
        part = gram if len(first) == batch else gram.take(first)
        _record(found, first, *_pivot(part, q[first], free, guess[first]))
    left = (found.code == _UNKNOWN).nonzero()[:, 0]
    if len(left):
        _Central(found, left, gram, q, free).run()
    for sample in (found.code == _UNKNOWN).nonzero()[:, 0]:
        _solve_single(found, int(sample), gram.take(sample[None]).whole()[0], q[sample], free)
    return found


class _Central:
    """An interior-point run on the samples ``left``, left early for an exact active set."""

    def __init__(
        self, found: Duals, left: Tensor, gram: Gram, q: Tensor, free: Tensor | None
    ) -> None:
        everything = len(left) == len(q)
        self.found, self.left, self.free = found, left, free
        self.gram, self.q = (gram, q) if everything else (gram.take(left), q[left])
        self.guess = torch.zeros_like(self.q, dtype=torch.bool)
        self.most = q.shape[1] if gram.rank is None else min(gram.rank, q.shape[1])

    def run(self) -> None:
        """Record what comes out of it."""
        found, left = self.found, self.left
        x = interior_point(
            self.gram, self.q, self._ends, free=self.free, accuracy=_CENTRAL_ACCURACY
        )
        everyone = (found.code[left] == _UNKNOWN).nonzero()[:, 0]
        if not len(everyone):
            return
        image = self.gram.times(x)
        slack = image - self.q
        central = torch.where(x > slack, x, 0.0)[everyone]
        gram, q = self._part(everyone)
        _record(found, left[everyone], central, _residual(gram, q, central, self.free))
        self._identify(everyone, x[everyone] > slack[everyone], _PATIENCE)
        for i in (found.code[left] == _UNKNOWN).nonzero()[:, 0]:
            gram, q = self.gram.take(i[None]), self.q[i]
            pure = (_purified(gram, q, x[i], self.free, faint) for faint in _FAINT)
            for ray in (*pure, x[i]):
                if bool(is_ray(gram.times(ray[None]), q[None], ray[None])):
                    found.code[left[i]], found.ray[left[i]] = _INFEASIBLE, ray
                    break

    def _ends(self, index: Tensor, x: Tensor, image: Tensor, guess: Tensor) -> Tensor:
        """Samples that need no more iterations: a ray, or settled by pivoting from here, (c,)."""
        guess = guess if self.free is None else guess | self.free
        count = guess.sum(1)
        changed = (guess ^ self.guess[index]).sum(1)
        self.guess[index] = guess
        ready = (count > 0) & (count <= self.most) & (changed <= _STEADY * count)
        ready &= self.found.code[self.left[index]] == _UNKNOWN
        chosen = ready.nonzero()[:, 0]
        self._identify(index[chosen], guess[chosen], _HASTE)
        solved = self.found.code[self.left[index]] != _UNKNOWN
        return is_ray(image, self.q[index], x) | solved

    def _part(self, which: Tensor) -> tuple[Gram, Tensor]:
        every = len(which) == len(self.q)
        return (self.gram, self.q) if every else (self.gram.take(which), self.q[which])

    def _identify(self, which: Tensor, guess: Tensor, patience: int) -> None:
        """Settle the samples ``which`` by pivoting from a guess of their active rows."""
        if len(which):
            gram, q = self._part(which)
            found = _pivot(gram, q, self.free, guess, patience)
            _record(self.found, self.left[which], *found)


def _purified(gram: Gram, q: Tensor, ray: Tensor, free: Tensor | None, faint: float) -> Tensor:
    """The ray (m,) without the rows that only an interior point weighs, if it is then shorter."""
    ray = ray / ray.abs().amax()
    index, valid = compress((ray.abs() > faint)[None])
    rows = index[0]
    values, vectors = torch.linalg.eigh(gram.block(index, valid)[0])
    null = vectors[:, values <= 1e-11 * values.amax()]
    pure = torch.zeros_like(ray)
    pure[rows] = null @ (null.T @ ray[rows])
    signed = pure if free is None else torch.where(free, 0.0, pure)
    length, before = ((v * gram.times(v[None])[0]).sum() for v in (pure, ray))
    better = length < before
    return pure if bool(better & (signed.amin() >= 0.0) & (q @ pure > 0.0)) else ray


def _record(found: Duals, index: Tensor, x: Tensor, residual: Tensor) -> None:
    good = (residual <= _RESIDUAL_TOLERANCE) & (residual < found.residual[index])
    found.multipliers[index[good]] = x[good]
    found.code[index[good]] = _OPTIMAL
    found.residual[index] = torch.minimum(found.residual[index], residual)


def _solve_single(found: Duals, sample: int, gram: Tensor, q: Tensor, free: Tensor | None) -> None:
    """Last resort; an equality row becomes two opposite inequalities."""
    if free is None:
        answer = project(gram, q)
        x, ray = answer.multipliers, answer.ray
    else:
        extra = free.nonzero()[:, 0]
        sign = torch.ones(len(q) + len(extra), dtype=q.dtype, device=q.device)
        sign[len(q) :] = -1.0
        index = torch.cat([torch.arange(len(q), device=q.device), extra])
        answer = project(gram[index][:, index] * sign[:, None] * sign, q[index] * sign)
        fold = np.zeros((len(q), len(index)))
        fold[index.cpu().numpy(), np.arange(len(index))] = sign.cpu().numpy()
        x = fold @ answer.multipliers
        ray = None if answer.ray is None else fold @ answer.ray
    if answer.status is Status.OPTIMAL:
        found.multipliers[sample] = torch.from_numpy(x).to(q)
        found.code[sample] = _OPTIMAL
        found.residual[sample] = answer.kkt_residual
    elif answer.status is Status.INFEASIBLE and ray is not None:
        found.code[sample] = _INFEASIBLE
        found.ray[sample] = torch.from_numpy(ray).to(q)


def is_ray(image: Tensor, q: Tensor, ray: Tensor) -> Tensor:
    """Per sample, whether ``q @ ray`` exceeds ``|J^T ray|`` too far for a sensible step, (b,).

    ``image`` is ``G ray``, (b, m), with ``|J^T ray|^2 = ray @ G ray``.
    """
    squared = (ray * image).sum(1)
    length = torch.maximum(squared.clamp_min(0.0).sqrt(), _LENGTH_NOISE * ray.abs().sum(1))
    return (q * ray).sum(1) > _FARTHEST * length.clamp_min(torch.finfo(q.dtype).tiny)


def _pivot(
    gram: Gram, q: Tensor, free: Tensor | None, active: Tensor, patience: int = _PATIENCE
) -> tuple[Tensor, Tensor]:
    """Block principal pivoting: best multipliers (b, m) and their KKT residuals (b,).

    Source: Judice and Pires, "A block principal pivoting algorithm for large-scale strictly
    monotone linear complementarity problems" (Comput. Oper. Res. 21, 1994), without its slow
    single-index rule: samples whose count of wrong signs stops falling are left open.
    """
    bound = torch.zeros_like(q[0], dtype=torch.bool) if free is None else free
    active = active | bound
    best, best_residual = torch.zeros_like(q), torch.full_like(q[:, 0], torch.inf)
    fewest = torch.full_like(q[:, 0], q.shape[1] + 1.0)
    swaps = torch.full_like(fewest, patience)
    index = torch.arange(len(q), device=q.device)
    for _ in range(_PIVOTS):
        if not len(index):
            break
        whole = len(index) == len(q)
        part, target, on = gram if whole else gram.take(index), q[index], active[index]
        x, slack = _restricted(part, target, on)
        noise = 1e-14 * x.abs().amax(1, keepdim=True).clamp_min(1.0)
        wrong = torch.where(on, (x < -noise) & ~bound, ~(slack >= -noise))
        x = torch.where(bound, x, x.clamp_min(0.0))
        residual = _residual(part, target, x, free)
        better = residual < best_residual[index]
        best[index[better]] = x[better]
        best_residual[index[better]] = residual[better]
        count = wrong.sum(1)
        fell = count < fewest[index]
        fewest[index] = torch.where(fell, count.to(fewest), fewest[index])
        swaps[index] = torch.where(fell, float(patience), swaps[index] - 1.0)
        active[index] = on ^ wrong
        going = (count > 0) & (swaps[index] >= 0) & (residual > 1e-15)
        index = index[going]
    return best, best_residual


def _residual(gram: Gram, q: Tensor, x: Tensor, free: Tensor | None) -> Tensor:
    """Largest ``|min(x, G x - q)|`` (``|G x - q|`` on free entries), (b,); inf for NaN."""
    slack = gram.times(x) - q
    lack = torch.minimum(x, slack)
    size = (lack if free is None else torch.where(free, slack, lack)).abs().amax(1)
    return torch.where(size.isnan(), torch.inf, size)


def _restricted(gram: Gram, q: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers that meet the active rows with equality, and the slack of every row, (b, m)."""
    index, valid = compress(active)
    block = gram.block(index, valid)
    block.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    factor, info = torch.linalg.cholesky_ex(block)
    lack = torch.where(valid, q.gather(1, index), 0.0)[:, :, None]
    inner = torch.cholesky_solve(lack, factor)
    inner = inner + torch.cholesky_solve(lack - block @ inner + _RIDGE * inner, factor)
    inner = torch.where((info == 0)[:, None, None], inner, torch.nan)
    x = torch.zeros_like(q).scatter(1, index, torch.where(valid, inner[:, :, 0], 0.0))
    return x, gram.times(x) - q
