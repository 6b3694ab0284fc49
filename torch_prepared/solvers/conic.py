"""Interior-point and splitting solvers for cones, reached through CVXPY.

The place for quadratic objectives (``"clarabel"`` is the default for the 2-norm) and for a second
opinion on linear ones. CVXPY is imported when a solve starts, never before.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any

import numpy as np
import scipy.sparse as sp

from torch_prepared.core.rows import Floats
from torch_prepared.errors import MissingDependencyError, SolverError
from torch_prepared.solvers._problem import LinearProgram
from torch_prepared.solvers._residuals import Claim, judge, with_ray
from torch_prepared.solvers._result import Solution, Status

__all__ = ["ConicBackend", "ConicSolver"]


class ConicBackend(StrEnum):
    """Solver behind CVXPY; the value is its name there."""

    CLARABEL = "CLARABEL"
    ECOS = "ECOS"
    SCS = "SCS"
    GUROBI = "GUROBI"


_CLAIMS = {
    "optimal": Status.OPTIMAL,
    "infeasible": Status.INFEASIBLE,
    "unbounded": Status.UNBOUNDED,
    "user_limit": Status.FEASIBLE,
}  #: every other CVXPY status, "optimal_inaccurate" among them, is UNKNOWN


@dataclass(frozen=True)
class ConicSolver:
    """Solvers ``"clarabel"``, ``"ecos"``, ``"scs"`` and, with a licence, ``"gurobi"``.

    Args:
        backend: see :class:`ConicBackend`. ECOS cannot be interrupted: its time limit is only
            looked at before it starts. Only Gurobi takes integer columns.
        find_ray: back ``INFEASIBLE`` by a Farkas ray (one more linear program, in the time left).
    """

    backend: ConicBackend = ConicBackend.CLARABEL
    find_ray: bool = True

    @property
    def name(self) -> str:
        """Name in the registry."""
        return self.backend.value.lower()

    def solve(
        self,
        problem: LinearProgram,
        *,
        time_limit: float | None = None,
        threads: int | None = None,
    ) -> Solution:
        """Minimize ``problem``; see :meth:`LPSolver.solve`.

        Raises:
            SolverError: integer columns (except Gurobi), an indefinite quadratic, or a licence
                that Gurobi does not accept.
            MissingDependencyError: CVXPY or the backend is not installed.
        """
        start = time.perf_counter()
        if problem.integer is not None and self.backend is not ConicBackend.GUROBI:
            raise SolverError(f"{self.name}: got integer columns; expected none; use 'highs'")
        cp = _import_cvxpy()
        if self.backend.value not in cp.installed_solvers():
            raise MissingDependencyError(
                f"{self.name}: not installed; install it next to CVXPY ('pip install "
                f"{self.backend.value.lower()}{'py' if self.backend is ConicBackend.GUROBI else ''}"
                "') or use solver 'highs'"
            )
        model = _Model(cp, problem)
        left = None if time_limit is None else time_limit - (time.perf_counter() - start)
        if left is not None and left <= 0.0:
            claim = Claim(Status.TIME_LIMIT, "time over while the model was built")
        else:
            claim = model.solve(self.backend, left, threads)
        seconds = time.perf_counter() - start
        verdict = judge(problem, claim, seconds=seconds, solver=self.name)
        if verdict.status is not Status.INFEASIBLE or not self.find_ray:
            return verdict
        left = None if time_limit is None else time_limit - seconds
        if left is not None and left <= 0.0:
            return verdict
        other = ConicSolver(self.backend, find_ray=False)
        return with_ray(
            problem, verdict, lambda p: other.solve(p, time_limit=left, threads=threads)
        )


class _Model:
    """The program in CVXPY's terms, with the constraints whose multipliers are wanted."""

    def __init__(self, cp: ModuleType, problem: LinearProgram) -> None:
        self.cp, self.rows = cp, problem.rows
        p, equal = problem.columns, problem.rows.equal
        whole = (
            None if problem.integer is None else [(int(j),) for j in problem.integer.nonzero()[0]]
        )
        self.x = cp.Variable(p) if whole is None else cp.Variable(p, integer=whole)
        matrix, rhs = problem.rows.matrix, problem.rows.rhs
        self.at_least = matrix[~equal] @ self.x >= rhs[~equal] if (~equal).any() else None
        self.equals = matrix[equal] @ self.x == rhs[equal] if equal.any() else None
        fixed = problem.lower == problem.upper
        constraints = [c for c in (self.at_least, self.equals) if c is not None]
        index = np.flatnonzero(fixed)
        if index.size:
            constraints.append(self.x[index] == problem.lower[index])
        index = np.flatnonzero(~fixed & np.isfinite(problem.lower))
        if index.size:
            constraints.append(self.x[index] >= problem.lower[index])
        index = np.flatnonzero(~fixed & np.isfinite(problem.upper))
        if index.size:
            constraints.append(self.x[index] <= problem.upper[index])
        self.problem = cp.Problem(cp.Minimize(self._objective(problem)), constraints)

    def _objective(self, problem: LinearProgram) -> Any:
        cp, linear = self.cp, problem.cost @ self.x
        if problem.quadratic is None:
            return linear
        if not isinstance(problem.quadratic, np.ndarray):
            return linear + 0.5 * cp.quad_form(
                self.x, cp.psd_wrap(sp.csc_matrix(problem.quadratic))
            )
        index = np.flatnonzero(problem.quadratic)
        root = np.sqrt(0.5 * problem.quadratic[index])
        return linear + cp.sum_squares(cp.multiply(root, self.x[index]))

    def solve(self, backend: ConicBackend, limit: float | None, threads: int | None) -> Claim:
        """Run the backend and translate its answer, failures included."""
        cp = self.cp
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "may be inaccurate": such answers are UNKNOWN
                self.problem.solve(solver=backend.value, **_settings(backend, limit, threads))
        except cp.error.DCPError as error:
            raise SolverError(
                f"{backend.value}: got a quadratic objective that is not convex; expected a "
                "positive semidefinite matrix"
            ) from error
        except cp.error.SolverError as error:
            return Claim(Status.UNKNOWN, f"{backend.value}: {error}".splitlines()[0])
        except Exception as error:
            if type(error).__name__ != "GurobiError":
                raise
            raise SolverError(
                f"gurobi: {error}; expected a valid licence for a problem of this size; set "
                "GRB_LICENSE_FILE or use solver 'highs'"
            ) from error
        status = str(self.problem.status)
        claim = _CLAIMS.get(status, Status.UNKNOWN)
        if claim is Status.FEASIBLE and limit is not None:
            claim = Status.TIME_LIMIT
        value = self.x.value
        x = None if value is None else np.asarray(value, dtype=np.float64)
        return Claim(claim, f"{backend.value}: {status.replace('_', ' ')}", x, self._duals())

    def _duals(self) -> Floats | None:
        duals = np.zeros(self.rows.count)
        for constraint, mask, sign in (
            (self.at_least, ~self.rows.equal, 1.0),
            (self.equals, self.rows.equal, -1.0),
        ):
            if constraint is None:
                continue
            if constraint.dual_value is None:
                return None
            duals[mask] = sign * np.asarray(constraint.dual_value)
        return duals


def _settings(
    backend: ConicBackend, limit: float | None, threads: int | None
) -> Mapping[str, float | int]:
    """CVXPY keyword arguments for accuracy, time and threads."""
    settings: dict[str, float | int] = {}
    time_names = {
        ConicBackend.CLARABEL: "time_limit",
        ConicBackend.SCS: "time_limit_secs",
        ConicBackend.GUROBI: "TimeLimit",
    }
    thread_names = {ConicBackend.CLARABEL: "max_threads", ConicBackend.GUROBI: "Threads"}
    if backend is ConicBackend.SCS:
        settings.update(eps_abs=1e-8, eps_rel=1e-8, max_iters=100_000)
    if limit is not None and backend in time_names:
        settings[time_names[backend]] = limit
    if threads is not None and backend in thread_names:
        settings[thread_names[backend]] = threads
    return settings


def _import_cvxpy() -> ModuleType:
    try:
        return importlib.import_module("cvxpy")
    except ImportError as error:
        raise MissingDependencyError(
            "conic solvers need CVXPY; install it with 'pip install torch-prepared[conic]' or use "
            "solver 'highs'"
        ) from error
