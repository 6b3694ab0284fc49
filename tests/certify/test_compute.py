"""Compute types: no evaluation that a model allows leaves its bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import conv_net, mlp, residual_net
from torch_prepared.certify import PointCertificate, PointClaims, Verdict, check_points
from torch_prepared.certify.compute import COMPUTE_TYPES, round_bfloat16
from torch_prepared.core.graph import Graph
from torch_prepared.errors import CertificateError
from torch_prepared.relax import evaluate_graph

SIZES = (20, 40, 30, 4)


def _claims(graph: Graph, count: int = 6, seed: int = 0) -> PointClaims:
    """Random inputs with the network's own decisions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, graph.input_size, generator=generator).to(graph.dtype)
    labels = evaluate_graph(graph, x).flatten(1).argmax(1)
    return PointClaims.labels(x.double().numpy(), labels.tolist(), graph.output_size)


def _check(graph: Graph, claims: PointClaims, arithmetic: str, **more):
    certificate = PointCertificate.create(graph.record(), claims)
    return check_points(certificate, graph.record(), claims, arithmetic=arithmetic, **more)


def _margins(claims: PointClaims, outputs: np.ndarray) -> np.ndarray:
    values = (outputs[claims.point] * claims.rows).sum(axis=1)
    return np.array([values[claims.point == i].min() for i in range(len(claims.inputs))])


def _few_bits(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ten bits after the leading one, each number rounded to nearest or cut off."""
    bits = value.astype(np.float32).view(np.uint32)
    half = np.where(rng.random(value.shape) < 0.5, 0x1000, 0).astype(np.uint32)
    return ((bits + half) & np.uint32(0xFFFFE000)).view(np.float32)


def _sum(products: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Products (m, n) added in a random order, or as a random number of partial sums."""
    products = products[:, rng.permutation(products.shape[1])]
    parts = np.array_split(products, int(rng.integers(1, 6)), axis=1)
    sums = [np.cumsum(part, axis=1, dtype=products.dtype)[:, -1] for part in parts]
    total = sums[0]
    for part in sums[1:]:
        total = total + part
    return total


def _emulate(graph: Graph, x: np.ndarray, compute: str, rng: np.random.Generator) -> np.ndarray:
    """One evaluation of a chain of linear layers and ReLUs as the model of ``compute`` allows."""
    kind = np.float64 if compute == "float64" else np.float32
    narrow = compute == "bfloat16"
    value = (round_bfloat16(x) if narrow else x).astype(kind)
    for node in graph.nodes[1:]:
        if node.op == "relu":
            value = np.maximum(value, 0)
            continue
        weight, bias = (
            node.params[role].read(graph.parameters).numpy().astype(kind)
            for role in ("weight", "bias")
        )
        if narrow:
            weight, bias = round_bfloat16(weight), round_bfloat16(bias)
        factors = (weight, value)
        if compute == "tf32":
            factors = (_few_bits(weight, rng), _few_bits(np.tile(value, (len(weight), 1)), rng))
        total = _sum(factors[0] * factors[1], rng)
        if narrow and rng.random() < 0.5:
            total = round_bfloat16(total)
        value = total + bias
        value = round_bfloat16(value) if narrow else value
    return value.astype(np.float64)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("compute", COMPUTE_TYPES)
def test_no_emulated_evaluation_leaves_the_bounds(compute: str, seed: int) -> None:
    dtype = torch.float64 if compute == "float64" else torch.float32
    graph = mlp(SIZES, dtype=dtype, seed=seed)
    claims, rng = _claims(graph, seed=seed), np.random.default_rng(seed)
    bound = _check(graph, claims, compute).margins
    assert np.isfinite(bound).all()
    exact = _check(graph, claims, "real").margins
    assert (bound <= exact).all() or compute == "bfloat16"  # there the weights are other ones
    least = np.full(len(bound), np.inf)
    for _ in range(40):
        outputs = np.stack([_emulate(graph, x, compute, rng) for x in claims.inputs])
        least = np.minimum(least, _margins(claims, outputs))
    assert (least >= bound).all()
    # and the bounds are not vacuous: sums of n terms may lose n units each
    lost = {"float32": 2.0**-10, "float64": 2.0**-39, "tf32": 0.2, "bfloat16": 0.7}[compute]
    assert (least - bound <= lost * np.maximum(1.0, np.abs(exact))).all()


def test_torch_in_bfloat16_stays_within_the_bounds() -> None:
    for make in (lambda: mlp(SIZES), conv_net):
        graph = make().to(torch.float32, "cpu")
        claims = _claims(graph)
        bound = _check(graph, claims, "bfloat16").margins
        narrow = graph.to(torch.bfloat16, "cpu")
        x = torch.from_numpy(claims.inputs).bfloat16()
        y = evaluate_graph(narrow, x).flatten(1).double().numpy()
        assert np.isfinite(bound).all()
        assert (_margins(claims, y) >= bound).all()


def test_batch_normalization_has_no_model_in_bfloat16() -> None:
    graph = residual_net().to(torch.float32, "cpu")
    claims = _claims(graph)
    assert "fold" in _check(graph, claims, "bfloat16").reason
    assert np.isfinite(_check(graph, claims, "tf32").margins).all()


def test_boxes_grow_as_the_type_gets_narrower() -> None:
    graph = mlp(SIZES, dtype=torch.float32)
    claims = _claims(graph)
    exact = _check(graph, claims, "real").margins
    lost = [exact - _check(graph, claims, name).margins for name in ("float64", "float32", "tf32")]
    assert (lost[0] >= 0).all()
    assert (lost[0] < lost[1]).all()
    assert (lost[1] < lost[2]).all()


def test_a_margin_for_float32_need_not_do_for_narrower_types() -> None:
    graph = mlp((3, 5, 2), dtype=torch.float32)
    claims = _claims(graph, 1)
    exact = float(_check(graph, claims, "real").margins[0])
    label = int(claims.rows[0].argmax())
    shift = torch.zeros(2)
    shift[label] = 1e-4 - exact
    near = graph.with_parameters({"linear3.bias": graph.parameters["linear3.bias"] + shift})
    verdicts = {name: _check(near, claims, name).status for name in COMPUTE_TYPES}
    assert verdicts["float32"] is verdicts["float64"] is Verdict.CERTIFIED
    assert verdicts["tf32"] is verdicts["bfloat16"] is Verdict.UNKNOWN


def test_rounding_to_bfloat16_is_that_of_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    bits[:1000] = (bits[:1000] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)  # ties
    x = bits.view(np.float32)
    x = x[np.isfinite(x)]
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(round_bfloat16(x), expected)


@pytest.mark.parametrize("compute", ["float32", "tf32", "bfloat16"])
def test_float64_weights_and_inputs_are_not_of_a_narrower_type(compute: str) -> None:
    graph = mlp((3, 4, 2))
    check = _check(graph, _claims(graph), compute)
    assert check.status is Verdict.UNKNOWN
    assert "float64" in check.reason
    single = graph.to(torch.float32, "cpu")
    between = PointClaims.labels(np.full((1, 3), 0.1), [0], 2)
    assert "float32 numbers" in _check(single, between, compute).reason


@pytest.mark.parametrize("compute", ["tf32", "bfloat16"])
def test_what_has_no_model_proves_nothing(compute: str) -> None:
    graph = mlp((3, 4, 2), dtype=torch.float32)
    huge = graph.with_parameters({"linear1.bias": torch.full((4,), 1e9)})
    check = _check(huge, _claims(huge), compute)
    assert check.status is Verdict.UNKNOWN
    assert np.isnan(check.margins).all()
    large = graph.with_parameters({n: 1e5 * p for n, p in graph.parameters.items()})
    assert _check(large, _claims(large), compute).status is Verdict.UNKNOWN  # sums beyond 2**26


def test_unknown_types_are_refused() -> None:
    graph = mlp((3, 4, 2), dtype=torch.float32)
    with pytest.raises(CertificateError, match="bfloat16"):
        _check(graph, _claims(graph), "float8")


def test_transcendental_activations_need_their_error() -> None:
    graph = conv_net("tanh").to(torch.float32, "cpu")
    claims = _claims(graph)
    for compute in ("tf32", "bfloat16"):
        assert _check(graph, claims, compute).status is Verdict.UNKNOWN
        found = _check(graph, claims, compute, activation_ulp=4.0).margins
        assert np.isfinite(found).all()
        assert (found < _check(graph, claims, "real").margins).all() or compute == "bfloat16"
