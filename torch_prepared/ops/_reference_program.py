"""Plain-torch oracle of row programs: every entry of every slot, one region after another.

Slopes of each row's own lie region after region here, not group after group; only the operators
that come with a program know the order of its shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_prepared.errors import UnsupportedOperationError

__all__ = [
    "fake_row_program",
    "fake_row_program_grad",
    "row_program_backward",
    "row_program_grad_reference",
    "row_program_reference",
    "row_program_setup",
    "row_shares_reference",
]

CONV, LINEAR, RELAX, DOT, ADD, SCALE, CUT = range(7)


@dataclass(frozen=True)
class _Program:
    """Arguments as in csrc/ops/row_program.h; see :func:`torch_prepared.ops.row_program`."""

    slots: Tensor
    steps: Tensor
    tensors: Sequence[Tensor]
    lines: Sequence[Tensor]
    boxes: Sequence[Tensor]
    starts: Tensor
    index: Tensor
    rows: Tensor | None
    input_slot: int
    free: Sequence[Tensor]
    shares: Tensor | None = None
    offsets: Tensor | None = None

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        return [(int(h), int(w), int(c)) for h, w, c in self.slots.tolist()]

    def seeds(self, region: int) -> Tensor:
        """Rows (r, size of slot 0) of one region."""
        if self.rows is not None:
            return self.rows[region]
        mine = self.index[self.starts[region] : self.starts[region + 1]]
        height, width, channels = self.shapes[0]
        unit = self.boxes[0].new_zeros(len(mine), height * width * channels)
        unit[torch.arange(len(mine)), mine] = 1.0
        return torch.cat([unit, -unit])

    def own_slopes(self, region: int) -> list[tuple[int, Tensor]]:
        """For each relax step in order: its lines, and which entries have shares."""
        relaxed = [step[5] for step in self.steps.tolist() if step[0] == RELAX]
        return [(k, self.free[k][region] != 0) for k in relaxed]

    def run(self, region: int) -> tuple[Tensor, Tensor, Tensor]:
        """Best cut (r,), rows on the input (r, n) and constants (r,) of one region."""
        seeds, shapes = self.seeds(region), self.shapes
        values = [seeds.new_zeros(len(seeds), h * w * c) for h, w, c in shapes]
        values[0] = seeds
        constant = seeds.new_zeros(len(seeds))
        best = torch.full_like(constant, -torch.inf)
        cursor = 0 if self.offsets is None else int(self.offsets[region])
        for step in self.steps.tolist():
            kind, source, target, data, sign = step[0], step[1], step[2], step[5], step[6]
            here = values[source]
            if kind == CONV:
                values[target] = values[target] + _conv(here, shapes, step, self.tensors[data])
            elif kind == LINEAR:
                weight = self.tensors[data].reshape(here.shape[1], -1)
                values[target] = values[target] + here @ weight
            elif kind == RELAX:
                slope, offset, upper_slope, upper_offset = self.lines[data][:, region]
                slope, cursor = self._slopes(slope, upper_offset, data, region, len(here), cursor)
                positive = here >= 0
                moved = here * torch.where(positive, slope, upper_slope)
                constant = constant + (here * torch.where(positive, offset, upper_offset)).sum(1)
                values[target] = moved if source == target else values[target] + moved
            elif kind == DOT:
                constant = constant + here @ self.tensors[data]
            elif kind == ADD:
                values[target] = values[target] + sign * here
            elif kind == SCALE:
                values[source] = here * self.tensors[data]
            elif kind == CUT:
                center, radius = self.boxes[data][:, region]
                best = torch.maximum(best, constant + here @ center - here.abs() @ radius)
        if self.input_slot < 0:
            return torch.maximum(best, constant), seeds.new_zeros(len(seeds), 0), constant
        return best, values[self.input_slot], constant

    def _slopes(
        self, slope: Tensor, above: Tensor, data: int, region: int, rows: int, cursor: int
    ) -> tuple[Tensor, int]:
        """Lower slopes (rows, n) with each row's own shares, and where the next ones begin."""
        slope = slope.expand(rows, -1)
        if self.shares is None:
            return slope, cursor
        free = self.free[data][region]
        count = rows * int((free != 0).sum())
        mine = self.shares[cursor : cursor + count].reshape(-1, rows).T
        own = 1 - free[free != 0] * (1 - mine)
        spread = torch.zeros_like(slope).masked_scatter((free != 0).expand(rows, -1), own)
        return torch.where((free != 0) & (above > 0), spread, slope), cursor + count


def row_program_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds, rows on the input, constants."""
    program = _Program(*arguments)
    found = [program.run(region) for region in range(program.boxes[0].shape[1])]
    if not found:
        return fake_row_program(*arguments)
    if program.rows is None:
        lower = torch.cat([part[0].reshape(2, -1) for part in found], dim=1)
        width = found[0][1].shape[1]
        return lower, lower.new_zeros(len(found), 0, width), lower.new_zeros(len(found), 0)
    lower, inputs, constants = (torch.stack(parts) for parts in zip(*found, strict=True))
    return lower, inputs, constants


def row_shares_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Where the shares of each region begin, and shares that give the slopes of the lines."""
    program = _Program(*arguments)
    parts, offsets = [program.boxes[0].new_zeros(0)], [0]
    for region in range(program.boxes[0].shape[1]):
        rows = len(program.seeds(region))
        for k, owned in program.own_slopes(region):
            slope, free = program.lines[k][0, region][owned], program.free[k][region][owned]
            parts.append((1 - (1 - slope) / free).unsqueeze(1).expand(-1, rows).reshape(-1))
        offsets.append(sum(len(part) for part in parts))
    return torch.tensor(offsets, dtype=torch.int64), torch.cat(parts)


def row_program_grad_reference(grad_lower: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Gradients of all lines, flat and one after another, and of the shares."""
    program = _Program(*arguments)
    lines = [line.detach().clone().requires_grad_() for line in program.lines]
    shares = None if program.shares is None else program.shares.detach().clone().requires_grad_()
    changed = (*arguments[:3], lines, *arguments[4:10], shares, program.offsets)
    with torch.enable_grad():
        lower = row_program_reference(*changed)[0]
    wanted = [*lines, *([] if shares is None else [shares])]
    if not lower.requires_grad:
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
    else:
        found = torch.autograd.grad(lower, wanted, grad_lower, allow_unused=True)
    full = [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]
    pieces = _pieces(program)
    flat = [F.pad(part.reshape(1, -1), (0, 0, 0, pieces - 1)) for part in full[: len(lines)]]
    none = grad_lower.new_zeros(0)
    shared = none if shares is None else full[-1]
    return torch.cat([none, *(part.reshape(-1) for part in flat)]), shared


def _pieces(program: _Program) -> int:
    """Partial sums of a line's gradient, by the number of regions as in the native wrapper."""
    return 1 if program.boxes[0].shape[1] >= 8 else 4


def _conv(
    rows: Tensor, shapes: Sequence[tuple[int, int, int]], step: Sequence[int], weight: Tensor
) -> Tensor:
    """The transpose of a convolution, rows (r, from) to (r, to), both in slot order."""
    (height, width, outputs), (tall, wide, inputs) = shapes[step[1]], shapes[step[2]]
    kernel, stride, padding, dilation, groups = (
        step[7:9], step[9:11], step[11:13], step[13:15], step[15],
    )  # fmt: skip
    image = rows.reshape(-1, height, width, outputs).permute(0, 3, 1, 2)
    taps = weight.reshape(*kernel, outputs, inputs // groups).permute(2, 3, 0, 1)
    full = F.conv_transpose2d(
        image, taps, stride=tuple(stride), dilation=tuple(dilation), groups=groups
    )
    reach = [max(tall + padding[0] - full.shape[2], 0), max(wide + padding[1] - full.shape[3], 0)]
    full = F.pad(full, (0, reach[1], 0, reach[0]))
    full = full[:, :, padding[0] : padding[0] + tall, padding[1] : padding[1] + wide]
    return full.permute(0, 2, 3, 1).reshape(len(rows), -1)


def fake_row_program(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the right shapes; the input's box is the last one."""
    program = _Program(*arguments)
    like = program.boxes[0]
    b, s = like.shape[1], 0 if program.rows is None else program.rows.shape[1]
    width = 0 if program.input_slot < 0 else program.boxes[-1].shape[2]
    lower = like.new_empty(b, s)
    if program.rows is None:
        lower = like.new_empty(2, program.index.shape[0])
    return lower, like.new_empty(b, s, width), like.new_empty(b, s)


def fake_row_program_grad(grad_lower: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Outputs of the right shapes."""
    program = _Program(*arguments)
    shares = program.shares
    total = _pieces(program) * sum(line.numel() for line in program.lines)
    return grad_lower.new_empty(total), grad_lower.new_empty(
        0 if shares is None else shares.numel()
    )


# The autograd context is an untyped object of torch.library, hence Any.
def row_program_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep every argument; refuse at once what has no gradient."""
    program = _Program(*inputs)
    constant = [*program.tensors, *program.boxes, *program.free]
    constant += [] if program.rows is None else [program.rows]
    if any(tensor.requires_grad for tensor in constant):
        _refuse()
    ctx.program = inputs
    ctx.mark_non_differentiable(output[1], output[2])


def row_program_backward(ctx: Any, grad_lower: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    """Gradients of lines and shares."""
    program = _Program(*ctx.program)
    flat, to_shares = torch.ops.torch_prepared.row_program_grad(grad_lower, *ctx.program)
    pieces = flat.numel() // max(1, sum(line.numel() for line in program.lines))
    parts = flat.split([pieces * line.numel() for line in program.lines])
    to_lines = [
        part.reshape(pieces, *line.shape).sum(0)
        for part, line in zip(parts, program.lines, strict=True)
    ]
    nothing: list[Any] = [None] * 12
    nothing[3] = to_lines
    nothing[2], nothing[4], nothing[9] = (
        [None] * len(program.tensors), [None] * len(program.boxes), [None] * len(program.free),
    )  # fmt: skip
    nothing[10] = None if program.shares is None else to_shares
    return tuple(nothing)


def _refuse() -> NoReturn:
    raise UnsupportedOperationError(
        "row_program: got a request for its gradient in weights, rows or boxes; expected none, as "
        "it has none; use bounds.certified_margin for bounds that are differentiable in the weights"
    )
