"""Interior points of separable programs, and many rows: agreement with HiGHS and Clarabel."""

import numpy as np
import pytest
import torch
from _layer_problems import problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_prepared.core.rows import LinearRows
from torch_prepared.solvers import (
    LinearProgram,
    Status,
    project_batch,
    solve,
    solve_lp_batch,
)
from torch_prepared.solvers._batched_interior import run_interior
from torch_prepared.solvers._batched_separable import SeparableBatch
from torch_prepared.solvers._complementarity import self_product


@pytest.fixture(autouse=True)
def _one_thread(_reproducible: None) -> None:
    """Programs this small only lose by threads."""
    torch.set_num_threads(1)


def one_norm_batch(center: Tensor, rows: Tensor, rhs: Tensor) -> SeparableBatch:
    zero, one = torch.zeros_like(center), torch.ones_like(center)
    return SeparableBatch(
        rows, rhs, zero, one, center, zero, zero, zero - torch.inf, zero + torch.inf,
        torch.zeros(rhs.shape[1], dtype=torch.bool),
    )  # fmt: skip


@pytest.mark.parametrize(("n", "m"), [(120, 20), (60, 60), (40, 90)])
def test_vertices_on_the_way_are_exact(n: int, m: int) -> None:
    """Both forms of the Newton system end at a vertex that meets the conditions to rounding."""
    scaled, *_ = one_norm_batch(*problem(6, n, m)).scaled()
    found, _ = run_interior(scaled, scaled.center, 1e-10)
    assert float(found.residual.max()) <= 1e-10
    assert float(scaled.optimality(found.x, found.y).max()) <= 1e-10
    assert torch.equal(found.free.sum(1), found.active.sum(1))


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 25),
    st.sampled_from(["dense", "integers", "repeated", "sparse", "tight"]), st.booleans(),
)  # fmt: skip
def test_one_norm_agrees_with_highs(seed: int, n: int, m: int, kind: str, equality: bool) -> None:
    center, rows, rhs = problem(2, n, m, seed)
    generator = torch.Generator().manual_seed(seed)
    if kind == "integers":  # many optimal vertices, many tight rows
        rows, center = rows.sign(), center.round()
        rhs = (rows @ center[:, :, None])[:, :, 0] - 1.0 + (rhs > 0.0)
    elif kind == "repeated":
        rows[:, m // 2 :], rhs[:, m // 2 :] = rows[:, : m - m // 2], rhs[:, : m - m // 2]
    elif kind == "sparse":
        rows = rows * (torch.rand(2, m, n, generator=generator) < 0.3)
        rhs = (rows @ center[:, :, None])[:, :, 0] + 0.1 * rhs
    elif kind == "tight":  # often infeasible
        rhs = rhs - 0.5
    equal = torch.zeros(m, dtype=torch.bool)
    equal[0] = equality
    one = torch.ones(n, dtype=torch.float64)
    found = solve_lp_batch(rows, rhs, weight=one, center=center, equal=equal, on_failure="nan")
    for sample in range(2):
        shifted = (rhs[sample] - rows[sample] @ center[sample]).numpy()
        both = np.hstack([-rows[sample].numpy(), rows[sample].numpy()])  # up and down
        constraints = LinearRows(both, -shifted, equal.numpy())
        expected = solve(
            LinearProgram(np.ones(2 * n), constraints, np.zeros(2 * n), np.full(2 * n, np.inf))
        )
        assert found.report.statuses[sample] is expected.status
        if expected.status is Status.OPTIMAL:
            distance = float((found.x[sample] - center[sample]).abs().sum())
            assert distance == pytest.approx(expected.objective, rel=1e-7, abs=1e-7)
            assert float(found.report.violation[sample]) <= 1e-8
        elif expected.status is Status.INFEASIBLE:
            ray = found.report.ray[sample]
            assert bool((ray[~equal] >= 0.0).all())
            assert float(ray @ rhs[sample]) < 0.0
            pull = float((ray @ rows[sample]).abs().max())
            assert pull <= 1e-5 * float(ray.abs().max())


def check_gradients(solver: object, data: tuple[Tensor, ...], step: float = 1e-7) -> None:
    """Directional derivatives of every sample against central differences of re-solves."""
    assert callable(solver)
    generator = torch.Generator().manual_seed(7)
    leaves = [t.clone().requires_grad_() for t in data]
    upstream = torch.randn(data[0].shape, generator=generator, dtype=torch.float64)
    (solver(*leaves) * upstream).sum().backward()
    n = data[0].shape[1]
    toward = [
        torch.randn(t.shape, generator=generator, dtype=t.dtype) / (n**0.5 if t.dim() == 3 else 1.0)
        for t in data
    ]
    high, low = (
        solver(*(t + sign * step * d for t, d in zip(data, toward, strict=True)))
        for sign in (1.0, -1.0)
    )
    expected = ((high - low) * upstream).sum(1) / (2.0 * step)
    claimed = sum((t.grad * d).flatten(1).sum(1) for t, d in zip(leaves, toward, strict=True))
    error = (claimed - expected).abs() / expected.abs().clamp_min(1.0)
    assert float(error.max()) <= 1e-5


@pytest.mark.parametrize(("n", "m"), [(60, 120), (150, 90)])
@pytest.mark.parametrize("norm", ["1", "2"])
def test_gradients_with_many_rows(norm: str, n: int, m: int) -> None:
    one = torch.ones(n, dtype=torch.float64)

    def point(x0: Tensor, rows: Tensor, rhs: Tensor) -> Tensor:
        if norm == "2":
            found = project_batch(x0, rows, rhs)
        else:
            found = solve_lp_batch(rows, rhs, weight=one, center=x0)
        assert set(found.report.statuses) == {Status.OPTIMAL}
        assert float(found.report.violation.max()) <= 1e-8
        return found.x

    check_gradients(point, problem(5, n, m))


@pytest.mark.parametrize(("n", "m"), [(25, 50), (10, 80)])
def test_projection_on_more_rows_than_columns_agrees_with_clarabel(n: int, m: int) -> None:
    x0, rows, rhs = problem(4, n, m)
    rhs[1] -= 0.4  # nothing fits here
    found = project_batch(x0, rows, rhs, on_failure="nan")
    for sample in range(4):
        program = LinearProgram(
            -x0[sample].numpy(), LinearRows(-rows[sample].numpy(), -rhs[sample].numpy()),
            np.full(n, -np.inf), np.full(n, np.inf), quadratic=np.ones(n),
        )  # fmt: skip
        expected = solve(program, "clarabel")
        assert found.report.statuses[sample] is expected.status
        if expected.status is Status.OPTIMAL:
            assert found.x[sample].numpy() == pytest.approx(expected.x, abs=2e-5)
    assert found.report.statuses[1] is Status.INFEASIBLE


def test_factors_of_forward_and_those_made_again_give_the_same_gradients() -> None:
    data = problem(4, 30, 12)
    gradients = []
    for memory in (2**30, 1):  # nothing fits in one byte: factored again in backward
        leaves = [t.clone().requires_grad_() for t in data]
        project_batch(*leaves, max_memory=memory).x.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for first, second in zip(*gradients, strict=True):
        assert torch.allclose(first, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_spoil_their_own_sample_alone(value: float) -> None:
    data = problem(3, 10, 4)
    spoiled = data[1].clone()
    spoiled[1, 2, 3] = value
    leaves = [t.clone().requires_grad_() for t in (data[0], spoiled, data[2])]
    found = project_batch(*leaves, on_failure="nan")
    s = Status
    assert found.report.statuses == (s.OPTIMAL, s.UNKNOWN, s.OPTIMAL)
    found.x[[0, 2]].sum().backward()
    whole = [t.clone().requires_grad_() for t in data]
    project_batch(*whole).x[[0, 2]].sum().backward()
    for first, second in zip(leaves, whole, strict=True):
        assert torch.equal(first.grad[1], torch.zeros_like(first.grad[1]))
        assert torch.allclose(first.grad[[0, 2]], second.grad[[0, 2]], atol=1e-12)


def test_shared_rows_in_chunks_agree_with_rows_of_their_own() -> None:
    x0, rows, rhs = problem(6, 40, 9)
    shared = [t.clone().requires_grad_() for t in (x0, rows[0])]
    own = [t.clone().requires_grad_() for t in (x0, rows[:1].expand(6, -1, -1))]
    first = project_batch(*shared, rhs[0], max_memory=1)
    second = project_batch(*own, rhs[0])
    assert torch.allclose(first.x, second.x, atol=1e-12)
    for found in (first, second):
        found.x.square().sum().backward()
    assert torch.allclose(shared[1].grad, own[1].grad.sum(0), atol=1e-10)


def test_a_start_far_off_changes_nothing_but_time() -> None:
    center, rows, rhs = problem(3, 40, 60)
    one = torch.ones(40, dtype=torch.float64)
    cold = solve_lp_batch(rows, rhs, weight=one, center=center)
    wrong = (-1e3 * center, torch.ones_like(rhs))
    warm = solve_lp_batch(rows, rhs, weight=one, center=center, start=wrong, fallback=False)
    again = solve_lp_batch(rows, rhs, weight=one, center=center, start=(cold.x, cold.multipliers))
    for found in (warm, again):
        assert set(found.report.statuses) == {Status.OPTIMAL}
        assert torch.allclose(found.x, cold.x, atol=1e-9)


def test_same_inputs_give_the_same_bits() -> None:
    center, rows, rhs = problem(4, 30, 50)
    one = torch.ones(30, dtype=torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (solve_lp_batch(rows, rhs, weight=one, center=center) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.multipliers, second.multipliers)


@pytest.mark.parametrize("m", [1, 63, 64, 65, 130, 700])
def test_symmetric_product(m: int) -> None:
    rows = torch.randn(2, m, 5, dtype=torch.float64)
    weight = torch.rand(5, dtype=torch.float64)
    found = self_product(rows, rows * weight)
    assert torch.equal(found, found.mT)
    assert torch.allclose(found, rows @ (rows * weight).mT, atol=1e-12)


@pytest.mark.parametrize(("n", "m"), [(140, 300), (150, 150), (300, 140)])
def test_large_programs_agree_with_highs(n: int, m: int) -> None:
    center, rows, rhs = problem(2, n, m, n + m)
    one = torch.ones(n, dtype=torch.float64)
    found = solve_lp_batch(rows, rhs, weight=one, center=center, fallback=False)
    assert found.report.statuses == (Status.OPTIMAL,) * 2
    assert float(found.report.violation.max()) <= 1e-8
    shifted = (rhs[0] - rows[0] @ center[0]).numpy()
    both = np.hstack([-rows[0].numpy(), rows[0].numpy()])
    expected = solve(
        LinearProgram(
            np.ones(2 * n), LinearRows(both, -shifted), np.zeros(2 * n), np.full(2 * n, np.inf)
        )
    )
    distance = float((found.x[0] - center[0]).abs().sum())
    assert distance == pytest.approx(expected.objective, rel=1e-7)
