"""Graphs as row programs: backward passes in native code, without gradients, on the CPU.

The programs do what ``bounds.crown`` does node by node, with the same relaxations; results agree up
to rounding. They visit only the pixels that a neuron's rows reach and only the neurons that are not
constantly zero on a region, and no region pays for the unstable neurons of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.bounds._guided import GuidedInterval, default_lines, reaches_up
from torch_prepared.bounds._layout import Layout
from torch_prepared.bounds._steps import Builder, Draft, SlotWeights
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import ElementwiseOperator, lookup
from torch_prepared.relax._base import Parameters

__all__ = ["Bounder", "Lowered", "pass_gradient", "programs_apply"]

Boxes = Mapping[str, Interval]


def programs_apply(tensors: Sequence[Tensor]) -> bool:
    """Whether native programs may compute with these tensors: CPU, no gradient, no transforms."""
    if not ops.build_info().native or torch._C._are_functorch_transforms_active():
        return False
    floats = (torch.float32, torch.float64)
    if any(t.device.type != "cpu" or t.dtype not in floats for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


def pass_gradient(value: Interval, source: Interval) -> Interval:
    """The ends of ``value`` with the gradients of ``source``, of one shape."""
    return Interval(
        value.lower.detach() + (source.lower - source.lower.detach()),
        value.upper.detach() + (source.upper - source.upper.detach()),
    )


@dataclass(frozen=True)
class Bounder:
    """A program with the rows it starts from.

    Args:
        program: as the operators take it.
        activations: nodes whose lines it needs, in order.
        cuts: values whose boxes it needs, in order.
        layout: of the graph.
        where: positions (k,) of the scalars in the flattened (b, n) value, when they are bounded.
        start: dense rows in slot order, when these are.
    """

    program: ops.RowProgram
    activations: tuple[Node, ...]
    cuts: tuple[str, ...]
    layout: Layout
    where: Tensor
    start: Tensor | None

    def lower(
        self, lines: Sequence[Tensor], boxes: Boxes, shares: ops.RowShares | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lower bounds, rows on the input and constants; see :func:`ops.row_program`."""
        return ops.row_program(self.program, lines, self.ends(boxes), self.start, shares)

    def shares(
        self, lines: Sequence[Tensor], boxes: Boxes, free: Sequence[Tensor]
    ) -> ops.RowShares:
        """Slopes of each row's own, equal to the lines'."""
        return ops.row_shares(self.program, lines, self.ends(boxes), free, self.start)

    def ends(self, boxes: Boxes) -> list[Tensor]:
        """Centers and radii (2, b, n) of the cuts' boxes in slot order."""
        found = []
        for name in self.cuts:
            box = boxes[name].map(lambda end: end.detach().flatten(1))
            found.append(self.layout.enter(name, torch.stack([box.center, box.radius])))
        return found

    def tighten(
        self,
        box: Interval,
        lines: Sequence[Tensor],
        boxes: Boxes,
        shares: ops.RowShares | None = None,
    ) -> Interval:
        """``box`` of the target's value, the program's scalars intersected with backward bounds.

        Gradients of the backward bounds pass through the intersection as if it were not there, so
        that slopes whose bounds are worse at present go on moving. Without ``shares`` the result
        remembers which slopes below the backward bounds alone would choose.
        """
        low, negated = self.lower(lines, boxes, shares)[0]
        lower, upper, where = box.lower.reshape(-1), box.upper.reshape(-1), self.where
        new = Interval(low, -negated)
        tight = Interval(lower[where], upper[where]).intersect(new)
        if low.requires_grad:
            tight = pass_gradient(tight, new)
        ends = (
            lower.index_put((where,), tight.lower).reshape_as(box.lower),
            upper.index_put((where,), tight.upper).reshape_as(box.upper),
        )
        if shares is not None:  # which say the slopes
            return Interval(*ends)
        steep = reaches_up(box).reshape(-1).index_put((where,), reaches_up(new))
        return GuidedInterval(*ends, steep.reshape_as(box.lower))


class Lowered:
    """One network with its present weights, ready to bound values natively.

    Args:
        graph: the network.
        table: every parameter.
        layout: of the graph.
    """

    def __init__(self, graph: Graph, table: Parameters, layout: Layout) -> None:
        self._graph = graph
        self.layout = layout
        self._weights = SlotWeights(graph, table, layout)
        self._lines: dict[str, Tensor] = {}

    @classmethod
    def of(cls, graph: Graph, table: Parameters) -> Lowered | None:
        """The lowered network, or None when it holds operators that programs do not know."""
        layout = Layout.of(graph)
        if layout is None:
            return None
        return cls(graph, table, layout)

    def bound_rows(
        self, target: Node, rows: Tensor, boxes: Boxes, cuts: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lower bounds of dense rows (b, s, n) on a node's value: ``lower, inputs, const``."""
        bounder = self.rows(target, rows, boxes if cuts else None)
        lower, inputs, const = bounder.lower(self.lines(bounder, boxes), boxes)
        start = self._graph.nodes[0]
        if bounder.program.input_slot < 0:
            inputs = rows.new_zeros(*rows.shape[:2], start.size)
        return lower, self.layout.leave(start.name, inputs), const

    def scalars(self, target: Node, needed: Tensor) -> Bounder:
        """What bounds the scalars ``needed`` (b, n) of a value."""
        entered = self.layout.enter(target.name, needed)
        found = entered.nonzero()
        starts = torch.zeros(len(needed) + 1, dtype=torch.int64)
        starts[1:] = entered.sum(dim=1).cumsum(0)
        order = self.layout.order(target.name)
        column = found[:, 1] if order is None else order[found[:, 1]]
        draft = Builder(self._weights, target, ()).build()
        where = found[:, 0] * needed.shape[1] + column
        return self._finish(draft, where, starts, found[:, 1].contiguous(), None)

    def rows(self, target: Node, rows: Tensor, cuts: Boxes | None) -> Bounder:
        """What bounds rows (b, s, n) on a value, also at cuts where ``cuts`` has boxes."""
        none = torch.zeros(0, dtype=torch.int64)
        draft = Builder(self._weights, target, cuts or ()).build()
        return self._finish(draft, none, none, none, self.layout.enter(target.name, rows))

    def _finish(
        self, draft: Draft, where: Tensor, starts: Tensor, index: Tensor, rows: Tensor | None
    ) -> Bounder:
        program, boxes = draft.program(starts, index), tuple(draft.boxes)
        return Bounder(program, tuple(draft.lines), boxes, self.layout, where, rows)

    def lines(self, bounder: Bounder, boxes: Boxes) -> list[Tensor]:
        """Lines (4, b, n) of all activations that a bounder goes through; computed once."""
        return [self._node_lines(node, boxes) for node in bounder.activations]

    def enter_lines(self, node: Node, lines: Tensor) -> Tensor:
        """Lines (..., n) of an activation in slot order."""
        return self.layout.enter(node.name, lines)

    def _node_lines(self, node: Node, boxes: Mapping[str, Interval]) -> Tensor:
        """Lines (4, b, n) of an activation in slot order."""
        if node.name not in self._lines:
            operator = cast(ElementwiseOperator, lookup(node.op))
            lines = torch.stack([*default_lines(operator, node, boxes[node.inputs[0]])])
            self._lines[node.name] = self.enter_lines(node, lines)
        return self._lines[node.name]
