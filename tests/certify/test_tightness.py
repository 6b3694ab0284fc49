"""The bounds are not vacuous: they equal a plain CROWN where that is the best cut."""

from __future__ import annotations

import numpy as np
import pytest

from torch_prepared.certify import (
    Certificate,
    InputRecord,
    NetworkRecord,
    ProofTree,
    check_certificate,
)

from .nets import box, mlp, nonlinear_inputs, row_property


def naive_crown(net: NetworkRecord, region: InputRecord, row: np.ndarray) -> float:
    """Plain CROWN for an MLP with ReLU, in ordinary float64."""
    center, radius = (region.lower + region.upper) / 2, (region.upper - region.lower) / 2
    layers = [
        (net.weights[f"w{k}.weight"].astype(float), net.weights[f"w{k}.bias"].astype(float))
        for k in range(1, len(net.structure["nodes"]), 2)
    ]
    relaxed: list[tuple[np.ndarray, ...]] = []

    def lower(rows: np.ndarray, depth: int) -> np.ndarray:
        constant = np.zeros(len(rows))
        for k in range(depth, -1, -1):
            weight, bias = layers[k]
            constant = constant + rows @ bias
            rows = rows @ weight
            if k:
                low, high, shift = relaxed[k - 1]
                constant = constant + np.minimum(rows, 0) @ shift
                rows = np.maximum(rows, 0) * low + np.minimum(rows, 0) * high
        return constant + rows @ center - np.abs(rows) @ radius

    for k in range(len(layers) - 1):
        eye = np.eye(len(layers[k][1]))
        low, high = lower(eye, k), -lower(-eye, k)
        unstable = (low < 0) & (high > 0)
        slope = np.where(unstable, high / np.where(unstable, high - low, 1), high > 0)
        below = np.where(unstable, high > -low, high > 0).astype(float)
        relaxed.append((below, slope, np.where(unstable, -slope * low, 0)))
    return float(lower(row, len(layers) - 1)[0])


@pytest.mark.parametrize("seed", range(12))
def test_at_least_plain_crown(seed: int) -> None:
    net = mlp((4, 15, 15, 15, 3), seed).record()
    rng = np.random.default_rng(seed)
    region = box(*np.sort(rng.normal(size=(2, 4)) * 0.3, axis=0))
    prop = row_property(region, rng.normal(size=(1, 3)))
    proof = ProofTree.leaf([0], tighten=nonlinear_inputs(net))
    bound = check_certificate(Certificate.create(net, [prop], [proof]), net, [prop]).margin
    expected = naive_crown(net, region, prop.clauses[0][0])
    assert bound >= expected - 1e-9 * (1 + abs(expected))


@pytest.mark.parametrize("op", ["relu", "tanh", "gelu"])
def test_bound_is_the_value_at_a_point(op: str) -> None:
    net = mlp((4, 15, 15, 3), 0, op).record()
    x = np.linspace(-1, 1, 4)
    prop = row_property(box(x, x), np.eye(3)[:1])
    opposite = row_property(box(x, x), -np.eye(3)[:1])
    bounds = [
        check_certificate(Certificate.create(net, [p], [ProofTree.leaf([0])]), net, [p]).margin
        for p in (prop, opposite)
    ]
    assert bounds[0] <= -bounds[1]
    assert -bounds[1] - bounds[0] < 1e-11


def test_merged_last_layer_beats_interval_subtraction() -> None:
    """Equal output rows cancel: the difference is bounded by about 0, not by two intervals."""
    builder = mlp((4, 15, 2), 0)
    builder.weights["w3.weight"][1] = builder.weights["w3.weight"][0]
    builder.weights["w3.bias"][:] = [1.0, 0.0]
    net = builder.record()
    prop = row_property(box(-np.ones(4), np.ones(4)), np.array([[1.0, -1.0]]))
    certificate = Certificate.create(net, [prop], [ProofTree.leaf([0])])
    assert check_certificate(certificate, net, [prop]).margin == pytest.approx(1.0, abs=1e-12)


def test_dual_norms_are_used() -> None:
    net = mlp((6, 2), 0).record()
    center = np.zeros(6)
    for p, order in ((1.0, np.inf), (2.0, 2), (np.inf, 1)):
        region = InputRecord("lp_ball", center - 9, center + 9, center=center, radius=0.5, p=p)
        prop = row_property(region, np.eye(2)[:1])
        certificate = Certificate.create(net, [prop], [ProofTree.leaf([0])])
        weight = net.weights["w1.weight"][0].astype(float)
        expected = net.weights["w1.bias"][0] - 0.5 * np.linalg.norm(weight, order)
        assert check_certificate(certificate, net, [prop]).margin == pytest.approx(
            expected, rel=1e-5
        )
