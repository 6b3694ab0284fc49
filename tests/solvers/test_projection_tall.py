"""Batched projections with more rows than unknowns: exact KKT points, whatever the data."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_prepared.errors import PreparedWarning
from torch_prepared.solvers import Status, project_batch
from torch_prepared.solvers import _batched_central as central
from torch_prepared.solvers._batched_central import interior_point
from torch_prepared.solvers._batched_gram import DenseGram, Gram, RowsGram

FAMILIES = ("inside", "duplicate", "nearly", "scaled", "vertex", "integer", "loose")
SIZES = [(6, 20), (30, 40), (40, 200), (150, 310), (300, 320)]  #: n, m


def problem(n: int, m: int, family: str, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x0, A and b with a known feasible point."""
    generator = torch.Generator().manual_seed(7 * n + m)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, inside = normal(batch, m, n), normal(batch, n, 1)
    if family == "integer":
        rows = rows.round().clamp(-1.0, 1.0)
    if family in ("duplicate", "nearly"):
        rows[:, m // 2 :] = rows[:, : m - m // 2]
    if family == "nearly":
        rows[:, m // 2 :] += 1e-7 * normal(batch, m - m // 2, n)
    room = torch.rand(batch, m, generator=generator, dtype=torch.float64)
    room = room * {"vertex": 0.0, "loose": 5.0}.get(family, 0.1)
    rhs = (rows @ inside)[:, :, 0] + room
    if family == "scaled":
        size = 10.0 ** (6.0 * torch.rand(batch, m, generator=generator, dtype=torch.float64) - 3.0)
        rows, rhs = rows * size[:, :, None], rhs * size
    return normal(batch, n), rows, rhs


def assert_optimal(
    x: Tensor, u: Tensor, x0: Tensor, rows: Tensor, rhs: Tensor, equal: Tensor | None = None
) -> None:
    """``x = x0 - A^T u`` with ``u >= 0``, ``A x <= b`` and, of each row, u or the slack zero."""
    norms = torch.linalg.vector_norm(rows, dim=2).clamp_min(1e-300)
    slack = (rhs - (rows @ x[:, :, None])[:, :, 0]) / norms
    price = u * norms
    torch.testing.assert_close(x, x0 - (u[:, None] @ rows)[:, 0], rtol=0.0, atol=1e-8)
    free = torch.zeros(rhs.shape[1], dtype=torch.bool) if equal is None else equal
    assert bool((price >= 0.0)[:, ~free].all())
    assert bool((slack >= -1e-8)[:, ~free].all())
    assert float(slack[:, free].abs().max()) <= 1e-8 if bool(free.any()) else True
    assert float(torch.minimum(price, slack)[:, ~free].abs().max()) <= 1e-8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_kkt_conditions_hold(n: int, m: int, family: str) -> None:
    x0, rows, rhs = problem(n, m, family)
    found = project_batch(x0, rows, rhs, on_failure="raise")
    assert_optimal(found.x, found.report.multipliers, x0, rows, rhs)
    again = project_batch(x0, rows, rhs, start=found.report.active, on_failure="raise")
    assert_optimal(again.x, again.report.multipliers, x0, rows, rhs)
    torch.testing.assert_close(again.x, found.x, rtol=0.0, atol=1e-8)


@pytest.mark.parametrize(("n", "m"), [(12, 40), (60, 90), (140, 300)])
def test_equality_rows_hold_exactly(n: int, m: int) -> None:
    x0, rows, rhs = problem(n, m, "inside")
    equal = torch.zeros(m, dtype=torch.bool)
    equal[: n // 4] = True
    inside = torch.linalg.lstsq(rows[:, : n // 4], rhs[:, : n // 4, None]).solution
    rhs = torch.where(equal, rhs, (rows @ inside)[:, :, 0] + 0.1)
    found = project_batch(x0, rows, rhs, equal=equal, on_failure="raise")
    assert_optimal(found.x, found.report.multipliers, x0, rows, rhs, equal)


def test_agrees_with_clarabel() -> None:
    cp = pytest.importorskip("cvxpy", reason="the reference needs CVXPY")
    x0, rows, rhs = problem(20, 60, "inside", batch=2)
    found = project_batch(x0, rows, rhs)
    for k in range(2):
        x = cp.Variable(20)
        goal = cp.Minimize(0.5 * cp.sum_squares(x - x0[k].numpy()))
        cp.Problem(goal, [rows[k].numpy() @ x <= rhs[k].numpy()]).solve(
            solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
        )
        np.testing.assert_allclose(found.x[k].numpy(), x.value, atol=1e-6)


@pytest.mark.parametrize(("n", "m"), [(10, 40), (40, 100), (150, 280), (200, 700)])
def test_bad_samples_are_refuted_and_leave_the_others_alone(n: int, m: int) -> None:
    x0, rows, rhs = problem(n, m, "inside", batch=6)
    alone = project_batch(x0[4:], rows[4:], rhs[4:])
    rows[:2, 1] = -rows[:2, 0]
    rhs[:2, 1] = -rhs[:2, 0] - 0.5
    rows[2, 0, 0] = torch.nan
    rows[3, 5], rhs[3, 5] = 0.0, -0.1  # 0 <= -0.1
    rows[4, 7], rhs[4, 7] = 0.0, 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreparedWarning)
        found = project_batch(x0, rows, rhs)
    states = found.report.statuses
    assert states[:2] == (Status.INFEASIBLE,) * 2
    assert states[2:4] == (Status.UNKNOWN, Status.INFEASIBLE)
    assert states[4:] == (Status.OPTIMAL,) * 2
    for k in (0, 1, 3):
        ray = found.report.ray[k]
        assert bool((ray >= 0.0).all())
        size = float((ray[:, None] * rows[k]).abs().sum(0).max())
        assert float((ray @ rows[k]).abs().max()) <= 1e-4 * max(size, 1e-300)
        assert float(ray @ rhs[k]) < 0.0
    assert_optimal(found.x[4:], found.report.multipliers[4:], x0[4:], rows[4:], rhs[4:])
    torch.testing.assert_close(found.x[5], alone.x[1], rtol=0.0, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(5, 12), (40, 100), (150, 310)])
def test_gradient_of_tall_projections(n: int, m: int) -> None:
    x0, rows, rhs = problem(n, m, "inside", batch=2)
    generator = torch.Generator().manual_seed(1)
    toward = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (x0, rows, rhs)]
    toward[1] *= n**-0.5
    upstream = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    leaves = [t.clone().requires_grad_() for t in (x0, rows, rhs)]
    (project_batch(*leaves).x * upstream).sum().backward()
    claimed = sum(float((leaf.grad * d).sum()) for leaf, d in zip(leaves, toward, strict=True))
    ends = [
        (project_batch(*(t + s * d for t, d in zip((x0, rows, rhs), toward, strict=True))).x)
        for s in (1e-7, -1e-7)
    ]
    measured = float(((ends[0] - ends[1]) * upstream).sum()) / 2e-7
    assert claimed == pytest.approx(measured, rel=1e-5, abs=1e-5)


def _never(index: Tensor, x: Tensor, image: Tensor, guess: Tensor) -> Tensor:
    return torch.zeros_like(index, dtype=torch.bool)


def _unit(n: int, m: int) -> tuple[Tensor, Tensor]:
    x0, rows, rhs = problem(n, m, "inside", batch=4)
    norms = torch.linalg.vector_norm(rows, dim=2)
    q = ((rows @ x0[:, :, None])[:, :, 0] - rhs) / norms
    return rows / norms[:, :, None], q / q.amax(1, keepdim=True)


@pytest.mark.parametrize("form", ["rows", "matrix"])
@pytest.mark.parametrize(("n", "m"), [(20, 60), (140, 300), (60, 40)])
def test_interior_points_become_complementary(n: int, m: int, form: str) -> None:
    rows, q = _unit(n, m)
    gram: Gram = RowsGram(rows) if form == "rows" else DenseGram(rows @ rows.mT)
    x = interior_point(gram, q, _never, accuracy=1e-12)
    assert bool((x > 0.0).all())
    # The lesser of a pair is at most the root of their product, so of m times the mean.
    assert float(torch.minimum(x, gram.times(x) - q).abs().max()) <= (m * 1e-12) ** 0.5


def test_factors_turn_to_float64_where_rounded_ones_do_not_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[torch.dtype] = []
    factorize = central._NarrowSystem._factorize

    def recorded(self: central._NarrowSystem) -> Tensor:
        used.append(self.low.dtype)
        return factorize(self)

    monkeypatch.setattr(central._NarrowSystem, "_factorize", recorded)
    rows, q = _unit(140, 300)
    x = interior_point(RowsGram(rows), q, _never, accuracy=1e-13)
    slack = RowsGram(rows).times(x) - q
    assert float(torch.minimum(x, slack).abs().max()) <= (300 * 1e-13) ** 0.5
    assert used[0] == torch.float32
    assert used[-1] == torch.float64


def test_samples_that_stop_are_left_as_they_are() -> None:
    rows, q = _unit(20, 60)
    seen: dict[int, Tensor] = {}

    def stop(index: Tensor, x: Tensor, image: Tensor, guess: Tensor) -> Tensor:
        for k, value in zip(index.tolist(), x, strict=True):
            seen.setdefault(k, value.clone()) if k != 2 else seen.update({k: value.clone()})
        return index != 2

    x = interior_point(RowsGram(rows), q, stop)
    for k in range(4):
        assert torch.equal(x[k], seen[k])
    slack = RowsGram(rows).times(x) - q
    assert float(torch.minimum(x, slack)[2].abs().max()) <= 1e-7
