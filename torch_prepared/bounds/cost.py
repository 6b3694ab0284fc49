"""What bounding will cost, before doing it."""

from __future__ import annotations

import numpy as np

from torch_prepared.bounds._affine_prefix import affine_values
from torch_prepared.core.graph import Graph, Node
from torch_prepared.relax import lookup

__all__ = [
    "affordable_method",
    "crown_bytes",
    "crown_flops",
    "forward_flops",
    "graph_flops",
    "regions_at_once",
]

BUDGET = 2e11
"""Operations of backward passes that are worth spending without asking."""
NATIVE_SAVING = 50.0
"""How much fewer operations native programs take: they skip stable scalars and unread pixels."""

CACHED = 1 << 26
"""Bytes of a part of a batch on the CPU: larger ones leave its caches and take longer."""
COPIES = 12
"""Numbers held for each scalar of a region: intervals, lines, both reordered, temporaries."""


def _node_flops(graph: Graph, node: Node) -> float:
    """Floating-point operations of one evaluation of a node."""
    if node.op == "linear":
        return 2.0 * node.size * graph.node(node.inputs[0]).shape[-1]
    if node.op == "conv":
        weight = node.params["weight"].read(graph.parameters)
        return 2.0 * node.size * float(np.prod(weight.shape[1:]))
    return float(node.size)


def graph_flops(graph: Graph) -> float:
    """Floating-point operations of one evaluation of the network, at least 1."""
    return max(1.0, sum(_node_flops(graph, node) for node in graph.nodes[1:]))


def crown_flops(graph: Graph) -> float:
    """Operations of backward passes for both ends of every scalar that feeds a nonlinear node."""
    total = before = 0.0
    composed = affine_values(graph)
    read = {name for n in graph.nodes[1:] if not lookup(n.op).traits.affine for name in n.inputs}
    for node in graph.nodes[1:]:
        before += _node_flops(graph, node)
        if node.name in read and node.name in composed:
            total += before * min(graph.input_size + 1, 2.0 * node.size)
        elif node.name in read:
            total += 2.0 * node.size * before
    return total


def crown_bytes(graph: Graph, item: int) -> float:
    """Bytes that gradients through backward passes keep: rows at every activation they cross."""
    total = before = 0.0
    composed = affine_values(graph)
    for node in graph.nodes[1:]:
        if lookup(node.op).traits.affine:
            continue
        for name in node.inputs:
            if name not in composed:
                total += 2.0 * graph.node(name).size * before
        before += node.size
    return total * item


def forward_flops(graph: Graph) -> float:
    """Operations of one forward pass of affine forms."""
    return (graph.input_size + 2.0) * graph_flops(graph)


def affordable_method(
    graph: Graph, regions: int, max_memory: int, *, native: bool, saved: bool
) -> str:
    """The first of "crown", "forward", "crown-ibp" whose cost is bearable.

    Args:
        graph: the network.
        regions: how many input sets.
        max_memory: bytes that may be kept for gradients.
        native: backward passes run as native programs.
        saved: gradients are wanted, so what passes compute is kept.
    """
    item = graph.dtype.itemsize
    work = crown_flops(graph) * regions / (NATIVE_SAVING if native else 1.0)
    if work <= BUDGET and not (saved and crown_bytes(graph, item) * regions > max_memory):
        return "crown"
    return "forward" if forward_flops(graph) * regions <= BUDGET else "crown-ibp"


def regions_at_once(graph: Graph, rows: int, max_memory: int, item: int) -> int:
    """How many regions to bound together, by the memory that their intervals and rows take.

    Args:
        graph: the network.
        rows: of the output that are bounded.
        max_memory: bytes that may be taken.
        item: bytes of a number.
    """
    scalars = sum(node.size for node in graph.nodes)
    each = item * (COPIES * scalars + 2 * rows * (graph.input_size + graph.output_size))
    budget = min(max_memory, CACHED) if graph.device.type == "cpu" else max_memory
    return max(1, budget // each)
