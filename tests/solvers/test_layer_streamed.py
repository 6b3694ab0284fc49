"""Projection of many weights onto rows that are streamed."""

import resource
import time

import pytest
import torch
from _layer_problems import problem

from torch_prepared.errors import SolverError
from torch_prepared.solvers import Status, project_batch, project_streamed


@pytest.mark.parametrize("chunk", [1, 33, 1000])
@pytest.mark.parametrize("weighted", [False, True])
def test_agrees_with_the_rows_in_memory(chunk: int, weighted: bool, dtype: torch.dtype) -> None:
    x0, rows, rhs = (t[0].to(dtype) for t in problem(1, 100, 7))
    metric = torch.rand(100, dtype=dtype) + 0.5 if weighted else None
    found = project_streamed(x0, lambda i, j: rows[:, i:j], rhs, metric=metric, chunk=chunk)
    expected = project_batch(x0, rows, rhs, metric=metric)
    assert found.report.statuses == (Status.OPTIMAL,)
    assert found.x.dtype == dtype
    assert torch.allclose(found.x, expected.x, atol=1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(found.report.active, expected.report.active)


def test_equalities_and_nothing_to_do() -> None:
    x0, rows, rhs = (t[0] for t in problem(1, 30, 4))
    equal = torch.tensor([True, False, False, False])
    found = project_streamed(x0, lambda i, j: rows[:, i:j], rhs, equal=equal)
    assert torch.allclose(found.x, project_batch(x0, rows, rhs, equal=equal).x, atol=1e-12)
    inside = project_streamed(x0, lambda i, j: rows[:, i:j], rhs + 1e3)
    assert torch.equal(inside.x, x0)


def test_contradiction_and_time_over_keep_the_weights() -> None:
    x0 = torch.zeros(10)
    rows = torch.ones(2, 10)
    rows[1] = -1.0
    rhs = torch.tensor([-1.0, -1.0])
    found = project_streamed(x0, lambda i, j: rows[:, i:j], rhs)
    assert found.report.statuses == (Status.INFEASIBLE,)
    assert float(found.report.ray[0] @ rhs.double()) < 0
    assert torch.equal(found.x, x0)
    late = project_streamed(x0, lambda i, j: rows[:1, i:j], rhs[:1], time_limit=1e-9)
    assert late.report.statuses == (Status.UNKNOWN,)
    assert torch.equal(late.x, x0)


def test_nan_is_no_answer_and_wrong_shapes_are_refused() -> None:
    x0, rhs = torch.zeros(10), torch.tensor([-1.0])
    nan = project_streamed(x0, lambda i, j: torch.full((1, j - i), torch.nan), rhs)
    assert nan.report.statuses == (Status.UNKNOWN,)
    with pytest.raises(SolverError, match=r"expected \(1, 10\)"):
        project_streamed(x0, lambda i, j: torch.zeros(2, j - i), rhs)
    with pytest.raises(SolverError, match="chunk 0"):
        project_streamed(x0, lambda i, j: torch.zeros(1, j - i), rhs, chunk=0)
    with pytest.raises(SolverError, match="not positive"):
        project_streamed(x0, lambda i, j: torch.zeros(1, j - i), rhs, metric=x0)


@pytest.mark.slow
def test_fifty_million_weights_fit_in_four_times_their_memory() -> None:
    n, m, chunk = 50_000_000, 100, 2**16
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(m, chunk + 997, generator=generator)
    x0 = torch.randn(n, generator=generator)

    def rows(start: int, stop: int) -> torch.Tensor:
        shift = (start // 7) % 997
        return base[:, shift : shift + stop - start]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    found = project_streamed(x0, rows, torch.zeros(m))
    seconds = time.process_time() - start
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert found.report.statuses == (Status.OPTIMAL,)
    assert grown <= 4 * x0.nbytes
    assert seconds <= 600  # CPU time with wide slack: measured values are in the benchmarks
