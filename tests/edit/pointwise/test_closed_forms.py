"""Programs against formulas, against enumeration, and against each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.helpers import mlp
from torch_prepared.edit.pointwise import Outcome, PointStatus, edit_points
from torch_prepared.edit.pointwise._examples import make_claims
from torch_prepared.edit.pointwise._layer import FreeLayer
from torch_prepared.edit.pointwise._linear import PointNorm, solve_linear
from torch_prepared.edit.pointwise._program import build_program
from torch_prepared.edit.pointwise._wanted import Wanted
from torch_prepared.relax import evaluate_all, evaluate_graph
from torch_prepared.solvers import Norm, Status
from torch_prepared.solvers.smt import solve_smt

MARGIN = 0.01


def _case(seed: int, sizes=(4, 6, 3)):
    graph = mlp(sizes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, sizes[0], generator=generator, dtype=torch.float64)
    y = evaluate_graph(graph, x)[0]
    target = int(torch.randint(sizes[-1], (1,), generator=generator))
    h = evaluate_all(graph, x)["relu2"][0]
    return graph, x, y, target, h


@pytest.mark.parametrize("seed", range(100))
def test_last_layer_optimum_of_the_maximum_norm_is_the_formula(seed: int) -> None:
    """delta* = max_j (kappa - (y_t - y_j))_+ / (2 (|h|_1 + 1))."""
    graph, x, y, t, h = _case(seed)
    others = [j for j in range(3) if j != t]
    needed = max(max(0.0, MARGIN - float(y[t] - y[j])) for j in others)
    expected = needed / (2 * (float(h.abs().sum()) + 1))
    result = edit_points(graph, x, [t], norm="inf", margin=MARGIN)
    assert result.outcome is Outcome.EDITED
    assert result.size == pytest.approx(expected, abs=1e-8)
    assert result.margins[0] > 0


@pytest.mark.parametrize("seed", range(100))
def test_two_outputs_have_the_formula_of_the_frobenius_norm(seed: int) -> None:
    """Delta = (kappa - (y_t - y_j))_+ / (2 (|h|_2^2 + 1)) (e_t - e_j) [h; 1]'."""
    graph, x, y, t, h = _case(seed, (4, 6, 2))
    lack = max(0.0, MARGIN - float(y[t] - y[1 - t]))
    factor = lack / (2 * (float(h.square().sum()) + 1))
    result = edit_points(graph, x, [t], norm="2", margin=MARGIN)
    moved = result.model.parameters["linear3.weight"] - graph.parameters["linear3.weight"]
    sign = torch.tensor([1.0 if k == t else -1.0 for k in range(2)], dtype=torch.float64)
    torch.testing.assert_close(moved, factor * torch.outer(sign, h), atol=1e-8, rtol=1e-6)


def test_zero_features_leave_only_the_bias() -> None:
    graph = mlp((3, 4, 3))
    graph = graph.with_parameters({"linear1.bias": torch.full((4,), -100.0, dtype=torch.float64)})
    x = torch.zeros(1, 3, dtype=torch.float64)
    y = evaluate_graph(graph, x)[0]
    t = int(y.argmin())
    result = edit_points(graph, x, [t], norm="inf", margin=MARGIN)
    assert result.size == pytest.approx((MARGIN + float(y.max() - y[t])) / 2, abs=1e-8)
    assert torch.equal(
        result.model.parameters["linear3.weight"], graph.parameters["linear3.weight"]
    )


@pytest.mark.parametrize("seed", range(3))
def test_mixed_integer_optimum_is_the_least_over_all_patterns(seed: int) -> None:
    graph, x, _, t, _ = _case(seed, (3, 4, 3))
    layer = FreeLayer.of(graph, "linear1", None)
    claims = make_claims(graph, x, [t], "examples")
    rows, required = np.arange(2), np.full(2, MARGIN)
    prefix = layer.prefix(claims.inputs)
    sizes = []
    for signs in itertools.product((True, False), repeat=4):
        pattern = {"relu2": torch.tensor([signs])}
        program = build_program(layer, prefix, claims, rows, required, pattern=pattern)
        answer = solve_linear(program, PointNorm.LINF)
        if answer.d is not None:
            sizes.append(answer.size)
    result = edit_points(graph, x, [t], layer="linear1", norm="inf", margin=MARGIN, budget=10.0)
    assert result.size == pytest.approx(min(sizes), abs=1e-5)


@pytest.mark.optional
def test_z3_agrees_on_both_sides_of_the_mixed_integer_optimum() -> None:
    pytest.importorskip("z3")
    graph = mlp((3, 4, 3), seed=1)
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = (evaluate_graph(graph, x).argmax(1) + 1) % 3
    best = edit_points(graph, x, labels, layer="linear1", norm="inf", margin=MARGIN, budget=5.0)
    assert best.outcome is Outcome.EDITED
    layer = FreeLayer.of(graph, "linear1", None)
    claims = make_claims(graph, x, labels, "examples")
    wanted = Wanted.of(layer, claims, None, MARGIN, None)
    prefix = layer.prefix(claims.inputs)
    program = build_program(layer, prefix, claims, wanted.rows, wanted.required, reach=5.0)
    above = solve_smt(program, budget=1.001 * best.size, time_limit=30)
    below = solve_smt(program, budget=0.999 * best.size, time_limit=30)
    assert above.status is Status.FEASIBLE
    assert below.status is Status.INFEASIBLE
    least = solve_smt(program, norm=Norm.LINF, time_limit=30)
    assert least.status is Status.OPTIMAL
    assert float(least.size) == pytest.approx(best.size, rel=2e-3)


def test_the_optimum_never_falls_with_more_examples_or_a_larger_margin() -> None:
    graph = mlp((4, 6, 3), seed=2)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = (evaluate_graph(graph, x).argmax(1) + 1) % 3
    by_count = [
        edit_points(graph, x[:k], labels[:k], norm="inf", margin=MARGIN).size for k in (1, 2, 4)
    ]
    assert (np.diff(by_count) >= -1e-9).all()
    by_margin = [
        edit_points(graph, x[:2], labels[:2], norm="inf", margin=m).size for m in (0.01, 0.1, 1.0)
    ]
    assert (np.diff(by_margin) >= -1e-9).all()


def test_examples_that_hold_already_change_nothing() -> None:
    graph = mlp((4, 6, 3))
    x = torch.randn(5, 4, dtype=torch.float64)
    labels = evaluate_graph(graph, x).argmax(1)
    result = edit_points(graph, x, labels, norm="inf", margin=1e-9)
    assert result.outcome is Outcome.EDITED
    assert result.delta.changed == 0
    assert result.status is PointStatus.VERIFIED_EXACT
