import highspy
import numpy as np
import pytest
import scipy.sparse as sp

from torch_prepared.core.rows import LinearRows
from torch_prepared.errors import MissingDependencyError, SolverError
from torch_prepared.solvers import (
    ConicBackend,
    ConicSolver,
    HighsMethod,
    HighsSolver,
    LinearProgram,
    LPSolver,
    Status,
    solve,
    solver_names,
)
from torch_prepared.testing.lp_solver import LPSolverSuite, random_program


class TestHighs(LPSolverSuite):
    def make_solver(self) -> LPSolver:
        return HighsSolver()


class TestHighsInteriorPoint(LPSolverSuite):
    def make_solver(self) -> LPSolver:
        return HighsSolver(HighsMethod.IPM, name="highs-ipm")


class TestHighsSimplex(LPSolverSuite):
    def make_solver(self) -> LPSolver:
        return HighsSolver(HighsMethod.SIMPLEX, name="highs-simplex")


class TestHighsFirstOrder(LPSolverSuite):
    tolerance = 1e-4

    def make_solver(self) -> LPSolver:
        return HighsSolver(HighsMethod.PDLP, name="highs-pdlp")


class TestClarabel(LPSolverSuite):
    def make_solver(self) -> LPSolver:
        pytest.importorskip("cvxpy", reason="conic solvers need CVXPY")
        return ConicSolver(ConicBackend.CLARABEL)


class TestEcos(LPSolverSuite):
    def make_solver(self) -> LPSolver:
        pytest.importorskip("cvxpy", reason="conic solvers need CVXPY")
        pytest.importorskip("ecos", reason="ECOS is not installed")
        return ConicSolver(ConicBackend.ECOS)


class TestScs(LPSolverSuite):
    tolerance = 1e-4

    def make_solver(self) -> LPSolver:
        pytest.importorskip("cvxpy", reason="conic solvers need CVXPY")
        pytest.importorskip("scs", reason="SCS is not installed")
        return ConicSolver(ConicBackend.SCS)


def quadratic_program(seed: int, dense: bool) -> LinearProgram:
    base = random_program(seed)
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(base.columns, base.columns))
    product = factor @ factor.T
    q = sp.csr_matrix(0.5 * (product + product.T)) if dense else rng.uniform(0.1, 1, base.columns)
    return LinearProgram(base.cost, base.rows, base.lower, base.upper, quadratic=q)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_quadratic_solvers_agree(seed: int, dense: bool) -> None:
    pytest.importorskip("cvxpy", reason="conic solvers need CVXPY")
    problem = quadratic_program(seed, dense)
    results = [solve(problem, name, time_limit=60, threads=1) for name in ("highs", "clarabel")]
    for result in results:
        assert result.status is Status.OPTIMAL, result.message
        assert result.gap <= 1e-5
    assert results[0].objective == pytest.approx(results[1].objective, rel=1e-5, abs=1e-5)


def test_mixed_integer_knapsack_has_bound_and_gap() -> None:
    rng = np.random.default_rng(0)
    weight, value = rng.integers(5, 30, 25), rng.integers(5, 30, 25)
    rows = LinearRows(-weight[None].astype(float), np.array([-120.0]))
    mask = np.ones(25, dtype=bool)
    problem = LinearProgram(-value.astype(float), rows, np.zeros(25), np.ones(25), mask)
    result = solve(problem, time_limit=30, threads=1)
    assert result.status is Status.OPTIMAL
    assert result.x is not None
    best = np.zeros(121)  # dynamic programming
    for w, v in zip(weight, value, strict=True):
        best[w:] = np.maximum(best[w:], best[:-w] + v)
    assert result.objective == pytest.approx(-best[-1])
    assert result.dual_bound <= result.objective + 1e-6
    assert result.gap <= 1e-4
    assert result.duals is None


def test_mixed_integer_infeasible() -> None:
    rows = LinearRows(np.array([[2.0]]), np.array([1.0]), np.array([True]))
    problem = LinearProgram(np.ones(1), rows, np.zeros(1), np.ones(1), np.array([True]))
    result = solve(problem)
    assert result.status is Status.INFEASIBLE
    assert result.x is None
    assert result.ray is None


def test_equality_bounds_that_miss_are_unknown_not_feasible() -> None:
    # Entries below HiGHS's smallest coefficient vanish inside it; our residuals still see them.
    rows = LinearRows(np.array([[1.0, 1e-13]]), np.array([1e-3]))
    problem = LinearProgram(np.array([1.0, 0.0]), rows, np.zeros(2), np.array([1.0, 1e12]))
    result = solve(problem)
    assert not result.status.has_point or result.violation <= 1e-6


def test_huge_coefficient_is_a_named_error() -> None:
    rows = LinearRows(np.array([[1e16]]), np.array([1.0]))
    with pytest.raises(SolverError, match="1e15"):
        solve(LinearProgram(np.ones(1), rows, np.zeros(1), np.ones(1)))


def test_hipo_is_used_or_named_as_missing() -> None:
    problem = random_program(0)
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    if highs.setOptionValue("solver", "hipo") == highspy.HighsStatus.kOk:
        assert solve(problem, "highs-hipo").status is Status.OPTIMAL
    else:
        with pytest.raises(MissingDependencyError, match="highspy-extras"):
            solve(problem, "highs-hipo")


def test_gurobi_is_optional() -> None:
    cvxpy = pytest.importorskip("cvxpy", reason="conic solvers need CVXPY")
    if "GUROBI" in cvxpy.installed_solvers():
        pytest.skip("Gurobi is installed here, so its absence cannot be tested")
    with pytest.raises(MissingDependencyError, match="gurobipy"):
        solve(random_program(0), "gurobi")


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SolverError, match=r"clarabel.*highs"):
        solve(random_program(0), "simplx")
    assert {"highs", "highs-ipm", "clarabel", "ecos", "scs", "gurobi"} <= set(solver_names())


def test_integers_are_refused_by_conic_solvers() -> None:
    base = random_program(0)
    mask = np.ones(base.columns, dtype=bool)
    problem = LinearProgram(base.cost, base.rows, base.lower, base.upper, mask)
    with pytest.raises(SolverError, match="integer"):
        solve(problem, "clarabel")
