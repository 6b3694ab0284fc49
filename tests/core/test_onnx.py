"""Real networks, bad files, and writing networks back."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from _onnx_models import (
    DATA,
    check_model,
    make_model,
    real_network,
    relative_error,
    relu_net,
    save_model,
)
from onnx import TensorProto, helper, numpy_helper

from torch_prepared.core.onnx import OnnxSession, load_onnx, run_onnx, save_onnx, with_parameters
from torch_prepared.errors import ModelFormatError, SpecError, UnsupportedOperationError

NETWORKS = [
    ("acasxu", "ACASXU_run2a_2_9_batch_2000", (1, 1, 5), (5,), 14),
    ("mnist_fc", "mnist-net_256x2", (784, 1), (10,), 6),
    ("rl_benchmarks", "dubinsrejoin", (8,), (8,), 6),
    ("reach_prob_density", "vdp", (3,), (3,), 6),
    ("tllverifybench", "tllBench_n=2_N=M=8_m=1_instance_0_0", (2,), (1,), None),
    ("oval21", "cifar_deep_kw", (3, 32, 32), (10,), 12),
    ("sri_resnet_a", "resnet_3b2_bn_mixup_adv_4.0_bs128_lr-1", (3, 32, 32), (10,), None),
    ("collins_rul_cnn", "NN_rul_small_window_20", (1, 20, 20), (1,), 12),
]


@pytest.mark.parametrize(("benchmark", "stem", "inputs", "outputs", "editable"), NETWORKS)
def test_real_network_agrees_with_onnxruntime(benchmark, stem, inputs, outputs, editable) -> None:
    network = load_onnx(real_network(benchmark, stem))
    assert network.graph.input_shape == inputs
    assert network.graph.output_shape == outputs
    assert network.batch_axis
    assert editable is None or len(network.graph.editable) == editable
    assert relative_error(network) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"benchmark data are absent: {DATA}")
def test_every_real_network_imports_or_is_refused_by_name() -> None:
    paths = sorted(DATA.glob("*/onnx/*.onnx.gz"))
    refused = []
    for path in paths:
        try:
            network = load_onnx(path)
        except UnsupportedOperationError as error:
            refused.append((path.name, "multiplies two values" in str(error)))
            continue
        assert relative_error(network) < 1e-5, path.name
    assert len(paths) == 93
    assert refused == [("mscn_128d.onnx.gz", True), ("mscn_128d_dual.onnx.gz", True)]


def test_products_of_values_are_refused_at_import() -> None:
    path = real_network("nn4sys", "mscn_128d")
    with pytest.raises(UnsupportedOperationError, match=r"Mul_39.*two values.*supported.*Relu"):
        load_onnx(path)


@pytest.mark.parametrize("batch", [1, "N"])
def test_batched_and_single_runs_agree(batch: int | str) -> None:
    session = OnnxSession(relu_net(batch))
    x = np.random.default_rng(0).normal(size=(7, 3))
    together = session(x)
    assert together.shape == (7, 2)
    assert together.dtype == np.float32
    np.testing.assert_allclose(
        together, np.concatenate([session(row[None]) for row in x]), rtol=1e-5
    )
    assert session(x[:0]).shape == (0, 2)
    with pytest.raises(SpecError, match=r"expected \(b, 3\)"):
        session(x[:, :2])


def test_a_symbolic_batch_that_the_network_fixes_is_run_one_by_one(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "s"], ["h"]),
        helper.make_node("MatMul", ["h", "W"], ["y"]),
    ]
    weight = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    constants = {"s": np.array([1, -1]), "W": weight}
    network = check_model(make_model(nodes, ["N", 2, 3], constants), tmp_path)
    x = np.ones((3, 6), np.float32)
    np.testing.assert_allclose(run_onnx(network, x), x @ weight, rtol=1e-5)


def test_acting_on_a_symbolic_batch_axis_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1)
    model = make_model([node, helper.make_node("Sub", ["x", "m"], ["y"])], ["N", 3])
    with pytest.raises(UnsupportedOperationError, match="batch axis"):
        load_onnx(save_model(model, tmp_path))


@pytest.mark.parametrize("suffix", [".onnx", ".onnx.gz"])
def test_round_trip_changes_only_the_named_weights(tmp_path: Path, suffix: str) -> None:
    path = real_network("collins_rul_cnn", "NN_rul_small_window_20")
    network = load_onnx(path)
    before = network.model.SerializeToString()
    name = "conv_2_B"
    new = network.graph.parameters[name] + 0.25
    out = tmp_path / f"out{suffix}"
    save_onnx(network, {**network.graph.parameters, name: new}, out)
    assert os.listdir(tmp_path) == [out.name]
    assert network.model.SerializeToString() == before
    data = out.read_bytes()
    written = onnx.load_model_from_string(gzip.decompress(data) if suffix.endswith("gz") else data)
    original = onnx.load_model_from_string(before)
    for old, tensor in zip(original.graph.initializer, written.graph.initializer, strict=True):
        if tensor.name == name:
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), new.numpy())
            tensor.CopyFrom(old)
    assert written.SerializeToString(deterministic=True) == original.SerializeToString(
        deterministic=True
    )
    again = load_onnx(out)
    assert torch.equal(again.graph.parameters[name], new)
    assert relative_error(again, 10) < 1e-5


def test_editing_the_graph_and_the_file_is_the_same(tmp_path: Path) -> None:
    network = load_onnx(save_model(relu_net(), tmp_path))
    generator = torch.Generator().manual_seed(0)
    edited = {
        name: value + torch.randn(value.shape, generator=generator)
        for name, value in network.graph.parameters.items()
    }
    assert network.graph.editable == {"W", "b", "V"}
    save_onnx(network, edited, tmp_path / "edited.onnx")
    again = load_onnx(tmp_path / "edited.onnx")
    assert all(torch.equal(again.graph.parameters[k], v) for k, v in edited.items())
    assert relative_error(again) < 1e-5


def test_with_parameters_changes_a_copy(tmp_path: Path) -> None:
    network = load_onnx(save_model(relu_net(), tmp_path))
    before = network.model.SerializeToString(deterministic=True)
    bias = torch.arange(4.0)
    edited = with_parameters(network, {"b": bias})
    assert torch.equal(edited.graph.parameters["b"], bias)
    assert not torch.equal(network.graph.parameters["b"], bias)
    assert network.model.SerializeToString(deterministic=True) == before
    assert relative_error(edited) < 1e-5
    bias.zero_()
    assert edited.graph.parameters["b"][1] == 1.0


def test_constant_nodes_and_typed_data_fields_are_written_back(tmp_path: Path) -> None:
    weight = helper.make_tensor("W", TensorProto.FLOAT, [3, 2], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    bias = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "inner")
    nodes = [
        helper.make_node("Constant", [], ["b"], value=bias),
        helper.make_node("Gemm", ["x", "W", "b"], ["y"]),
    ]
    model = make_model(nodes, [1, 3])
    model.graph.initializer.append(weight)
    network = load_onnx(save_model(model, tmp_path))
    assert network.graph.editable == {"W", "b"}
    edited = {"W": np.full((3, 2), 0.1, np.float32), "b": torch.tensor([-1.0, 7.5])}
    save_onnx(network, edited, tmp_path / "edited.onnx")
    again = load_onnx(tmp_path / "edited.onnx")
    np.testing.assert_array_equal(again.graph.parameters["W"].numpy(), edited["W"])
    assert torch.equal(again.graph.parameters["b"], edited["b"])
    assert len(again.model.graph.initializer[0].float_data) == 6


def test_a_weight_that_another_constant_depends_on_is_not_editable(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["h"]),
        helper.make_node("Neg", ["W"], ["V"]),
        helper.make_node("MatMul", ["h", "V"], ["y"]),
    ]
    constants = {"W": np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)}
    network = check_model(make_model(nodes, ["N", 3], constants), tmp_path)
    assert network.graph.editable == frozenset()
    with pytest.raises(ModelFormatError, match="not editable"):
        save_onnx(network, {"W": constants["W"] + 1}, tmp_path / "out.onnx")


def test_a_transposed_weight_is_edited_in_its_stored_layout(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["W"], ["V"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "V"], ["y"]),
    ]
    constants = {"W": np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)}
    network = check_model(make_model(nodes, ["N", 3], constants), tmp_path)
    assert network.graph.editable == {"W"}
    assert network.graph.parameters["W"].shape == (2, 3)


def test_weights_listed_as_inputs_are_weights(tmp_path: Path) -> None:
    weight = np.ones((3, 2), np.float32)
    model = make_model(
        [helper.make_node("MatMul", ["x", "W"], ["y"])], [1, 3], {"W": weight}, listed=True
    )
    assert check_model(model, tmp_path).input_name == "x"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("strange", torch.zeros(4), "does not exist"),
        ("b", torch.zeros(3), r"got float32 \(3,\); expected float32 \(4,\)"),
        ("b", torch.zeros(4, dtype=torch.float64), "got float64"),
        ("b", torch.full((4,), torch.nan), "NaN"),
    ],
)
def test_wrong_values_are_not_saved(tmp_path: Path, name, value, message: str) -> None:
    network = load_onnx(save_model(relu_net(), tmp_path))
    with pytest.raises(ModelFormatError, match=message):
        save_onnx(network, {name: value}, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch) -> None:
    network = load_onnx(save_model(relu_net(), tmp_path))
    out = tmp_path / "out.onnx"
    out.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ModelFormatError, match="No space left on device"):
        save_onnx(network, {"b": torch.zeros(4)}, out)
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "out.onnx"]
    with pytest.raises(ModelFormatError, match="cannot write"):
        save_onnx(network, {}, tmp_path / "nowhere" / "out.onnx")
    with pytest.raises(ModelFormatError, match=r"expected \.onnx or \.onnx\.gz"):
        save_onnx(network, {}, tmp_path / "out.pt")
