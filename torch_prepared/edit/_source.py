"""The networks an edit accepts, in one form."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_prepared.core.capture import apply_parameters, capture_module
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork, load_onnx, with_parameters
from torch_prepared.errors import ModelFormatError

__all__ = ["Network", "Source", "read_network"]

Network = nn.Module | OnnxNetwork | Graph | str | Path


@dataclasses.dataclass(frozen=True)
class Source:
    """A network's graph, and how to write changed parameters back to where it came from."""

    origin: nn.Module | OnnxNetwork | Graph
    graph: Graph

    def rebuild(self, parameters: Mapping[str, Tensor]) -> nn.Module | OnnxNetwork | Graph:
        """A copy of the origin with other parameters; the origin is not touched."""
        if isinstance(self.origin, nn.Module):
            return (
                apply_parameters(self.origin, parameters)
                if parameters
                else copy.deepcopy(self.origin)
            )
        if isinstance(self.origin, OnnxNetwork):
            return with_parameters(self.origin, parameters)
        return self.graph.with_parameters(parameters)


def read_network(model: Network, example_input: Tensor | None, input_size: int) -> Source:
    """The graph of a module, an ONNX network or file, or a graph as it is.

    A module is traced on ``example_input`` (one batch axis first); without one, on zeros of shape
    (1, input_size).

    Raises:
        ModelFormatError: not a network, or a module that cannot be run on the example.
    """
    if isinstance(model, (str, Path)):
        model = load_onnx(model)
    if isinstance(model, Graph):
        return Source(model, model)
    if isinstance(model, OnnxNetwork):
        return Source(model, model.graph)
    if isinstance(model, nn.Module):
        if example_input is None:
            dtype = next((p.dtype for p in model.parameters()), torch.float32)
            example_input = torch.zeros(1, input_size, dtype=dtype)
        return Source(model, capture_module(model, example_input[:1]))
    raise ModelFormatError(
        f"network: got {type(model).__name__}; expected an nn.Module, an OnnxNetwork, a Graph or "
        "the path of an ONNX file"
    )
