"""Checked bounds are below the truth with zero slack, judged in exact or 50-digit arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.certify import (
    Certificate,
    InputRecord,
    NetworkRecord,
    ProofTree,
    PropertyRecord,
    Slopes,
    check_certificate,
    evaluate_exactly,
    margin_exactly,
)
from torch_prepared.certify.nodes import read_nodes

from .nets import NetBuilder, box, mlp, nonlinear_inputs, row_property


def checked_bound(
    net: NetworkRecord, prop: PropertyRecord, proof: ProofTree, **options: object
) -> float:
    certificate = Certificate.create(net, [prop], [proof])
    return check_certificate(certificate, net, [prop], **options).margin


def conv_net(seed: int) -> NetBuilder:
    net = NetBuilder((2, 5, 4), seed)
    net.conv(4, (3, 2), stride=2, padding=(1, 0, 2, 1), groups=2)
    net.elementwise("relu")
    net.conv(3, (2, 2), dilation=1, padding=(1, 1, 0, 0))
    net.elementwise("abs")
    net.flatten()
    net.linear(2)
    return net


def conv1d_net(seed: int) -> NetBuilder:
    net = NetBuilder((2, 7), seed)
    net.conv(3, (3,), stride=1, padding=(2, 1), dilation=2)
    net.elementwise("leaky_relu", alpha=0.1)
    net.pool("max_pool", (3,), stride=2, padding=(1, 1))
    net.flatten()
    net.linear(2)
    return net


def pool_net(seed: int) -> NetBuilder:
    net = NetBuilder((2, 4, 4), seed)
    net.conv(2, (2, 2))
    net.pool("max_pool", (2, 2), stride=1)
    net.pool("avg_pool", (2, 2), stride=1, padding=(1, 0, 1, 0), count_include_pad=seed % 2 == 0)
    net.elementwise("relu")
    net.flatten()
    net.linear(2)
    return net


def residual_net(seed: int) -> NetBuilder:
    net = NetBuilder((3,), seed)
    first = net.linear(4)
    second = net.linear(4, net.elementwise("relu", first))
    joined = net.add("add", [second, first, second], (4,), signs=[1, -1, 1])
    relu = net.elementwise("relu", joined)
    wide = net.add("concat", [relu, first], (8,), axis=0)
    picked = net.add("gather", [wide], (2, 3), index=[[0, 7, 0], [3, 5, 2]])
    summed = net.add("reduce_sum", [picked], (2,), axes=[1], scale=1.0 / 3.0)
    net.weight("s", (2,))
    net.weight("t", (2,))
    net.add("scale", [summed], (2,), {"scale": "s", "shift": "t"})
    return net


NETS: dict[str, Callable[[int], NetBuilder]] = {
    "relu": lambda seed: mlp((3, 6, 6, 2), seed),
    "leaky": lambda seed: mlp((3, 5, 5, 2), seed, "leaky_relu", alpha=1.5),
    "abs": lambda seed: mlp((3, 5, 5, 2), seed, "abs"),
    "conv": conv_net,
    "conv1d": conv1d_net,
    "pool": pool_net,
    "residual": residual_net,
}


def region_points(
    region: InputRecord, rng: np.random.Generator, count: int = 6
) -> list[list[Fraction]]:
    """Exact points of the region: corners, samples, and rational hull or ball points."""
    n = len(region.lower)
    low = [Fraction(float(v)) for v in region.lower]
    high = [Fraction(float(v)) for v in region.upper]
    if region.kind == "v_polytope":
        vertices = [[Fraction(float(v)) for v in row] for row in region.vertices]
        points = list(vertices)
        for _ in range(count):
            parts = [Fraction(int(k)) for k in rng.integers(1, 9, len(vertices))]
            points.append(
                [
                    sum(p * v[j] for p, v in zip(parts, vertices, strict=True)) / sum(parts)
                    for j in range(n)
                ]
            )
        return points
    if region.kind == "lp_ball":
        center = [Fraction(float(v)) for v in region.center]
        radius = Fraction(region.radius)
        points = [center]
        for j, sign in itertools.product(range(n), (-1, 1)):
            points.append([c + sign * radius * (i == j) for i, c in enumerate(center)])
        for _ in range(count):
            step = rng.normal(size=n)
            scale = {1.0: np.abs(step).sum(), 2.0: np.sqrt((step**2).sum())}.get(
                region.p, np.abs(step).max()
            )
            exact = [Fraction(float(s)) for s in step / scale * (1 - 1e-12)]
            points.append([c + radius * s for c, s in zip(center, exact, strict=True)])
        return [p for p in points if all(a <= v <= b for a, v, b in zip(low, p, high, strict=True))]
    corners = [[low[j] if rng.random() < 0.5 else high[j] for j in range(n)] for _ in range(count)]
    inner = [
        [a + (b - a) * Fraction(float(rng.random())) for a, b in zip(low, high, strict=True)]
        for _ in range(count)
    ]
    return corners + inner


def random_region(kind: str, n: int, rng: np.random.Generator, width: float) -> InputRecord:
    center = rng.normal(size=n)
    if kind == "v_polytope":
        vertices = center + width * rng.normal(size=(4, n))
        return InputRecord(kind, vertices.min(axis=0), vertices.max(axis=0), vertices=vertices)
    if kind.startswith("ball"):
        p = {"1": 1.0, "2": 2.0, "i": float("inf")}[kind[4]]
        low, high = center - 0.8 * width, center + 1.5 * width
        return InputRecord("lp_ball", low, high, center=center, radius=width, p=p)
    half = width * rng.random(n) * (rng.random(n) < 0.8)
    return box(center - half, center + half)


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["box", "box", "ball1", "ball2", "balli", "v_polytope"]),
    width=st.sampled_from([0.0, 1e-12, 1e-3, 0.1, 1.0, 1e3]),
    tighten=st.booleans(),
)
def test_bound_is_below_exact_margin(
    name: str, seed: int, kind: str, width: float, tighten: bool
) -> None:
    net = NETS[name](seed).record()
    rng = np.random.default_rng(seed + 1)
    nodes = read_nodes(net)
    region = random_region(kind, nodes[0].size, rng, width)
    prop = row_property(region, rng.normal(size=(1, 2)), rng.normal(size=1))
    proof = ProofTree.leaf([0], tighten=nonlinear_inputs(net) if tighten else ())
    bound = Fraction(checked_bound(net, prop, proof))
    for point in region_points(region, rng):
        assert bound <= margin_exactly(prop, evaluate_exactly(net, np.array(point, dtype=object)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_any_slopes_are_sound(seed: int, scale: float) -> None:
    net = mlp((3, 6, 6, 2), seed).record()
    rng = np.random.default_rng(seed)
    region = random_region("box", 3, rng, 0.5)
    prop = row_property(region, rng.normal(size=(1, 2)))
    slopes = {
        n["name"]: Slopes(rng.normal(size=(1, 6)) * scale, rng.normal(size=(1, 6)) * scale)
        for n in net.structure["nodes"]
        if n["op"] == "relu"
    }
    proof = ProofTree.leaf([0], tighten=nonlinear_inputs(net), slopes=slopes, tighten_slopes=slopes)
    bound = Fraction(checked_bound(net, prop, proof))
    for point in region_points(region, rng):
        assert bound <= margin_exactly(prop, evaluate_exactly(net, np.array(point, dtype=object)))


def gelu_tanh(x: mpmath.mpf) -> mpmath.mpf:
    inner = mpmath.sqrt(8 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)
    return x / (1 + mpmath.exp(-inner))


MP_RULES: dict[str, Callable[[mpmath.mpf, dict[str, object]], mpmath.mpf]] = {
    "relu": lambda x, _: max(x, mpmath.mpf(0)),
    "tanh": lambda x, _: mpmath.tanh(x),
    "sigmoid": lambda x, _: 1 / (1 + mpmath.exp(-x)),
    "softplus": lambda x, _: mpmath.log(1 + mpmath.exp(x)),
    "silu": lambda x, _: x / (1 + mpmath.exp(-x)),
    "gelu": lambda x, attrs: (
        x * mpmath.ncdf(x) if attrs.get("approximate") != "tanh" else gelu_tanh(x)
    ),
    "elu": lambda x, attrs: x if x > 0 else attrs["alpha"] * mpmath.expm1(x),
}


def evaluate_mp(net: NetworkRecord, point: np.ndarray) -> list[mpmath.mpf]:
    """50-digit evaluation of chains of linear, batch_norm and activation nodes."""
    value = [mpmath.mpf(float(v)) for v in point]
    for node in read_nodes(net)[1:]:
        if node.op == "linear":
            weight, bias = node.required("weight").tolist(), node.required("bias").tolist()
            value = [mpmath.fdot(row, value) + b for row, b in zip(weight, bias, strict=True)]
        elif node.op == "batch_norm":
            mean, var, gain, shift = (
                node.required(role).tolist() for role in ("mean", "var", "weight", "bias")
            )
            value = [
                (x - m) / mpmath.sqrt(mpmath.mpf(v) + node.number("eps")) * g + s
                for x, m, v, g, s in zip(value, mean, var, gain, shift, strict=True)
            ]
        else:
            value = [MP_RULES[node.op](x, dict(node.attrs)) for x in value]
    return value


SMOOTH = ["tanh", "sigmoid", "softplus", "silu", "gelu", "gelu tanh", "elu"]


@pytest.mark.parametrize("op", [*SMOOTH, "batch_norm"])
@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    width=st.sampled_from([0.0, 1e-9, 0.1, 1.0, 30.0]),
    tighten=st.booleans(),
)
def test_smooth_bound_is_below_50_digit_margin(
    op: str, seed: int, width: float, tighten: bool
) -> None:
    rng = np.random.default_rng(seed)
    if op == "batch_norm":
        net = NetBuilder((3,), seed)
        net.linear(4)
        for role in ("mean", "var", "weight", "bias"):
            net.weight(role, (4,))
        net.weights["var"] = np.abs(net.weights["var"])
        roles = {role: role for role in ("mean", "var", "weight", "bias")}
        net.add("batch_norm", [net.last], (4,), roles, eps=1e-5)
        net.elementwise("relu")
        net.linear(2)
    else:
        attrs = {"alpha": float(rng.uniform(0.2, 3))} if op == "elu" else {}
        op, *form = op.split()
        attrs |= {"approximate": form[0]} if form else {}
        net = mlp((3, 4, 4, 2), seed, op, **attrs)
    record = net.record()
    region = random_region("box", 3, rng, width)
    prop = row_property(region, rng.normal(size=(1, 2)))
    proof = ProofTree.leaf([0], tighten=nonlinear_inputs(record) if tighten else ())
    bound = checked_bound(record, prop, proof)
    row = prop.clauses[0][0][0].tolist()
    with mpmath.workdps(50):
        for point in region_points(region, rng):
            floats = np.clip(np.array([float(v) for v in point]), region.lower, region.upper)
            assert bound <= mpmath.fdot(row, evaluate_mp(record, floats))


def float32_run(net: NetworkRecord, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One float32 evaluation with a random order of every sum."""
    value = x.astype(np.float32)
    for node in read_nodes(net)[1:]:
        if node.op == "relu":
            value = np.maximum(value, np.float32(0))
            continue
        products = node.params["weight"] * value[None, :]
        terms = np.concatenate([products, node.params["bias"][:, None]], axis=1)
        total = np.zeros(len(terms), dtype=np.float32)
        for j in rng.permutation(terms.shape[1]):
            total = total + terms[:, j]
        value = total
    return value


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1.0, 1e-20, 1e6]),
    tighten=st.booleans(),
)
def test_float32_bound_is_below_every_summation_order(
    seed: int, scale: float, tighten: bool
) -> None:
    """At a point interval the bound must cover the rounding of the float32 run alone."""
    net = mlp((4, 12, 12, 2), seed).record()
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=4) * scale).astype(np.float32)
    region = box(x, x)
    prop = row_property(region, rng.normal(size=(1, 2)))
    proof = ProofTree.leaf([0], tighten=nonlinear_inputs(net) if tighten else ())
    bound = Fraction(checked_bound(net, prop, proof, arithmetic="float32"))
    exact_bound = Fraction(checked_bound(net, prop, proof))
    assert bound <= exact_bound
    for _ in range(10):
        output = evaluate_output(float32_run(net, x, rng))
        assert bound <= margin_exactly(prop, output)


def evaluate_output(values: np.ndarray) -> np.ndarray:
    return np.array([Fraction(float(v)) for v in values], dtype=object)
