"""A network cut at its last hidden value: nonlinear head, affine tail."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.core.interval import Interval
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax import lookup

__all__ = ["HiddenCut", "cut_network"]


@dataclass(frozen=True)
class HiddenCut:
    """``f(x) = tail(z)`` with ``z = head(x)`` and an affine tail.

    Args:
        graph: the network, parameters as stored.
        hidden: name of the node whose value is z.
        tail_names: names of the nodes after it, in order.
    """

    graph: Graph
    hidden: str
    tail_names: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number n of scalars in z."""
        return self.graph.node(self.hidden).size

    def head(self) -> Graph:
        """The network that computes z."""
        position = [node.name for node in self.graph.nodes].index(self.hidden)
        return replace(self.graph, nodes=self.graph.nodes[: position + 1])

    def tail(self) -> Graph:
        """The affine network from z to the output."""
        start = Node(self.hidden, "input", (), self.graph.node(self.hidden).shape)
        nodes = [start, *(self.graph.node(name) for name in self.tail_names)]
        if len(nodes) == 1:  # z is the output itself
            nodes.append(Node(f"{self.hidden}/output", "reshape", (self.hidden,), start.shape))
        return replace(self.graph, nodes=tuple(nodes))

    def pruned(self, kept: Tensor) -> Graph:
        """The network in which only the features ``kept`` (k,) reach the tail; others are zero.

        In exact arithmetic it is the network whose tail has zero columns for all other features.
        """
        shape = self.graph.node(self.hidden).shape
        like = torch.empty(0, dtype=self.graph.dtype, device=self.graph.device)
        mask = like.new_zeros(self.size)
        mask[kept.to(mask.device)] = 1.0
        key, name = f"{self.hidden}/kept", f"{self.hidden}/pruned"
        node = Node(name, "scale", (self.hidden,), shape, {"scale": ParameterRef(key)})
        nodes: list[Node] = []
        for old in self.graph.nodes:
            inputs = old.inputs
            if old.name in self.tail_names:
                inputs = tuple(name if source == self.hidden else source for source in inputs)
            nodes.append(replace(old, inputs=inputs))
            if old.name == self.hidden:
                nodes.append(node)
        parameters = {**self.graph.parameters, key: mask.reshape(shape)}
        return Graph(tuple(nodes), parameters, self.graph.editable)

    def pull_back(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows on the output as rows on z: (s, m) to (s, n) and constants (s,), float64, exact.

        "Exact" up to the rounding of float64.
        """
        graph = self.graph.to(torch.float64)
        target = graph.nodes[-1]
        spread = rows.to(graph.device, torch.float64).reshape(1, len(rows), *target.shape)
        pending, const = {target.name: spread}, spread.new_zeros(1, len(rows))
        for name in reversed(self.tail_names):
            node, moved = graph.node(name), pending.pop(name)
            shapes = [graph.node(source).shape for source in node.inputs]
            boxes = [Interval.point(spread.new_zeros(1, *shape)) for shape in shapes]
            back = lookup(node.op).pull_back(node, moved, boxes, graph.parameters)
            const = const if back.bias is None else const + back.bias
            for source, part in zip(node.inputs, back.inputs, strict=True):
                pending[source] = pending[source] + part if source in pending else part
        return pending[self.hidden].flatten(2)[0], const[0]


def cut_network(graph: Graph) -> HiddenCut:
    """Cut as early as the affine end of the network goes back to a single value.

    That is the last nonlinear operator where it alone feeds the output, and else the last value
    in which all branches meet (a sum behind a residual block, say).

    Raises:
        UnsupportedOperationError: an affine network, which has no hidden features.
    """
    used, tail = {graph.nodes[-1].name}, list[str]()
    found = HiddenCut(graph, graph.nodes[-1].name, ())
    for node in reversed(graph.nodes):
        if node.name not in used:
            continue
        if len(used) == 1:
            found = HiddenCut(graph, node.name, tuple(reversed(tail)))
        if node.op == "input":
            break
        if not lookup(node.op).traits.affine:
            return found
        tail.append(node.name)
        used.remove(node.name)
        used.update(node.inputs)
    raise UnsupportedOperationError(
        "network: got no nonlinear operator; expected a hidden layer, whose scalars are the "
        "features of a proof"
    )
