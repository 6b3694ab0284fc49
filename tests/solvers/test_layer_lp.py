"""Linear-program layer: exact vertices, gradients, statuses, and the zero gradient of the cost."""

import numpy as np
import pytest
import torch
from _layer_problems import problem
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_prepared.core.rows import LinearRows
from torch_prepared.errors import PreparedWarning, SolverError
from torch_prepared.solvers import LinearProgram, LPLayer, Norm, Status, solve, solve_lp_batch


@pytest.mark.parametrize(
    ("batch", "n", "m"), [(6, 40, 6), (4, 200, 20), (4, 20, 60), pytest.param(8, 300, 80)]
)
def test_one_norm_distance_is_that_of_highs(batch: int, n: int, m: int) -> None:
    center, rows, rhs = problem(batch, n, m)
    found = solve_lp_batch(rows, rhs, weight=torch.ones(n, dtype=torch.float64), center=center)
    assert set(found.report.statuses) == {Status.OPTIMAL}
    assert float(found.report.violation.max()) <= 1e-8
    y = found.multipliers
    assert float((y[:, None] @ rows).abs().max()) <= 1 + 1e-8
    assert float(y.min()) >= 0
    primal = (found.x - center).abs().sum(1)
    dual = ((rows @ center[:, :, None])[:, :, 0] - rhs).mul(y).sum(1)
    assert torch.allclose(primal, dual, rtol=1e-9)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 6), st.booleans())
def test_agrees_with_highs_on_bounded_programs(seed: int, n: int, m: int, equality: bool) -> None:
    inside, rows, _ = problem(1, n, m, seed)
    rhs = (rows @ inside[:, :, None])[:, :, 0] + 0.05
    equal = torch.zeros(m, dtype=torch.bool)
    equal[0] = equality and n > 1
    lower, upper = inside - 1.0, inside + 2.0
    cost = torch.randn(1, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = solve_lp_batch(
        rows, rhs, cost=cost, lower=lower, upper=upper, equal=equal, on_failure="nan"
    )
    expected = solve(
        LinearProgram(
            cost[0].numpy(),
            LinearRows(-rows[0].numpy(), -rhs[0].numpy(), equal.numpy()),
            lower[0].numpy(), upper[0].numpy(),
        )
    )  # fmt: skip
    if expected.status is Status.INFEASIBLE:
        assert found.report.statuses == (Status.INFEASIBLE,)
        return
    assert found.report.statuses == (Status.OPTIMAL,)
    assert float(found.report.violation) <= 1e-8
    value = float((cost * found.x).sum())
    assert value == pytest.approx(expected.objective, rel=1e-6, abs=1e-6)


def leaves_of(seed: int, smoothing: float) -> dict[str, Tensor]:
    center, rows, rhs = problem(3, 6, 3, seed)
    generator = torch.Generator().manual_seed(seed)
    cost, weight = (torch.rand(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    data = {"A": rows, "b": rhs + 0.3, "cost": cost - 0.5, "center": center,
            "lower": center - 6.0, "upper": center + 6.5}  # fmt: skip
    if smoothing:
        data["weight"] = weight + 0.1
    return {name: value.requires_grad_() for name, value in data.items()}


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
@pytest.mark.parametrize("seed", [0, 1])
def test_gradcheck(seed: int, smoothing: float) -> None:
    leaves = leaves_of(seed, smoothing)
    names = list(leaves)

    def point(*values: Tensor) -> tuple[Tensor, Tensor]:
        data = dict(zip(names, values, strict=True))
        found = solve_lp_batch(**data, smoothing=smoothing)
        assert bool(found.report.solved.all())
        return found.x, found.multipliers

    torch.autograd.gradcheck(point, list(leaves.values()), eps=1e-7, atol=1e-5, fast_mode=True)


def test_cost_gradient_is_zero_at_a_vertex_and_not_with_smoothing() -> None:
    """max x_0 + x_1 over the unit box and x_0 + 2 x_1 <= 2: the vertex (1, 1/2) stays put."""
    rows, rhs = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([2.0]).double()
    box = {"lower": torch.zeros(2).double(), "upper": torch.ones(2).double()}
    gradients = []
    for smoothing in (0.0, 1.0):
        cost = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
        bound = rhs.clone().requires_grad_()
        x = solve_lp_batch(rows, bound, cost=cost, smoothing=smoothing, **box).x
        (x[1] - x[0]).backward()
        gradients.append((x.detach(), cost.grad, bound.grad))
    (bare, bare_cost, bare_bound), (_, smooth_cost, _) = gradients
    assert torch.allclose(bare, torch.tensor([1.0, 0.5]).double())
    assert torch.equal(bare_cost, torch.zeros(2).double())
    assert float(bare_bound) == pytest.approx(0.5)
    assert float(smooth_cost.abs().min()) > 0.1


def test_gradient_of_every_sample_is_that_of_re_solves() -> None:
    data = problem(8, 120, 12)
    one, step = torch.ones(120, dtype=torch.float64), 1e-6

    def point(center: Tensor, rows: Tensor, rhs: Tensor) -> Tensor:
        return solve_lp_batch(rows, rhs, weight=one, center=center).x

    leaves = [t.clone().requires_grad_() for t in data]
    upstream = torch.randn_like(data[0])
    (point(*leaves) * upstream).sum().backward()
    toward = [torch.randn_like(t) / (11.0 if t.dim() == 3 else 1.0) for t in data]
    ends = [
        point(*(t + sign * step * d for t, d in zip(data, toward, strict=True)))
        for sign in (1.0, -1.0)
    ]
    expected = ((ends[0] - ends[1]) * upstream).sum(1) / (2 * step)
    claimed = sum((t.grad * d).flatten(1).sum(1) for t, d in zip(leaves, toward, strict=True))
    error = (claimed - expected).abs() / expected.abs().clamp_min(1.0)
    assert float(error.max()) <= 1e-5


def test_statuses_are_each_sample_s_own() -> None:
    center, rows, rhs = problem(4, 10, 3)
    rows[1, 1], rhs[1, 1] = -rows[1, 0], -rhs[1, 0] - 1.0
    rhs[2, 0] = torch.nan
    weight = torch.ones(10, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (center, rows, rhs)]
    with pytest.warns(PreparedWarning, match="2 of 4"):
        found = solve_lp_batch(leaves[1], leaves[2], weight=weight, center=leaves[0])
    s = Status
    assert found.report.statuses == (s.OPTIMAL, s.INFEASIBLE, s.UNKNOWN, s.OPTIMAL)
    ray = found.report.ray[1]
    assert bool((ray >= 0).all())
    assert float((ray @ rows[1]).abs().max()) <= 1e-7 * float(ray.max())
    assert float(ray @ rhs[1]) < 0
    assert torch.equal(found.x[[1, 2]], center[[1, 2]])
    found.x.sum().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


def test_infeasible_bounds_and_unbounded_costs() -> None:
    rows, rhs = torch.tensor([[-1.0, -1.0]]).double(), torch.tensor([-3.0]).double()
    zero, one = torch.zeros(2).double(), torch.ones(2).double()
    with pytest.warns(PreparedWarning, match="0 infeasible"):
        report = solve_lp_batch(rows, rhs, cost=one, lower=zero, upper=one).report
    least = torch.where(report.ray[0] @ rows > 0, 0.0, report.ray[0] @ rows).sum()
    assert float(least - report.ray[0] @ rhs) > 0
    with pytest.warns(PreparedWarning, match="0 unbounded"):
        solve_lp_batch(rows, rhs, cost=-one)
    with pytest.warns(PreparedWarning, match="unknown"):
        solve_lp_batch(rows, rhs, cost=one, lower=one, upper=zero)


def test_without_fallback_what_stays_open_is_unknown() -> None:
    rows, rhs = torch.tensor([[-1.0]]).double(), torch.tensor([-3.0]).double()
    cost = -torch.ones(1).double()
    found = solve_lp_batch(rows, rhs, cost=cost, fallback=False, on_failure="nan")
    assert found.report.statuses == (Status.UNKNOWN,)
    assert bool(found.x.isnan().all())


def test_degenerate_and_repeated_rows() -> None:
    center, rows, rhs = problem(3, 8, 2)
    many = rows.repeat(1, 4, 1)
    weight = torch.ones(8, dtype=torch.float64)
    plain = solve_lp_batch(rows, rhs, weight=weight, center=center)
    leaf = rhs.repeat(1, 4).requires_grad_()
    found = solve_lp_batch(many, leaf, weight=weight, center=center)
    assert set(found.report.statuses) == {Status.OPTIMAL}
    distances = [(x - center).abs().sum(1) for x in (plain.x, found.x)]
    assert torch.allclose(distances[0], distances[1], rtol=1e-9)
    found.x.sum().backward()
    assert bool(leaf.grad.isfinite().all())


def test_no_rows_and_no_samples() -> None:
    cost, one = torch.tensor([1.0, -1.0, 0.0]).double(), torch.ones(3).double()
    rows, rhs = torch.zeros(0, 3).double(), torch.zeros(0).double()
    found = solve_lp_batch(rows, rhs, cost=cost, lower=-one, upper=one)
    assert found.x.tolist() == [-1.0, 1.0, 0.0]
    assert found.multipliers.shape == (0,)
    empty = solve_lp_batch(torch.zeros(0, 2, 3).double(), torch.zeros(0, 2).double(), cost=cost)
    assert empty.x.shape == (0, 3)
    assert empty.report.statuses == ()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_do_not_matter(scale: float) -> None:
    center, rows, rhs = problem(3, 20, 5)
    one = torch.ones(20, dtype=torch.float64)
    expected = solve_lp_batch(rows, rhs, weight=one, center=center)
    for found, unit in (
        (solve_lp_batch(rows * scale, rhs * scale, weight=one, center=center), 1.0),
        (solve_lp_batch(rows, rhs, weight=one * scale, center=center), 1.0),
        (solve_lp_batch(rows, rhs * scale, weight=one, center=center * scale), scale),
    ):
        assert set(found.report.statuses) == {Status.OPTIMAL}
        assert torch.allclose(found.x / unit, expected.x, atol=1e-9)


def test_same_inputs_give_the_same_bits() -> None:
    center, rows, rhs = problem(5, 30, 10)
    weight = torch.ones(30, dtype=torch.float64)
    first, second = (solve_lp_batch(rows, rhs, weight=weight, center=center).x for _ in range(2))
    assert torch.equal(first, second)


class TestModule:
    rows = LinearRows(np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]), np.array([4.0, 1.0]))

    def test_rows_shared_by_a_batch_of_centers(self, dtype: torch.dtype) -> None:
        layer = LPLayer(self.rows, norm=Norm.L1).to(dtype)
        center = torch.zeros(4, 3, dtype=dtype, requires_grad=True)
        x = layer(center=center)
        assert x.dtype == dtype
        assert torch.allclose(x, torch.tensor([0.0, 2.0, 0.0], dtype=dtype))
        x[:, 1].sum().backward()
        assert torch.equal(center.grad, torch.tensor([[-0.5, 0.0, 0.0]] * 4, dtype=dtype))

    def test_warm_start_and_a_changed_shape(self) -> None:
        layer = LPLayer(norm="1", warm_start=True)
        center, rows, rhs = problem(3, 20, 5)
        for shift in (0.0, 1e-3):
            x = layer(center=center + shift, A=rows, b=rhs)
            expected = solve_lp_batch(
                rows, rhs, weight=torch.ones(20).double(), center=center + shift
            ).x
            assert torch.allclose(x, expected, atol=1e-9)
        assert layer(center=center[0], A=rows[0], b=rhs[0]).shape == (20,)

    def test_other_norms_are_refused(self) -> None:
        with pytest.raises(SolverError, match="ProjectionLayer"):
            LPLayer(self.rows, norm=Norm.LINF)

    def test_compiles_around_a_clean_graph_break(self) -> None:
        layer = LPLayer(self.rows, norm=Norm.L1)
        compiled = torch.compile(lambda c: layer(center=c + 1.0).sum(), backend="aot_eager")
        center = torch.zeros(3, dtype=torch.float64)
        assert float(compiled(center)) == pytest.approx(float(layer(center=center + 1.0).sum()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"cost": torch.zeros(5)}, "got cost"),
        ({"cost": torch.zeros(3, 4)}, "expected 2"),
        ({"b": torch.zeros(2, 1, 1)}, "got b"),
        ({"A": torch.zeros(4)}, "got A"),
        ({"weight": -torch.ones(4)}, "negative weight"),
        ({"smoothing": -1.0}, "smoothing"),
        ({"equal": torch.zeros(3, dtype=torch.bool)}, "equal"),
        ({"A": torch.full((2, 4), torch.inf)}, "infinite"),
    ],
)
def test_malformed_input_is_refused(change: dict[str, object], match: str) -> None:
    given = {"A": torch.zeros(2, 4), "b": torch.zeros(2, 2)} | change
    with pytest.raises(SolverError, match=match):
        solve_lp_batch(**given)
