"""The demo's network: handwritten digits of 8 x 8 pixels, two hidden layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from torch_prepared.errors import MissingDependencyError

__all__ = ["CLASSES", "Digits", "export_onnx", "load_digits", "train"]

CLASSES = 10
_HIDDEN = 32
_EPOCHS = 40
_BATCH = 128


@dataclass(frozen=True)
class Digits:
    """Images (q, 64) float32 in [0, 1] and labels (q,) int64, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int) -> Digits:
    """The digits that come with scikit-learn, a quarter of them kept for testing.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingDependencyError(
            "demo: its images come with scikit-learn, which is not installed; "
            "install it with 'pip install scikit-learn'"
        ) from error
    table = load()
    order = np.random.default_rng(seed).permutation(len(table.target))
    images = torch.from_numpy((table.data[order] / 16).astype(np.float32))
    labels = torch.from_numpy(table.target[order].astype(np.int64))
    cut = len(order) * 3 // 4
    return Digits(images[:cut], labels[:cut], images[cut:], labels[cut:])


def train(digits: Digits, seed: int) -> nn.Sequential:
    """Plain training for a few seconds, without any thought of robustness."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(64, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN, CLASSES),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
        for _ in range(_EPOCHS):
            for batch in torch.split(torch.randperm(len(digits.train_images)), _BATCH):
                optimizer.zero_grad()
                logits = model(digits.train_images[batch])
                loss = nn.functional.cross_entropy(logits, digits.train_labels[batch])
                loss.backward()
                optimizer.step()
    return model.eval()


def export_onnx(model: nn.Sequential, path: Path) -> None:
    """Write linear and ReLU layers as Gemm and Relu nodes, batch size free."""
    nodes, tensors, value = [], [], "x"
    for position, layer in enumerate(model):
        result = "y" if position == len(model) - 1 else f"value_{position}"
        if isinstance(layer, nn.Linear):
            names = [f"layer_{position}.weight", f"layer_{position}.bias"]
            for name, tensor in zip(names, (layer.weight, layer.bias), strict=True):
                tensors.append(numpy_helper.from_array(tensor.detach().numpy(), name))
            node = helper.make_node(
                "Gemm", [value, *names], [result], f"layer_{position}", transB=1
            )
        else:
            node = helper.make_node("Relu", [value], [result], f"relu_{position}")
        nodes.append(node)
        value = result
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        tensors,
    )
    exported = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(exported, str(path))
