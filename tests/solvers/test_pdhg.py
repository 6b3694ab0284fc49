"""The first-order method and the scaling it relies on."""

import pytest
import torch
from _layer_problems import problem

from torch_prepared.solvers._batched_separable import SeparableBatch
from torch_prepared.solvers.pdhg import PDHGSettings, run_pdhg


def one_norm(batch: int, n: int, m: int, device: str = "cpu") -> SeparableBatch:
    center, rows, rhs = (t.to(device) for t in problem(batch, n, m))
    zero = torch.zeros_like(center)
    return SeparableBatch(
        rows, rhs, zero, zero + 1.0, center, zero, zero, zero - torch.inf, zero + torch.inf,
        torch.zeros(m, dtype=torch.bool, device=device),
    )  # fmt: skip


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_residual_reaches_the_tolerance(tolerance: float, device: str) -> None:
    batch, *_ = one_norm(5, 60, 8, device).scaled()
    found = run_pdhg(batch, settings=PDHGSettings(tolerance, 8000))
    residual = torch.maximum(*batch.residual(found.x, found.y))
    assert torch.allclose(residual, found.residual, rtol=1e-6, atol=1e-12)
    assert float(residual.max()) <= tolerance
    assert bool((found.y >= 0).all())


def test_scaled_rows_have_norm_at_most_one() -> None:
    original = one_norm(4, 30, 12)
    original.rows[:, 3] *= 1e5
    original.rows[:, :, 7] *= 1e-4
    original.rows[:, 5] = 0.0
    batch, column, row, _ = original.scaled()
    assert float(torch.linalg.matrix_norm(batch.rows, 2).max()) <= 1 + 1e-12
    # Columns carry the length of x as well, one factor per sample.
    back = batch.rows / (row[:, :, None] * column[:, None, :])
    factor = (original.rows / back)[:, 0, 0, None, None]
    assert torch.allclose(back * factor, original.rows)


def test_limit_is_kept_and_start_is_not_changed() -> None:
    batch, *_ = one_norm(3, 40, 10).scaled()
    x, y = torch.zeros(3, 40, dtype=torch.float64), torch.zeros(3, 10, dtype=torch.float64)
    found = run_pdhg(batch, (x, y), PDHGSettings(1e-12, 80))
    assert float(found.residual.min()) > 1e-12
    assert float(x.abs().max()) == float(y.abs().max()) == 0.0


def test_a_solution_is_a_fixed_point() -> None:
    batch, *_ = one_norm(2, 20, 4).scaled()
    found = run_pdhg(batch, settings=PDHGSettings(1e-8, 40000))
    again = run_pdhg(batch, (found.x, found.y), PDHGSettings(1e-7, 40))
    assert torch.equal(again.x, found.x)


def test_prox_minimizes_its_function() -> None:
    generator = torch.Generator().manual_seed(0)
    kind = {"generator": generator, "dtype": torch.float64}
    cost, center, anchor, pull, at = (torch.randn(1, 50, **kind) for _ in range(5))
    weight, curve = torch.rand(1, 50, **kind), torch.rand(1, 50, **kind)
    lower = torch.randn(1, 50, **kind) - 1.0
    batch = SeparableBatch(
        torch.zeros(1, 0, 50, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.float64), cost,
        weight, center, curve, anchor, lower, lower + 1.5, torch.zeros(0, dtype=torch.bool),
    )  # fmt: skip
    x, free = batch.prox(pull, at, torch.full((1, 1), 0.7, dtype=torch.float64))
    grid = lower + 1.5 * torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None]

    def value(z: torch.Tensor) -> torch.Tensor:
        smooth = 0.5 * curve * (z - anchor) ** 2 + (z - at) ** 2 / 1.4
        return (cost + pull) * z + weight * (z - center).abs() + smooth

    assert bool((value(x) <= value(grid).amin(0) + 1e-12).all())
    assert 0 < int(free.sum()) < 50
    moved, _ = batch.prox(pull + 1e-7, at, torch.full((1, 1), 0.7, dtype=torch.float64))
    assert bool(((moved != x) == free).all())
