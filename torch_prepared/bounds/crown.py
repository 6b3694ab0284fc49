"""CROWN: linear lower bounds pulled back from any node to the input.

A row set on a node's value, ``rows . v + const``, is replaced node by node by a lower bound on
earlier values: affine nodes by their transpose, nonlinear ones by lines picked by the sign of the
coefficient. Nothing here knows an activation by name.

Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
Functions" (NeurIPS 2018); Xu et al., "Automatic Perturbation Analysis for Scalable Certified
Robustness and Beyond" (NeurIPS 2020) for general graphs. Ours: bounds are evaluated at every cut of
the graph, so the result is never worse than interval propagation from the same boxes; backward
passes run for unstable scalars only, and in chunks under a memory budget.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import lookup
from torch_prepared.relax._base import Parameters
from torch_prepared.relax.relu import TwoPiece

__all__ = ["RowBound", "bound_nodes", "bound_rows", "tightened_names"]

Boxes = Mapping[str, Interval]
DEFAULT_MEMORY = 1 << 30
_MIXING = ("linear", "conv", "avg_pool", "reduce_sum", "add")


class RowBound(NamedTuple):
    """``lower`` (b, s) and the affine form behind it: ``inputs`` (b, s, n) and ``const`` (b, s)."""

    lower: Tensor
    inputs: Tensor
    const: Tensor


def bound_rows(
    graph: Graph,
    regions: RegionBatch,
    boxes: Boxes,
    rows: Tensor,
    *,
    node: str | None = None,
    parameters: Parameters | None = None,
    alphas: Mapping[str, Tensor] | None = None,
    cuts: bool = True,
    shallow: bool = False,
) -> RowBound:
    """Lower bounds of ``rows . value(node)`` over every region.

    Args:
        graph: the network.
        regions: b input sets.
        boxes: intervals of the values that nonlinear nodes read, from :func:`bound_nodes`.
        rows: (b, s, m) or (1, s, m) coefficients on the flattened value of ``node``.
        node: name; the network's output when None.
        parameters: tensors that replace the graph's own.
        alphas: optimizable relaxation parameters by node, (b, s or 1, *input shape).
        cuts: also evaluate over the intermediate boxes and keep the best.
        shallow: stop at the first nonlinear values and use their boxes: interval propagation with
            the rows merged into the last affine nodes.

    Returns:
        A :class:`RowBound`; differentiable in parameters, boxes and alphas.

    Soundness: in exact arithmetic, for every region; see ``ibp`` on rounding.
    """
    table = graph.parameters if parameters is None else {**graph.parameters, **parameters}
    target = graph.nodes[-1] if node is None else graph.node(node)
    spread = rows.expand(len(regions), *rows.shape[1:])
    pending = {target.name: spread.reshape(*spread.shape[:2], *target.shape)}
    const = spread.new_zeros(spread.shape[:2])
    return _descend(graph, regions, boxes, pending, const, table, alphas, cuts, shallow)


def _descend(
    graph: Graph,
    regions: RegionBatch,
    boxes: Boxes,
    pending: dict[str, Tensor],
    const: Tensor,
    table: Parameters,
    alphas: Mapping[str, Tensor] | None,
    cuts: bool,
    shallow: bool = False,
) -> RowBound:
    best = None
    for node in reversed(graph.nodes):
        rows = pending.pop(node.name, None)
        if rows is None:
            continue
        if node.op == "input":
            inputs = rows.flatten(2)
            lower = const + regions.minimum(inputs)
            return RowBound(lower if best is None else torch.maximum(best, lower), inputs, const)
        operator = lookup(node.op)
        stop = shallow and not operator.traits.affine
        if stop or (cuts and not pending and node.name in boxes):
            box = boxes[node.name].map(lambda end: end.flatten(1))
            here = const + ops.concretize(rows.flatten(2), box.center, box.radius)
            if stop:
                const = here
                continue
            best = here if best is None else torch.maximum(best, here)
        alpha = None if alphas is None else alphas.get(node.name)
        moved = operator.pull_back(
            node, rows, [boxes[name] for name in node.inputs], table, alpha
        )
        if moved.bias is not None:
            const = const + moved.bias
        for name, part in zip(node.inputs, moved.inputs, strict=True):
            pending[name] = pending[name] + part if name in pending else part
    # The output does not depend on the input at all.
    empty = const.new_zeros(*const.shape, graph.input_size)
    return RowBound(const if best is None else torch.maximum(best, const), empty, const)


def bound_nodes(
    graph: Graph,
    regions: RegionBatch,
    *,
    parameters: Parameters | None = None,
    tighten: bool = True,
    only: Collection[str] | None = None,
    known: Boxes | None = None,
    max_memory: int = DEFAULT_MEMORY,
) -> dict[str, Interval]:
    """An interval (b, *shape) for every node: interval arithmetic, tightened by backward passes.

    Args:
        graph: the network.
        regions: b input sets.
        parameters: tensors that replace the graph's own.
        tighten: run CROWN for the scalars that feed nonlinear nodes; False is plain IBP.
        only: names of the values to tighten; None means all that :func:`tightened_names` lists.
        known: intervals proved for larger regions or elsewhere; intersected in.
        max_memory: bytes that the rows of one backward pass may take.

    Returns:
        Intervals by node name; differentiable in parameters.
    """
    table = graph.parameters if parameters is None else {**graph.parameters, **parameters}
    readers = _nonlinear_readers(graph)
    chosen = set(readers if only is None else only) if tighten else set()
    if regions.is_box:
        chosen &= set(tightened_names(graph))
    start = graph.nodes[0]
    boxes = {start.name: regions.box.map(lambda end: end.reshape(end.shape[0], *start.shape))}
    for node in graph.nodes[1:]:
        box = lookup(node.op).interval(node, [boxes[name] for name in node.inputs], table)
        if known is not None and node.name in known:
            box = box.intersect(known[node.name])
        if node.name in chosen:
            box = _tighten(graph, regions, boxes, node, box, readers[node.name], table, max_memory)
        boxes[node.name] = box
    return boxes


def tightened_names(graph: Graph) -> tuple[str, ...]:
    """Values read by nonlinear nodes on which interval arithmetic over a box is not exact yet."""
    mixing: dict[str, int] = {graph.nodes[0].name: 0}
    for node in graph.nodes[1:]:
        mixing[node.name] = max(mixing[name] for name in node.inputs) + (node.op in _MIXING)
    return tuple(name for name in _nonlinear_readers(graph) if mixing[name] > 1)


def _nonlinear_readers(graph: Graph) -> dict[str, tuple[Node, ...]]:
    """For each value read by nonlinear nodes: those nodes."""
    readers: dict[str, tuple[Node, ...]] = {}
    for node in graph.nodes[1:]:
        if not lookup(node.op).traits.affine:
            for name in node.inputs:
                readers[name] = (*readers.get(name, ()), node)
    return readers


def _tighten(
    graph: Graph,
    regions: RegionBatch,
    boxes: Boxes,
    node: Node,
    box: Interval,
    readers: tuple[Node, ...],
    table: Parameters,
    max_memory: int,
) -> Interval:
    """Intersect ``box`` with backward bounds of the scalars some reader is nonlinear on."""
    needed = torch.zeros_like(box.lower, dtype=torch.bool)
    for reader in readers:
        operator = lookup(reader.op)
        stable = operator.stable(box) if isinstance(operator, TwoPiece) else box.width <= 0
        needed |= ~stable
    needed = needed.flatten(1)
    width = int(needed.sum(dim=1).max()) if needed.numel() else 0
    if width == 0:
        return box
    # Per region the needed scalars first; shorter lists are padded with scalars not needed.
    order = needed.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    lower, upper = box.lower.flatten(1), box.upper.flatten(1)
    parts = [
        _bound_scalars(graph, regions, boxes, node, part, table)
        for part in _chunks(graph, order, lower.element_size(), max_memory)
    ]
    new_lower = torch.cat([part.lower for part in parts], dim=1)
    new_upper = torch.cat([part.upper for part in parts], dim=1)
    tight = Interval(lower.gather(1, order), upper.gather(1, order)).intersect(
        Interval(new_lower, new_upper)
    )
    return Interval(
        lower.scatter(1, order, tight.lower).reshape(box.lower.shape),
        upper.scatter(1, order, tight.upper).reshape(box.upper.shape),
    )


def _chunks(graph: Graph, order: Tensor, item: int, max_memory: int) -> Iterator[Tensor]:
    """Split columns so that one backward pass keeps within the memory budget."""
    largest = max(n.size for n in graph.nodes)
    per_column = 2 * 4 * order.shape[0] * largest * item  # both ends; rows, parts, temporaries
    yield from order.split(max(1, max_memory // max(per_column, 1)), dim=1)


def _bound_scalars(
    graph: Graph, regions: RegionBatch, boxes: Boxes, node: Node, index: Tensor, table: Parameters
) -> Interval:
    """Backward bounds of the scalars ``index`` (b, k) of a node's flattened value."""
    moved = lookup(node.op).select(node, index, [boxes[name] for name in node.inputs], table)
    pending = {}
    for name, part in zip(node.inputs, moved.inputs, strict=True):
        both = torch.cat([part, -part], dim=1)
        pending[name] = pending[name] + both if name in pending else both
    bias = moved.bias
    if bias is None:
        bias = next(iter(pending.values())).new_zeros(index.shape)
    const = torch.cat([bias, -bias], dim=1)
    found = _descend(graph, regions, boxes, pending, const, table, None, cuts=False).lower
    lower, negated = found.chunk(2, dim=1)
    return Interval(lower, -negated)
