"""Conformance suite of linear-program solvers: inherit it, say how to make the solver.

Example::

    class TestMySolver(LPSolverSuite):
        def make_solver(self) -> LPSolver:
            return MySolver()
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from torch_prepared.core.rows import LinearRows
from torch_prepared.errors import SolverError
from torch_prepared.solvers import (
    LinearProgram,
    LPSolver,
    Solution,
    Status,
    farkas_gap,
    find_solver,
    solve,
)

__all__ = ["LPSolverSuite", "random_program"]


def random_program(seed: int, rows: int = 12, columns: int = 8, equal: int = 2) -> LinearProgram:
    """A feasible, bounded sparse program with equalities and one-sided, open and fixed columns.

    Feasible because the right-hand sides are met at a drawn point; bounded because the cost is
    ``matrix.T @ y`` plus reduced costs that match the bounds, with y nonnegative.
    """
    rng = np.random.default_rng(seed)
    matrix = sp.random_array((rows, columns), density=0.5, rng=rng, data_sampler=rng.normal)
    point = rng.normal(size=columns)
    mask = np.arange(rows) < equal
    rhs = matrix @ point - np.where(mask, 0.0, rng.uniform(0.0, 1.0, rows))
    kind = rng.integers(0, 4, columns)  # 0 open, 1 lower, 2 both, 3 fixed
    lower = np.where(kind == 0, -np.inf, np.where(kind == 3, point, point - 1.0))
    upper = np.where(kind >= 2, np.where(kind == 3, point, point + 1.0), np.inf)
    duals = np.where(mask, rng.normal(size=rows), rng.uniform(0.0, 1.0, rows))
    reduced = np.where(kind == 0, 0.0, rng.uniform(0.0, 1.0, columns))
    cost = matrix.T @ duals + reduced
    return LinearProgram(cost, LinearRows(sp.csr_matrix(matrix), rhs, mask), lower, upper)


class LPSolverSuite:
    """Tests that every :class:`LPSolver` passes. Override ``tolerance`` for low-accuracy ones."""

    tolerance = 1e-5  #: relative, on objectives, duals and complementarity

    def make_solver(self) -> LPSolver:
        """The solver under test."""
        raise NotImplementedError

    def _solve(self, problem: LinearProgram, limit: float | None = 60.0) -> Solution:
        return solve(problem, self.make_solver(), time_limit=limit, threads=1)

    @pytest.mark.parametrize("seed", range(5))
    def test_optimality_conditions(self, seed: int) -> None:
        """Feasibility, dual feasibility, complementary slackness and a closed gap."""
        problem = random_program(seed)
        result = self._solve(problem)
        assert result.status is Status.OPTIMAL, result.message
        assert result.x is not None
        assert result.duals is not None
        assert result.violation <= 1e-6
        assert (result.x >= problem.lower - self.tolerance).all()
        assert (result.x <= problem.upper + self.tolerance).all()
        rows = problem.rows
        assert (result.duals[~rows.equal] >= 0.0).all()
        slack = rows.matrix @ result.x - rows.rhs
        assert np.abs(slack * result.duals).max() <= self.tolerance
        reduced = problem.cost - rows.matrix.T @ result.duals
        end = np.where(reduced > 0, problem.lower, problem.upper)
        away = np.minimum(np.abs(result.x - end), 1e3)
        assert np.abs(reduced * away).max() <= 10 * self.tolerance
        assert result.gap <= self.tolerance

    @pytest.mark.parametrize("seed", range(10, 14))
    def test_agrees_with_simplex(self, seed: int) -> None:
        """The optimal value is that of HiGHS's simplex method."""
        problem = random_program(seed, rows=30, columns=20)
        result, reference = self._solve(problem), solve(problem, "highs-simplex")
        assert reference.status is Status.OPTIMAL
        assert result.objective == pytest.approx(
            reference.objective, rel=self.tolerance, abs=self.tolerance
        )

    def test_dense_rows(self) -> None:
        """Dense rows give the optimum of the same rows stored sparsely."""
        problem = random_program(3)
        matrix = problem.rows.matrix @ np.eye(problem.columns)
        rows = LinearRows(matrix, problem.rows.rhs, problem.rows.equal)
        dense = LinearProgram(problem.cost, rows, problem.lower, problem.upper)
        expected = self._solve(problem).objective
        assert self._solve(dense).objective == pytest.approx(expected, abs=self.tolerance)

    def test_infeasible(self) -> None:
        """``x + y >= 1`` and ``-x - y >= 0``: a checked Farkas ray comes back."""
        rows = LinearRows(np.array([[1.0, 1.0], [-1.0, -1.0]]), np.array([1.0, 0.0]))
        problem = LinearProgram(np.ones(2), rows, np.full(2, -np.inf), np.full(2, np.inf))
        result = self._solve(problem)
        assert result.status is Status.INFEASIBLE, result.message
        assert result.x is None
        assert result.ray is not None
        assert farkas_gap(problem, result.ray) > 0.0

    def test_infeasible_against_bounds(self) -> None:
        """``x + y == 3`` within the unit square."""
        rows = LinearRows(np.array([[1.0, 1.0]]), np.array([3.0]), np.array([True]))
        problem = LinearProgram(np.zeros(2), rows, np.zeros(2), np.ones(2))
        result = self._solve(problem)
        assert result.status is Status.INFEASIBLE, result.message
        assert result.ray is not None
        assert farkas_gap(problem, result.ray) > 0.0

    def test_unbounded(self) -> None:
        """Minimize ``-x`` over ``x - y >= 0``: never a point that claims to be optimal."""
        rows = LinearRows(np.array([[1.0, -1.0]]), np.array([0.0]))
        problem = LinearProgram(np.array([-1.0, 0.0]), rows, np.zeros(2), np.full(2, np.inf))
        result = self._solve(problem)
        assert result.status is Status.UNBOUNDED, result.message
        assert result.x is None

    def test_no_rows(self) -> None:
        """Without rows every column sits at its cheaper bound."""
        cost, lower, upper = np.array([1.0, -2.0]), np.array([-1.0, 0.0]), np.array([4.0, 3.0])
        result = self._solve(LinearProgram(cost, LinearRows.empty(2), lower, upper))
        assert result.status is Status.OPTIMAL
        assert result.objective == pytest.approx(-7.0, abs=self.tolerance)

    def test_all_columns_fixed(self) -> None:
        """One point is left: optimal if the rows hold there, infeasible otherwise."""
        point, matrix = np.array([1.0, 2.0]), np.array([[1.0, 1.0]])
        for rhs, status in ((2.5, Status.OPTIMAL), (3.5, Status.INFEASIBLE)):
            rows = LinearRows(matrix, np.array([rhs]))
            result = self._solve(LinearProgram(np.ones(2), rows, point, point))
            assert result.status is status, result.message

    def test_degenerate(self) -> None:
        """Thirty copies of the same row, redundant equalities and a tie in the cost."""
        matrix = np.vstack([np.ones((30, 3)), np.array([[1.0, -1.0, 0.0]] * 2)])
        rhs, equal = np.append(np.ones(30), np.zeros(2)), np.arange(32) >= 30
        rows = LinearRows(sp.csr_matrix(matrix), rhs, equal)
        result = self._solve(LinearProgram(np.ones(3), rows, np.zeros(3), np.full(3, np.inf)))
        assert result.status is Status.OPTIMAL, result.message
        assert result.objective == pytest.approx(1.0, abs=self.tolerance)

    def test_time_limit(self) -> None:
        """An impossible limit gives no unearned verdict and no exception."""
        problem = random_program(1, rows=400, columns=300, equal=20)
        result = self._solve(problem, limit=1e-6)
        assert result.status in (Status.TIME_LIMIT, Status.FEASIBLE, Status.OPTIMAL, Status.UNKNOWN)
        assert result.status.has_point == (result.violation <= 1e-6)
        if result.status is Status.OPTIMAL:  # presolve may be that fast; the claim must hold
            assert result.gap <= self.tolerance

    def test_problem_is_not_changed(self) -> None:
        """Arrays of the program are the same after the solve."""
        problem, untouched = random_program(2), random_program(2)
        self._solve(problem)
        for name in ("cost", "lower", "upper"):
            assert np.array_equal(getattr(problem, name), getattr(untouched, name))
        assert np.array_equal(problem.rows.rhs, untouched.rows.rhs)
        probe = np.eye(problem.columns)
        assert np.array_equal(problem.rows.matrix @ probe, untouched.rows.matrix @ probe)

    def test_registered_name(self) -> None:
        """The solver's own name leads back to a solver of that name."""
        assert find_solver(self.make_solver().name).name == self.make_solver().name

    def test_bad_limits_are_refused(self) -> None:
        """A limit of zero seconds or threads is an error, not an endless solve."""
        problem = random_program(0)
        with pytest.raises(SolverError, match="time_limit"):
            solve(problem, self.make_solver(), time_limit=0.0)
        with pytest.raises(SolverError, match="threads"):
            solve(problem, self.make_solver(), threads=0)
