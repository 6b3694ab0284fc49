r"""Differentiable projection of a batch of points onto few half-spaces each.

``x* = argmin (x - x0) @ M (x - x0) / 2`` subject to ``A x <= b`` (``A x = b`` on chosen rows), with
M diagonal or known through its inverse. With S the rows that are active at x*, the optimality
conditions ``M (x* - x0) + A_S^T u = 0, A_S x* = b_S`` are a linear system; for an upstream gradient
g its adjoint ``M v + A_S^T w = g, A_S v = 0`` gives

``dL/dx0 = g - A_S^T w,  dL/db_S = w,  dL/dA_S = -u v^T - w x*^T,  dL/dM = -v (x* - x0)``.

Where a row is active with multiplier 0, x* has one-sided derivatives only; this is the derivative
as if that row were absent. Numbers of size m and the sums over n are float64 whatever the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_prepared.errors import SolverError
from torch_prepared.solvers._batched_dual import CODES, solve_duals
from torch_prepared.solvers._batched_gram import (
    DenseGram,
    Gram,
    RowsGram,
    compress,
    worthwhile,
)
from torch_prepared.solvers._batched_report import (
    BatchReport,
    OnFailure,
    announce,
    check_floating,
    eager,
    relative_violation,
)
from torch_prepared.solvers._complementarity import self_product
from torch_prepared.solvers._result import Status

__all__ = ["Projection", "project_batch"]

VIOLATION_TOLERANCE = 1e-8  #: relative; a float64 point beyond it is no answer
_RIDGE = 1e-13
_EXACT = 1e-11  #: relative error of an active row that one more Newton step is worth
_CACHE = 2**25  #: bytes a chunk may take on a CPU: what leaves its cache costs more than a call
Metric = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Projection:
    """Points of :func:`project_batch`, differentiable, and the report on them, not."""

    x: Tensor
    report: BatchReport


@eager
def project_batch(
    x0: Tensor,
    A: Tensor,  # noqa: N803 - the field's name of the matrix
    b: Tensor,
    *,
    metric: Tensor | None = None,
    inverse_metric: Metric | None = None,
    equal: Tensor | None = None,
    start: Tensor | None = None,
    on_failure: OnFailure | str = OnFailure.KEEP,
    max_memory: int = 2**30,
) -> Projection:
    """Project each sample onto ``{x : A x <= b}``; gradients reach x0, A, b and ``metric``.

    Args:
        x0: (b, n) points, or (n,) for a single one; float32 or float64. Left as it is.
        A: (b, m, n), or (m, n) shared by all samples.
        b: (b, m), or (m,) shared.
        metric: positive diagonal of M, (b, n) or (n,); None: the identity.
        inverse_metric: instead of ``metric``, a function that applies a constant symmetric
            positive definite ``M^{-1}`` along the last axis; no gradient reaches it.
        equal: (m,) bool, rows that hold with equality.
        start: (b, m) active rows expected (``report.active`` of an earlier, similar call); wrong
            ones cost time, never correctness.
        on_failure: see :class:`OnFailure`; a failed sample never changes the others.
        max_memory: bytes of temporary float64 copies; larger batches go in chunks.

    Returns:
        Points of x0's shape, dtype and device, and the report. The violation is within 1e-8 of
        ``max(1, |b|)`` in float64; a float32 point is rounded after that, and the report says by
        how much it violates its rows.

    Raises:
        SolverError: shapes, dtypes or devices that do not fit, a metric that is not positive,
            NaN in data shared by the batch, or any failure under ``on_failure="raise"``.

    Example:
        >>> x0 = torch.tensor([[2.0, 0.0], [0.0, 0.5]], requires_grad=True)
        >>> found = project_batch(x0, torch.eye(2), torch.ones(2))
        >>> found.x.tolist()
        [[1.0, 0.0], [0.0, 0.5]]
    """
    action = OnFailure(on_failure)
    single = x0.dim() == 1
    points = x0[None] if single else x0
    _check(points, A, b, metric, inverse_metric, equal)
    rhs = b.expand(len(points), -1) if b.dim() == 1 else b
    task = _Task(inverse_metric, equal, start, max_memory)
    apply: Callable[..., Tensor] = _Project.apply
    x = apply(points, A, rhs, metric, task, action)
    assert task.report is not None  # noqa: S101 - set by forward, for mypy
    announce(task.report.statuses, action, "project_batch")
    return Projection(x[0] if single else x, task.report)


def _check(
    x0: Tensor,
    rows: Tensor,
    rhs: Tensor,
    metric: Tensor | None,
    inverse_metric: Metric | None,
    equal: Tensor | None,
) -> None:
    check_floating("project_batch", x0=x0, A=rows, b=rhs, metric=metric)
    count, n = x0.shape if x0.dim() == 2 else (-1, -1)
    m = rows.shape[-2] if rows.dim() >= 2 else -1
    fits = x0.dim() == 2 and tuple(rows.shape) in ((m, n), (count, m, n))
    if not fits or tuple(rhs.shape) not in ((m,), (count, m)):
        raise SolverError(
            f"project_batch: got x0 {tuple(x0.shape)}, A {tuple(rows.shape)}, b {tuple(rhs.shape)};"
            " expected (b, n), (b, m, n) or (m, n), (b, m) or (m,)"
        )
    if equal is not None and (equal.shape != (m,) or equal.dtype != torch.bool):
        raise SolverError(f"project_batch: got equal {tuple(equal.shape)}; expected bool ({m},)")
    if metric is not None:
        if inverse_metric is not None:
            raise SolverError("project_batch: got metric and inverse_metric; expected one of them")
        if tuple(metric.shape) not in ((n,), (count, n)) or not bool((metric > 0).all()):
            raise SolverError(
                f"project_batch: got metric {tuple(metric.shape)}; expected positive (b, n) or (n,)"
            )
    if rows.dim() == 2 and not bool(rows.isfinite().all()):
        raise SolverError("project_batch: got NaN or infinite entries in shared A; expected none")


@dataclass
class _Task:
    """What autograd does not see, and where forward leaves its report."""

    inverse_metric: Metric | None
    equal: Tensor | None
    start: Tensor | None
    max_memory: int
    report: BatchReport | None = None


class _Data:
    """Rows and metric of a call; what all its samples share is computed once."""

    def __init__(self, rows: Tensor, metric: Tensor | None, inverse: Metric | None) -> None:
        shared = rows.dim() == 2
        self.rows = rows.double() if shared else rows
        self.metric, self.inverse = metric, inverse
        self.one_gram = shared and (metric is None or metric.dim() == 1)
        self.shared: Tensor | None = None

    def chunk(self, part: slice) -> _Chunk:
        """The samples of ``part``."""
        return _Chunk(part, self)


class _Chunk:
    """Float64 view of some samples: rows, metric and the products with them."""

    def __init__(self, part: slice, data: _Data) -> None:
        self.data, self.inverse = data, data.inverse
        self.rows = data.rows if data.rows.dim() == 2 else data.rows[part].double()
        weight = data.metric
        weight = weight if weight is None or weight.dim() == 1 else weight[part]
        self.weight = None if weight is None else weight.double()

    def apply_inverse(self, v: Tensor) -> Tensor:
        """``M^{-1} v`` along the last axis of (c, n)."""
        if self.inverse is not None:
            return self.inverse(v).double()
        return v if self.weight is None else v / self.weight

    def gram(self, count: int) -> Gram:
        """``A M^{-1} A^T`` of ``count`` samples."""
        if _is_plain(self.data):
            return RowsGram(self.rows)
        matrix = self.data.shared
        if matrix is None:
            rows = self.rows if self.rows.dim() == 3 else self.rows[None]
            other = rows
            if self.inverse is not None:
                other = self.inverse(rows).double()
            elif self.weight is not None:
                other = rows / (self.weight[:, None] if self.weight.dim() == 2 else self.weight)
            matrix = self_product(rows, other)
            if self.data.one_gram:
                self.data.shared = matrix
        return DenseGram(matrix.expand(count, -1, -1))

    def neutralize(self, sound: Tensor) -> None:
        """Zero rows for the samples that are not sound (c,)."""
        self.rows = torch.where(sound[:, None, None], self.rows, 0.0)

    def times(self, x: Tensor) -> Tensor:
        """``A x``, (c, m)."""
        if self.rows.dim() == 2:
            return x @ self.rows.T
        return (self.rows @ x[:, :, None])[:, :, 0]

    def transposed(self, u: Tensor) -> Tensor:
        """``A^T u``, (c, n)."""
        if self.rows.dim() == 2:
            return u @ self.rows
        return (u[:, None, :] @ self.rows)[:, 0]


class _Active:
    """Solves ``A_S M^{-1} A_S^T w = r`` for the active rows S of each sample."""

    def __init__(self, gram: Gram, active: Tensor) -> None:
        self.index, self.valid = compress(active)
        block = gram.block(self.index, self.valid)
        self.scale = block.diagonal(dim1=1, dim2=2).clamp_min(1e-300).rsqrt()
        self.block = block.mul_(self.scale[:, :, None]).mul_(self.scale[:, None, :])
        ridged = self.block.clone()
        ridged.diagonal(dim1=1, dim2=2).add_(_RIDGE)
        self.factor, info = torch.linalg.cholesky_ex(ridged)
        self.dependent = (info != 0).nonzero()[:, 0]  # here, the smallest of all solutions
        self.inverse = torch.linalg.pinv(self.block[self.dependent], hermitian=True)

    def solve(self, r: Tensor) -> Tensor:
        """(c, m) from (c, m); entries of inactive rows are neither read nor nonzero."""
        lack = (torch.where(self.valid, r.gather(1, self.index), 0.0) * self.scale)[:, :, None]
        w = torch.cholesky_solve(lack, self.factor)
        w = w + torch.cholesky_solve(lack - self.block @ w, self.factor)
        if len(self.dependent):
            w[self.dependent] = self.inverse @ lack[self.dependent]
        w = torch.where(self.valid, w[:, :, 0] * self.scale, 0.0)
        return torch.zeros_like(r).scatter(1, self.index, w)


def _is_plain(data: _Data) -> bool:
    """Whether the Gram matrices are formed only as far as needed."""
    own = data.rows.dim() == 3 and data.metric is None and data.inverse is None
    return own and worthwhile(data.rows)


def _chunks(count: int, data: _Data, budget: int) -> list[slice]:
    m, n = data.rows.shape[-2:]
    each = 8 * (5 * m * m + (2 * m * n if data.rows.dim() == 3 else 4 * n))
    if _is_plain(data):
        each = min(each, 8 * (3 * m * n + 5 * n * n))
    budget = min(budget, _CACHE) if data.rows.device.type == "cpu" else budget
    size = max(1, budget // max(each, 1))
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


class _Project(torch.autograd.Function):
    """The solve and its adjoint; everything that is not data travels in the task."""

    @staticmethod
    def forward(
        ctx: Any,
        x0: Tensor,
        rows: Tensor,
        rhs: Tensor,
        metric: Tensor | None,
        task: _Task,
        on_failure: OnFailure,
    ) -> Tensor:
        data = _Data(rows.detach(), metric, task.inverse_metric)
        # Factors for the adjoint, while they fit.
        size = 16 * len(x0) * rows.shape[-2] ** 2
        keep = any(ctx.needs_input_grad) and size <= task.max_memory
        parts, ctx.systems = [], []
        for part in _chunks(len(x0), data, task.max_memory):
            found, system = _forward_chunk(part, x0, rhs, data, task, keep)
            parts.append(found)
            ctx.systems.append(system)
        if parts:
            x, code, violation, multipliers, active, ray = map(torch.cat, zip(*parts, strict=True))
        else:
            x, code, ray = x0.double(), x0.new_zeros(0, dtype=torch.long), rhs.double()
            violation, multipliers, active = x.new_zeros(0), ray, ray > 0
        task.report = BatchReport(
            tuple(CODES[i] for i in code.tolist()), violation, multipliers, active, ray
        )
        solved = code == CODES.index(Status.OPTIMAL)
        ctx.save_for_backward(x0, rows, rhs, metric, x, multipliers, active, solved)
        ctx.task = task
        result = torch.where(solved[:, None], x.to(x0.dtype), x0)
        if on_failure is OnFailure.NAN:
            result = torch.where(solved[:, None], result, torch.nan)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x0, rows, rhs, metric, x, multipliers, active, solved = ctx.saved_tensors
        need_x0, need_rows, need_rhs, need_metric = ctx.needs_input_grad[:4]
        grad_x0 = torch.empty_like(x0) if need_x0 else None
        grad_rows = None
        if need_rows:
            grad_rows = torch.zeros_like(rows) if rows.dim() == 2 else torch.empty_like(rows)
        grad_rhs = torch.empty_like(rhs) if need_rhs else None
        grad_metric = torch.zeros_like(metric) if need_metric else None
        data = _Data(rows, metric, ctx.task.inverse_metric)
        parts = _chunks(len(x0), data, ctx.task.max_memory)
        for part, system in zip(parts, ctx.systems, strict=True):
            chunk = data.chunk(part)
            alive = solved[part, None]
            if rows.dim() == 3 and not bool(alive.all()):
                chunk.neutralize(alive[:, 0])
            g, u = torch.where(alive, grad[part].double(), 0.0), multipliers[part]
            h = chunk.apply_inverse(g)
            system = system or _Active(chunk.gram(len(u)), active[part])
            w = system.solve(chunk.times(h))
            back = chunk.transposed(w)
            v = h - chunk.apply_inverse(back)
            if grad_x0 is not None:
                grad_x0[part] = g - back
            if grad_rhs is not None:
                grad_rhs[part] = w
            point = torch.where(alive, x[part], 0.0)
            if grad_rows is not None and rows.dim() == 2:
                grad_rows.sub_((u.T @ v + w.T @ point).to(rows.dtype))
            elif grad_rows is not None:
                pair = torch.stack([-u, -w], 2), torch.stack([v, point], 1)
                if grad_rows.dtype == torch.float64:
                    torch.bmm(*pair, out=grad_rows[part])
                else:
                    grad_rows[part] = (pair[0] @ pair[1]).to(rows.dtype)
            if grad_metric is not None:
                change = -v * torch.where(alive, point - x0[part].double(), 0.0)
                if metric.dim() == 1:
                    grad_metric.add_(change.sum(0).to(metric.dtype))
                else:
                    grad_metric[part] = change.to(metric.dtype)
        return grad_x0, grad_rows, grad_rhs, grad_metric, None, None


def _forward_chunk(
    part: slice, x0: Tensor, rhs: Tensor, data: _Data, task: _Task, keep: bool
) -> tuple[tuple[Tensor, ...], _Active | None]:
    """Point, status code, violation, multipliers, active rows and ray of some samples.

    Also, with ``keep``, the system of their active rows.
    """
    chunk = data.chunk(part)
    point, bound = x0[part].double(), rhs[part].double()
    gram = chunk.gram(len(point))
    # A row that is not finite shows in its norm.
    sound = gram.norms().isfinite().all(1)
    sound = sound & point.isfinite().all(1) & bound.isfinite().all(1)
    if not bool(sound.all()):
        chunk.neutralize(sound)
        gram = chunk.gram(len(point))
    point, bound = torch.where(sound[:, None], point, 0.0), torch.where(sound[:, None], bound, 0.0)
    start = None if task.start is None else task.start[part]
    duals = solve_duals(gram, chunk.times(point) - bound, task.equal, start=start)
    multipliers = duals.multipliers
    active = multipliers != 0.0
    if task.equal is not None:
        active = active | task.equal
    x = point - chunk.apply_inverse(chunk.transposed(multipliers))
    excess = chunk.times(x) - bound
    lack = torch.where(active, excess, 0.0).abs() / bound.abs().clamp_min(1.0)
    system = _Active(gram, active) if keep else None
    if not bool((lack <= _EXACT).all()):
        # Rounding of G shows in A x; one Newton step on the active rows removes it.
        system = system or _Active(gram, active)
        change = system.solve(excess)
        sign_kept = (multipliers + change > 0.0) | ~(multipliers > 0.0)
        multipliers = torch.where(sign_kept.all(1, keepdim=True), multipliers + change, multipliers)
        x = point - chunk.apply_inverse(chunk.transposed(multipliers))
        excess = chunk.times(x) - bound
    violation = relative_violation(excess, bound, task.equal)
    solved = (duals.code == CODES.index(Status.OPTIMAL)) & (violation <= VIOLATION_TOLERANCE)
    unknown = CODES.index(Status.UNKNOWN)
    code = torch.where(duals.code == CODES.index(Status.OPTIMAL), unknown, duals.code)
    code = torch.where(solved, CODES.index(Status.OPTIMAL), code)
    code = torch.where(sound, code, unknown)
    if x0.dtype != torch.float64:
        violation = relative_violation(
            chunk.times(x.to(x0.dtype).double()) - bound, bound, task.equal
        )
    violation = torch.where(code == CODES.index(Status.OPTIMAL), violation, torch.inf)
    found = (x, code, violation, multipliers, active & solved[:, None], duals.ray)
    return found, system
