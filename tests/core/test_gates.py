"""GELU and SiLU written out as products are recognized, and only these."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import load_onnx
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax import evaluate_graph

K = math.sqrt(2 / math.pi)
FORMS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "module": ("gelu", nn.GELU()),
    "module tanh": ("gelu", nn.GELU("tanh")),
    "silu": ("silu", nn.SiLU()),
    "product": ("silu", lambda x: torch.sigmoid(x) * x),
    "scaled": ("silu", lambda x: 3 * x * torch.sigmoid(1.702 * x)),
    "erf": ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
    "erf, half later": ("gelu", lambda x: x * (torch.erf(x * math.sqrt(0.5)) + 1) * 0.5),
    "erf, half inside": ("gelu", lambda x: x * (0.5 + 0.5 * torch.erf(x * math.sqrt(0.5)))),
    "tanh": ("gelu", lambda x: 0.5 * x * (1 + torch.tanh(K * (x + 0.044715 * torch.pow(x, 3))))),
    "tanh, cube by products": (
        "gelu",
        lambda x: x * 0.5 * (torch.tanh(K * x + K * 0.044715 * x * x * x) + 1),
    ),
}


class Net(nn.Module):
    """Linear, a function, linear."""

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5, dtype=dtype), nn.Linear(5, 3, dtype=dtype)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def check(graph: Graph, net: Net, op: str, dtype: torch.dtype) -> None:
    """The right operator, the same function, all four weights still editable."""
    x = 3 * torch.randn(50, 4, dtype=dtype)
    assert op in [node.op for node in graph.nodes]
    room = 50 * torch.finfo(dtype).eps
    torch.testing.assert_close(evaluate_graph(graph, x), net(x), rtol=room, atol=room)
    assert len(graph.editable) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_captured(form: str, dtype: torch.dtype) -> None:
    op, function = FORMS[form]
    net = Net(function, dtype)
    check(capture_module(net, torch.zeros(1, 4, dtype=dtype)), net, op, dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [14, 20])
@pytest.mark.parametrize("form", FORMS)
def test_imported(form: str, opset: int, tmp_path: Path) -> None:
    op, function = FORMS[form]
    net, path = Net(function, torch.float32), tmp_path / "m.onnx"
    example = (torch.zeros(1, 4),)
    torch.onnx.export(net, example, str(path), opset_version=opset, dynamo=False)
    assert onnx.load(path).graph.node
    check(load_onnx(path).graph, net, op, torch.float32)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * x, "computes a power of a value"),
        (torch.erf, "computes erf"),
        (lambda x: torch.pow(x, 4), "power 4"),
        (lambda x: x * torch.sigmoid(x + 1), "multiplies two values"),
        (lambda x: (x + 1) * torch.sigmoid(x), "multiplies two values"),
        (lambda x: x * torch.tanh(x), "multiplies two values"),
        (lambda x: x * (1 + torch.erf(x)), "multiplies two values"),
        (lambda x: x * (1 + torch.erf(x * 0.7071)), "multiplies two values"),
        (lambda x: x * (1 - torch.erf(x * math.sqrt(0.5))), "multiplies two values"),
        (lambda x: x * (1 + torch.tanh(K * (x + 0.0447 * torch.pow(x, 3)))), "multiplies two"),
        (lambda x: x * (1 + torch.tanh(K * (x - 0.044715 * torch.pow(x, 3)))), "multiplies two"),
        (lambda x: x[:, :1] * torch.sigmoid(x), "multiplies two values"),
    ],
)
def test_other_products_are_refused(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(UnsupportedOperationError, match=message):
        capture_module(Net(function, torch.float32), torch.zeros(1, 4))


def test_a_number_inside_a_gate_is_not_edited() -> None:
    """Zero biases look like numbers; those of the layer stay editable, those of the gate do not."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            nn.init.zeros_(self.layer.bias)
            self.gain = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y * torch.sigmoid(self.gain * y)

    graph = capture_module(Gate(), torch.zeros(1, 3))
    assert graph.editable == {"layer.weight", "layer.bias"}
