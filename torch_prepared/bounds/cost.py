"""What bounding will cost, before doing it."""

from __future__ import annotations

import numpy as np

from torch_prepared.bounds._affine_prefix import affine_values
from torch_prepared.core.graph import Graph, Node
from torch_prepared.relax import lookup

__all__ = ["crown_flops", "node_flops"]


def node_flops(graph: Graph, node: Node) -> float:
    """Floating-point operations of one evaluation of a node."""
    if node.op == "linear":
        return 2.0 * node.size * graph.node(node.inputs[0]).shape[-1]
    if node.op == "conv":
        weight = node.params["weight"].read(graph.parameters)
        return 2.0 * node.size * float(np.prod(weight.shape[1:]))
    return float(node.size)


def crown_flops(graph: Graph) -> float:
    """Operations of backward passes for both ends of every scalar that feeds a nonlinear node."""
    total = before = 0.0
    composed = affine_values(graph)
    read = {name for n in graph.nodes[1:] if not lookup(n.op).traits.affine for name in n.inputs}
    for node in graph.nodes[1:]:
        before += node_flops(graph, node)
        if node.name in read and node.name in composed:
            total += before * min(graph.input_size + 1, 2.0 * node.size)
        elif node.name in read:
            total += 2.0 * node.size * before
    return total
