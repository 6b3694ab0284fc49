import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.core.rows import LinearRows
from torch_prepared.errors import SolverError
from torch_prepared.solvers import LinearProgram, Status, gram_matrix, project, solve


def quadratic_objective(jacobian: np.ndarray, q: np.ndarray) -> float:
    """Optimal |d|^2 / 2 by a general quadratic solver."""
    p = jacobian.shape[1]
    problem = LinearProgram(
        np.zeros(p), LinearRows(jacobian, q), np.full(p, -np.inf), np.full(p, np.inf),
        quadratic=np.ones(p),
    )  # fmt: skip
    result = solve(problem, "clarabel")
    assert result.status is Status.OPTIMAL, result.message
    return result.objective


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
def test_agrees_with_a_quadratic_solver(seed: int, m: int, p: int) -> None:
    pytest.importorskip("cvxpy", reason="conic solvers need CVXPY")
    rng = np.random.default_rng(seed)
    jacobian = rng.normal(size=(m, p))
    q = jacobian @ rng.normal(size=p) - rng.uniform(0, 1, m)
    result = project(jacobian @ jacobian.T, q)
    assert result.status is Status.OPTIMAL
    d = jacobian.T @ result.multipliers
    assert (jacobian @ d >= q - 1e-7 * (1 + np.abs(q).max())).all()
    assert (result.multipliers >= 0).all()
    expected = quadratic_objective(jacobian, q)
    assert 0.5 * d @ d == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert result.distance == pytest.approx(np.linalg.norm(d), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("m", "p"), [(9, 2000), (300, 1000), (400, 60)])
def test_kkt_conditions_hold_to_high_accuracy(m: int, p: int) -> None:
    rng = np.random.default_rng(m)
    jacobian = rng.normal(size=(m, p))
    q = jacobian @ rng.normal(size=p) - rng.uniform(0, 0.2, m)
    gram = jacobian @ jacobian.T
    result = project(gram, q)
    assert result.status is Status.OPTIMAL
    assert result.kkt_residual <= 1e-10
    slack = gram @ result.multipliers - q
    assert slack.min() >= -1e-8
    assert np.abs(slack * result.multipliers).max() <= 1e-7


def test_metric_is_respected() -> None:
    generator = torch.Generator().manual_seed(0)
    jacobian = torch.randn(4, 20, generator=generator)
    metric = torch.rand(20, generator=generator, dtype=torch.float64) + 0.1
    gram = gram_matrix(jacobian, lambda rows: rows / metric)
    q = torch.tensor([1.0, -1.0, 0.5, 0.2], dtype=torch.float64)
    result = project(gram, q)
    multipliers = torch.from_numpy(result.multipliers)
    d = (jacobian.double().T @ multipliers) / metric
    assert bool((jacobian.double() @ d >= q - 1e-9).all())
    assert result.distance == pytest.approx(float((d * metric * d).sum().sqrt()))


def test_repeated_and_scaled_rows() -> None:
    rng = np.random.default_rng(1)
    jacobian = np.repeat(rng.normal(size=(5, 30)), 20, axis=0)
    q = np.repeat(rng.normal(size=5), 20)
    scale = 10.0 ** rng.uniform(-6, 6, 100)
    plain, scaled = (
        project(j @ j.T, r) for j, r in ((jacobian, q), (jacobian * scale[:, None], q * scale))
    )
    assert plain.status is scaled.status is Status.OPTIMAL
    assert plain.distance == pytest.approx(scaled.distance, rel=1e-8)


def test_cycling_pivots_fall_back_to_interior_point() -> None:
    rng = np.random.default_rng(5)
    jacobian = rng.normal(size=(600, 90))
    q = jacobian @ rng.normal(size=90) - 0.1 * np.abs(rng.normal(size=600))
    result = project(jacobian @ jacobian.T, q)
    assert result.status is Status.OPTIMAL
    assert result.kkt_residual <= 1e-10


@pytest.mark.parametrize("slack", [0.0, -0.999])
def test_contradiction_gives_a_farkas_ray(slack: float) -> None:
    jacobian = np.array([[1.0, 2.0], [-1.0, -2.0], [0.0, 1.0]])
    q = np.array([1.0, slack, -5.0])
    result = project(jacobian @ jacobian.T, q)
    assert result.status is Status.INFEASIBLE
    assert result.ray is not None
    assert (result.ray >= 0).all()
    assert q @ result.ray > 0
    assert np.abs(jacobian.T @ result.ray).max() <= 1e-7 * result.ray.max()


def test_infeasible_overdetermined_rows() -> None:
    rng = np.random.default_rng(0)
    jacobian = rng.normal(size=(300, 40))
    q = rng.normal(size=300)
    result = project(jacobian @ jacobian.T, q)
    assert result.status is Status.INFEASIBLE
    assert result.ray is not None
    needed = q @ result.ray / np.linalg.norm(jacobian.T @ result.ray)
    assert needed > 1e3


def test_zero_rows_and_nothing_to_do() -> None:
    assert project(np.zeros((1, 1)), [1.0]).status is Status.INFEASIBLE
    idle = project(np.diag([0.0, 1.0]), [-1.0, -2.0])
    assert idle.status is Status.OPTIMAL
    assert idle.distance == 0.0
    assert project(np.zeros((0, 0)), np.zeros(0)).status is Status.OPTIMAL


@pytest.mark.parametrize(
    ("gram", "q", "match"),
    [
        (np.eye(2), np.zeros(3), "expected"),
        (np.full((1, 1), np.nan), np.zeros(1), "NaN"),
        (np.eye(1), np.array([np.inf]), "infinite"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), np.zeros(2), "asymmetric"),
        (-np.eye(1), np.ones(1), "negative"),
    ],
)
def test_malformed_input_is_refused(gram: np.ndarray, q: np.ndarray, match: str) -> None:
    with pytest.raises(SolverError, match=match):
        project(gram, q)


@pytest.mark.parametrize("seed", range(4))
def test_many_rows_of_which_few_matter(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in bundles of near copies, most of them violated: as many rows solved for at once."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(40, 300, generator=generator, dtype=torch.float64)
    rows = centers.repeat(10, 1) + 1e-3 * torch.randn(400, 300, generator=generator).double()
    q = torch.rand(400, generator=generator, dtype=torch.float64) - 0.2
    gram = gram_matrix(rows)
    few = project(gram, q)
    assert few.status is Status.OPTIMAL
    assert few.kkt_residual <= 1e-10
    assert bool((rows @ (rows.T @ torch.from_numpy(few.multipliers)) >= q - 1e-8).all())
    monkeypatch.setattr("torch_prepared.solvers.projection._FEW", 10**9)
    every = project(gram, q)
    assert few.distance == pytest.approx(every.distance, rel=1e-9)
    steps = [rows.T @ torch.from_numpy(found.multipliers) for found in (few, every)]
    torch.testing.assert_close(*steps, rtol=1e-7, atol=1e-8)


def test_two_opposite_rows_among_many_are_infeasible() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 50, generator=generator, dtype=torch.float64)
    rows[150] = -rows[20]
    q = torch.full((200,), -50.0, dtype=torch.float64)
    q[20] = q[150] = 1.0
    found = project(gram_matrix(rows), q)
    assert found.status is Status.INFEASIBLE
    assert found.ray is not None
    assert float(q @ torch.from_numpy(found.ray)) > 0
    assert float((rows.T @ torch.from_numpy(found.ray)).norm()) < 1e-9
