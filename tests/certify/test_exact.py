"""The exact evaluator agrees with PyTorch's own operators in float64."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.nn import functional

from torch_prepared.certify import (
    Certificate,
    NetworkRecord,
    ProofTree,
    PropertyRecord,
    check_certificate,
    evaluate_exactly,
    margin_exactly,
)
from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.errors import CertificateError, UnsupportedOperationError

from .nets import NetBuilder, box, mlp


def agree(net: NetworkRecord, expected: torch.Tensor, x: np.ndarray) -> None:
    got = [float(v) for v in evaluate_exactly(net, x.reshape(-1))]
    np.testing.assert_allclose(got, expected.reshape(-1).numpy(), rtol=1e-12, atol=1e-12)
    for sign in (1.0, -1.0):  # the checker's enclosure of every output is tight at a point
        for j in range(len(got)):
            row = np.zeros((1, len(got)))
            row[0, j] = sign
            prop = PropertyRecord(box(x.reshape(-1), x.reshape(-1)), [(row, np.zeros(1))])
            certificate = Certificate.create(net, [prop], [ProofTree.leaf([0])])
            margin = check_certificate(certificate, net, [prop]).margin
            assert margin == pytest.approx(sign * got[j], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_conv_2d(groups: int) -> None:
    net = NetBuilder((2, 5, 4))
    net.conv(2, (3, 2), stride=2, padding=(1, 0, 2, 1), dilation=1, groups=groups)
    net.elementwise("relu")
    net.conv(3, (2, 2), dilation=2, padding=(1, 1, 1, 1))
    x = np.random.default_rng(1).normal(size=(2, 5, 4))
    w = {k: torch.tensor(v, dtype=torch.float64) for k, v in net.weights.items()}
    value = functional.pad(torch.tensor(x)[None], (0, 1, 1, 2))
    value = functional.conv2d(value, w["w1.weight"], w["w1.bias"], stride=2, groups=groups)
    value = functional.conv2d(value.relu(), w["w3.weight"], w["w3.bias"], padding=1, dilation=2)
    agree(net.record(), value, x)


def test_conv_1d_and_pools() -> None:
    net = NetBuilder((2, 9))
    net.conv(4, (3,), stride=2, padding=(1, 1))
    net.pool("max_pool", (3,), stride=2, padding=(1, 1))
    net.pool("avg_pool", (2,), stride=1, padding=(1, 1), count_include_pad=False)
    x = np.random.default_rng(1).normal(size=(2, 9))
    w = {k: torch.tensor(v, dtype=torch.float64) for k, v in net.weights.items()}
    value = functional.conv1d(
        torch.tensor(x)[None], w["w1.weight"], w["w1.bias"], stride=2, padding=1
    )
    value = functional.max_pool1d(value, 3, 2, 1)
    value = functional.avg_pool1d(value, 2, 1, 1, count_include_pad=False)
    agree(net.record(), value, x)


def test_pools_2d() -> None:
    net = NetBuilder((2, 5, 5))
    net.pool("avg_pool", (2, 2), stride=1, padding=(1, 1, 1, 1))
    net.pool("max_pool", (3, 3), stride=2, padding=(1, 1, 1, 1))
    x = np.random.default_rng(1).normal(size=(2, 5, 5))
    value = functional.avg_pool2d(torch.tensor(x)[None], 2, 1, 1)
    value = functional.max_pool2d(value, 3, 2, 1)
    agree(net.record(), value, x)


def test_structural_operators_and_linear_over_the_last_axis() -> None:
    net = NetBuilder((2, 3))
    linear = net.linear(4)
    leaky = net.elementwise("leaky_relu", alpha=0.25)
    joined = net.add("concat", [leaky, linear], (2, 8), axis=-1)
    summed = net.add("reduce_sum", [joined], (8,), axes=[0], scale=0.5)
    absolute = net.elementwise("abs", summed)
    index = [[0, 0, 7], [3, 2, 1]]
    net.add("gather", [absolute], (2, 3), index=index)
    x = np.random.default_rng(1).normal(size=(2, 3))
    w = {k: torch.tensor(v, dtype=torch.float64) for k, v in net.weights.items()}
    value = functional.linear(torch.tensor(x), w["w1.weight"], w["w1.bias"])
    value = torch.cat([functional.leaky_relu(value, 0.25), value], dim=-1)
    value = (0.5 * value.sum(0)).abs()[torch.tensor(index)]
    agree(net.record(), value, x)


def test_graph_records_are_read_with_permuted_parameters() -> None:
    """A weight stored (in, out), as ONNX's MatMul has it, is read through its reference."""
    weight = torch.arange(6.0).reshape(2, 3)
    graph = Graph(
        nodes=(
            Node("x", "input", (), (2,)),
            Node("y", "linear", ("x",), (3,), {"weight": ParameterRef("w", permute=(1, 0))}),
            Node("z", "reshape", ("y",), (3, 1)),
        ),
        parameters={"w": weight},
        editable=frozenset({"w"}),
    )
    output = evaluate_exactly(graph.record(), np.array([1.0, 2.0]))
    assert output.tolist() == [Fraction(6), Fraction(9), Fraction(12)]


def test_margin_takes_the_best_row_of_the_worst_clause() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0]])
    prop = PropertyRecord(
        box(np.zeros(1), np.ones(1)), [(rows, np.zeros(2)), (rows[:1], np.array([-0.5]))]
    )
    output = np.array([Fraction(1, 3), Fraction(2)], dtype=object)
    assert margin_exactly(prop, output) == Fraction(1, 3) - Fraction(1, 2)


def test_irrational_operators_and_bad_points_are_refused() -> None:
    with pytest.raises(UnsupportedOperationError, match="tanh"):
        evaluate_exactly(mlp((2, 2, 1), 0, "tanh").record(), np.zeros(2))
    with pytest.raises(CertificateError, match="point"):
        evaluate_exactly(mlp((2, 2, 1)).record(), np.zeros(3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stride", [0]),
        ("stride", [1, 1]),
        ("padding", [1]),
        ("dilation", [1.5]),
        ("groups", 3),
        ("groups", True),
    ],
)
def test_malformed_attributes_are_refused(field: str, value: object) -> None:
    net = NetBuilder((2, 6))
    net.conv(2, (3,))
    net.nodes[1]["attrs"][field] = value
    record = net.record()
    prop = PropertyRecord(box(np.zeros(12), np.ones(12)), [(np.ones((1, 8)), np.zeros(1))])
    certificate = Certificate.create(record, [prop], [ProofTree.leaf([0])])
    with pytest.raises(CertificateError):
        check_certificate(certificate, record, [prop])


def test_unknown_operators_are_named() -> None:
    net = NetBuilder((2,))
    net.elementwise("sin")
    record = net.record()
    prop = PropertyRecord(box(np.zeros(2), np.ones(2)), [(np.ones((1, 2)), np.zeros(1))])
    certificate = Certificate.create(record, [prop], [ProofTree.leaf([0])])
    with pytest.raises(UnsupportedOperationError, match="'sin'"):
        check_certificate(certificate, record, [prop])
