"""Values that are affine in the network's input: bounded exactly, all scalars at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import lookup

__all__ = ["affine_values", "bound_affine_value"]


def affine_values(graph: Graph) -> frozenset[str]:
    """Names of the values before the first nonlinear operator on every path."""
    found = {graph.nodes[0].name}
    for node in graph.nodes[1:]:
        if lookup(node.op).traits.affine and found.issuperset(node.inputs):
            found.add(node.name)
    return frozenset(found)


def bound_affine_value(
    graph: Graph, regions: RegionBatch, node: Node, table: Mapping[str, Tensor]
) -> Interval:
    """The interval (b, *shape) of a value that is affine in the input.

    The map is composed forward from the n unit inputs: n + 1 evaluations of the prefix, where
    backward passes need two per scalar. Exact for the regions in exact arithmetic.
    """
    n = graph.input_size
    origin = regions.lower.new_zeros(1, n)
    units = torch.cat([origin, torch.eye(n, dtype=origin.dtype, device=origin.device)])
    values = {graph.nodes[0].name: units.reshape(n + 1, *graph.input_shape)}
    for other in graph.nodes[1:]:
        if set(other.inputs) <= set(values):
            operator = lookup(other.op)
            if operator.traits.affine:
                values[other.name] = operator.value(
                    other, [values[name] for name in other.inputs], table
                )
        if other.name == node.name:
            break
    image = values[node.name].flatten(1)
    const, rows = image[0], (image[1:] - image[:1]).T.unsqueeze(0)  # (1, m, n)
    rows = rows.expand(len(regions), -1, -1)
    lower = const + regions.minimum(rows)
    upper = const - regions.minimum(-rows)
    return Interval(lower, upper).map(lambda end: end.reshape(end.shape[0], *node.shape))
