"""A graph as an ``nn.Module``: for tools that trace modules, and to train what was imported."""

from __future__ import annotations

from torch import Tensor, nn

from torch_prepared.core.graph import Graph
from torch_prepared.relax._evaluate import evaluate_graph

__all__ = ["GraphModule", "graph_to_module"]


class GraphModule(nn.Module):
    """Computes a graph's function from registered parameters of its own.

    Args:
        graph: the network; its tensors are copied. Editable ones become trainable parameters,
            all others are registered without gradient.

    Inputs (b, *input_shape) or (b, n), outputs (b, *output_shape).
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph
        # Registered names may not contain dots; stored names do.
        self._names = {name: f"p{index}" for index, name in enumerate(sorted(graph.parameters))}
        for name, registered in self._names.items():
            value = graph.parameters[name].detach().clone()
            self.register_parameter(registered, nn.Parameter(value, name in graph.editable))

    @property
    def graph(self) -> Graph:
        """The graph with the parameters as they are now (shared, not copied)."""
        return self._graph.with_parameters(self._stored())

    def forward(self, x: Tensor) -> Tensor:
        """The network's output."""
        return evaluate_graph(self._graph, x, self._stored())

    def __deepcopy__(self, memo: dict[int, object]) -> GraphModule:
        twin = GraphModule(self.graph)
        for mine, copied in zip(self.parameters(), twin.parameters(), strict=True):
            copied.requires_grad_(mine.requires_grad)
        memo[id(self)] = twin
        return twin.train(self.training)

    def _stored(self) -> dict[str, Tensor]:
        return {name: self.get_parameter(inner) for name, inner in self._names.items()}


def graph_to_module(graph: Graph) -> GraphModule:
    """The module that computes ``graph``; see :class:`GraphModule`."""
    return GraphModule(graph)
