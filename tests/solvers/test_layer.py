"""Projection layer: optimality, gradients against re-solves, failures that stay in their sample."""

import numpy as np
import pytest
import torch
from _layer_problems import problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_prepared.core.rows import LinearRows
from torch_prepared.errors import PreparedWarning, SolverError
from torch_prepared.solvers import LinearProgram, ProjectionLayer, Status, project_batch, solve


def kkt_gap(x0: Tensor, rows: Tensor, rhs: Tensor, x: Tensor, u: Tensor) -> float:
    """Largest of stationarity, violation, sign and complementarity."""
    excess = (rows @ x[:, :, None])[:, :, 0] - rhs
    parts = (x - x0 + (u[:, None, :] @ rows)[:, 0], excess.clamp_min(0), u.clamp_max(0), u * excess)
    return max(float(part.abs().max()) for part in parts)


@pytest.mark.parametrize(
    ("batch", "n", "m"), [(5, 30, 8), (4, 300, 60), (6, 20, 70), (2, 60, 400), (1, 7, 1)]
)
def test_optimality_conditions(batch: int, n: int, m: int) -> None:
    x0, rows, rhs = problem(batch, n, m)
    found = project_batch(x0, rows, rhs)
    assert set(found.report.statuses) == {Status.OPTIMAL}
    assert float(found.report.violation.max()) <= 1e-8
    assert kkt_gap(x0, rows, rhs, found.x, found.report.multipliers) <= 1e-9


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_agrees_with_a_quadratic_solver(seed: int, n: int, m: int, equality: bool) -> None:
    x0, rows, rhs = problem(1, n, m, seed)
    weight = torch.rand(n, dtype=torch.float64) + 0.5
    equal = torch.zeros(m, dtype=torch.bool)
    equal[0] = equality
    found = project_batch(x0, rows, rhs, metric=weight, equal=equal, on_failure="nan")
    general = LinearProgram(
        (-weight * x0[0]).numpy(),
        LinearRows(-rows[0].numpy(), -rhs[0].numpy(), equal.numpy()),
        np.full(n, -np.inf), np.full(n, np.inf), quadratic=weight.numpy(),
    )  # fmt: skip
    expected = solve(general, "clarabel")
    assert found.report.statuses == (expected.status,)
    if expected.status is Status.OPTIMAL:
        assert found.x[0].numpy() == pytest.approx(expected.x, abs=2e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared: bool) -> None:
    x0, rows, rhs = problem(3, 6, 4)
    if shared:
        rhs = rhs[0] + 0 * rhs
        rows = rows[0]
    metric = torch.rand(6, dtype=torch.float64) + 0.5
    inputs = [t.clone().requires_grad_() for t in (x0, rows, rhs, metric)]

    def point(x0: Tensor, rows: Tensor, rhs: Tensor, metric: Tensor) -> Tensor:
        found = project_batch(x0, rows, rhs, metric=metric)
        assert bool(found.report.solved.all())
        return found.x

    torch.autograd.gradcheck(point, inputs, fast_mode=True)


def test_gradcheck_with_equalities() -> None:
    x0, rows, rhs = problem(3, 6, 4)
    equal = torch.tensor([True, False, False, True])
    inputs = [t.clone().requires_grad_() for t in (x0, rows, rhs)]
    torch.autograd.gradcheck(lambda *a: project_batch(*a, equal=equal).x, inputs, fast_mode=True)


@pytest.mark.parametrize(("n", "m"), [(200, 20), (40, 120)])
def test_gradient_of_every_sample_is_that_of_re_solves(n: int, m: int) -> None:
    data = problem(8, n, m)
    leaves = [t.clone().requires_grad_() for t in data]
    upstream, step = torch.randn_like(data[0]), 1e-6
    (project_batch(*leaves).x * upstream).sum().backward()
    toward = [torch.randn_like(t) / (n**0.5 if t.dim() == 3 else 1.0) for t in data]
    ends = [
        project_batch(*(t + sign * step * d for t, d in zip(data, toward, strict=True))).x
        for sign in (1.0, -1.0)
    ]
    expected = ((ends[0] - ends[1]) * upstream).sum(1) / (2 * step)
    claimed = sum((t.grad * d).flatten(1).sum(1) for t, d in zip(leaves, toward, strict=True))
    error = (claimed - expected).abs() / expected.abs().clamp_min(1.0)
    assert float(error.max()) <= 1e-5


def test_metric_given_by_its_inverse() -> None:
    x0, rows, rhs = problem(3, 12, 4)
    root = torch.randn(12, 12, dtype=torch.float64)
    metric = root @ root.T + torch.eye(12)
    inverse = torch.linalg.inv(metric)
    leaves = [t.clone().requires_grad_() for t in (x0, rows, rhs)]
    found = project_batch(*leaves, inverse_metric=lambda v: v @ inverse)
    pull = (found.x - x0) @ metric + (found.report.multipliers[:, None] @ rows)[:, 0]
    assert float(pull.detach().abs().max()) <= 1e-9
    torch.autograd.gradcheck(
        lambda *a: project_batch(*a, inverse_metric=lambda v: v @ inverse).x, leaves, fast_mode=True
    )


def test_infeasible_and_nan_samples_leave_the_others_alone() -> None:
    x0, rows, rhs = problem(5, 20, 6)
    good = project_batch(x0, rows, rhs).x
    bad_rows, bad_rhs = rows.clone(), rhs.clone()
    bad_rows[1, 1], bad_rhs[1, 1] = -bad_rows[1, 0], -bad_rhs[1, 0] - 1.0
    bad_rhs[3, 2] = torch.nan
    bad_rows[4, 0] = 0.0
    bad_rhs[4, 0] = -1.0
    leaves = [t.clone().requires_grad_() for t in (x0, bad_rows, bad_rhs)]
    with pytest.warns(PreparedWarning, match=r"3 of 5 .*1 infeasible, 3 unknown, 4 infeasible"):
        found = project_batch(*leaves)
    s = Status
    assert found.report.statuses == (s.OPTIMAL, s.INFEASIBLE, s.OPTIMAL, s.UNKNOWN, s.INFEASIBLE)
    assert torch.equal(found.x[[0, 2]], good[[0, 2]]) or torch.allclose(found.x[0], good[0])
    assert torch.equal(found.x[[1, 3, 4]], x0[[1, 3, 4]])
    for sample in (1, 4):
        ray = found.report.ray[sample]
        assert bool((ray >= 0).all())
        assert float((ray @ bad_rows[sample]).abs().max()) <= 1e-7 * float(ray.max())
        assert float(ray @ bad_rhs[sample]) < 0
    found.x.sum().backward()
    for leaf in leaves:
        assert bool(leaf.grad.isfinite().all())
        assert float(leaf.grad[[1, 3, 4]].abs().max()) == 0.0
        assert float(leaf.grad[0].abs().max()) > 0.0


def test_policies_for_failures() -> None:
    x0, rhs = torch.zeros(1, 1), torch.tensor([[-1.0, -1.0]])
    rows = torch.tensor([[1.0], [-1.0]])
    assert bool(project_batch(x0, rows, rhs, on_failure="nan").x.isnan().all())
    with pytest.raises(SolverError, match="1 of 1 samples"):
        project_batch(x0, rows, rhs, on_failure="raise")


def test_float32_violation_is_that_of_the_rounded_point() -> None:
    x0, rows, rhs = (t.float() for t in problem(4, 50, 6))
    found = project_batch(x0, rows, rhs)
    assert found.x.dtype == torch.float32
    excess = (rows.double() @ found.x.double()[:, :, None])[:, :, 0] - rhs.double()
    worst = (excess / rhs.double().abs().clamp_min(1)).clamp_min(0).amax(1)
    assert torch.allclose(found.report.violation, worst, atol=0)
    assert 0 < float(worst.max()) <= 1e-5


def test_chunks_single_samples_and_empty_batches_agree() -> None:
    x0, rows, rhs = problem(5, 20, 6)
    whole = project_batch(x0, rows, rhs)
    assert torch.allclose(project_batch(x0, rows, rhs, max_memory=1).x, whole.x, atol=1e-12)
    assert torch.allclose(project_batch(x0[2], rows[2], rhs[2]).x, whole.x[2], atol=1e-12)
    none = project_batch(x0[:0], rows[:0], rhs[:0])
    assert none.x.shape == (0, 20)
    assert none.report.statuses == ()
    free = project_batch(x0, rows[:, :0], rhs[:, :0])
    assert torch.equal(free.x, x0)
    inside = project_batch(x0, rows, rhs + 1e3)
    assert torch.equal(inside.x, x0)


def test_repeated_and_scaled_rows() -> None:
    x0, rows, rhs = problem(2, 15, 3)
    scale = torch.logspace(-6, 6, 30, dtype=torch.float64)
    many, many_rhs = rows.repeat(1, 10, 1) * scale[:, None], rhs.repeat(1, 10) * scale
    expected = project_batch(x0, rows, rhs)
    found = project_batch(x0, many, many_rhs)
    assert set(found.report.statuses) == {Status.OPTIMAL}
    assert torch.allclose(found.x, expected.x, atol=1e-8)


def test_same_inputs_give_the_same_bits_and_are_not_changed() -> None:
    data = problem(6, 30, 40)
    copies = [t.clone() for t in data]
    torch.use_deterministic_algorithms(True)
    try:
        leaves = [[t.clone().requires_grad_() for t in data] for _ in range(2)]
        for each in leaves:
            project_batch(*each).x.square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*leaves, strict=True):
        assert torch.equal(first.grad, second.grad)
    assert all(torch.equal(t, c) for t, c in zip(data, copies, strict=True))


class TestModule:
    def test_rows_of_the_package_point_the_other_way(self) -> None:
        rows = LinearRows(np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([2.0, 0.5]),
                          np.array([False, True]))  # fmt: skip
        x = ProjectionLayer(rows)(torch.zeros(3, 2, dtype=torch.float64))
        assert torch.allclose(x, torch.tensor([1.25, 0.75], dtype=torch.float64))

    def test_warm_start_changes_nothing_but_time(self) -> None:
        x0, rows, rhs = problem(4, 30, 8)
        layer = ProjectionLayer(warm_start=True)
        layer(x0, rows, rhs)
        again = layer(x0 + 1e-3, rows, rhs)
        wrong = ProjectionLayer(warm_start=True)
        wrong(-x0, rows, rhs)
        expected = project_batch(x0 + 1e-3, rows, rhs).x
        assert torch.allclose(again, expected, atol=1e-11)
        assert torch.allclose(wrong(x0 + 1e-3, rows, rhs), expected, atol=1e-11)

    def test_compiles_around_a_clean_graph_break(self) -> None:
        x0, rows, rhs = problem(4, 10, 3)
        layer = ProjectionLayer()

        def loss(x0: Tensor) -> Tensor:
            return (layer(x0 * 2.0, rows, rhs) ** 2).sum()

        leaves = [x0.clone().requires_grad_() for _ in range(2)]
        torch.compile(loss, backend="aot_eager")(leaves[0]).backward()
        loss(leaves[1]).backward()
        assert torch.allclose(leaves[0].grad, leaves[1].grad)

    def test_rows_are_part_of_state_and_device_moves(self, device: str) -> None:
        layer = ProjectionLayer(LinearRows(np.ones((1, 3)), np.ones(1))).to(device)
        assert set(layer.state_dict()) == {"A", "b"}
        x = layer(torch.zeros(2, 3, dtype=torch.float64, device=device))
        assert torch.allclose(x.sum(1), torch.ones(2, dtype=torch.float64, device=device))

    def test_no_rows_is_an_error(self) -> None:
        with pytest.raises(SolverError, match="got no rows"):
            ProjectionLayer()(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"A": torch.zeros(4, 3, 7)}, r"expected \(b, n\)"),
        ({"b": torch.zeros(4)}, r"expected \(b, n\)"),
        ({"x0": torch.zeros(4, 6, dtype=torch.int64)}, "expected float32 or float64"),
        ({"metric": torch.zeros(6)}, "expected positive"),
        ({"metric": torch.ones(6), "inverse_metric": lambda v: v}, "one of them"),
        ({"equal": torch.zeros(2, dtype=torch.bool)}, "expected bool"),
        ({"A": torch.full((3, 6), torch.nan)}, "NaN"),
    ],
)
def test_malformed_input_is_refused(change: dict[str, object], match: str) -> None:
    given = {"x0": torch.zeros(4, 6), "A": torch.zeros(4, 3, 6), "b": torch.zeros(4, 3)} | change
    with pytest.raises(SolverError, match=match):
        project_batch(**given)
