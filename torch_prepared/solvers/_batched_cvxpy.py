"""The batched solver behind cvxpylayers, and cvxpylayers' own backends made safe to use.

Importing cvxpylayers patches CVXPY, so this module is imported only when a layer is declared.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from cvxpylayers.interfaces.base import SolverInterface
from cvxpylayers.torch.cvxpylayer import CvxpyLayer
from torch import Tensor, nn

from torch_prepared.errors import SolverError
from torch_prepared.solvers._batched_adjoint import Adjoint
from torch_prepared.solvers._batched_diffcp import DiffcpInterface
from torch_prepared.solvers._batched_program import solve_batch
from torch_prepared.solvers._batched_report import BatchReport, OnFailure, announce, eager
from torch_prepared.solvers._batched_separable import SeparableBatch
from torch_prepared.solvers._result import Status

__all__ = ["Backend", "BatchedInterface", "DeclaredLayer"]

_MEMORY = 2**31  #: bytes of dense matrices in one batch


class Backend(StrEnum):
    """Who solves a declared program."""

    BATCHED = "batched"  #: this package's, on any device
    DIFFCP = "diffcp"  #: cvxpylayers' default; the solver below is diffcp's choice
    CLARABEL = "clarabel"
    ECOS = "ecos"
    SCS = "scs"


class BatchedInterface(SolverInterface):
    """Programs with a diagonal quadratic and linear rows, for ``CvxpyLayer(solver=...)``.

    Args:
        on_failure: points of samples without an answer: zeros (``KEEP``) or NaN.

    Attributes:
        report: what the last solve said; None before the first.
    """

    canon_solver = "CLARABEL"
    supports_quad_obj = True

    def __init__(self, on_failure: OnFailure = OnFailure.KEEP) -> None:
        self.on_failure = on_failure
        self.report: BatchReport | None = None

    @property
    def statuses(self) -> tuple[Status, ...]:
        """Of the last solve; empty before the first."""
        return () if self.report is None else self.report.statuses

    def setup(self, ctx: Any) -> None:
        """Read the sparsity of the canonical form.

        Raises:
            SolverError: cones other than linear ones, or products of different variables.
        """
        dims = ctx.cone_dims
        if dims.soc or dims.exp or dims.psd or getattr(dims, "p3d", None):
            raise SolverError(
                "layer: got a program with second-order or other cones; expected linear rows and "
                "a separable quadratic; use backend='clarabel'"
            )
        indices, starts, (m, wide) = ctx.reduced_A.problem_data_index
        self._at_row = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        self._at_column = torch.from_numpy(np.repeat(np.arange(wide), np.diff(starts)))
        self._rows, self._columns = int(m), int(wide) - 1
        self._equal = torch.arange(self._rows) < int(dims.zero)
        self._diagonal = torch.zeros(0, dtype=torch.int64)
        if ctx.reduced_P.problem_data_index is not None:
            indices, starts, shape = ctx.reduced_P.problem_data_index
            across = np.repeat(np.arange(shape[1]), np.diff(starts))
            if not np.array_equal(indices, across):
                raise SolverError(
                    "layer: got a quadratic with products of different variables; expected a sum "
                    "of squares of variables; use backend='clarabel' or a ProjectionLayer"
                )
            self._diagonal = torch.from_numpy(np.asarray(indices, dtype=np.int64))

    def solve_torch_batch(
        self,
        P: Tensor | None,  # noqa: N803 - the base class's names
        q: Tensor,
        A: Tensor,  # noqa: N803
        dims: Any,
        solver_args: Any,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Any]:
        """Primal (b, n), dual (b, m) and what the derivative needs; see the base class."""
        device, count = q.device, len(q)
        if 8 * count * self._rows * self._columns > _MEMORY:
            raise SolverError(
                f"layer: got {count} canonical programs of {self._rows} x {self._columns}; "
                "expected fewer or smaller ones; state the program by rows or split the batch"
            )
        wide = A.new_zeros(count, self._rows, self._columns + 1, dtype=torch.float64)
        wide[:, self._at_row.to(device), self._at_column.to(device)] = A.double()
        zero = wide.new_zeros(count, self._columns)
        curve = zero.clone()
        if P is not None:
            curve[:, self._diagonal.to(device)] = P.double()
        batch = SeparableBatch(
            rows=-wide[:, :, :-1], rhs=wide[:, :, -1].clone(), cost=q[:, :-1].double(),
            weight=zero, center=zero, curve=curve, anchor=zero,
            lower=zero - torch.inf, upper=zero + torch.inf, equal=self._equal.to(device),
        )  # fmt: skip
        found = solve_batch(batch)
        self.report = found.report
        solved = found.report.solved[:, None]
        gone = torch.nan if self.on_failure is OnFailure.NAN else 0.0
        x = torch.where(solved, found.x, gone).to(q.dtype)
        return x, found.y.to(q.dtype), (batch, found, P is not None, q.dtype)

    def derivative_torch_batch(
        self, dprimal: Tensor, ddual: Tensor, saved_state: Any
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gradients of the canonical values, batch first; see the base class."""
        batch, found, quadratic, dtype = saved_state
        solved = found.report.solved[:, None]
        adjoint = Adjoint(batch, found.free, found.report.active)
        h = torch.where(solved & found.report.active, ddual.double(), 0.0)
        v, w, _ = adjoint.solve(torch.where(solved, dprimal.double(), 0.0), h)
        x = torch.where(solved, found.x, 0.0)
        at_row, at_column = self._at_row.to(v.device), self._at_column.to(v.device)
        # Values are those of [-A | b].
        left = torch.cat([v, torch.zeros_like(v[:, :1])], 1)[:, at_column]
        right = torch.cat([x, torch.ones_like(x[:, :1])], 1)[:, at_column]
        d_rows = found.y[:, at_row] * left + w[:, at_row] * right
        d_cost = torch.cat([-v, torch.zeros_like(v[:, :1])], 1)
        d_quadratic = (-v * x)[:, self._diagonal.to(v.device)].to(dtype) if quadratic else None
        return d_quadratic, d_cost.to(dtype), d_rows.to(dtype)


class DeclaredLayer(nn.Module):
    """A program declared in CVXPY, solved for a batch of parameter values, with gradients.

    Args:
        problem: a DPP-compliant ``cvxpy.Problem``.
        parameters: its parameters, in the order of :meth:`forward`'s arguments.
        variables: those wanted back.
        backend: see :class:`Backend`. With any but ``BATCHED``, gradients use diffcp's dense
            adjoint up to 500 rows plus columns and ``lsmr`` beyond: its default, ``lsqr``, can be
            wrong without a sign of it.
        on_failure: see :class:`OnFailure`; ``KEEP`` returns zeros.

    Raises:
        SolverError: a form that the batched solver does not treat.
    """

    def __init__(
        self,
        problem: Any,
        parameters: Sequence[Any],
        variables: Sequence[Any],
        *,
        backend: Backend | str = Backend.BATCHED,
        on_failure: OnFailure | str = OnFailure.KEEP,
    ) -> None:
        super().__init__()
        self.backend, self.on_failure = Backend(backend), OnFailure(on_failure)
        self._interface: BatchedInterface | DiffcpInterface
        if self.backend is Backend.BATCHED:
            self._interface = BatchedInterface(self.on_failure)
        else:
            method = None if self.backend is Backend.DIFFCP else self.backend.value.upper()
            self._interface = DiffcpInterface(method, self.on_failure)
        self.layer = CvxpyLayer(problem, list(parameters), list(variables), solver=self._interface)

    @property
    def report(self) -> BatchReport | None:
        """Of the last call; None with cvxpylayers' own backends, which only give ``statuses``."""
        return self._interface.report if isinstance(self._interface, BatchedInterface) else None

    @property
    def statuses(self) -> tuple[Status, ...]:
        """Per sample, of the last call; empty before the first."""
        return self._interface.statuses

    @eager
    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Optimal values of the variables, each with a leading batch axis if any value has one."""
        found: tuple[Tensor, ...] = self.layer(*values)
        announce(self.statuses, self.on_failure, "DeclaredLayer")
        return found
