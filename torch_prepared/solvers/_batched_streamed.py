"""Projection of very many weights onto few rows that are never in memory at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from torch_prepared.errors import SolverError
from torch_prepared.solvers._batched_dual import CODES, Duals, solve_duals
from torch_prepared.solvers._batched_gram import DenseGram, compress, take_block
from torch_prepared.solvers._batched_report import (
    BatchReport,
    check_floating,
    relative_violation,
)
from torch_prepared.solvers._result import Status

__all__ = ["StreamedProjection", "project_streamed"]

Columns = Callable[[int, int], Tensor]
Sum = Callable[[Tensor], Tensor]
_PASSES = 4  #: corrections of the active rows before giving up


@dataclass(frozen=True, eq=False)
class StreamedProjection:
    """Answer of :func:`project_streamed`.

    Attributes:
        x: (n,) of x0's dtype; a copy of x0 without an answer.
        report: of one sample; its tensors have a leading axis of 1.
        seconds: wall time.
    """

    x: Tensor
    report: BatchReport
    seconds: float


@torch.no_grad()
def project_streamed(
    x0: Tensor,
    rows: Columns,
    b: Tensor,
    *,
    metric: Tensor | None = None,
    equal: Tensor | None = None,
    chunk: int = 2**16,
    tolerance: float | None = None,
    time_limit: float | None = None,
    progress: bool = False,
    all_reduce: Sum | None = None,
) -> StreamedProjection:
    """Nearest point to x0 with ``A x <= b``, A given by blocks of columns; no gradients.

    Two passes over A: one for ``A M^{-1} A^T`` and ``A x0``, one for x and its residual; more only
    if rounding is left to correct. Memory beyond x0 is one copy of it for x plus about
    ``20 m chunk`` bytes. Products and sums are float64.

    With ``all_reduce`` the point is spread over processes: each gives its part of x0, of the
    metric and of A's columns, and gets its part of x; only sums of m x m numbers travel.

    Args:
        x0: (n,) float32 or float64; left as it is.
        rows: ``rows(start, stop)`` gives columns ``start .. stop - 1`` of A, (m, stop - start), of
            any floating dtype on x0's device; must give the same answer each time.
        b: (m,) right-hand sides.
        metric: (n,) positive diagonal of M; None: the identity.
        equal: (m,) bool, rows with equality.
        chunk: columns asked for at once.
        tolerance: violation, relative to ``max(1, |b|)``, that counts as solved. None: 1e-8 plus
            what rounding x to its dtype can do to a row of that size.
        time_limit: wall seconds; when over, the status is ``UNKNOWN``.
        progress: show a bar on stderr.
        all_reduce: sums a tensor over all processes that hold parts of the point, as
            ``cluster.Group.all_reduce``; every one of them must make this call, with the same b.

    Raises:
        SolverError: shapes or dtypes that do not fit, a metric that is not positive.

    Example:
        >>> found = project_streamed(torch.ones(6), lambda i, j: torch.ones(1, j - i),
        ...                          torch.tensor([3.0]), chunk=4)
        >>> found.x.tolist()
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """
    begin = time.perf_counter()
    _check(x0, b, metric, chunk)
    deadline = None if time_limit is None else begin + time_limit
    total = all_reduce or (lambda value: value)
    stream = _Stream(x0, rows, b.double(), metric, equal, chunk, deadline, progress, total)
    return stream.project(tolerance, begin)


def _check(x0: Tensor, b: Tensor, metric: Tensor | None, chunk: int) -> None:
    """Refuse misfits; raises as :func:`project_streamed`."""
    check_floating("project_streamed", x0=x0, b=b, metric=metric)
    if x0.dim() != 1 or b.dim() != 1 or (metric is not None and metric.shape != x0.shape):
        raise SolverError(
            f"project_streamed: got x0 {tuple(x0.shape)}, b {tuple(b.shape)}; expected (n,), (m,) "
            "and metric like x0"
        )
    if metric is not None and not bool((metric > 0).all()):
        raise SolverError("project_streamed: got a metric that is not positive; expected > 0")
    if chunk < 1:
        raise SolverError(f"project_streamed: got chunk {chunk}; expected at least 1")


@dataclass
class _Stream:
    """The data of one call and the two kinds of passes over it."""

    x0: Tensor
    rows: Columns
    rhs: Tensor
    metric: Tensor | None
    equal: Tensor | None
    chunk: int
    deadline: float | None
    progress: bool
    total: Sum

    def project(self, tolerance: float | None, begin: float) -> StreamedProjection:
        """Both passes, and the dual between them."""
        sums = self.first_pass()
        if sums is None:
            return self.failed(None, begin)
        gram, value, reach = sums
        if not bool(gram.isfinite().all() & value.isfinite().all() & self.rhs.isfinite().all()):
            return self.failed(None, begin)
        duals = solve_duals(DenseGram(gram[None]), (value - self.rhs)[None], self.equal)
        solved = duals.code == CODES.index(Status.OPTIMAL)
        if float(self.agreed(solved)) < 1.0:
            return self.failed(None if bool(solved) else duals, begin)
        noise = torch.finfo(self.x0.dtype).eps * float(
            (reach / self.rhs.abs().clamp_min(1.0)).max()
        )
        allowed = 1e-8 + noise if tolerance is None else tolerance
        return self.finish(gram, self.agreed(duals.multipliers[0]), allowed, begin)

    def blocks(self, label: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slices of columns, their rows as float64, and the rows times M^{-1}.

        Both tensors are buffers that the next step overwrites.
        """
        n, m = len(self.x0), len(self.rhs)
        buffer = self.rhs.new_empty(m, min(n, self.chunk))
        other = buffer if self.metric is None else torch.empty_like(buffer)
        with tqdm(total=n, desc=label, disable=not self.progress, leave=False) as bar:
            for start in range(0, n, self.chunk):
                stop = min(start + self.chunk, n)
                given = self.rows(start, stop)
                if tuple(given.shape) != (m, stop - start):
                    raise SolverError(
                        f"project_streamed: got rows({start}, {stop}) of {tuple(given.shape)}; "
                        f"expected ({m}, {stop - start})"
                    )
                part = slice(start, stop)
                block = buffer[:, : stop - start].copy_(given.detach())
                scaled = block
                if self.metric is not None:
                    scaled = torch.div(block, self.metric[part], out=other[:, : stop - start])
                yield part, block, scaled
                bar.update(stop - start)

    def late(self) -> bool:
        return self.deadline is not None and time.perf_counter() > self.deadline

    def agreed(self, value: Tensor) -> Tensor:
        """The mean over processes: the same in all, where rounding may have made them differ."""
        both = self.total(torch.cat([value.double().reshape(-1), self.rhs.new_ones(1)]))
        return (both[:-1] / both[-1]).reshape(value.shape)

    def first_pass(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """``A M^{-1} A^T``, ``A x0`` and about ``|a| rms(x0)`` per row; None when late."""
        m = len(self.rhs)
        sums = self.rhs.new_zeros(m + 3, m)  # Gram matrix, A x0, reach, whether late
        gram, value, reach, late = sums[:m], sums[m], sums[m + 1], sums[m + 2]
        square = self.rhs.new_zeros(())
        for part, block, scaled in self.blocks("Gram matrix"):
            if self.late():
                late += 1.0
                break
            own = self.x0[part].double()
            gram.addmm_(scaled, block.T)
            value += block @ own
            square += own @ own
        largest = float(self.metric.max()) if self.metric is not None and len(self.x0) else 1.0
        size = float(square / max(1, len(self.x0))) ** 0.5
        reach += (largest * gram.diagonal()).sqrt() * size
        sums = self.total(sums)
        if bool((sums[m + 2] > 0).any()):
            return None
        return 0.5 * (sums[:m] + sums[:m].T), sums[m], sums[m + 1]

    def apply(self, multipliers: Tensor, out: Tensor) -> Tensor | None:
        """Write ``x0 - M^{-1} A^T multipliers`` to ``out``; returns ``A out``, None when late."""
        value = self.rhs.new_zeros(len(self.rhs) + 1)  # A out, whether late
        for part, block, scaled in self.blocks("projection"):
            if self.late():
                value[-1] += 1.0
                break
            out[part] = (self.x0[part].double() - multipliers @ scaled).to(out.dtype)
            value[:-1] += block @ out[part].double()
        value = self.total(value)
        return None if float(value[-1]) > 0 else value[:-1]

    def finish(self, gram: Tensor, u: Tensor, tolerance: float, begin: float) -> StreamedProjection:
        """The point for multipliers u (m,), corrected until its rows hold."""
        x = torch.empty_like(self.x0)
        active = (u != 0.0) if self.equal is None else (u != 0.0) | self.equal
        index, valid = compress(active[None])
        block = take_block(gram[None], index, valid)[0]
        for _ in range(_PASSES):
            value = self.apply(u, x)
            if value is None:
                break
            excess = value - self.rhs
            violation = relative_violation(excess[None], self.rhs[None], self.equal)
            if float(violation) <= tolerance:
                report = BatchReport(
                    (Status.OPTIMAL,), violation, u[None], active[None], torch.zeros_like(u)[None]
                )
                return StreamedProjection(x, report, time.perf_counter() - begin)
            change = torch.linalg.lstsq(block, excess[index[0], None]).solution[:, 0]
            u = self.agreed(u.scatter_add(0, index[0], change))
            if bool((u[~self.equal] < 0).any() if self.equal is not None else (u < 0).any()):
                break
        return self.failed(None, begin, x)

    def failed(
        self, duals: Duals | None, begin: float, out: Tensor | None = None
    ) -> StreamedProjection:
        """x0 itself, with the reason as status."""
        code = CODES.index(Status.UNKNOWN) if duals is None else int(duals.code)
        zero = torch.zeros_like(self.rhs)[None]
        report = BatchReport(
            (CODES[code],), torch.full_like(zero[:, 0], torch.inf), zero, zero > 0,
            zero if duals is None else duals.ray,
        )  # fmt: skip
        x = self.x0.clone() if out is None else out.copy_(self.x0)
        return StreamedProjection(x, report, time.perf_counter() - begin)
