"""Files and models that must be refused, each with one line that says why."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import onnx
import pytest
from _onnx_models import (
    make_model,
    relu_net,
    save_model,
)
from onnx import TensorProto, helper, numpy_helper

from torch_prepared.core.onnx import load_onnx
from torch_prepared.errors import ModelFormatError, UnsupportedOperationError


def bad_files() -> dict[str, bytes]:
    good = relu_net().SerializeToString()
    return {
        "empty": b"",
        "text": b"this is not a network at all\n" * 20,
        "cut": good[: len(good) // 2],
        "cut gzip": gzip.compress(good)[:-20],
        "damaged gzip": gzip.compress(good)[:30] + b"\x00" * 40,
        "empty gzip": gzip.compress(b""),
        "random": np.random.default_rng(0).bytes(2000),
    }


@pytest.mark.parametrize("kind", list(bad_files()))
def test_bad_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(bad_files()[kind])
    with pytest.raises(ModelFormatError, match=r"bad\.onnx: ") as caught:
        load_onnx(path)
    assert "\n" not in str(caught.value)


def test_missing_file_folder_and_oversized_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="No such file"):
        load_onnx(tmp_path / "missing.onnx")
    with pytest.raises(ModelFormatError, match="cannot be read"):
        load_onnx(tmp_path)
    path = tmp_path / "bomb.onnx.gz"
    path.write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(ModelFormatError, match="more than 100000 bytes"):
        load_onnx(path, max_bytes=100_000)


def changed(change) -> onnx.ModelProto:
    model = relu_net()
    change(model)
    return model


def add_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))


def add_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, None))


def poison(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].raw_data = np.full(4, np.nan, np.float32).tobytes()


def shorten(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = b"1234"


def widen(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[1] = 2**40


def misfit(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4


def open_size(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"


def no_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def detach_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "W"


def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "r"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_input, "exactly one input"),
        (add_output, "exactly one output"),
        (poison, "'b'.*NaN"),
        (shorten, "'W'|damaged|invalid"),
        (widen, "'W'|damaged|invalid"),
        (misfit, "do not fit"),
        (open_size, "symbolic size"),
        (no_shape, "shape"),
        (detach_output, "does not depend on the input"),
        (cycle, "invalid|nothing before"),
    ],
)
def test_malformed_model(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message) as caught:
        load_onnx(save_model(changed(change), tmp_path))
    assert "\n" not in str(caught.value)


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def half(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((3, 4), np.float16), "W"))


def unknown(model: onnx.ModelProto) -> None:
    model.graph.node[2].op_type = "Sin"


def custom(model: onnx.ModelProto) -> None:
    model.graph.node[2].domain = "com.example"


def square(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[1] = "h"
    model.graph.node[1].op_type = "Mul"


def quotient(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[:] = ["b", "h"]
    model.graph.node[1].op_type = "Div"


def half_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (external, "'W' is stored in another file"),
        (half, "'W' has type FLOAT16"),
        (half_input, "'x' has type FLOAT16"),
        (unknown, r"'third': operator 'Sin' has no support; supported operators: Add.*Relu"),
        (custom, "com.example::Relu"),
        (square, r"'second' \(Mul\): computes a power of a value"),
        (quotient, r"'second' \(Div\): divides by a value"),
    ],
)
def test_unsupported_model(tmp_path: Path, change, message: str) -> None:
    with pytest.raises(UnsupportedOperationError, match=message):
        load_onnx(save_model(changed(change), tmp_path))


@pytest.mark.parametrize(
    ("op", "attributes", "operands"),
    [
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}, []),
        ("Conv", {}, [np.ones((1, 1, 2, 2, 2), np.float32)]),
        ("LeakyRelu", {"alpha": 1.5}, []),
        ("Expand", {}, [np.array([2**20, 2**20, 5, 5])]),
    ],
)
def test_unsupported_forms(tmp_path: Path, op: str, attributes, operands) -> None:
    shape = [1, 1, 5, 5, 5] if op == "Conv" else [1, 1, 5, 5]
    constants = {f"c{i}": value for i, value in enumerate(operands)}
    model = make_model(
        [helper.make_node(op, ["x", *constants], ["y"], **attributes)], shape, constants
    )
    with pytest.raises(UnsupportedOperationError):
        load_onnx(save_model(model, tmp_path))


def test_a_huge_folded_constant_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    model = make_model(nodes, [1, 3], {"s": np.array([2**20, 2**20])})
    with pytest.raises(UnsupportedOperationError, match="more than"):
        load_onnx(save_model(model, tmp_path))
