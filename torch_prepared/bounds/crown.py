"""CROWN: linear lower bounds pulled back from any node to the input.

A row set on a node's value, ``rows . v + const``, is replaced node by node by a lower bound on
earlier values: affine nodes by their transpose, nonlinear ones by lines picked by the sign of the
coefficient. Nothing here knows an activation by name.

Source: Zhang et al., "Efficient Neural Network Robustness Certification with General Activation
Functions" (NeurIPS 2018); Xu et al., "Automatic Perturbation Analysis for Scalable Certified
Robustness and Beyond" (NeurIPS 2020) for general graphs. Ours: bounds are evaluated at every cut of
the graph, so the result is never worse than interval propagation from the same boxes; backward
passes run for unstable scalars only, and in chunks under a memory budget.

NaN (from weights that overflow, say) is never dropped: a region whose intervals hold NaN gets NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from torch_prepared.bounds._affine_prefix import affine_values, bound_affine_value
from torch_prepared.bounds._descend import RowBound, Setting, descend
from torch_prepared.bounds._guided import GuidedInterval, reaches_up
from torch_prepared.bounds._program import Lowered, pass_gradient, programs_apply
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds._slopes import TargetSlopes
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import ElementwiseOperator, lookup
from torch_prepared.relax._base import Parameters, unit_rows
from torch_prepared.relax.relu import TwoPiece

__all__ = [
    "RowBound",
    "bound_nodes",
    "bound_rows",
    "needed_scalars",
    "tighten_scalars",
    "tightened_names",
    "unstable_order",
]

Boxes = Mapping[str, Interval]
DEFAULT_MEMORY = 1 << 30
_MIXING = ("linear", "conv", "avg_pool", "max_pool", "reduce_sum", "add", "concat")


def bound_rows(
    graph: Graph,
    regions: RegionBatch,
    boxes: Boxes,
    rows: Tensor,
    *,
    node: str | None = None,
    parameters: Parameters | None = None,
    alphas: Mapping[str, Tensor] | None = None,
    pulls: Mapping[str, Tensor] | None = None,
    cuts: bool = True,
    shallow: bool = False,
) -> RowBound:
    """Lower bounds of ``rows . value(node)`` over every region.

    Args:
        graph: the network.
        regions: b input sets.
        boxes: intervals of every node's value, from :func:`bound_nodes`.
        rows: (b, s, m) or (1, s, m) coefficients on the flattened value of ``node``.
        node: name; the network's output when None.
        parameters: tensors that replace the graph's own.
        alphas: optimizable relaxation parameters by node, (b, s or 1, *input shape).
        pulls: by activation a combination (b, s or 1, *input shape) of its input that is known
            to be not negative; it is subtracted, which leaves a lower bound. See ``split``.
        cuts: also evaluate over the intermediate boxes and keep the best; then the bound is never
            below the shallow one.
        shallow: stop at the first nonlinear values and use their boxes: interval propagation with
            the rows merged into the last affine nodes.

    Returns:
        A :class:`RowBound`; differentiable in parameters, boxes and alphas.

    Soundness: in exact arithmetic, for every region; see ``ibp`` on rounding.
    """
    table = graph.parameters if parameters is None else {**graph.parameters, **parameters}
    target = graph.nodes[-1] if node is None else graph.node(node)
    spread = rows.expand(len(regions), *rows.shape[1:])
    lowered = None
    if alphas is None and pulls is None and not shallow:
        ends = [end for box in boxes.values() for end in (box.lower, box.upper)]
        lowered = _lower(graph, [rows, regions.lower, *ends], table)
    if lowered is not None:
        found = RowBound(*lowered.bound_rows(target, spread, boxes, cuts))
        if not regions.is_box:
            exact = found.const + regions.minimum(found.inputs)
            found = found._replace(lower=torch.maximum(found.lower, exact))
    if lowered is None:
        own = rows if shallow else spread  # affine values need no rows of each region's own
        setting = Setting(graph, regions, boxes, table, pulls or {})
        found = descend(setting, *_start(target, own), alphas, cuts, shallow)
    if not cuts or shallow or _is_chain(graph):
        return found
    # With branches the cuts met on the way need not include the first nonlinear values of all.
    setting = Setting(graph, regions, boxes, table)
    floor = descend(setting, *_start(target, rows), None, cuts=False, shallow=True)
    return found._replace(lower=torch.maximum(found.lower, floor.lower))


def _start(target: Node, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Rows (b or 1, s, n) on a node's value, pending, and constants of zero."""
    shaped = rows.reshape(*rows.shape[:2], *target.shape)
    return {target.name: shaped}, rows.new_zeros(rows.shape[:2])


def _is_chain(graph: Graph) -> bool:
    """Whether every node reads the one before it and nothing else."""
    pairs = zip(graph.nodes, graph.nodes[1:], strict=False)
    return all(node.inputs == (before.name,) for before, node in pairs)


def bound_nodes(
    graph: Graph,
    regions: RegionBatch,
    *,
    parameters: Parameters | None = None,
    tighten: bool = True,
    only: Collection[str] | None = None,
    known: Boxes | None = None,
    every: bool = False,
    slopes: Mapping[str, TargetSlopes] | None = None,
    guided: bool = False,
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
        every: tighten stable scalars too. Nothing then depends on values, as ``vmap`` needs.
        slopes: relaxation parameters of each row's own, and which scalars they bound, by name of
            the value; only these values are tightened then.
        guided: choose slopes below kinks as backward passes alone would (see ``_guided``). Off,
            intervals say everything about the lines on them, as the certificate checker expects.
        max_memory: bytes that the rows of one backward pass may take.

    Returns:
        Intervals by node name; differentiable in parameters and slopes.
    """
    table = graph.parameters if parameters is None else {**graph.parameters, **parameters}
    readers = _nonlinear_readers(graph)
    chosen = set(tightened_names(graph, box=regions.is_box)) if tighten else set()
    if only is not None:
        chosen &= set(only)
    composed = affine_values(graph) & chosen
    native = chosen - composed and regions.is_box and not every and slopes is None
    lowered = _lower(graph, [regions.lower, regions.upper], table) if native else None
    start = graph.nodes[0]
    boxes = {start.name: regions.box.map(lambda end: end.reshape(end.shape[0], *start.shape))}
    setting = Setting(graph, regions, boxes, table)
    for node in graph.nodes[1:]:
        box = lookup(node.op).interval(node, [boxes[name] for name in node.inputs], table)
        if known is not None and node.name in known:
            box = box.intersect(known[node.name])
        if node.name in composed and graph.input_size < box.lower[0].numel():
            box = box.intersect(bound_affine_value(graph, regions, node, table))
        elif node.name in chosen and lowered is not None:
            bounder = lowered.scalars(node, needed_scalars(box, readers[node.name]))
            box = bounder.tighten(box, lowered.lines(bounder, boxes), boxes)
        elif slopes is not None and node.name in slopes:
            own = slopes[node.name]
            box = tighten_scalars(setting, node, box, own, max_memory)
        elif slopes is None and node.name in chosen:
            columns = _all(box) if every else unstable_order(box, readers[node.name])
            own = TargetSlopes(*columns, {})
            box = tighten_scalars(setting, node, box, own, max_memory)
        boxes[node.name] = box if guided else box.map(lambda end: end)
    return boxes


def tightened_names(graph: Graph, box: bool = True) -> tuple[str, ...]:
    """Values that backward passes can tighten: read by nonlinear nodes, not exact already.

    Left out are images of elementwise functions, as tight as what they are applied to, and for
    regions that are boxes (``box``) values on which interval arithmetic is exact.
    """
    mixing: dict[str, int] = {graph.nodes[0].name: 0 if box else 1}
    for node in graph.nodes[1:]:
        mixing[node.name] = max(mixing[name] for name in node.inputs) + _mixes(node)
    elementwise = {n.name for n in graph.nodes[1:] if isinstance(lookup(n.op), ElementwiseOperator)}
    return tuple(
        name
        for name in _nonlinear_readers(graph)
        if mixing[name] > 1 and name not in elementwise and name != graph.nodes[0].name
    )


def _mixes(node: Node) -> bool:
    """Whether a scalar of the output may combine, or later meet again, several of the input."""
    if node.op == "gather":
        index = np.asarray(node.attrs["index"]).ravel()
        return len(np.unique(index)) < len(index)
    return node.op in _MIXING


def _nonlinear_readers(graph: Graph) -> dict[str, tuple[Node, ...]]:
    """For each value read by nonlinear nodes: those nodes."""
    readers: dict[str, tuple[Node, ...]] = {}
    for node in graph.nodes[1:]:
        if not lookup(node.op).traits.affine:
            for name in node.inputs:
                readers[name] = (*readers.get(name, ()), node)
    return readers


def _all(box: Interval) -> tuple[Tensor, Tensor]:
    """Positions (b, m) of every scalar of a value; all count."""
    count = box.lower.shape[0]
    size = box.lower.flatten(1).shape[1]
    order = torch.arange(size, device=box.lower.device).expand(count, size)
    return order, torch.ones_like(order, dtype=torch.bool)


def _lower(graph: Graph, tensors: Sequence[Tensor], table: Parameters) -> Lowered | None:
    """The network for native backward passes, or None where they do not apply."""
    if not programs_apply([*tensors, *table.values()]):
        return None
    return Lowered.of(graph, table)


def needed_scalars(box: Interval, readers: tuple[Node, ...]) -> Tensor:
    """Which scalars (b, n) some reader is nonlinear on."""
    needed = torch.zeros_like(box.lower, dtype=torch.bool)
    for reader in readers:
        operator = lookup(reader.op)
        stable = operator.stable(box) if isinstance(operator, TwoPiece) else box.width <= 0
        needed |= ~stable
    return needed.flatten(1)


def unstable_order(box: Interval, readers: tuple[Node, ...]) -> tuple[Tensor, Tensor]:
    """Positions (b, k) of the scalars that some reader is nonlinear on, and which of them count.

    Lists shorter than the longest are padded with scalars that do not count and stay as they are:
    a region's bounds must not depend on the other regions of the batch.
    """
    needed = needed_scalars(box, readers)
    width = int(needed.sum(dim=1).max()) if needed.numel() else 0
    order = needed.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    return order, needed.gather(1, order)


def tighten_scalars(
    setting: Setting, node: Node, box: Interval, slopes: TargetSlopes, max_memory: int
) -> Interval:
    """Intersect the scalars ``order`` (b, k) of ``box`` that count with backward bounds."""
    order, counts = slopes.order, slopes.counts
    if not order.shape[1]:
        return box
    lower, upper = box.lower.flatten(1), box.upper.flatten(1)
    parts = [
        _bound_scalars(setting, node, part)
        for part in _chunks(setting.graph, slopes, lower.element_size(), max_memory)
    ]
    new_lower = torch.cat([part.lower for part in parts], dim=1)
    new_upper = torch.cat([part.upper for part in parts], dim=1)
    old = Interval(lower.gather(1, order), upper.gather(1, order))
    new = Interval(new_lower, new_upper)
    tight = old.intersect(new)
    if slopes.through:
        tight = pass_gradient(tight, new)
    steep = torch.where(counts, reaches_up(new), reaches_up(old))
    return GuidedInterval(
        lower.scatter(1, order, torch.where(counts, tight.lower, old.lower)).reshape_as(box.lower),
        upper.scatter(1, order, torch.where(counts, tight.upper, old.upper)).reshape_as(box.upper),
        reaches_up(box).flatten(1).scatter(1, order, steep).reshape_as(box.lower),
    )


def _chunks(
    graph: Graph, slopes: TargetSlopes, item: int, max_memory: int
) -> Iterator[TargetSlopes]:
    """Split columns so that one backward pass keeps within the memory budget."""
    order = slopes.order
    largest = max(n.size for n in graph.nodes)
    per_column = 2 * 4 * order.shape[0] * largest * item  # both ends; rows, parts, temporaries
    size, total = max(1, max_memory // max(per_column, 1)), order.shape[1]
    for first in range(0, total, size):
        span = slice(first, min(first + size, total))
        mirror = slice(total + span.start, total + span.stop)
        alphas = {
            name: torch.cat([alpha[:, span], alpha[:, mirror]], dim=1)
            for name, alpha in slopes.alphas.items()
        }
        yield TargetSlopes(order[:, span], slopes.counts[:, span], alphas)


def _bound_scalars(setting: Setting, node: Node, slopes: TargetSlopes) -> Interval:
    """Backward bounds of the scalars ``slopes.order`` (b, k) of a node's flattened value."""
    index, alphas = slopes.order, slopes.alphas or None
    operator, like = lookup(node.op), setting.inputs(node)[0].lower
    pending: dict[str, Tensor] = {}
    if operator.traits.affine:
        moved = operator.select(node, index, setting.inputs(node), setting.table)
        for name, part in zip(node.inputs, moved.inputs, strict=True):
            both = torch.cat([part, -part], dim=1)
            pending[name] = pending[name] + both if name in pending else both
        bias = like.new_zeros(index.shape) if moved.bias is None else moved.bias
        const = torch.cat([bias, -bias], dim=1)
    else:  # the lower line is not the upper one: both signs go through the relaxation
        units = unit_rows(index, node, like)
        pending[node.name] = torch.cat([units, -units], dim=1)
        const = like.new_zeros(index.shape[0], 2 * index.shape[1])
    found = descend(setting, pending, const, alphas, cuts=False).lower
    lower, negated = found.chunk(2, dim=1)
    return Interval(lower, -negated)
