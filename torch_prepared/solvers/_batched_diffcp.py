"""diffcp behind cvxpylayers, judged: its answers are checked and one sample cannot stop a batch.

cvxpylayers' own route to diffcp raises for the whole batch when a sample fails, or, with Clarabel,
returns the point of an infeasible sample as if it were an answer, and its default derivative can
be wrong without a sign of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffcp
import numpy as np
import scipy.sparse as sp
import torch
from cvxpy.reductions.solvers.conic_solvers.scs_conif import dims_to_solver_dict
from cvxpylayers.interfaces.base import SolverInterface
from diffcp.cone_program import SolverError as DiffcpError
from torch import Tensor

from torch_prepared.core.rows import Floats
from torch_prepared.solvers._batched_report import OnFailure
from torch_prepared.solvers._result import Status

__all__ = ["DiffcpInterface"]

_DENSE_LIMIT = 500  #: rows plus columns up to which diffcp's exact dense adjoint is used
_ACCEPTED = 1e-3  #: residuals of the cone program, relative; solvers' defaults reach 1e-4 to 1e-8


class DiffcpInterface(SolverInterface):
    """One cone program after another by diffcp, for ``CvxpyLayer(solver=...)``.

    Args:
        solve_method: ``"CLARABEL"``, ``"ECOS"``, ``"SCS"``, or None for diffcp's choice.
        on_failure: points of samples without an answer: zeros (``KEEP``) or NaN.

    Attributes:
        statuses: of the last solve; a sample whose answer fails the check is ``UNKNOWN``.
    """

    canon_solver = "DIFFCP"
    supports_quad_obj = False

    def __init__(self, solve_method: str | None, on_failure: OnFailure) -> None:
        self.on_failure = on_failure
        self.statuses: tuple[Status, ...] = ()
        self._arguments: dict[str, str] = {}
        if solve_method is not None:
            self._arguments["solve_method"] = solve_method

    def setup(self, ctx: Any) -> None:
        """Read the sparsity of ``[-A | b]`` and the cones."""
        indices, starts, shape = ctx.reduced_A.problem_data_index
        self._indices, self._starts, self._shape = indices, starts, shape
        self._columns = np.repeat(np.arange(shape[1]), np.diff(starts))
        convert: Callable[[Any], dict[str, Any]] = dims_to_solver_dict
        self._cones = convert(ctx.cone_dims)
        self._mode = "dense" if sum(shape) <= _DENSE_LIMIT else "lsmr"

    def solve_torch_batch(
        self,
        P: Tensor | None,  # noqa: N803 - the base class's names
        q: Tensor,
        A: Tensor,  # noqa: N803
        dims: Any,
        solver_args: Any,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Any]:
        """Primal (b, n), dual (b, m) and the adjoints; see the base class."""
        gone = np.nan if self.on_failure is OnFailure.NAN else 0.0
        primal = np.full((len(q), self._shape[1] - 1), gone)
        dual = np.zeros((len(q), self._shape[0]))
        adjoints: list[Any] = []
        statuses = []
        values, costs = A.detach().cpu().double().numpy(), q.detach().cpu().double().numpy()
        for i in range(len(q)):
            wide = sp.csc_matrix((values[i], self._indices, self._starts), shape=self._shape)
            answer = self._solve_one(-wide[:, :-1], wide[:, -1].toarray()[:, 0], costs[i, :-1],
                                     needs_grad)  # fmt: skip
            statuses.append(Status.UNKNOWN if answer is None else Status.OPTIMAL)
            adjoints.append(None if answer is None else answer[2])
            if answer is not None:
                primal[i], dual[i] = answer[:2]
        self.statuses = tuple(statuses)
        return torch.from_numpy(primal).to(q), torch.from_numpy(dual).to(q), adjoints

    def _solve_one(
        self, matrix: sp.csc_matrix, rhs: Floats, cost: Floats, needs_grad: bool
    ) -> tuple[Floats, Floats, Any] | None:
        """Primal, dual and adjoint of one program, or None where the check fails."""
        finite = bool(np.isfinite(matrix.data).all() and np.isfinite(rhs).all())
        if not (finite and bool(np.isfinite(cost).all())):
            return None
        adjoint = None
        try:  # diffcp drops explicit zeros from the matrix it is given
            if needs_grad:
                x, y, s, _, adjoint = diffcp.solve_and_derivative(
                    matrix.copy(), rhs, cost, self._cones, mode=self._mode, **self._arguments
                )
            else:
                x, y, s = diffcp.solve_only(
                    matrix.copy(), rhs, cost, self._cones, **self._arguments
                )
        except (DiffcpError, ValueError, RuntimeError, ArithmeticError, np.linalg.LinAlgError):
            return None
        lacks = (
            np.abs(matrix @ x + s - rhs).max(initial=0.0) / (1.0 + np.abs(rhs).max(initial=0.0)),
            np.abs(matrix.T @ y + cost).max(initial=0.0) / (1.0 + np.abs(cost).max(initial=0.0)),
            abs(cost @ x + rhs @ y) / (1.0 + abs(cost @ x)),
        )
        return (x, y, adjoint) if max(lacks) <= _ACCEPTED else None  # NaN fails

    def derivative_torch_batch(
        self, dprimal: Tensor, ddual: Tensor, saved_state: Any
    ) -> tuple[None, Tensor, Tensor]:
        """Gradients of the canonical values, batch first; see the base class."""
        rows, columns = self._indices, self._columns
        last = columns == self._shape[1] - 1
        d_values = np.zeros((len(dprimal), len(rows)))
        d_costs = np.zeros((len(dprimal), self._shape[1]))
        towards_x = dprimal.detach().cpu().double().numpy()
        towards_y = ddual.detach().cpu().double().numpy()
        for i, adjoint in enumerate(saved_state):
            if adjoint is None:
                continue
            d_matrix, d_rhs, d_cost = adjoint(towards_x[i], towards_y[i], np.zeros(self._shape[0]))
            table = sp.csr_matrix(d_matrix)
            d_values[i, ~last] = -np.asarray(table[rows[~last], columns[~last]]).ravel()
            d_values[i, last] = d_rhs[rows[last]]
            d_costs[i, :-1] = d_cost
        return None, torch.from_numpy(d_costs).to(dprimal), torch.from_numpy(d_values).to(dprimal)
