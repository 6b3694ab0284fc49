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

from torch_prepared.solvers._complementarity import interior_point
from torch_prepared.solvers._result import Status
from torch_prepared.solvers.projection import project

__all__ = [
    "CODES",
    "Duals",
    "batch_indices",
    "compress",
    "solve_duals",
    "take_block",
]

CODES = (Status.OPTIMAL, Status.INFEASIBLE, Status.UNKNOWN)  #: meaning of ``Duals.code``
_OPTIMAL, _INFEASIBLE, _UNKNOWN = range(3)
_RESIDUAL_TOLERANCE = 1e-10  #: KKT residual at which a dual counts as solved
_FARTHEST = 1e4  #: a step this many times longer than the way to one half-space: infeasible
_LENGTH_NOISE = 2e-8  #: rounding of |J^T ray| relative to the sum of |ray_i J_i|
_CENTRAL_ACCURACY = 1e-14  #: mean complementarity at which an interior-point run ends
_CENTRAL_FIRST, _CENTRAL_RATIO = 4e-6, 1e-2  #: where pivoting is tried on the way
_FAINT = 1e-4  #: share of a ray's largest entry below which a row is noise
_PIVOTS = 12
_PATIENCE = 3  #: block swaps without progress before giving up
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
    gram: Tensor,
    q: Tensor,
    equal: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    start: Tensor | None = None,
) -> Duals:
    """Multipliers of the projections of 0 onto ``{d : J d >= q}`` from ``G = J M^{-1} J^T``.

    Args:
        gram: (b, m, m) float64, symmetric positive semidefinite.
        q: (b, m) float64, finite.
        equal: (m,) rows with ``J d == q``, whose multipliers have no sign; None: none.
        rows: (b, m, n) with ``G = rows @ rows.T``; used where n < m.
        start: (b, m) mask of the rows expected to be active; None: the violated ones.
    """
    if not q.numel():
        none = torch.zeros_like(q)
        return Duals(none, q.new_zeros(len(q), dtype=torch.long), q.new_zeros(len(q)), none)
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    dead = norms == 0.0
    asks = q > 0.0 if equal is None else (q > 0.0) | (equal & (q != 0.0))
    stuck = dead & asks
    scale = torch.where(dead, 0.0, 1.0 / norms)
    target = torch.where(dead, -1.0, q * scale)
    size = torch.where(asks & ~dead, target.abs(), 0.0).amax(1, keepdim=True)
    target = target / torch.where(size > 0.0, size, 1.0)
    unit = (gram * scale[:, :, None]).mul_(scale[:, None, :])
    unit.diagonal(dim1=1, dim2=2).add_(dead.to(unit))
    free = None if equal is None or not bool(equal.any()) else equal & ~dead.all(0)
    wide = rows is None or rows.shape[2] >= rows.shape[1]
    scaled_rows = None if rows is None or wide else rows * scale[:, :, None]
    found = _solve_unit(unit, target, free, scaled_rows, start)
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


def _solve_unit(
    gram: Tensor, q: Tensor, free: Tensor | None, rows: Tensor | None, start: Tensor | None
) -> Duals:
    """:func:`solve_duals` with unit diagonal and ``max(q) == 1``."""
    batch = len(q)
    found = Duals(
        torch.zeros_like(q), torch.full((batch,), _UNKNOWN, device=q.device),
        torch.full_like(q[:, 0], torch.inf), torch.zeros_like(q),
    )  # fmt: skip
    guess = q > 0.0 if start is None else start
    # Pivoting hopes for independent rows: in vain where rows are many and many of them violated.
    hopeful = guess.sum(1) <= (gram.shape[1] if rows is None else rows.shape[2] // 2)
    first = hopeful.nonzero()[:, 0]
    if len(first):
        x, residual = _pivot(gram[first], q[first], free, guess[first])
        _record(found, first, x, residual)
    left = (found.code == _UNKNOWN).nonzero()[:, 0]
    if len(left):
        _Central(found, left, gram, q, free, rows).run()
    for sample in (found.code == _UNKNOWN).nonzero()[:, 0].tolist():
        _solve_single(found, sample, gram[sample], q[sample], free)
    return found


class _Central:
    """An interior-point run on the samples ``left``, left early for an exact active set."""

    def __init__(
        self, found: Duals, left: Tensor, gram: Tensor, q: Tensor, free: Tensor | None,
        rows: Tensor | None,
    ) -> None:  # fmt: skip
        everything = len(left) == len(q)
        self.found, self.left, self.free = found, left, free
        self.gram, self.q = (gram, q) if everything else (gram[left], q[left])
        self.rows = rows if rows is None or everything else rows[left]
        self.tries = torch.zeros_like(left)

    def run(self) -> None:
        """Record what comes out of it."""
        found, left = self.found, self.left
        x = interior_point(
            self.gram, self.q, self._ends, free=self.free, rows=self.rows,
            accuracy=_CENTRAL_ACCURACY,
        )  # fmt: skip
        everyone = (found.code[left] == _UNKNOWN).nonzero()[:, 0]
        image = (self.gram @ x[:, :, None])[:, :, 0]
        self._identify(everyone, x, image - self.q)
        refuted = is_ray(image, self.q, x) & (found.code[left] == _UNKNOWN)
        found.code[left[refuted]] = _INFEASIBLE
        for i in refuted.nonzero()[:, 0].tolist():
            found.ray[left[i]] = _purified(self.gram[i], self.q[i], x[i], self.free)

    def _ends(self, x: Tensor, image: Tensor) -> Tensor:
        """Samples that need no more iterations: a ray, or settled by pivoting from here, (b,)."""
        slack = image - self.q
        mean = (x * slack).abs().mean(1)
        accuracy = _CENTRAL_FIRST * _CENTRAL_RATIO ** self.tries.to(x)
        ready = (mean <= accuracy) & (self.found.code[self.left] == _UNKNOWN)
        self.tries += ready.to(self.tries)
        self._identify(ready.nonzero()[:, 0], x, slack)
        return is_ray(image, self.q, x) | (self.found.code[self.left] != _UNKNOWN)

    def _identify(self, which: Tensor, x: Tensor, slack: Tensor) -> None:
        """Settle the samples ``which`` by the rows that matter more than they are slack."""
        if not len(which):
            return
        index = self.left[which]
        every = len(which) == len(self.q)
        gram, q = (self.gram, self.q) if every else (self.gram[which], self.q[which])
        guess = x[which] > slack[which]
        guess = guess if self.free is None else guess | self.free
        central = torch.where(guess, x[which], 0.0)
        _record(self.found, index, central, _residual(gram, q, central, self.free))
        _record(self.found, index, *_pivot(gram, q, self.free, guess))


def _purified(gram: Tensor, q: Tensor, ray: Tensor, free: Tensor | None) -> Tensor:
    """The ray (m,) without the rows that only an interior point weighs, if it is then shorter."""
    ray = ray / ray.abs().amax()
    rows = (ray.abs() > _FAINT).nonzero()[:, 0]
    values, vectors = torch.linalg.eigh(gram[rows][:, rows])
    null = vectors[:, values <= 1e-11 * values.amax()]
    pure = torch.zeros_like(ray)
    pure[rows] = null @ (null.T @ ray[rows])
    signed = pure if free is None else torch.where(free, 0.0, pure)
    better = (pure @ gram @ pure) < (ray @ gram @ ray)
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


def _pivot(gram: Tensor, q: Tensor, free: Tensor | None, active: Tensor) -> tuple[Tensor, Tensor]:
    """Block principal pivoting: best multipliers (b, m) and their KKT residuals (b,).

    Source: Judice and Pires, "A block principal pivoting algorithm for large-scale strictly
    monotone linear complementarity problems" (Comput. Oper. Res. 21, 1994), without its slow
    single-index rule: samples whose count of wrong signs stops falling are left open.
    """
    bound = torch.zeros_like(q[0], dtype=torch.bool) if free is None else free
    active = active | bound
    best, best_residual = torch.zeros_like(q), torch.full_like(q[:, 0], torch.inf)
    fewest = torch.full_like(q[:, 0], q.shape[1] + 1.0)
    patience = torch.full_like(fewest, _PATIENCE)
    index = torch.arange(len(q), device=q.device)
    for _ in range(_PIVOTS):
        if not len(index):
            break
        whole = len(index) == len(q)
        part, target, on = gram if whole else gram[index], q[index], active[index]
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
        patience[index] = torch.where(fell, float(_PATIENCE), patience[index] - 1.0)
        active[index] = on ^ wrong
        going = (count > 0) & (patience[index] >= 0) & (residual > 1e-15)
        index = index[going]
    return best, best_residual


def _residual(gram: Tensor, q: Tensor, x: Tensor, free: Tensor | None) -> Tensor:
    """Largest ``|min(x, G x - q)|`` (``|G x - q|`` on free entries), (b,); inf for NaN."""
    slack = (gram @ x[:, :, None])[:, :, 0] - q
    lack = torch.minimum(x, slack)
    size = (lack if free is None else torch.where(free, slack, lack)).abs().amax(1)
    return torch.where(size.isnan(), torch.inf, size)


def _restricted(gram: Tensor, q: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers that meet the active rows with equality, and the slack of every row, (b, m)."""
    index, valid = compress(active)
    block = take_block(gram, index, valid)
    ridged = block.clone()
    ridged.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    factor, info = torch.linalg.cholesky_ex(ridged)
    lack = torch.where(valid, q.gather(1, index), 0.0)[:, :, None]
    inner = torch.cholesky_solve(lack, factor)
    inner = inner + torch.cholesky_solve(lack - block @ inner, factor)
    inner = torch.where((info == 0)[:, None, None], inner, torch.nan)
    x = torch.zeros_like(q).scatter(1, index, torch.where(valid, inner[:, :, 0], 0.0))
    return x, (gram @ x[:, :, None])[:, :, 0] - q


def compress(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the true entries of each row of ``mask`` (b, m), padded to the longest row.

    Returns:
        ``index`` (b, k) and ``valid`` (b, k); padding points at false entries, each once.
    """
    width = int(mask.sum(1).max()) if mask.numel() else 0
    index = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :width]
    return index, mask.gather(1, index)


def batch_indices(index: Tensor) -> Tensor:
    """(b, 1), to index the batch axis beside ``index`` (b, k)."""
    return torch.arange(len(index), device=index.device)[:, None]


def take_block(gram: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Rows and columns ``index`` (b, k) of ``gram`` (b, m, m); the identity where not valid."""
    each = batch_indices(index)[:, :, None]
    block = gram[each, index[:, :, None], index[:, None, :]]
    block = torch.where(valid[:, :, None] & valid[:, None, :], block, 0.0)
    block.diagonal(dim1=1, dim2=2).add_((~valid).to(block))
    return block
