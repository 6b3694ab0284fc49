"""Small ONNX models for tests, and where the real ones lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from torch_prepared.core.onnx import OnnxNetwork, load_onnx, run_onnx
from torch_prepared.relax import evaluate_graph

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "vnncomp2022"


def real_network(benchmark: str, stem: str) -> Path:
    """Path of a real network, or skip where the data are absent."""
    path = DATA / benchmark / "onnx" / f"{stem}.onnx.gz"
    if not path.exists():
        pytest.skip(f"benchmark data are absent: {path}")
    return path


def make_model(
    nodes: list[onnx.NodeProto],
    input_shape: list[int | str],
    constants: dict[str, np.ndarray] | None = None,
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
    listed: bool = False,
) -> onnx.ModelProto:
    """A model from input ``x`` to output ``y``; ``listed``: weights are inputs as well."""
    tensors = [numpy_helper.from_array(v, k) for k, v in (constants or {}).items()]
    inputs = [helper.make_tensor_value_info("x", dtype, input_shape)]
    if listed:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    outputs = [helper.make_tensor_value_info("y", dtype, None)]
    graph = helper.make_graph(nodes, "test", inputs, outputs, tensors)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 20 else 10
    )


def save_model(model: onnx.ModelProto, folder: Path) -> Path:
    """Write ``model`` without any check."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def relative_error(network: OnnxNetwork, count: int = 100, seed: int = 0) -> float:
    """Largest difference between the graph and onnxruntime, relative to the output's scale."""
    dtype = {torch.float32: np.float32, torch.float64: np.float64}[network.graph.dtype]
    x = np.random.default_rng(seed).uniform(-1, 1, (count, network.graph.input_size)).astype(dtype)
    expected = run_onnx(network, x)
    with torch.no_grad():
        got = evaluate_graph(network.graph, torch.from_numpy(x)).flatten(1).numpy()
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-6))


def check_model(model: onnx.ModelProto, folder: Path, count: int = 8) -> OnnxNetwork:
    """Import ``model`` and compare it with onnxruntime."""
    network = load_onnx(save_model(model, folder))
    assert relative_error(network, count) < 2e-6
    return network


def relu_net(batch: int | str = "N") -> onnx.ModelProto:
    """MatMul, Add, Relu, Gemm from 3 to 2 numbers."""
    rng = np.random.default_rng(3)
    constants = {
        "W": rng.normal(size=(3, 4)).astype(np.float32),
        "b": rng.normal(size=4).astype(np.float32),
        "V": rng.normal(size=(2, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["h"], "first"),
        helper.make_node("Add", ["h", "b"], ["a"], "second"),
        helper.make_node("Relu", ["a"], ["r"], "third"),
        helper.make_node("Gemm", ["r", "V"], ["y"], "fourth", transB=1),
    ]
    return make_model(nodes, [batch, 3], constants)
