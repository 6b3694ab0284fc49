"""The functional form of the differentiable linear program: tensors in, points and a report out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_prepared.errors import SolverError
from torch_prepared.solvers._batched_program import differentiable_solve
from torch_prepared.solvers._batched_report import (
    BatchReport,
    OnFailure,
    announce,
    check_floating,
    eager,
    relative_violation,
)
from torch_prepared.solvers._batched_separable import SeparableBatch, times

__all__ = ["ProgramSolution", "solve_lp_batch"]


@dataclass(frozen=True, eq=False)
class ProgramSolution:
    """Answer of :func:`solve_lp_batch`.

    Attributes:
        x: (b, n) or (n,) points, differentiable.
        multipliers: (b, m) or (m,) of the rows, differentiable.
        report: not differentiable; for a single program its tensors have a leading axis of 1.
    """

    x: Tensor
    multipliers: Tensor
    report: BatchReport


@eager
def solve_lp_batch(
    A: Tensor,  # noqa: N803 - the field's name of the matrix
    b: Tensor,
    *,
    cost: Tensor | None = None,
    weight: Tensor | None = None,
    center: Tensor | None = None,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    equal: Tensor | None = None,
    smoothing: float = 0.0,
    start: tuple[Tensor, Tensor] | None = None,
    on_failure: OnFailure | str = OnFailure.KEEP,
    fallback: bool = True,
) -> ProgramSolution:
    """Minimize ``cost @ x + weight @ |x - center| + smoothing |x - center|^2 / 2`` over rows.

    The rows are ``A x <= b`` (``A x = b`` where ``equal``) and the bounds. Every tensor may have
    a leading batch axis or be shared. Gradients reach all of them; **without smoothing those of
    cost and weight are zero** (the optimum is a vertex, which small changes of the cost leave).

    Args:
        A: (b, m, n) or (m, n).
        b: (b, m) or (m,).
        cost: (b, n) or (n,), as all that follow with n; None: 0.
        weight: nonnegative; None: 0.
        center: None: 0.
        lower: None: open.
        upper: None: open; ``lower == upper`` fixes a column.
        equal: (m,) bool.
        smoothing: strength, in units of cost per unit of x, of the pull to the center.
        start: x (b, n) and multipliers (b, m) of a similar earlier solution.
        on_failure: see :class:`OnFailure`; the point kept is the center.
        fallback: try HiGHS or Clarabel, one by one, on samples the batched methods leave open.

    Returns:
        Points in the widest dtype given. Computation is float64; the report's violation is that
        of the points as returned. Results depend on the inputs alone: nothing is random or timed.

    Raises:
        SolverError: shapes, dtypes or devices that do not fit, negative weights or smoothing, NaN
            in shared rows, or any failure under ``on_failure="raise"``.

    Example:
        >>> rows, rhs = torch.tensor([[-1.0, -2.0]]), torch.tensor([-4.0])   # x_0 + 2 x_1 >= 4
        >>> found = solve_lp_batch(rows, rhs, weight=torch.ones(2))          # nearest to 0, 1-norm
        >>> found.x.tolist()
        [0.0, 2.0]
    """
    action = OnFailure(on_failure)
    given = dict(cost=cost, weight=weight, center=center, lower=lower, upper=upper)
    check_floating("solve_lp_batch", A=A, b=b, **given)
    count, batched = _batch_size(A, b, given)
    _check_values(A, weight, equal, smoothing)
    m = A.shape[-2]
    batch = _assemble(A, b, given, equal, smoothing, count)
    if start is not None:
        start = (start[0].expand(count, -1), start[1].expand(count, -1)) if m else None
    x, y, found = differentiable_solve(batch, start, on_failure=action, fallback=fallback)
    announce(found.report.statuses, action, "solve_lp_batch")
    tensors = [A, b, *(value for value in given.values() if value is not None)]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    x, y, report = x.to(dtype), y[:, :m].to(dtype), found.report
    report = replace(
        report, multipliers=report.multipliers[:, :m], active=report.active[:, :m],
        ray=report.ray[:, :m],
    )  # fmt: skip
    if dtype != torch.float64:
        with torch.no_grad():
            excess = times(batch.rows, x.double()) - batch.rhs
            rounded = relative_violation(excess, batch.rhs, batch.equal)
        report = replace(report, violation=torch.maximum(rounded, report.violation))
    return ProgramSolution(x if batched else x[0], y if batched else y[0], report)


def _check_values(
    rows: Tensor, weight: Tensor | None, equal: Tensor | None, smoothing: float
) -> None:
    if not 0.0 <= smoothing < float("inf"):
        raise SolverError(f"solve_lp_batch: got smoothing {smoothing}; expected at least 0")
    m = rows.shape[-2]
    if equal is not None and (equal.shape != (m,) or equal.dtype != torch.bool):
        raise SolverError(f"solve_lp_batch: got equal {tuple(equal.shape)}; expected bool ({m},)")
    if weight is not None and bool((weight < 0.0).any()):
        raise SolverError("solve_lp_batch: got a negative weight; expected nonnegative ones")
    if rows.dim() == 2 and not bool(rows.isfinite().all()):
        raise SolverError("solve_lp_batch: got NaN or infinite entries in shared A; expected none")


def _assemble(
    rows: Tensor, rhs: Tensor, given: dict[str, Tensor | None], equal: Tensor | None,
    smoothing: float, count: int,
) -> SeparableBatch:  # fmt: skip
    """Everything as float64 with a batch axis; gradients flow through."""
    n = rows.shape[-1]
    if rows.shape[-2] == 0:  # one row that always holds keeps every shape below ordinary
        rows, equal = rows.new_zeros(*rows.shape[:-2], 1, n), None
        rhs = rhs.new_ones(*rhs.shape[:-1], 1)
    m = rows.shape[-2]
    zero = rhs.detach().new_zeros(1, n, dtype=torch.float64)
    fills = dict.fromkeys(given, zero) | dict(lower=zero - torch.inf, upper=zero + torch.inf)
    full = {
        name: (fills[name] if value is None else value.double()).expand(count, n)
        for name, value in given.items()
    }
    return SeparableBatch(
        rows=rows.double(), rhs=rhs.double().expand(count, m),
        curve=(zero + smoothing).expand(count, n), anchor=full["center"],
        equal=torch.zeros(m, dtype=torch.bool, device=rhs.device) if equal is None else equal,
        **full,
    )  # fmt: skip


def _batch_size(rows: Tensor, rhs: Tensor, columns: dict[str, Tensor | None]) -> tuple[int, bool]:
    """Samples, and whether any tensor has a batch axis."""
    m, n = rows.shape[-2:] if rows.dim() in (2, 3) else (-1, -1)
    named = [("A", rows, (m, n)), ("b", rhs, (m,))]
    named += [(name, value, (n,)) for name, value in columns.items() if value is not None]
    count = None
    for name, tensor, shape in named:
        extra = tensor.dim() - len(shape)
        if extra not in (0, 1) or tuple(tensor.shape[extra:]) != shape:
            raise SolverError(
                f"solve_lp_batch: got {name} {tuple(tensor.shape)}; expected {shape} with at most "
                "one leading batch axis"
            )
        if extra and count not in (None, len(tensor)):
            raise SolverError(
                f"solve_lp_batch: got {name} with {len(tensor)} samples; expected {count}"
            )
        count = len(tensor) if extra else count
    return (1, False) if count is None else (count, True)
