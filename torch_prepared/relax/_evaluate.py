"""Exact evaluation of a graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from torch_prepared.core.graph import Graph
from torch_prepared.errors import SpecError
from torch_prepared.relax._registry import lookup

__all__ = ["evaluate_all", "evaluate_graph"]


def evaluate_all(
    graph: Graph, x: Tensor, parameters: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Value (b, *shape) of every node by name; ``parameters`` replace the graph's own."""
    if x.dim() < 1 or x.shape[1:].numel() != graph.input_size:
        raise SpecError(
            f"network input: got a tensor of shape {tuple(x.shape)}; expected a batch of inputs "
            f"of shape {graph.input_shape}, flattened or not"
        )
    table = graph.parameters if parameters is None else {**graph.parameters, **parameters}
    values = {graph.nodes[0].name: x.reshape(x.shape[0], *graph.input_shape)}
    for node in graph.nodes[1:]:
        inputs = [values[name] for name in node.inputs]
        values[node.name] = lookup(node.op).value(node, inputs, table)
    return values


def evaluate_graph(
    graph: Graph, x: Tensor, parameters: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The network's output (b, *output_shape) on inputs (b, *input_shape) or (b, n)."""
    return evaluate_all(graph, x, parameters)[graph.nodes[-1].name]
