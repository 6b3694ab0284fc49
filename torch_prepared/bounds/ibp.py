"""Interval bound propagation: one interval per scalar, forward, from constants or known boxes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.relax import lookup

__all__ = ["propagate_intervals"]


def propagate_intervals(
    graph: Graph,
    box: Interval,
    parameters: Mapping[str, Tensor] | None = None,
    known: Mapping[str, Interval] | None = None,
) -> dict[str, Interval]:
    """An interval (b, *shape) for the value of every node, for all inputs of the boxes.

    Args:
        graph: the network.
        box: input boxes (b, n).
        parameters: tensors that replace the graph's own, by name.
        known: intervals proved elsewhere; intersected in and passed on.

    Soundness: in exact arithmetic; floating-point error is the certificate checker's concern.
    Source: Gowal et al., "Scalable Verified Training for Provably Robust Image Classification"
    (ICCV 2019).
    """
    table = graph.parameters if parameters is None else {**graph.parameters, **parameters}
    start = graph.nodes[0]
    shaped = box.map(lambda end: end.reshape(end.shape[0], *start.shape))
    boxes = {start.name: shaped}
    for node in graph.nodes[1:]:
        value = lookup(node.op).interval(node, [boxes[name] for name in node.inputs], table)
        if known is not None and node.name in known:
            value = value.intersect(known[node.name])
        boxes[node.name] = value
    return boxes
