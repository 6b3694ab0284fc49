"""A backward pass over a graph, written down as the steps of a row program."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.bounds._layout import SCALING, Layout
from torch_prepared.core.graph import Graph, Node
from torch_prepared.relax import ElementwiseOperator, lookup
from torch_prepared.relax._base import Parameters
from torch_prepared.relax.conv import window

__all__ = ["Builder", "Draft", "SlotWeights"]

Kind = Literal["conv", "linear", "relax", "dot", "add", "scale", "cut"]
KINDS: tuple[Kind, ...] = ("conv", "linear", "relax", "dot", "add", "scale", "cut")
ADD, FIRST, ONLY = range(3)
NO_WINDOW = ((1, 1), (1, 1), (0, 0), (1, 1), 1)


class _Step(NamedTuple):
    kind: Kind
    source: int
    target: int
    data: int
    sign: int = 1
    geometry: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], int] = (
        NO_WINDOW
    )


@dataclass
class Draft:
    """Steps under construction, with the names of the values that lines and boxes belong to."""

    slots: list[tuple[int, int, int]] = field(default_factory=list)
    steps: list[_Step] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    lines: list[Node] = field(default_factory=list)
    boxes: list[str] = field(default_factory=list)
    input_slot: int = -1

    def program(self, starts: Tensor, index: Tensor) -> ops.RowProgram:
        """The steps, as the operators take them, for rows on scalars ``index`` or dense ones."""
        return ops.RowProgram(
            torch.tensor(self.slots, dtype=torch.int64), self._encode(), tuple(self.tensors),
            starts, index, self.input_slot,
        )  # fmt: skip

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


class SlotWeights:
    """Weights of a network's affine nodes in the order of the slots; each is read once.

    Args:
        graph: the network.
        table: every parameter.
        layout: of the graph.
    """

    def __init__(self, graph: Graph, table: Parameters, layout: Layout) -> None:
        self.graph, self.table, self.layout = graph, table, layout
        self._known: dict[str, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, node: Node) -> tuple[Tensor, Tensor | None]:
        """Flat weight of an affine node as the kernel reads it, and a bias per slot entry."""
        if node.name not in self._known:
            self._known[node.name] = self._read_weight(node)
        return self._known[node.name]

    def _read_weight(self, node: Node) -> tuple[Tensor, Tensor | None]:
        height, width, channels = self.layout.shapes[node.name]
        if node.op in SCALING:
            factor, shift = lookup(node.op).constants(node, self.table)  # type: ignore[attr-defined]
            parts = [
                None if part is None else self._entries(node, part.expand(node.shape))
                for part in (factor, shift)
            ]
            return torch.zeros(0) if parts[0] is None else parts[0], parts[1]
        if node.op == "avg_pool":
            kernel = window(node, "kernel")
            size = torch.tensor(kernel).prod().item()
            like = _floating_dtype(self.table)
            return torch.full((int(size) * channels,), 1.0 / size, dtype=like), None
        weight = node.params["weight"].read(self.table)
        bias = node.read("bias", self.table)
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


def _floating_dtype(table: Parameters) -> torch.dtype:
    """The floating dtype of the parameters."""
    for value in table.values():
        if value.is_floating_point():
            return value.dtype
    return torch.float32


class Builder:
    """Writes the program of one target value.

    Args:
        weights: of the network.
        target: the value that rows start from.
        cuts: values over whose boxes bounds are evaluated on the way, beside the input's.
    """

    def __init__(self, weights: SlotWeights, target: Node, cuts: Collection[str]) -> None:
        self._weights = weights
        self._graph = weights.graph
        self._nodes = {node.name: node for node in self._graph.nodes}
        self._shapes = weights.layout.shapes
        self._target = target
        self._cuts = cuts
        self._order = self._ancestors()
        self._program = Draft()
        self._slots: dict[str, int] = {}

    def build(self) -> Draft:
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
            program.boxes.append(self._graph.nodes[0].name)
        return program

    def _ancestors(self) -> list[Node]:
        """The target and all it depends on, last first."""
        wanted, found = {self._target.name}, []
        for node in reversed(self._graph.nodes):
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
        weight, bias = self._weights(node)
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
            "weight", self._weights.table
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
