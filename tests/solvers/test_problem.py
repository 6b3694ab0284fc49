import numpy as np
import pytest
import scipy.sparse as sp

from torch_prepared.core.rows import LinearRows, Unknowns
from torch_prepared.errors import SolverError
from torch_prepared.solvers import LinearProgram, Status, minimize_norm, solve
from torch_prepared.solvers._residuals import (
    Claim,
    dual_bound,
    farkas_gap,
    judge,
    max_violation,
    with_ray,
)


def norm_problem(norm: str, weights: np.ndarray | None = None) -> tuple[LinearProgram, Unknowns]:
    unknowns = Unknowns()
    unknowns.add("slack", (2,), lower=0.0)
    d = unknowns.add("d", (2, 2))
    matrix = np.array([[-1.0, 0, 1, 2, 0, 0], [0, -1, 0, -1, 1, -1]])
    rows = LinearRows(matrix, np.array([3.0, 2.0]))
    return minimize_norm(unknowns, rows, d.columns, weights=weights, norm=norm), unknowns


def value(norm: str, d: np.ndarray, w: np.ndarray) -> float:
    one, inf = float((w * np.abs(d)).sum()), float((w * np.abs(d)).max())
    return {"1": one, "inf": inf, "1+inf": one + inf, "2": float((w * d * d).sum())}[norm]


@pytest.mark.parametrize("norm", ["1", "inf", "1+inf", "2"])
@pytest.mark.parametrize("weighted", [False, True])
def test_objective_is_the_norm_of_the_deltas_alone(norm: str, weighted: bool) -> None:
    w = np.array([1.0, 3.0, 0.5, 2.0]) if weighted else np.ones(4)
    problem, unknowns = norm_problem(norm, w if weighted else None)
    result = solve(problem, threads=1)
    assert result.status is Status.OPTIMAL, result.message
    assert result.x is not None
    d = unknowns.split(result.x)["d"].ravel()
    assert result.objective == pytest.approx(value(norm, d, w), abs=1e-6)
    rng = np.random.default_rng(0)
    matrix = problem.rows.matrix[:2, 2:6] if norm in ("inf", "2") else problem.rows.matrix[:2, 6:10]
    matrix = matrix.toarray() if sp.issparse(matrix) else matrix
    for trial in rng.uniform(-3, 3, (4000, 4)):
        if (matrix @ trial >= [3.0, 2.0]).all():
            assert value(norm, trial, w) >= result.objective - 1e-6


def test_norm_two_keeps_dense_rows_dense() -> None:
    problem, _ = norm_problem("2")
    assert isinstance(problem.rows.matrix, np.ndarray)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"norm": "3"}, "expected one of '1'"),
        ({"weights": [-1.0]}, "nonnegative"),
        ({"weights": [np.nan]}, "nonnegative"),
        ({"weights": [1.0, 2.0]}, "weights of size 2"),
        ({"deltas": [5]}, "outside"),
        ({"deltas": [0, 0]}, "repeated"),
    ],
)
def test_bad_norm_arguments_are_named(kwargs: dict[str, object], match: str) -> None:
    unknowns = Unknowns()
    unknowns.add("d", (2,))
    deltas = kwargs.pop("deltas", [0])
    with pytest.raises(SolverError, match=match):
        minimize_norm(unknowns, LinearRows.empty(2), deltas, **kwargs)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"cost": np.ones(3)}, "cost"),
        ({"cost": np.array([np.nan, 0])}, "costs"),
        ({"lower": np.array([2.0, 0])}, "lower > upper"),
        ({"upper": np.array([np.nan, 1])}, "NaN"),
        ({"lower": np.full(2, np.inf), "upper": np.full(2, np.inf)}, "empty"),
        ({"integer": np.ones(3, dtype=bool)}, "integer mask"),
        ({"quadratic": np.array([-1.0, 0])}, "convex"),
        ({"quadratic": sp.csr_matrix(np.array([[1.0, 1], [0, 1]]))}, "symmetric"),
        ({"quadratic": sp.csr_matrix((3, 3))}, "quadratic"),
    ],
)
def test_malformed_programs_are_refused(change: dict[str, object], match: str) -> None:
    parts = {"cost": np.ones(2), "lower": np.zeros(2), "upper": np.ones(2), **change}
    with pytest.raises(SolverError, match=match):
        LinearProgram(rows=LinearRows.empty(2), **parts)


def square() -> LinearProgram:
    rows = LinearRows(np.array([[1.0, 1.0]]), np.array([1.0]))
    return LinearProgram(np.array([1.0, 2.0]), rows, np.zeros(2), np.ones(2))


def test_judge_never_repeats_an_unsupported_claim() -> None:
    def status(claim: Status, x: list[float] | None, dual: float | None = None) -> Status:
        point = None if x is None else np.array(x)
        duals = None if dual is None else np.array([dual])
        return judge(square(), Claim(claim, "", point, duals), seconds=0.0, solver="t").status

    assert status(Status.OPTIMAL, [1.0, 0.0], 1.0) is Status.OPTIMAL
    assert status(Status.OPTIMAL, [1.0, 0.0]) is Status.FEASIBLE  # no multipliers to confirm it
    assert status(Status.OPTIMAL, [0.0, 1.0], 1.0) is Status.FEASIBLE  # gap
    assert status(Status.OPTIMAL, [0.5, 0.0], 1.0) is Status.UNKNOWN  # violated
    assert status(Status.OPTIMAL, [np.nan, 1.0], 1.0) is Status.UNKNOWN
    assert status(Status.OPTIMAL, None) is Status.UNKNOWN
    assert status(Status.TIME_LIMIT, None) is Status.TIME_LIMIT
    assert status(Status.TIME_LIMIT, [0.0, 1.0]) is Status.FEASIBLE
    assert status(Status.UNKNOWN, [0.0, 1.0], 1.0) is Status.UNKNOWN  # "almost optimal"


def test_dual_bound_is_below_every_feasible_value() -> None:
    problem, rng = square(), np.random.default_rng(0)
    points = [x for x in rng.uniform(0, 1, (200, 2)) if x.sum() >= 1]
    for y in rng.uniform(-1, 4, 50):
        bound = dual_bound(problem, None, np.array([y]))
        assert all(bound <= problem.objective(x) + 1e-12 for x in points)


def test_violation_counts_bounds_and_integrality() -> None:
    rows = LinearRows.empty(2)
    problem = LinearProgram(
        np.zeros(2), rows, np.zeros(2), np.ones(2), integer=np.array([True, False])
    )
    assert max_violation(problem, np.array([0.25, 0.5])) == pytest.approx(0.25)
    assert max_violation(problem, np.array([1.0, 1.5])) == pytest.approx(0.5)
    assert max_violation(problem, np.array([np.nan, 0.5])) == np.inf


def test_wrong_infeasible_verdict_is_taken_back() -> None:
    problem = square()
    verdict = judge(problem, Claim(Status.INFEASIBLE, "claimed"), seconds=0.0, solver="t")
    assert with_ray(problem, verdict, solve).status is Status.UNKNOWN


def test_farkas_gap_rejects_what_proves_nothing() -> None:
    problem = square()
    assert farkas_gap(problem, np.array([1.0])) <= 0.0
    assert farkas_gap(problem, np.array([np.nan])) == -np.inf
    assert farkas_gap(problem, np.zeros(1)) == -np.inf
