"""alpha-CROWN: sound, never worse than CROWN, the same natively and in plain torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import NETWORKS, attack, mlp, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.bounds import AlphaOptions, alpha_crown, certified_margin, compute_bounds
from torch_prepared.core.interval import Interval
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import LpBall, Property, SafeSet

FEW = AlphaOptions(iterations=4)


@given(
    name=st.sampled_from(sorted(NETWORKS)),
    op=st.sampled_from(["relu", "leaky_relu", "tanh", "sigmoid", "elu"]),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@settings(max_examples=10, deadline=None)
def test_encloses_attacked_outputs_and_is_never_worse_than_crown(
    name: str, op: str, seed: int, dtype: torch.dtype
) -> None:
    graph = NETWORKS[name](op, seed, dtype)
    exact = graph.to(torch.float64)
    regions = random_boxes(graph.input_size, 2, seed, 0.4)
    crown = compute_bounds(graph, regions)
    found = compute_bounds(graph, regions, method="alpha-crown", alpha=FEW)
    assert bool((found.lower >= crown.lower).all())
    assert bool((found.upper <= crown.upper).all())
    slack = 1e-12 if dtype == torch.float64 else 1e-4
    for i, region in enumerate(regions):
        x = attack(lambda p: evaluate_graph(exact, p).flatten(1), region, seed, count=4)
        y = evaluate_graph(exact, x).flatten(1)
        room = slack * (1 + y.abs().amax(0))
        assert bool((found.lower[i].double() - room <= y.amin(0)).all())
        assert bool((y.amax(0) <= found.upper[i].double() + room).all())


@pytest.mark.parametrize("name", ["mlp", "conv", "branching"])
@pytest.mark.parametrize("op", ["relu", "leaky_relu"])
def test_native_and_plain_optimizers_agree(
    name: str, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = NETWORKS[name](op, 3)
    regions = random_boxes(graph.input_size, 3, 1, 0.5)
    # Plain torch also repeats interval arithmetic from the boxes of each iterate, and later steps
    # amplify rounding at kinks.
    once = AlphaOptions(iterations=1)

    def run(options: AlphaOptions) -> Interval:
        return compute_bounds(graph, regions, method="alpha-crown", alpha=options)

    native, long = run(once), run(FEW)
    monkeypatch.setattr(alpha_crown, "_native", lambda *arguments: None)
    plain = run(once)
    torch.testing.assert_close(native.lower, plain.lower, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(native.upper, plain.upper, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(long.width.mean(), run(FEW).width.mean(), rtol=0.02, atol=0)


def test_tightens_by_a_wide_margin_where_crown_is_loose() -> None:
    graph = mlp((3, 40, 40, 40, 2))
    regions = random_boxes(3, 2, 0, 1.0)
    crown = compute_bounds(graph, regions).width.mean()
    found = compute_bounds(graph, regions, method="alpha-crown").width.mean()
    assert float(found) < 0.8 * float(crown)


def test_parts_under_a_memory_budget_change_nothing() -> None:
    graph = NETWORKS["conv"]("relu", 3)
    regions = random_boxes(graph.input_size, 3, 1, 0.5)
    whole = compute_bounds(graph, regions, method="alpha-crown", alpha=FEW)
    parts = compute_bounds(graph, regions, method="alpha-crown", alpha=FEW, max_memory=1)
    torch.testing.assert_close(whole.lower, parts.lower, rtol=1e-9, atol=1e-9)


def test_balls_take_the_plain_path_and_stay_tighter() -> None:
    graph = mlp((3, 12, 12, 2))
    ball = LpBall(torch.zeros(3, dtype=torch.float64), 0.7, 2)
    crown = compute_bounds(graph, ball)
    found = compute_bounds(graph, ball, method="alpha-crown", alpha=FEW)
    assert bool((found.lower >= crown.lower).all())
    x = ball.sample(200, torch.Generator().manual_seed(0))
    assert bool((found.lower <= evaluate_graph(graph, x).amin(0) + 1e-9).all())


def test_margins_are_differentiable_in_the_weights_with_slopes_held() -> None:
    graph = mlp((3, 10, 10, 2))
    region = random_boxes(3, 1, 0, 0.5)[0]
    prop = Property(region, SafeSet.interval([-9.0, -9.0], [9.0, 9.0]))
    changed = {name: p.clone().requires_grad_() for name, p in graph.parameters.items()}
    for options in (AlphaOptions(0), FEW):
        found = certified_margin(
            graph, prop, method="alpha-crown", parameters=changed, alpha=options
        )
        grads = torch.autograd.grad(found.margin.sum(), list(changed.values()))
        assert sum(float(g.square().sum()) for g in grads) > 0
        with torch.no_grad():
            best = certified_margin(graph, prop, method="alpha-crown", alpha=options).margin
        assert float(found.margin.detach()) <= float(best) + 1e-9
        if options.iterations:  # optimized anew, the slopes would move with the weights
            continue
        step = {n: p.detach() + 1e-7 * g for (n, p), g in zip(changed.items(), grads, strict=True)}
        with torch.no_grad():
            after = certified_margin(graph, prop, parameters=step).margin
        expected = 1e-7 * sum(float(g.square().sum()) for g in grads)
        assert float(after - best) == pytest.approx(expected, rel=1e-3)


def test_no_iterations_give_crown_and_nan_stays() -> None:
    graph = mlp((3, 10, 10, 2))
    regions = random_boxes(3, 2, 0, 0.5)
    none = compute_bounds(graph, regions, method="alpha-crown", alpha=AlphaOptions(0))
    torch.testing.assert_close(none.lower, compute_bounds(graph, regions).lower)
    huge = {"linear1.weight": graph.parameters["linear1.weight"] * 1e308}
    bad = compute_bounds(graph, regions, method="alpha-crown", parameters=huge, alpha=FEW)
    assert not any(math.isfinite(v) and v > 0 for v in bad.lower.flatten().tolist())


@pytest.mark.parametrize("native", [True, False])
def test_iterates_build_on_the_best_intervals_so_far(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = mlp((3, 20, 20, 20, 2))
    kind = alpha_crown._Native if native else alpha_crown._Plain
    if not native:
        monkeypatch.setattr(alpha_crown, "_native", lambda *arguments: None)
    seen, run = [], kind.run

    def watched(problem: alpha_crown.Problem) -> alpha_crown.BoundState:
        state = run(problem)  # type: ignore[arg-type]
        seen.append((dict(problem.known), state.boxes))
        return state

    monkeypatch.setattr(kind, "run", watched)
    compute_bounds(graph, random_boxes(3, 2, 0, 1.0), method="alpha-crown", alpha=FEW)
    assert len(seen) == FEW.iterations + 1
    shrunk = 0
    for (before, _), (after, _) in itertools.pairwise(seen):
        for name, box in after.items():
            assert bool((box.width <= before[name].width + 1e-12).all())
            shrunk += int((box.width < before[name].width - 1e-9).sum())
    assert shrunk > 0
    for known, boxes in seen:
        assert all(bool((boxes[n].width <= known[n].width + 1e-12).all()) for n in known)
