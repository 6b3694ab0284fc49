"""Intervals of every node for relaxation slopes that are given instead of chosen.

The loop of ``bounds.bound_nodes`` over its own parts: values are tightened in topological order,
each by backward passes (``bounds.bound_rows``, which takes slopes) for its contested scalars.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_prepared.bounds import bound_nodes, bound_rows
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds.crown import DEFAULT_MEMORY, tightened_names
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import lookup
from torch_prepared.relax.relu import TwoPiece

__all__ = ["bound_held_nodes"]


def bound_held_nodes(
    graph: Graph,
    regions: RegionBatch,
    parameters: Mapping[str, Tensor],
    alphas: Mapping[str, Tensor],
    every: bool = False,
) -> dict[str, Interval]:
    """An interval (b, *shape) for every node, differentiable in parameters and slopes.

    Args:
        graph: the network.
        regions: b input sets.
        parameters: tensors that replace the graph's own.
        alphas: relaxation parameters by node, (b, 1, *input shape), in [0, 1].
        every: tighten stable scalars too, as in ``bounds.bound_nodes``.

    Soundness: as ``bounds.bound_nodes``; every slope in [0, 1] gives a valid relaxation.
    """
    names = tightened_names(graph, regions.is_box)
    early = [name for name in names if not _follows(graph, name, alphas)]
    known = {
        name: box
        for name, box in bound_nodes(graph, regions, parameters=parameters, only=early).items()
        if name in early
    }
    for name in names:
        if name not in known:
            boxes = bound_nodes(graph, regions, parameters=parameters, tighten=False, known=known)
            node = graph.node(name)
            known[name] = _tighten(graph, regions, boxes, node, parameters, alphas, every)
    return bound_nodes(graph, regions, parameters=parameters, tighten=False, known=known)


def _follows(graph: Graph, name: str, alphas: Mapping[str, Tensor]) -> bool:
    """Whether a value depends on a relaxation whose slopes are given."""
    after: set[str] = set()
    for node in graph.nodes:
        if node.name in alphas or after.intersection(node.inputs):
            after.add(node.name)
    return name in after


def _tighten(
    graph: Graph,
    regions: RegionBatch,
    boxes: Mapping[str, Interval],
    node: Node,
    parameters: Mapping[str, Tensor],
    alphas: Mapping[str, Tensor],
    every: bool,
) -> Interval:
    """The interval of a value with backward bounds where some reader is nonlinear on it."""
    box = boxes[node.name]
    lower, upper = box.lower.flatten(1), box.upper.flatten(1)
    if every:
        contested = torch.ones_like(lower, dtype=torch.bool)
        columns = torch.arange(node.size, device=lower.device)
    else:
        contested = _contested(graph, node, box)
        columns = contested.any(dim=0).nonzero().flatten()
    widest = max(n.size for n in graph.nodes)
    chunk = max(1, DEFAULT_MEMORY // (8 * len(regions) * widest * lower.element_size()))
    for part in columns.split(chunk):
        if not len(part):
            continue
        units = torch.nn.functional.one_hot(part, node.size).to(lower)
        rows = torch.cat([units, -units])[None]
        found = bound_rows(
            graph, regions, boxes, rows,
            node=node.name, parameters=parameters, alphas=alphas, cuts=False,
        ).lower  # fmt: skip
        below, above = found.chunk(2, dim=1)
        old = Interval(lower[:, part], upper[:, part])
        tight = old.intersect(Interval(below, -above))
        mine = contested[:, part]
        lower = lower.index_copy(1, part, torch.where(mine, tight.lower, old.lower))
        upper = upper.index_copy(1, part, torch.where(mine, tight.upper, old.upper))
    return Interval(lower.reshape_as(box.lower), upper.reshape_as(box.upper))


def _contested(graph: Graph, node: Node, box: Interval) -> Tensor:
    """(b, n) which scalars some nonlinear reader is not affine on."""
    needed = torch.zeros_like(box.lower, dtype=torch.bool)
    for reader in graph.nodes[1:]:
        operator = lookup(reader.op)
        if node.name not in reader.inputs or operator.traits.affine:
            continue
        stable = operator.stable(box) if isinstance(operator, TwoPiece) else box.width <= 0
        needed = needed | ~stable
    return needed.flatten(1)
