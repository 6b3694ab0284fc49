"""Which networks can be encoded exactly, and their values at single points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torch_prepared.certify import NetworkRecord
from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork, load_onnx
from torch_prepared.core.rows import Floats
from torch_prepared.errors import ModelFormatError, SpecError, UnsupportedOperationError
from torch_prepared.relax import evaluate_graph, lookup

__all__ = ["Network", "PiecewiseNetwork", "PointLike", "as_point", "check_tolerance"]

PointLike = Tensor | np.ndarray | Sequence[float]
Network = nn.Module | OnnxNetwork | Graph | str | Path
_ENCODED = ("relu", "leaky_relu", "max_pool")


@dataclass(frozen=True)
class PiecewiseNetwork:
    """A continuous piecewise affine network with the weights as stored and in float64.

    Attributes:
        stored: weights as stored, on the CPU.
        graph: weights in float64; float32 weights are converted exactly.
        record: weights as stored, for exact rational evaluation.
    """

    stored: Graph
    graph: Graph
    record: NetworkRecord

    @classmethod
    def of(cls, network: Network, size: int, where: str = "network") -> PiecewiseNetwork:
        """Read a network that takes ``size`` numbers.

        Raises:
            ModelFormatError: not a network, or not finite.
            UnsupportedOperationError: an operator that is not piecewise affine.
            SpecError: the network takes another number of inputs.
        """
        graph = _read(network, size)
        for node in graph.nodes[1:]:
            rational = lookup(node.op).traits.affine and node.op != "batch_norm"
            if not rational and node.op not in _ENCODED:
                raise UnsupportedOperationError(
                    f"{where}, {node.name}: got operator '{node.op}'; expected affine operators, "
                    f"{', '.join(_ENCODED)} (fold batch normalization into the layer before it)"
                )
        if graph.input_size != size:
            raise SpecError(
                f"{where}: takes {graph.input_size} numbers; got a point of {size}; expected one "
                "number per input"
            )
        stored = graph.to(device="cpu")
        return cls(stored, graph.to(torch.float64, "cpu"), stored.record())

    @property
    def input_size(self) -> int:
        """Number n of inputs."""
        return self.graph.input_size

    @property
    def output_size(self) -> int:
        """Number m of outputs."""
        return self.graph.output_size

    def values(self, points: Floats) -> Floats:
        """Outputs (b, m) at points (b, n), in float64 arithmetic."""
        with torch.no_grad():
            out = evaluate_graph(self.graph, torch.from_numpy(np.ascontiguousarray(points)))
        return np.asarray(out.flatten(1).numpy())


def as_point(values: PointLike, where: str = "center") -> Floats:
    """A flat float64 copy (n,) of finite numbers.

    Raises:
        SpecError: no numbers, or some that are not finite.
    """
    raw = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    try:
        point = np.array(raw, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{where}: expected numbers ({error})") from error
    if not point.size or not bool(np.isfinite(point).all()):
        raise SpecError(f"{where}: got no numbers, NaN or infinity; expected a finite point")
    return point


def check_tolerance(output_tolerance: float) -> float:
    """The largest difference of outputs that count as the same; 0 for exactly equal ones.

    Raises:
        SpecError: negative, NaN or infinite.
    """
    if not 0.0 <= output_tolerance < math.inf:
        raise SpecError(
            f"output_tolerance: got {output_tolerance}; expected a finite number of at least 0"
        )
    return float(output_tolerance)


def _read(network: Network, size: int) -> Graph:
    if isinstance(network, (str, Path)):
        network = load_onnx(network)
    if isinstance(network, OnnxNetwork):
        return network.graph
    if isinstance(network, Graph):
        return network
    if isinstance(network, nn.Module):
        dtype = next((p.dtype for p in network.parameters()), torch.float32)
        return capture_module(network, torch.zeros(1, size, dtype=dtype))
    raise ModelFormatError(
        f"network: got {type(network).__name__}; expected an nn.Module, an OnnxNetwork, a Graph "
        "or the path of an ONNX file"
    )
