r"""Differentiable batches of linear and separable programs: first-order, then exact, then judged.

A sample is done when it meets the optimality conditions, in the caller's own units, at rounding
level; that takes a vertex (or KKT point) solved exactly on an identified active set. Samples that
neither the batched methods nor a Farkas ray settle go, one at a time, to the package's
single-problem solver.

Gradients go through the active set: with F the columns strictly between kinks, S the active rows
and ``E = diag(e_F)``, the adjoint of the KKT system is ``E v + A_SF^T w = g_F, A_SF v = h`` and

``dL/db_S = w,  dL/dA_S = -y v^T - w x^T,  dL/dc_F = -v,  dL/dr_j = g_j - (A^T w)_j`` at a kink,

likewise for the bounds. **A linear program has e = 0: its optimum is a vertex, v = 0, and so is
the gradient with respect to the cost (and the weights w), almost everywhere.** Ask for smoothing
``e > 0`` where that gradient is wanted; gradients with respect to rows, right-hand sides, centers
and bounds are useful as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torch_prepared.solvers._batched_adjoint import Adjoint
from torch_prepared.solvers._batched_interior import run_interior
from torch_prepared.solvers._batched_newton import Exact, solve_exactly
from torch_prepared.solvers._batched_report import BatchReport, OnFailure, relative_violation
from torch_prepared.solvers._batched_separable import SeparableBatch, times, transposed
from torch_prepared.solvers._batched_single import solve_single
from torch_prepared.solvers._result import Status
from torch_prepared.solvers.pdhg import PDHGSettings, run_pdhg

__all__ = ["SolvedBatch", "differentiable_solve", "solve_batch"]

ACCEPTED = 1e-8  #: violation of the optimality conditions (unit objective) and of the rows
_STAGES = (
    (PDHGSettings(3e-3, 800), 15),
    (PDHGSettings(1e-4, 3000), 15),
    (PDHGSettings(1e-5, 6000), 25),
)  #: first-order settings and proximal-point steps, tried in turn on what is still open
_FEW_ROWS = PDHGSettings(1e-2, 400)  #: a rougher start suffices with far fewer rows than columns
_NONE = PDHGSettings(torch.inf, 0)  #: no first-order phase: after a warm start
_BOLD_STEP = 30.0  #: likewise
_SETTLED = 1e-10  #: residual that leaves nothing to do
_POLISH = 8  #: proximal-point steps on what interior points leave open
_CACHE, _MEMORY = 2**25, 2**30  #: bytes of samples treated at a time on a CPU, elsewhere
_FARTHEST = 1e4  #: a solution this many times farther than the data reach: infeasible
_OPEN = 1e-9  #: coefficient of an open column that is rounding, relative to the ray's scale


@dataclass(frozen=True, eq=False)
class SolvedBatch:
    """Points x (b, n), multipliers y (b, m), the columns that are free, and the report."""

    x: Tensor
    y: Tensor
    free: Tensor
    report: BatchReport


def solve_batch(
    batch: SeparableBatch, start: tuple[Tensor, Tensor] | None = None, *, fallback: bool = True
) -> SolvedBatch:
    """Solve every sample; failing is a status of that sample alone.

    Args:
        batch: the program, in the caller's units.
        start: x (b, n) and y (b, m) of similar programs; a good one saves the first-order phase.
        fallback: try HiGHS (Clarabel with curvature) on what the batched methods leave open.
    """
    count, m, n = batch.size
    lower_first = (batch.lower <= batch.upper).all(1)
    usable = _finite(batch) & lower_first
    work = batch if bool(usable.all()) else _neutralized(batch, usable)
    status = [Status.UNKNOWN] * count
    ray = work.rhs.new_zeros(count, m)
    found = _first_guess(work, start)
    left = usable.nonzero()[:, 0]
    if start is not None and len(left):
        left = _stage(work, found, left, _NONE, _POLISH)
    if len(left):
        left = _interior(work, found, left, status, ray)
    for stage, (settings, outer) in enumerate(_STAGES):
        if not len(left):
            break
        rough = _FEW_ROWS if stage == 0 and 8 * m <= n else settings
        left = _stage(work, found, left, rough, outer)
        left = _refute(work, found.y[left], left, status, ray)
    if fallback:
        for sample in left.tolist():
            status[sample] = _single(work, found, sample, ray)
    violation = torch.where(usable, _violation(work, found.x), torch.inf)
    for sample in (usable & (found.residual <= ACCEPTED) & (violation <= ACCEPTED)).nonzero():
        status[int(sample)] = Status.OPTIMAL
    good = torch.tensor([s is Status.OPTIMAL for s in status], device=violation.device)
    good = good.to(torch.bool)
    report = BatchReport(
        tuple(status), torch.where(good, violation, torch.inf),
        torch.where(good[:, None], found.y, 0.0), found.active & good[:, None], ray,
    )  # fmt: skip
    return SolvedBatch(found.x, report.multipliers, found.free & good[:, None], report)


def _first_guess(batch: SeparableBatch, start: tuple[Tensor, Tensor] | None) -> Exact:
    if start is None:
        x = torch.maximum(torch.minimum(batch.center, batch.upper), batch.lower)
        y = torch.zeros_like(batch.rhs)
    else:
        x, y = (value.detach().double().clone() for value in start)
    none = torch.zeros_like(x, dtype=torch.bool)
    return Exact(
        x, y, none, torch.zeros_like(y, dtype=torch.bool), torch.full_like(y[:, 0], torch.inf)
        if y.shape[1] else y.new_full((len(y),), torch.inf),
    )  # fmt: skip


def _stage(
    batch: SeparableBatch, found: Exact, left: Tensor, settings: PDHGSettings, outer: int
) -> Tensor:
    """Improve the samples ``left``; returns those still open."""
    scaled, column, row, objective = batch.take(left).scaled()
    x, y = found.x[left] / column, found.y[left] / (row * objective)
    rough = run_pdhg(scaled, (x, y), settings)
    bold = _BOLD_STEP if settings is _FEW_ROWS else 1.0
    exact = solve_exactly(scaled, rough.x, rough.y, outer, bold)
    _store(batch, found, left, exact, exact.x * column, exact.y * row * objective)
    return left[found.residual[left] > _SETTLED]


def _interior(
    batch: SeparableBatch, found: Exact, left: Tensor, status: list[Status], ray: Tensor
) -> Tensor:
    """Interior points and the vertices they suggest, some samples at a time; who is left."""
    _, m, n = batch.size
    small = batch.rhs.device.type == "cpu"
    each = 8 * (3 * m * n + 2 * min(m, n) ** 2 + 40 * n)
    size = max(1, (_CACHE if small else _MEMORY) // each)
    rest = [left[:0]]
    for part in left.split(size):
        scaled, column, row, objective = batch.take(part).scaled()
        exact, last = run_interior(scaled, found.x[part] / column, _SETTLED)
        _store(batch, found, part, exact, exact.x * column, exact.y * row * objective)
        open_ = found.residual[part] > _SETTLED
        if bool(open_.any()):
            polished = solve_exactly(
                scaled.take(open_.nonzero()[:, 0]),
                exact.x[open_],
                exact.y[open_],
                _POLISH,
                _BOLD_STEP,
            )
            index = part[open_]
            scale = row.expand(len(part), -1)[open_] * objective[open_]
            _store(batch, found, index, polished, polished.x * column[open_], polished.y * scale)
            open_ = open_ & (found.residual[part] > _SETTLED)
            ends = (last * row * objective)[open_]
            rest.append(_refute(batch, ends, part[open_], status, ray))
    return torch.cat(rest)


def _store(
    batch: SeparableBatch, found: Exact, left: Tensor, exact: Exact, x: Tensor, y: Tensor
) -> None:
    """Keep the new points where their residual in the caller's units is smaller."""
    part = batch.take(left)
    # Scaling back rounds: columns at a kink are put exactly on it.
    for kink, used in ((part.lower, None), (part.upper, None), (part.center, part.weight > 0.0)):
        near = ~exact.free & kink.isfinite()
        near &= (x - kink).abs() <= 1e-9 * kink.abs().clamp_min(1.0)
        x = torch.where(near if used is None else near & used, kink, x)
    size = part.magnitude()
    unit = replace(
        part, cost=part.cost / size[:, None], weight=part.weight / size[:, None],
        curve=part.curve / size[:, None],
    )  # fmt: skip
    residual = unit.optimality(x, y / size[:, None])
    better = (residual < found.residual[left]) | found.residual[left].isinf()
    index = left[better]
    found.x[index], found.y[index] = x[better], y[better]
    found.residual[index] = residual[better]
    found.free[index], found.active[index] = exact.free[better], exact.active[better]


def _refute(
    batch: SeparableBatch, y: Tensor, left: Tensor, status: list[Status], ray: Tensor
) -> Tensor:
    """Samples whose multipliers y have become a Farkas ray are infeasible; returns the others."""
    if not len(left):
        return left
    part = batch.take(left)
    y = y / y.abs().amax(1, keepdim=True).clamp_min(1e-300)
    slope = transposed(part.rows, y)
    end = torch.where(slope > 0.0, part.lower, part.upper)
    open_ = end.isinf() & (slope != 0.0)
    least = torch.where(open_ | (slope == 0.0), 0.0, slope * end.where(~open_, 0.0)).sum(1)
    gap = least - (y * part.rhs).sum(1)
    loose = torch.linalg.vector_norm(torch.where(open_, slope, 0.0), dim=1)
    reach = part.center.abs().amax(1).clamp_min(1.0)
    refuted = gap > _FARTHEST * torch.maximum(loose * reach, gap.new_tensor(1e-13))
    for sample, value in zip(left[refuted].tolist(), y[refuted], strict=True):
        status[sample] = Status.INFEASIBLE
        ray[sample] = value
    return left[~refuted]


def _single(batch: SeparableBatch, found: Exact, sample: int, ray: Tensor) -> Status:
    """One sample by the single-problem solver; an answer is polished like any other."""
    index = torch.tensor([sample], device=batch.rhs.device)
    part = batch.take(index)
    answer = solve_single(part)
    if answer.ray is not None:
        ray[sample] = answer.ray
    if answer.x is None or answer.y is None:
        return answer.status
    scaled, column, row, objective = part.scaled()
    x, y = answer.x[None] / column, answer.y[None] / (row * objective)
    exact = solve_exactly(scaled, x, y)
    _store(batch, found, index, exact, exact.x * column, exact.y * row * objective)
    return Status.UNKNOWN


def _violation(batch: SeparableBatch, x: Tensor) -> Tensor:
    """Largest relative violation of rows and bounds, (b,)."""
    rows = relative_violation(times(batch.rows, x) - batch.rhs, batch.rhs, batch.equal)
    for lack, bound in ((batch.lower - x, batch.lower), (x - batch.upper, batch.upper)):
        scale = torch.where(bound.isinf(), 1.0, bound.abs().clamp_min(1.0))
        rows = torch.maximum(rows, (lack / scale).amax(1).clamp_min(0.0))
    return torch.where(x.isfinite().all(1), rows, torch.inf)


def _finite(batch: SeparableBatch) -> Tensor:
    """Samples without NaN or wrong infinities, (b,)."""
    sound = batch.rhs.isfinite().all(1)
    for value in (batch.cost, batch.weight, batch.center, batch.curve, batch.anchor):
        sound &= value.isfinite().all(1)
    sound &= ~(batch.lower.isnan() | batch.upper.isnan()).any(1)
    sound &= (batch.weight >= 0.0).all(1) & (batch.curve >= 0.0).all(1)
    if batch.rows.dim() == 3:
        sound &= batch.rows.isfinite().all(2).all(1)
    return sound


def _neutralized(batch: SeparableBatch, usable: Tensor) -> SeparableBatch:
    """Harmless data in place of samples that cannot be used."""
    keep = usable[:, None]
    zero = {
        name: torch.where(keep, getattr(batch, name), 0.0)
        for name in ("rhs", "cost", "weight", "center", "curve", "anchor", "lower", "upper")
    }
    rows = batch.rows if batch.rows.dim() == 2 else batch.rows.where(keep[:, :, None], 0.0)
    return replace(batch, rows=rows, **zero)


_GRADED = ("rows", "rhs", "cost", "weight", "center", "curve", "anchor", "lower", "upper")


def differentiable_solve(
    batch: SeparableBatch,
    start: tuple[Tensor, Tensor] | None = None,
    *,
    on_failure: OnFailure = OnFailure.KEEP,
    fallback: bool = True,
) -> tuple[Tensor, Tensor, SolvedBatch]:
    """Points and multipliers with gradients to every tensor of ``batch``, and the plain result."""
    box: list[SolvedBatch] = []
    data = [getattr(batch, name) for name in _GRADED]
    apply: Callable[..., tuple[Tensor, Tensor]] = _Solve.apply
    x, y = apply(batch, start, on_failure, fallback, box, *data)
    return x, y, box[0]


def _rebuilt(data: Sequence[Tensor], equal: Tensor) -> SeparableBatch:
    return SeparableBatch(**dict(zip(_GRADED, data, strict=True)), equal=equal)


class _Solve(torch.autograd.Function):
    """Solve, then differentiate through the active set."""

    @staticmethod
    def forward(
        ctx: Any,
        batch: SeparableBatch,
        start: tuple[Tensor, Tensor] | None,
        on_failure: OnFailure,
        fallback: bool,
        box: list[SolvedBatch],
        *data: Tensor,
    ) -> tuple[Tensor, Tensor]:
        batch = _rebuilt(data, batch.equal)
        found = solve_batch(batch, start, fallback=fallback)
        box.append(found)
        solved = found.report.solved[:, None]
        x = torch.where(solved, found.x, batch.center)
        if on_failure is OnFailure.NAN:
            x = torch.where(solved, x, torch.nan)
        ctx.save_for_backward(*data, batch.equal, found.x, found.y, found.free,
                              found.report.active, solved)  # fmt: skip
        return x, found.y.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *data, equal, x, y, free, active, solved = ctx.saved_tensors
        batch = _rebuilt(data, equal)
        adjoint = Adjoint(batch, free, active)
        g = torch.where(solved, grad_x, 0.0)
        v, w, held = adjoint.solve(g, torch.where(solved & active, grad_y, 0.0))
        x = torch.where(solved, x, 0.0)
        needs: Sequence[bool] = ctx.needs_input_grad[5:]
        return None, None, None, None, None, *_gradients(batch, x, y, v, w, held, needs)


def _gradients(
    batch: SeparableBatch, x: Tensor, y: Tensor, v: Tensor, w: Tensor, held: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients in the order of ``_GRADED``; ``held`` is what reaches columns at a kink."""
    low, high = x <= batch.lower, x >= batch.upper
    kink = ~low & ~high & (batch.weight > 0.0) & (x == batch.center)
    rows: Tensor | None = None
    if needs[0] and batch.rows.dim() == 2:
        rows = -(y.T @ v + w.T @ x)
    elif needs[0]:
        rows = -(torch.stack([y, w], 2) @ torch.stack([v, x], 1))
    return [
        rows,
        w,
        -v,
        -v * (x - batch.center).sign(),
        torch.where(kink, held, 0.0),
        -v * (x - batch.anchor),
        batch.curve * v,
        torch.where(low, held, 0.0),
        torch.where(high & ~low, held, 0.0),
    ]
