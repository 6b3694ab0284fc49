"""sound=True holds in spite of rounding: judged in rational arithmetic, with zero slack."""

from __future__ import annotations

from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from helpers import NETWORKS, Net, attack, mlp, random_boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_prepared.bounds import certified_margin, compute_bounds
from torch_prepared.bounds.sound import gamma
from torch_prepared.certify.exact import evaluate_exactly
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, Property, SafeSet

METHODS = ["ibp", "crown-ibp", "crown"]


def exact_outputs(graph: Graph, points: Tensor) -> list[list[Fraction]]:
    record = graph.record()
    return [evaluate_exactly(record, x.double().numpy()).tolist() for x in points]


def assert_exact(bound: Interval, outputs: list[list[Fraction]]) -> None:
    low, high = bound.lower[0].tolist(), bound.upper[0].tolist()
    for values in outputs:
        for a, value, b in zip(low, values, high, strict=True):
            assert Fraction(a) <= value <= Fraction(b)


def rational_networks() -> list[str]:
    """Those without batch normalization, whose square root is not rational."""
    return [n for n in sorted(NETWORKS) if all(
        node.op != "batch_norm" for node in NETWORKS[n]("relu", 0).nodes)]  # fmt: skip


@given(
    name=st.sampled_from(rational_networks()),
    op=st.sampled_from(["relu", "leaky_relu"]),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    radius=st.sampled_from([0.0, 1e-12, 1e-3, 0.5]),
)
@settings(max_examples=10, deadline=None)
def test_bounds_enclose_exact_values(
    name: str, op: str, seed: int, dtype: torch.dtype, radius: float
) -> None:
    graph = NETWORKS[name](op, seed, dtype)
    region = random_boxes(graph.input_size, 1, seed, radius)[0]
    points = attack(lambda x: evaluate_graph(graph.to(torch.float64), x).flatten(1), region, seed,
                    count=1)[:3]  # fmt: skip
    outputs = exact_outputs(graph, points)
    for method in METHODS:
        bound = compute_bounds(graph, region, method=method, sound=True)
        assert bound.lower.dtype == torch.float64
        assert_exact(bound, outputs)


def cancelling(scale: float, dtype: torch.dtype) -> Graph:
    """Large terms that cancel, so that rounding decides what is left."""
    graph = mlp((3, 6, 6, 2), "relu", 5)
    weights = {name: value.clone() for name, value in graph.parameters.items()}
    names = [name for name in weights if name.endswith("weight")]
    for name in names[:-1]:
        weights[name][0], weights[name][1] = scale, scale * (1 + 2**-20)
    weights[names[-1]][:, 0], weights[names[-1]][:, 1] = scale, -scale
    return graph.with_parameters(weights).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("method", METHODS)
def test_cancellation_is_covered(method: str, scale: float, dtype: torch.dtype) -> None:
    graph = cancelling(scale, dtype)
    generator = torch.Generator().manual_seed(1)
    for radius in (0.0, 1e-9, 0.1):
        for _ in range(4):
            center = torch.rand(3, generator=generator, dtype=torch.float64)
            region = Box(center - radius, center + radius)
            bound = compute_bounds(graph, region, method=method, sound=True)
            assert_exact(bound, exact_outputs(graph, region.sample(3, generator)))


def test_plain_bounds_are_broken_by_rounding_where_sound_ones_hold() -> None:
    """What the option is for: at points, plain bounds miss the exact value."""
    graph = cancelling(1e6, torch.float32)
    generator = torch.Generator().manual_seed(2)
    missed = 0
    for _ in range(10):
        point = torch.rand(3, generator=generator, dtype=torch.float64).float().double()
        outputs = exact_outputs(graph, point[None])
        plain = compute_bounds(graph, Box(point, point))
        low, high = plain.lower[0].tolist(), plain.upper[0].tolist()
        missed += any(
            not Fraction(a) <= v <= Fraction(b)
            for a, v, b in zip(low, outputs[0], high, strict=True)
        )
        assert_exact(compute_bounds(graph, Box(point, point), sound=True), outputs)
    assert missed > 0


@pytest.mark.parametrize("op", ["tanh", "sigmoid", "softplus", "elu", "gelu", "silu"])
def test_smooth_networks_at_points_enclose_50_digits(op: str) -> None:
    functions = {
        "tanh": mpmath.tanh,
        "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
        "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
        "elu": lambda x: x if x > 0 else mpmath.mpf(0.25) * mpmath.expm1(x),
        "gelu": lambda x: x * mpmath.ncdf(x),
        "silu": lambda x: x / (1 + mpmath.exp(-x)),
    }
    graph = mlp((3, 5, 4, 2), op, 7)
    layers = [
        (p["weight"].read(graph.parameters), p["bias"].read(graph.parameters))
        for p in (node.params for node in graph.nodes) if p
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x = 2 * torch.randn(3, generator=generator, dtype=torch.float64)
        with mpmath.workdps(50):
            value = [mpmath.mpf(v) for v in x.tolist()]
            for position, (weight, bias) in enumerate(layers):
                if position:
                    value = [functions[op](v) for v in value]
                pairs = zip(weight.tolist(), bias.tolist(), strict=True)
                value = [mpmath.fdot(row, value) + b for row, b in pairs]
            for method in METHODS:
                bound = compute_bounds(graph, Box(x, x), method=method, sound=True)
                for a, v, b in zip(bound.lower[0].tolist(), value, bound.upper[0].tolist(),
                                   strict=True):  # fmt: skip
                    assert a <= v <= b
                assert float(bound.width.max()) < 1e-11


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_they_are_plain_bounds_but_for_rounding(name: str, method: str) -> None:
    """Not vacuous, for any operator: at most a thousandth of a millionth wider, nor tighter."""
    for op in ("relu", "tanh", "gelu"):
        graph = NETWORKS[name](op, 3)
        region = random_boxes(graph.input_size, 2, 3, 0.3)
        plain = compute_bounds(graph, region, method=method)
        sound = compute_bounds(graph, region, method=method, sound=True)
        torch.testing.assert_close(sound.lower, plain.lower, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(sound.upper, plain.upper, rtol=1e-9, atol=1e-9)


def test_margins_are_below_exact_margins() -> None:
    graph = mlp((4, 8, 3), "relu", 1, torch.float32)
    region = random_boxes(4, 1, 1, 0.2)[0]
    prop = Property(region, SafeSet.argmax(0, 3))
    found = certified_margin(graph, prop, sound=True)
    assert found.margin.dtype == torch.float64
    record = graph.record()
    for x in region.sample(20, torch.Generator().manual_seed(0)):
        y = evaluate_exactly(record, x.numpy())
        assert Fraction(float(found.margin[0])) <= min(y[0] - v for v in y[1:])


def test_precision_flags_are_neither_read_nor_changed() -> None:
    graph = mlp((4, 32, 32, 3), "relu", 1, torch.float32)
    region = random_boxes(4, 1, 1, 0.2)[0]
    expected = compute_bounds(graph, region, sound=True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        loose = compute_bounds(graph, region, sound=True)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(loose.lower, expected.lower)
    assert torch.equal(loose.upper, expected.upper)


def test_other_methods_are_refused() -> None:
    for method in ("forward", "alpha-crown", "auto"):
        with pytest.raises(SpecError, match=r"sound=True: got method .*expected 'ibp'"):
            compute_bounds(mlp(), random_boxes(4, 1), method=method, sound=True)


def test_nan_weights_prove_nothing_and_long_sums_are_infinite() -> None:
    graph = mlp()
    weight = {"linear1.weight": torch.full_like(graph.parameters["linear1.weight"], torch.nan)}
    bound = compute_bounds(graph, random_boxes(4, 1)[0], parameters=weight, sound=True)
    assert bool(torch.isnan(bound.lower).all())
    assert gamma(1 << 60) == float("inf")
    assert 0 < gamma(0) < gamma(10) < 1e-14
    assert np.isfinite(gamma(1 << 40))


def test_underflow_is_covered() -> None:
    net = Net((2,), 0)
    net.linear(2)
    net.act("relu")
    net.linear(1)
    graph = net.graph()
    tiny = {name: value * 1e-170 for name, value in graph.parameters.items()}
    small = graph.with_parameters(tiny)
    x = torch.tensor([0.3, -0.7], dtype=torch.float64)
    assert_exact(compute_bounds(small, Box(x, x), sound=True), exact_outputs(small, x.unsqueeze(0)))
