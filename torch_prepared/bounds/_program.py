"""Graphs as row programs: backward passes in native code, without gradients, on the CPU.

The programs do what ``bounds.crown`` does node by node, with the same relaxations; results agree up
to rounding. They visit only the pixels that a neuron's rows reach and only the neurons that are not
constantly zero on a region, and no region pays for the unstable neurons of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.bounds._layout import SCALING, Layout
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import ElementwiseOperator, lookup
from torch_prepared.relax._base import Parameters
from torch_prepared.relax.conv import window

__all__ = ["Bounder", "Lowered", "programs_apply"]

Boxes = Mapping[str, Interval]
Kind = Literal["conv", "linear", "relax", "dot", "add", "scale", "cut"]
KINDS: tuple[Kind, ...] = ("conv", "linear", "relax", "dot", "add", "scale", "cut")
ADD, FIRST, ONLY = range(3)
NO_WINDOW = ((1, 1), (1, 1), (0, 0), (1, 1), 1)


def programs_apply(tensors: Sequence[Tensor]) -> bool:
    """Whether native programs may compute with these tensors: CPU, no gradient, no transforms."""
    if not ops.build_info().native or torch._C._are_functorch_transforms_active():
        return False
    floats = (torch.float32, torch.float64)
    if any(t.device.type != "cpu" or t.dtype not in floats for t in tensors):
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))


class _Step(NamedTuple):
    kind: Kind
    source: int
    target: int
    data: int
    sign: int = 1
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int] = (
        NO_WINDOW
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


@dataclass
class _Draft:
    """Steps under construction, with the names of the values that lines and boxes belong to."""

    slots: list[tuple[int, int, int]] = field(default_factory=list)
    steps: list[_Step] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    lines: list[Node] = field(default_factory=list)
    boxes: list[str] = field(default_factory=list)
    input_slot: int = -1

    def finish(
        self, layout: Layout, where: Tensor, starts: Tensor, index: Tensor, rows: Tensor | None
    ) -> Bounder:
        """The program, with what it starts from."""
        program = ops.RowProgram(
            torch.tensor(self.slots, dtype=torch.int64), self._encode(), tuple(self.tensors),
            starts, index, self.input_slot,
        )  # fmt: skip
        return Bounder(program, tuple(self.lines), tuple(self.boxes), layout, where, rows)

    def _encode(self) -> Tensor:
        """Numbers (steps, 16) as csrc/ops/row_program.h reads them."""
        writers = [0] * len(self.slots)
        for step in self.steps:
            writers[step.target] += _writes(step)
        seen = [0] * len(self.slots)
        rows = []
        for position, step in enumerate(self.steps):
            mode, wanted = ONLY, -1
            if _writes(step):
                seen[step.target] += 1
                if writers[step.target] > 1:
                    mode = FIRST if seen[step.target] == 1 else ADD
                else:
                    wanted = self._wanted(position, step.target)
            kernel, stride, padding, dilation, groups = step.geometry
            numbers = (*kernel, *stride, *padding, *dilation, groups)
            head = (KINDS.index(step.kind), step.source, step.target, mode, wanted)
            rows.append((*head, step.data, step.sign, *numbers))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 16)

    def _wanted(self, position: int, slot: int) -> int:
        """The lines a slot goes through in place before anything else but cuts reads it."""
        for step in self.steps[position + 1 :]:
            if step.source != slot or step.kind == "cut":
                continue
            return step.data if step.kind == "relax" and step.target == slot else -1
        return -1


def _writes(step: _Step) -> bool:
    return step.kind in ("conv", "linear", "relax", "add") and step.source != step.target


class Lowered:
    """One network with its present weights, ready to bound values natively.

    Args:
        graph: the network.
        table: every parameter.
        layout: of the graph.
    """

    def __init__(self, graph: Graph, table: Parameters, layout: Layout) -> None:
        self._graph = graph
        self._table = table
        self.layout = layout
        self._nodes = {node.name: node for node in graph.nodes}
        self._weights: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._lines: dict[str, Tensor] = {}

    @classmethod
    def of(cls, graph: Graph, table: Parameters) -> Lowered | None:
        """The lowered network, or None when it holds operators that programs do not know."""
        layout = Layout.of(graph)
        if layout is None:
            return None
        return cls(graph, table, layout)

    def bound_scalars(
        self, target: Node, needed: Tensor, boxes: Boxes
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Backward bounds of single scalars of a node's value, over boxes.

        Args:
            target: the node.
            needed: (b, n) bool, the scalars to bound, in flat order.
            boxes: intervals of the values before the node.

        Returns:
            ``(where, lower, upper)``: positions (k,) in the flattened ``(b, n)`` and the bounds.
        """
        bounder = self.scalars(target, needed)
        lower, negated = bounder.lower(self.lines(bounder, boxes), boxes)[0]
        return bounder.where, lower, -negated

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
        draft = _Builder(self, target, None).build()
        where = found[:, 0] * needed.shape[1] + column
        return draft.finish(self.layout, where, starts, found[:, 1].contiguous(), None)

    def rows(self, target: Node, rows: Tensor, cuts: Boxes | None) -> Bounder:
        """What bounds rows (b, s, n) on a value, also at cuts where ``cuts`` has boxes."""
        none = torch.zeros(0, dtype=torch.int64)
        draft = _Builder(self, target, cuts).build()
        return draft.finish(self.layout, none, none, none, self.layout.enter(target.name, rows))

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
            box = boxes[node.inputs[0]].map(lambda end: end.flatten(1))
            lines = torch.stack([*operator.lines(node, box)])
            self._lines[node.name] = self.enter_lines(node, lines)
        return self._lines[node.name]

    def weight(self, node: Node) -> tuple[Tensor, Tensor | None]:
        """Flat weight of an affine node as the kernel reads it, and a bias per slot entry."""
        if node.name not in self._weights:
            self._weights[node.name] = self._read_weight(node)
        return self._weights[node.name]

    def _read_weight(self, node: Node) -> tuple[Tensor, Tensor | None]:
        height, width, channels = self.layout.shapes[node.name]
        if node.op in SCALING:
            factor, shift = lookup(node.op).constants(node, self._table)  # type: ignore[attr-defined]
            parts = [
                None if part is None else self._entries(node, part.expand(node.shape))
                for part in (factor, shift)
            ]
            return torch.zeros(0) if parts[0] is None else parts[0], parts[1]
        if node.op == "avg_pool":
            kernel = window(node, "kernel")
            size = torch.tensor(kernel).prod().item()
            like = boxes_dtype(self._table)
            return torch.full((int(size) * channels,), 1.0 / size, dtype=like), None
        weight = node.params["weight"].read(self._table)
        bias = node.read("bias", self._table)
        if node.op == "conv":
            shift = None if bias is None else bias.repeat(height * width)
            return weight.flatten(2).permute(2, 0, 1).reshape(-1), shift
        for axis, name in ((0, node.name), (1, node.inputs[0])):
            order = self.layout.order(name)
            weight = weight if order is None else weight.index_select(axis, order)
        order = self.layout.order(node.name)
        return weight.reshape(-1), bias if bias is None or order is None else bias[order]

    def _entries(self, node: Node, value: Tensor) -> Tensor:
        return self.layout.enter(node.name, value.reshape(-1)).contiguous()


def boxes_dtype(table: Parameters) -> torch.dtype:
    """The floating dtype of the parameters."""
    for value in table.values():
        if value.is_floating_point():
            return value.dtype
    return torch.float32


class _Builder:
    """Writes the program of one target value."""

    def __init__(self, lowered: Lowered, target: Node, cuts: Boxes | None) -> None:
        self._lowered = lowered
        self._nodes = lowered._nodes
        self._shapes = lowered.layout.shapes
        self._target = target
        self._cuts = cuts or {}
        self._order = self._ancestors()
        self._program = _Draft()
        self._slots: dict[str, int] = {}

    def build(self) -> _Draft:
        """The program; values that are pending decide where a single cut separates the graph."""
        self._assign()
        program, pending = self._program, {self._target.name}
        for node in self._order:
            pending.discard(node.name)
            slot = self._slots[node.name]
            if node.op == "input":
                program.input_slot = slot
                self._cut(node.name, slot)
                continue
            if not pending and node.name in self._cuts:
                self._cut(node.name, slot)
            self._pull(node, slot)
            pending.update(node.inputs)
        if not program.boxes:  # a constant output: batch size and dtype still come from a box
            program.boxes.append(self._lowered._graph.nodes[0].name)
        return program

    def _ancestors(self) -> list[Node]:
        """The target and all it depends on, last first."""
        wanted, found = {self._target.name}, []
        for node in reversed(self._lowered._graph.nodes):
            if node.name in wanted:
                found.append(node)
                wanted.update(node.inputs)
        return found

    def _assign(self) -> None:
        """One slot per value; rows that are equal or change in place share one."""
        readers: dict[str, int] = {}
        for node in self._order:
            for name in node.inputs:
                readers[name] = readers.get(name, 0) + 1
        for node in self._order:
            if node.name not in self._slots:
                self._slots[node.name] = len(self._program.slots)
                self._program.slots.append(self._shapes[node.name])
            for position, name in enumerate(node.inputs):
                if readers[name] == 1 and self._shares(node, position):
                    self._slots[name] = self._slots[node.name]

    def _shares(self, node: Node, position: int) -> bool:
        """Whether rows on an input may take the place of rows on the output."""
        if node.op != "add":
            return node.op in ("reshape", *SCALING) or not lookup(node.op).traits.affine
        # Several terms see the same rows: none of them may change these in place.
        producer = self._nodes[node.inputs[position]].op
        return self._sign(node, position) == 1 and producer in ("conv", "linear", "avg_pool")

    def _sign(self, node: Node, position: int) -> int:
        return int(node.attrs["signs"][position])  # type: ignore[index]

    def _cut(self, name: str, slot: int) -> None:
        self._program.steps.append(_Step("cut", slot, slot, len(self._program.boxes)))
        self._program.boxes.append(name)

    def _pull(self, node: Node, slot: int) -> None:
        program = self._program
        targets = [self._slots[name] for name in node.inputs]
        if node.op == "reshape":
            if targets[0] != slot:
                program.steps.append(_Step("add", slot, targets[0], 0))
        elif node.op == "add":
            for position, target in enumerate(targets):
                if target != slot:
                    program.steps.append(_Step("add", slot, target, 0, self._sign(node, position)))
        elif isinstance(lookup(node.op), ElementwiseOperator):
            program.steps.append(_Step("relax", slot, targets[0], len(program.lines)))
            program.lines.append(node)
        else:
            self._pull_affine(node, slot, targets[0])

    def _pull_affine(self, node: Node, slot: int, target: int) -> None:
        program = self._program
        weight, bias = self._lowered.weight(node)
        if bias is not None:
            program.steps.append(_Step("dot", slot, slot, self._tensor(bias)))
        if node.op in SCALING:
            if weight.numel():
                program.steps.append(_Step("scale", slot, slot, self._tensor(weight)))
            if target != slot:
                program.steps.append(_Step("add", slot, target, 0))
            return
        data = self._tensor(weight)
        if node.op == "linear":
            program.steps.append(_Step("linear", slot, target, data))
            return
        program.steps.append(_Step("conv", slot, target, data, 1, self._geometry(node, weight)))

    def _geometry(
        self, node: Node, weight: Tensor
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
        pool = node.op == "avg_pool"
        kernel = window(node, "kernel") if pool else node.read(
            "weight", self._lowered._table
        ).shape[2:]  # type: ignore[union-attr]  # fmt: skip
        stride, padding = window(node, "stride"), window(node, "padding")
        d = len(stride)
        dilation = (1,) * d if pool else window(node, "dilation")
        groups = node.shape[0] if pool else int(node.attrs["groups"])  # type: ignore[arg-type]
        wide = [(1,) * (2 - d) + tuple(part) for part in (kernel, stride)]
        begins = (0,) * (2 - d) + padding[:d]
        return wide[0], wide[1], begins, (1,) * (2 - d) + tuple(dilation), groups

    def _tensor(self, value: Tensor) -> int:
        self._program.tensors.append(value)
        return len(self._program.tensors) - 1
