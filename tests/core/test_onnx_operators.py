"""Every supported ONNX operator against onnxruntime, in both batch conventions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from _onnx_models import check_model, make_model
from onnx import TensorProto, helper

RNG = np.random.default_rng(7)
BATCHES = [1, "N"]


def random(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def node(op: str, *inputs: str, out: str = "y", **attributes: object):
    return helper.make_node(op, list(inputs), [out], name=f"{op}_{out}", **attributes)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (0.3, 0.0)])
def test_gemm(tmp_path: Path, batch, trans_b: int, alpha: float, beta: float) -> None:
    weight = random(4, 3) if trans_b else random(3, 4)
    gemm = node("Gemm", "x", "W", "b", transB=trans_b, alpha=alpha, beta=beta)
    network = check_model(make_model([gemm], [batch, 3], {"W": weight, "b": random(4)}), tmp_path)
    plain = (alpha, beta) == (1.0, 1.0)
    assert network.graph.editable == ({"W", "b"} if plain else {"W"})
    assert network.batch_axis
    if plain:
        assert [n.op for n in network.graph.nodes] == ["input", "linear"]


@pytest.mark.parametrize("bias", [random(1, 4), random(), random(1)])
def test_gemm_broadcasts_its_bias(tmp_path: Path, bias: np.ndarray) -> None:
    gemm = node("Gemm", "x", "W", "b")
    network = check_model(make_model([gemm], [1, 3], {"W": random(3, 4), "b": bias}), tmp_path)
    assert ("b" in network.graph.editable) == (bias.shape == (1, 4))


def test_gemm_without_batch_axis_and_with_every_transposition(tmp_path: Path) -> None:
    nodes = [
        node("Gemm", "W", "x", "b", out="h", transA=1, transB=1),
        node("Gemm", "h", "V", out="y", transA=1),
    ]
    constants = {"W": random(3, 6), "b": random(6, 1), "V": random(6, 2)}
    network = check_model(make_model(nodes, [2, 3], constants), tmp_path)
    assert not network.batch_axis
    assert network.graph.input_shape == (2, 3)
    assert {"W", "V"} <= network.graph.editable


def test_gemm_transposes_a_batch_of_one(tmp_path: Path) -> None:
    gemm = node("Gemm", "x", "W", transA=1)
    check_model(make_model([gemm], [1, 3], {"W": random(1, 4)}), tmp_path)


@pytest.mark.parametrize(
    ("input_shape", "weight"),
    [
        ([2], (2, 5)),
        ([1, 2], (2, 5)),
        (["N", 2], (2, 5)),
        (["N", 4, 2], (2, 5)),
        (["N", 4, 2], (1, 2, 5)),
        ([1, 4, 2], (2,)),
        ([2], (1, 2, 5)),
        ([2], (2,)),
    ],
)
def test_matmul_with_a_constant_on_the_right(tmp_path: Path, input_shape, weight) -> None:
    network = check_model(
        make_model([node("MatMul", "x", "W")], input_shape, {"W": random(*weight)}), tmp_path
    )
    assert network.batch_axis == (len(input_shape) > 1)
    assert network.graph.editable == {"W"}


@pytest.mark.parametrize(
    ("input_shape", "weight"),
    [
        ([2], (5, 2)),
        ([2], (1, 5, 2)),
        ([2, 3], (5, 2)),
        ([1, 5], (4, 1)),
        ([1, 3, 4], (2, 3)),
        (["N", 3, 4], (2, 3)),
        (["N", 3, 4], (3,)),
        ([1, 3, 4], (1, 2, 3)),
    ],
)
def test_matmul_with_a_constant_on_the_left(tmp_path: Path, input_shape, weight) -> None:
    network = check_model(
        make_model([node("MatMul", "W", "x")], input_shape, {"W": random(*weight)}), tmp_path
    )
    assert network.graph.editable == {"W"}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("bias_first", [True, False])
def test_matmul_and_add_become_one_layer(tmp_path: Path, batch, bias_first: bool) -> None:
    order = ("b", "h") if bias_first else ("h", "b")
    nodes = [node("MatMul", "x", "W", out="h"), node("Add", *order, out="y")]
    constants = {"W": random(3, 4), "b": random(1, 4)}
    network = check_model(make_model(nodes, [batch, 3], constants), tmp_path)
    (_, layer) = network.graph.nodes
    assert layer.op == "linear"
    assert layer.name == "y"
    assert network.graph.editable == {"W", "b"}
    assert layer.params["weight"].permute == (1, 0)
    np.testing.assert_array_equal(network.graph.parameters["W"].numpy(), constants["W"])
    assert network.graph.parameters["b"].shape == (1, 4)


def test_a_shared_product_keeps_its_addition_apart(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x", "W", out="h"),
        node("Add", "h", "b", out="a"),
        node("Relu", "h", out="r"),
        node("Add", "a", "r"),
    ]
    constants = {"W": random(3, 4), "b": random(4)}
    network = check_model(make_model(nodes, ["N", 3], constants), tmp_path)
    assert network.graph.editable == {"W"}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (1, 3, 4), (2, 3, 4), (1, 2, 1, 1)])
def test_arithmetic_with_a_constant(tmp_path: Path, batch, op: str, shape) -> None:
    constant = random(*shape) + np.float32(3.0)
    nodes = [node(op, "x", "c", out="h")]
    nodes.append(node("Div", "h", "two") if op == "Div" else node(op, "c", "h"))
    constants = {"c": constant, "two": np.float32(2.0).reshape(())}
    check_model(make_model(nodes, [batch, 2, 3, 4], constants), tmp_path)


def test_a_constant_may_spread_over_a_batch_of_one(tmp_path: Path) -> None:
    check_model(make_model([node("Add", "x", "c")], [1, 3], {"c": random(4, 3)}), tmp_path)


@pytest.mark.parametrize("op", ["Add", "Sub"])
@pytest.mark.parametrize("batch", BATCHES)
def test_two_values_broadcast(tmp_path: Path, op: str, batch) -> None:
    nodes = [
        node("Slice", "x", "start", "stop", "axis", out="h"),
        node(op, "x", "h", out="a"),
        node(op, "h", "a"),
    ]
    constants = {"start": ints(1), "stop": ints(2), "axis": ints(-1)}
    check_model(make_model(nodes, [batch, 3, 4], constants), tmp_path)


CONVOLUTIONS = [
    ([2, 9], (4, 2, 3), {"strides": [2], "pads": [0, 2]}),
    ([4, 9], (6, 2, 3), {"dilations": [2], "group": 2}),
    ([3, 8, 7], (4, 3, 3, 2), {"strides": [2, 1], "pads": [1, 0, 2, 1]}),
    ([4, 8, 7], (8, 1, 3, 3), {"group": 4, "dilations": [2, 1]}),
    ([3, 8, 7], (4, 3, 3, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ([3, 8, 7], (4, 3, 4, 2), {"auto_pad": "SAME_LOWER", "strides": [3, 1]}),
    ([3, 8, 7], (4, 3, 3, 2), {"auto_pad": "VALID"}),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("shape", "weight", "attributes"), CONVOLUTIONS)
def test_convolution(tmp_path: Path, batch, shape, weight, attributes) -> None:
    conv = node("Conv", "x", "W", "b", **attributes)
    constants = {"W": random(*weight), "b": random(weight[0])}
    network = check_model(make_model([conv], [batch, *shape], constants), tmp_path)
    assert network.graph.editable == {"W", "b"}


def test_convolution_takes_an_added_bias(tmp_path: Path) -> None:
    nodes = [node("Conv", "x", "W", out="h"), node("Add", "h", "b")]
    constants = {"W": random(4, 3, 3, 3), "b": random(1, 4, 1, 1)}
    network = check_model(make_model(nodes, ["N", 3, 6, 6], constants), tmp_path)
    assert [n.op for n in network.graph.nodes] == ["input", "conv"]
    assert network.graph.editable == {"W", "b"}


@pytest.mark.parametrize("shape", [[3, 5, 5], [3]])
def test_batch_normalization(tmp_path: Path, shape) -> None:
    constants = {k: random(3) for k in ("s", "b", "m")}
    constants["v"] = np.abs(random(3)) + np.float32(0.1)
    norm = node("BatchNormalization", "x", "s", "b", "m", "v", epsilon=1e-3)
    check_model(make_model([norm], ["N", *shape], constants), tmp_path)


ACTIVATIONS = [
    ("Relu", {}),
    ("LeakyRelu", {}),
    ("LeakyRelu", {"alpha": 0.2}),
    ("Tanh", {}),
    ("Sigmoid", {}),
    ("Elu", {}),
    ("Elu", {"alpha": 0.5}),
    ("Softplus", {}),
    ("Identity", {}),
    ("Dropout", {}),
    ("Neg", {}),
    ("Cast", {"to": TensorProto.FLOAT}),
]


@pytest.mark.parametrize("shape", [[3], [1, 3], ["N", 2, 3]])
@pytest.mark.parametrize(("op", "attributes"), ACTIVATIONS)
def test_elementwise(tmp_path: Path, shape, op: str, attributes) -> None:
    check_model(make_model([node(op, "x", **attributes)], shape), tmp_path)


@pytest.mark.parametrize("form", ["none", "tanh"])
def test_gelu_is_imported_in_both_forms(tmp_path: Path, form: str) -> None:
    pytest.importorskip("torch_prepared.relax")
    from torch_prepared.core.onnx import load_onnx

    path = tmp_path / "m.onnx"
    model = make_model([node("Gelu", "x", approximate=form)], ["N", 3], opset=20)
    path.write_bytes(model.SerializeToString())
    last = load_onnx(path).graph.nodes[-1]
    assert (last.op, last.attrs["approximate"]) == ("gelu", form)


MOVES = [
    ("Flatten", [], {"axis": 1}),
    ("Reshape", [ints(0, -1)], {}),
    ("Reshape", [ints(-1, 24)], {}),
    ("Reshape", [ints(1, 4, 6)], {}),
    ("Reshape", [ints(0, 0, 2, 2, 3)], {}),
    ("Transpose", [], {"perm": [0, 2, 3, 1]}),
    ("Slice", [ints(0, 3), ints(2, -9), ints(1, -1), ints(1, -2)], {}),
    ("Gather", [ints(1, 0, -1)], {"axis": 2}),
    ("Gather", [np.array(1)], {"axis": 3}),
    ("Gather", [np.array([[0, 1], [1, 1]])], {"axis": 1}),
    ("Unsqueeze", [ints(1, 5)], {}),
    ("Expand", [ints(1, 2, 3, 4)], {}),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("op", "operands", "attributes"), MOVES)
def test_movement(tmp_path: Path, batch, op: str, operands, attributes) -> None:
    names = [f"c{i}" for i in range(len(operands))]
    constants = dict(zip(names, operands, strict=True))
    model = make_model([node(op, "x", *names, **attributes)], [batch, 2, 3, 4], constants)
    check_model(model, tmp_path)


@pytest.mark.parametrize(
    ("op", "operands", "attributes"),
    [("Flatten", [], {"axis": 2}), ("Expand", [ints(5, 1, 1, 1, 1)], {})],
)
def test_movement_of_a_batch_of_one(tmp_path: Path, op: str, operands, attributes) -> None:
    constants = {"c": operands[0]} if operands else {}
    model = make_model([node(op, "x", *constants, **attributes)], [1, 2, 3, 4], constants)
    check_model(model, tmp_path)


@pytest.mark.parametrize("shape", [[784, 1], [-1], [28, 28], [7, 112]])
def test_a_batch_of_one_may_vanish_in_a_reshape(tmp_path: Path, shape) -> None:
    nodes = [
        node("Reshape", "x", "s", out="h"),
        node("Reshape", "h", "back", out="v"),
        node("MatMul", "v", "W"),
    ]
    constants = {"s": ints(*shape), "back": ints(1, 784), "W": random(784, 3)}
    network = check_model(make_model(nodes, [1, 784, 1], constants), tmp_path)
    assert network.graph.input_shape == (784, 1)
    assert network.graph.output_shape == (3,)


def test_the_batch_axis_may_be_transposed_away_and_back(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", out="h", perm=[1, 0, 2]),
        node("MatMul", "h", "W", out="v"),
        node("Transpose", "v", perm=[1, 2, 0]),
    ]
    network = check_model(make_model(nodes, ["N", 3, 4], {"W": random(4, 2)}), tmp_path)
    assert network.graph.output_shape == (2, 3)


def test_shapes_computed_by_the_network_are_folded(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", out="s"),
        node("Gather", "s", "zero", out="n", axis=0),
        node("Unsqueeze", "n", "axes", out="n1"),
        node("Concat", "n1", "rest", out="target", axis=0),
        node("Reshape", "x", "target"),
    ]
    constants = {"zero": np.array(0), "axes": ints(0), "rest": ints(-1)}
    network = check_model(make_model(nodes, ["N", 3, 4], constants), tmp_path)
    assert network.graph.output_shape == (12,)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("opset", [11, 17])
def test_split_squeeze_and_concat(tmp_path: Path, batch, opset: int) -> None:
    old = opset < 13
    split = helper.make_node(
        "Split",
        ["x"] if old else ["x", "sizes"],
        ["a", "b"],
        axis=1,
        **({"split": [1, 3]} if old else {}),
    )
    squeeze = node(
        "Squeeze", *(["a"] if old else ["a", "axes"]), out="s", **({"axes": [1]} if old else {})
    )
    unsqueeze = node(
        "Unsqueeze", *(["s"] if old else ["s", "axes"]), out="u", **({"axes": [1]} if old else {})
    )
    nodes = [split, squeeze, unsqueeze, node("Concat", "b", "u", "b", axis=-2)]
    constants = {"sizes": ints(1, 3), "axes": ints(1)}
    check_model(make_model(nodes, [batch, 4, 3], constants, opset=opset), tmp_path)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean"])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[1], [-1], [1, 3], [3, 2, 1]])
def test_reduction(tmp_path: Path, batch, op: str, keepdims: int, axes) -> None:
    model = make_model([node(op, "x", axes=axes, keepdims=keepdims)], [batch, 2, 3, 4], opset=11)
    check_model(model, tmp_path)


def test_reduction_with_axes_as_operand_and_over_everything(tmp_path: Path) -> None:
    nodes = [
        node("ReduceSum", "x", "axes", out="h", keepdims=1),
        node("ReduceMean", "h", keepdims=1),
    ]
    check_model(make_model(nodes, [1, 3, 4], {"axes": ints(-1)}), tmp_path)


POOLS = [
    ("AveragePool", {"kernel_shape": [2, 3], "strides": [2, 1]}),
    ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    ("AveragePool", {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1], "strides": [2, 2]}),
    ("AveragePool", {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2]}),
    ("MaxPool", {"kernel_shape": [3, 3], "pads": [1, 0, 2, 1], "strides": [2, 2]}),
    ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("GlobalAveragePool", {}),
]


@pytest.mark.parametrize(("op", "attributes"), POOLS)
def test_pool(tmp_path: Path, op: str, attributes) -> None:
    check_model(make_model([node(op, "x", **attributes)], ["N", 2, 8, 8]), tmp_path)


@pytest.mark.parametrize("op", ["AveragePool", "MaxPool"])
def test_pool_over_one_axis(tmp_path: Path, op: str) -> None:
    check_model(make_model([node(op, "x", kernel_shape=[3], pads=[1, 1])], [1, 2, 8]), tmp_path)


def test_double_precision(tmp_path: Path) -> None:
    constants = {"W": RNG.normal(size=(3, 4)), "b": RNG.normal(size=4)}
    model = make_model([node("Gemm", "x", "W", "b")], ["N", 3], constants, dtype=TensorProto.DOUBLE)
    network = check_model(model, tmp_path)
    assert str(network.graph.dtype) == "torch.float64"
