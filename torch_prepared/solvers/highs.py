"""HiGHS: linear, mixed-integer and small convex quadratic programs, passed as arrays.

Defaults were chosen by measurement on parametric interval programs of fully connected networks
(2 threads, 2e5 to 2e6 columns) and on 50 dense rows over 65,792 weights. Presolve saves a factor
of 30 or more. Interior point without crossover and dual simplex are within a factor of 2 of each
other on the former; on the dense rows only interior point ends within a minute. The first-order
methods often miss the feasibility tolerance. HiGHS looks at the clock between iterations only, so
that an interior-point iteration on a hard factorization can overrun the time limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import highspy
import numpy as np
import scipy.sparse as sp

from torch_prepared.errors import MissingDependencyError, SolverError
from torch_prepared.solvers._problem import LinearProgram
from torch_prepared.solvers._residuals import Claim, judge, with_ray
from torch_prepared.solvers._result import Solution, Status

__all__ = ["HighsMethod", "HighsSolver"]

_LARGEST_INDEX = 2**31 - 1
_TINY_ENTRIES = 2_000  #: below this many coefficients simplex is faster than interior point
_LONG = 100_000  #: nonzeros of a linear program that may run long
_LOOK_EVERY = 0.05  #: seconds
_WORKERS_END = 1.0  #: seconds in which HiGHS's workers end; a process that exits before aborts


class HighsMethod(StrEnum):
    """Algorithm for continuous linear programs; the value is HiGHS's option."""

    AUTO = "choose"  #: interior point without crossover, simplex when tiny or as second try
    IPM = "ipx"  #: interior point, no crossover
    IPM_CROSSOVER = "ipx+crossover"  #: interior point, then a vertex
    SIMPLEX = "simplex"  #: dual simplex
    HIPO = "hipo"  #: newer interior point, needs the package highspy-extras
    PDLP = "pdlp"  #: first-order; low accuracy


_CLAIMS = {
    highspy.HighsModelStatus.kOptimal: Status.OPTIMAL,
    highspy.HighsModelStatus.kModelEmpty: Status.OPTIMAL,
    highspy.HighsModelStatus.kInfeasible: Status.INFEASIBLE,
    highspy.HighsModelStatus.kUnbounded: Status.UNBOUNDED,
    highspy.HighsModelStatus.kTimeLimit: Status.TIME_LIMIT,
    highspy.HighsModelStatus.kIterationLimit: Status.FEASIBLE,
    highspy.HighsModelStatus.kSolutionLimit: Status.FEASIBLE,
    highspy.HighsModelStatus.kObjectiveBound: Status.FEASIBLE,
    highspy.HighsModelStatus.kObjectiveTarget: Status.FEASIBLE,
    highspy.HighsModelStatus.kInterrupt: Status.FEASIBLE,
    highspy.HighsModelStatus.kMemoryLimit: Status.FEASIBLE,
}  #: every other HiGHS status is UNKNOWN


@dataclass(frozen=True)
class HighsSolver:
    """Solver ``"highs"``.

    Args:
        method: see :class:`HighsMethod`; programs with integers use branch and bound, quadratic
            ones HiGHS's active-set method, whatever the method.
        retry: when a continuous solve ends ``UNKNOWN`` or unconfirmed, try simplex in the time
            left.
        find_ray: back ``INFEASIBLE`` by a Farkas ray (one more linear program, in the time left).
        mip_gap: relative gap at which branch and bound stops.
        progress: called from branch and bound with (dual bound, best objective) now and then, from
            another thread; must not raise.
        name: name in the registry.

    Branch and bound runs in a thread of its own, so that Ctrl-C ends it within a second.
    """

    method: HighsMethod = HighsMethod.AUTO
    retry: bool = True
    find_ray: bool = True
    mip_gap: float = 1e-4
    progress: Callable[[float, float], None] | None = None
    name: str = "highs"

    def solve(
        self,
        problem: LinearProgram,
        *,
        time_limit: float | None = None,
        threads: int | None = None,
    ) -> Solution:
        """Minimize ``problem``; see :meth:`LPSolver.solve`.

        Raises:
            SolverError: more than 2^31 - 1 coefficients, or HiGHS refuses the data (an entry
                beyond 1e15, an indefinite quadratic).
            MissingDependencyError: method ``HIPO`` without ``highspy-extras``.
        """
        start = time.perf_counter()
        deadline = np.inf if time_limit is None else start + time_limit
        data = _arrays(problem)
        verdict: Solution | None = None
        for option in self._attempts(problem):
            left = deadline - time.perf_counter()
            if verdict is not None and left <= 0.0:
                break
            attempt = _run(problem, data, option, max(left, 0.0), threads, self)
            verdict = attempt if verdict is None else _better(verdict, attempt)
            if verdict.status not in (Status.UNKNOWN, Status.FEASIBLE):
                break
        if verdict is None:
            raise SolverError("highs: no method to try; expected at least one")
        verdict = replace(verdict, seconds=time.perf_counter() - start)
        if problem.quadratic is not None and verdict.status is Status.UNKNOWN:
            verdict = replace(verdict, message=f"{verdict.message}; try solver 'clarabel'")
        left = deadline - time.perf_counter()
        if verdict.status is Status.INFEASIBLE and self.find_ray and left > 0.0:
            relaxed = HighsSolver(self.method, self.retry, find_ray=False)
            limit = None if time_limit is None else left
            return with_ray(
                problem, verdict, lambda p: relaxed.solve(p, time_limit=limit, threads=threads)
            )
        return verdict

    def _attempts(self, problem: LinearProgram) -> Iterator[HighsMethod]:
        if problem.integer is not None or problem.quadratic is not None:
            yield HighsMethod.AUTO
            return
        first = self.method
        if first is HighsMethod.AUTO:
            tiny = problem.rows.entries <= _TINY_ENTRIES
            first = HighsMethod.SIMPLEX if tiny else HighsMethod.IPM
        yield first
        if self.retry:
            yield HighsMethod.IPM_CROSSOVER if first is HighsMethod.SIMPLEX else HighsMethod.SIMPLEX


def _better(first: Solution, second: Solution) -> Solution:
    """The later answer unless it lost a feasible point that the earlier one had."""
    if first.status.has_point and second.status is not Status.OPTIMAL:
        return first if not second.status.has_point or first.gap <= second.gap else second
    return second if second.status is not Status.TIME_LIMIT else first


def _arrays(problem: LinearProgram) -> sp.csr_matrix:
    """The rows as CSR; a sparse matrix is used as it is, never made dense."""
    matrix = sp.csr_matrix(problem.rows.matrix)
    if max(matrix.nnz, *matrix.shape) > _LARGEST_INDEX:
        raise SolverError(
            f"highs: got {matrix.nnz} coefficients; expected at most {_LARGEST_INDEX}; "
            "edit fewer parameters or use lazily generated rows"
        )
    return matrix


def _pass_problem(highs: highspy.Highs, problem: LinearProgram, matrix: sp.csr_matrix) -> None:
    rows, p = problem.rows, problem.columns
    kinds = np.zeros(p, dtype=np.int32) if problem.integer is None else problem.integer
    status = highs.passModel(
        p,
        rows.count,
        matrix.nnz,
        int(highspy.MatrixFormat.kRowwise),
        int(highspy.ObjSense.kMinimize),
        0.0,
        problem.cost,
        problem.lower,
        problem.upper,
        rows.rhs,
        np.where(rows.equal, rows.rhs, np.inf),
        matrix.indptr.astype(np.int32),
        matrix.indices.astype(np.int32),
        matrix.data,
        np.asarray(kinds, dtype=np.int32),
    )
    if status == highspy.HighsStatus.kError:
        raise SolverError(
            "highs: refused the program; expected entries below 1e15 and bounds below 1e20; "
            "rescale the unknowns"
        )
    if problem.quadratic is None:
        return
    if isinstance(problem.quadratic, np.ndarray):
        lower = sp.diags(problem.quadratic, format="csc")
    else:
        lower = sp.tril(problem.quadratic, format="csc")
    status = highs.passHessian(
        p,
        lower.nnz,
        int(highspy.HessianFormat.kTriangular),
        lower.indptr.astype(np.int32),
        lower.indices.astype(np.int32),
        lower.data,
    )
    if status == highspy.HighsStatus.kError:
        raise SolverError("highs: refused the quadratic objective; expected it convex")


def _set_options(
    highs: highspy.Highs, method: HighsMethod, limit: float, threads: int | None, mip_gap: float
) -> None:
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("small_matrix_value", 1e-12)
    highs.setOptionValue("time_limit", float(limit))
    highs.setOptionValue("mip_rel_gap", float(mip_gap))
    crossover = method is HighsMethod.IPM_CROSSOVER
    highs.setOptionValue("run_crossover", "on" if crossover else "off")
    if threads is not None:
        # The worker pool of this process keeps its first size until it is told otherwise.
        highspy.Highs.resetGlobalScheduler(True)
        highs.setOptionValue("threads", int(threads))
    option = HighsMethod.IPM.value if crossover else method.value
    if highs.setOptionValue("solver", option) != highspy.HighsStatus.kOk:
        raise MissingDependencyError(
            f"highs: method {method.value!r} is not in this build of HiGHS; install "
            "highspy-extras or use method 'choose'"
        )


def _run_aside(highs: highspy.Highs, progress: Callable[[float, float], None] | None) -> None:
    """Run in another thread, so that this one hears Ctrl-C and can pass it on."""
    highs.HandleUserInterrupt = True
    if progress is not None:
        report = progress

        def tell(event: highspy.HighsCallbackEvent) -> None:
            report(float(event.data_out.mip_dual_bound), float(event.data_out.mip_primal_bound))

        highs.cbMipInterrupt += tell
    highs.startSolve()
    try:  # not by joining the thread: an interrupted join takes a running thread for ended
        while highs.is_solver_running():
            time.sleep(_LOOK_EVERY)
    except BaseException:
        highs.cancelSolve()  # type: ignore[no-untyped-call]  # its stub lacks the return type
        while highs.is_solver_running():
            time.sleep(_LOOK_EVERY)
        time.sleep(_WORKERS_END)
        raise


def _run(
    problem: LinearProgram,
    matrix: sp.csr_matrix,
    method: HighsMethod,
    limit: float,
    threads: int | None,
    settings: HighsSolver,
) -> Solution:
    start = time.perf_counter()
    highs = highspy.Highs()  # type: ignore[no-untyped-call]  # its stub lacks the return type
    _set_options(highs, method, limit, threads, settings.mip_gap)
    _pass_problem(highs, problem, matrix)
    passed = time.perf_counter() - start
    highs.setOptionValue("time_limit", max(limit - passed, 0.0))
    if problem.integer is None and matrix.nnz < _LONG:
        highs.run()
    else:
        _run_aside(highs, settings.progress)
    status = highs.getModelStatus()
    solution, info = highs.getSolution(), highs.getInfo()
    x = np.asarray(solution.col_value, dtype=np.float64) if solution.value_valid else None
    duals, bound = None, None
    if problem.integer is not None:
        bound = float(info.mip_dual_bound)
    elif solution.dual_valid:
        duals = np.asarray(solution.row_dual, dtype=np.float64)
    claim = Claim(
        _CLAIMS.get(status, Status.UNKNOWN),
        f"HiGHS: {highs.modelStatusToString(status).lower()}",
        x,
        duals,
        bound,
    )
    seconds = time.perf_counter() - start
    return judge(problem, claim, seconds=seconds, solver=f"highs ({method.value})")
