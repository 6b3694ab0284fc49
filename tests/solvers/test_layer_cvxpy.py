"""Programs declared in CVXPY: our solver behind cvxpylayers, and its own backends made safe."""

import numpy as np
import pytest
import torch
from _layer_problems import problem
from torch import Tensor, nn

from torch_prepared.errors import PreparedWarning, SolverError
from torch_prepared.solvers import LPLayer, ProjectionLayer, Status, project_batch, solve_lp_batch

cp = pytest.importorskip("cvxpy", reason="declared programs need CVXPY")
pytest.importorskip("cvxpylayers", reason="declared programs need cvxpylayers")

PEERS = ("clarabel", "ecos", "scs", "diffcp")


def declare(norm: str, n: int, m: int, backend: str = "batched") -> nn.Module:
    x, target = cp.Variable(n), cp.Parameter(n)
    rows, rhs = cp.Parameter((m, n)), cp.Parameter(m)
    objective = 0.5 * cp.sum_squares(x - target) if norm == "2" else cp.norm1(x - target)
    program = cp.Problem(cp.Minimize(objective), [rows @ x <= rhs])
    return LPLayer.from_cvxpy(program, [target, rows, rhs], [x], backend=backend)


def direct(norm: str, x0: Tensor, rows: Tensor, rhs: Tensor) -> Tensor:
    if norm == "2":
        return project_batch(x0, rows, rhs).x
    return solve_lp_batch(rows, rhs, weight=torch.ones_like(x0[0]), center=x0).x


@pytest.mark.parametrize("norm", ["1", "2"])
def test_declared_and_direct_forms_agree_with_gradients(norm: str) -> None:
    data = problem(4, 6, 3)
    leaves = [[t.clone().requires_grad_() for t in data] for _ in range(2)]
    layer = declare(norm, 6, 3)
    (declared,) = layer(*leaves[0])
    expected = direct(norm, *leaves[1])
    assert set(layer.statuses) == {Status.OPTIMAL}
    assert float(layer.report.violation.max()) <= 1e-8
    assert torch.allclose(declared, expected, atol=1e-9)
    upstream = torch.randn_like(declared)
    for x in (declared, expected):
        (x * upstream).sum().backward()
    for first, second in zip(*leaves, strict=True):
        assert torch.allclose(first.grad, second.grad, atol=1e-8)


@pytest.mark.parametrize("backend", PEERS)
@pytest.mark.parametrize("norm", ["1", "2"])
def test_cvxpylayers_backends_agree_within_their_accuracy(backend: str, norm: str) -> None:
    data = problem(3, 5, 3)
    leaves = [[t.clone().requires_grad_() for t in data] for _ in range(2)]
    (found,) = declare(norm, 5, 3, backend)(*leaves[0])
    expected = direct(norm, *leaves[1])
    assert torch.allclose(found, expected, atol=2e-3)
    for x in (found, expected):
        x.sum().backward()
    for first, second in zip(*leaves, strict=True):
        assert torch.allclose(first.grad, second.grad, atol=1e-2)


@pytest.mark.parametrize("backend", ["batched", "clarabel", "ecos", "scs"])
@pytest.mark.parametrize("with_gradient", [False, True])
def test_one_infeasible_sample_fails_alone(backend: str, with_gradient: bool) -> None:
    x0, rows, rhs = problem(3, 5, 3)
    rows[1, 1], rhs[1, 1] = -rows[1, 0], -rhs[1, 0] - 1.0
    leaf = rhs.clone().requires_grad_(with_gradient)
    layer = declare("2", 5, 3, backend)
    with pytest.warns(PreparedWarning, match="1 of 3"):
        (x,) = layer(x0, rows, leaf)
    bad = Status.INFEASIBLE if backend == "batched" else Status.UNKNOWN
    assert layer.statuses == (Status.OPTIMAL, bad, Status.OPTIMAL)
    expected = project_batch(x0[[0, 2]], rows[[0, 2]], rhs[[0, 2]]).x
    assert torch.allclose(x[[0, 2]].detach(), expected, atol=2e-3)
    assert float(x[1].detach().abs().max()) == 0.0
    if with_gradient:
        x.sum().backward()
        assert bool(leaf.grad.isfinite().all())
        assert float(leaf.grad[1].abs().max()) == 0.0


def test_gradcheck_of_a_quadratic_with_a_parameter_of_its_own() -> None:
    x, weight, cost = cp.Variable(4), cp.Parameter(4, nonneg=True), cp.Parameter(4)
    bound, dual_of = cp.Parameter(2), np.array([[1.0, 1, 0, 0], [0, 1, -1, 2]])
    program = cp.Problem(
        cp.Minimize(cost @ x + cp.sum_squares(cp.multiply(weight, x))),
        [dual_of @ x <= bound, cp.sum(x) == 1],
    )
    layer = ProjectionLayer.from_cvxpy(program, [weight, cost, bound], [x])
    generator = torch.Generator().manual_seed(0)
    inputs = [
        (torch.rand(2, 4, generator=generator, dtype=torch.float64) + 0.5).requires_grad_(),
        torch.randn(2, 4, generator=generator, dtype=torch.float64).requires_grad_(),
        torch.tensor([[0.1, 0.2], [0.0, -0.3]], dtype=torch.float64, requires_grad=True),
    ]
    torch.autograd.gradcheck(lambda *a: layer(*a)[0], inputs, atol=1e-5)


def test_default_derivative_of_diffcp_is_not_used() -> None:
    """Its lsqr mode is off by up to 94 % on such a batch; ours must be right for every sample."""
    data = problem(4, 30, 60)
    leaves = [[t.clone().requires_grad_() for t in data] for _ in range(2)]
    upstream = torch.randn_like(data[0])
    (declare("2", 30, 60, "clarabel")(*leaves[0])[0] * upstream).sum().backward()
    (project_batch(*leaves[1]).x * upstream).sum().backward()
    difference = (leaves[0][2].grad - leaves[1][2].grad).abs().amax(1)
    assert float((difference / leaves[1][2].grad.abs().amax(1)).max()) <= 2e-2


def test_unsupported_programs_are_named() -> None:
    x, target = cp.Variable(3), cp.Parameter(3)
    cone = cp.Problem(cp.Minimize(cp.norm2(x - target)))
    with pytest.raises(SolverError, match="other cones"):
        LPLayer.from_cvxpy(cone, [target], [x])
    metric = np.array([[2.0, 1, 0], [1, 2, 0], [0, 0, 1]])
    coupled = cp.Problem(cp.Minimize(cp.quad_form(x, metric) + target @ x), [x >= 0])
    with pytest.raises(SolverError, match="products of different variables"):
        LPLayer.from_cvxpy(coupled, [target], [x])
