"""What a row program is made of, as its operators take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

__all__ = ["RowProgram", "RowShares"]


@dataclass(frozen=True)
class RowProgram:
    """Steps that pull rows from one value of a network back to its input.

    A slot holds the coefficients that rows have on one value: ``channels`` numbers at each of
    ``height x width`` pixels, pixels outside. ``csrc/ops/row_program.h`` explains every field.

    Args:
        slots: int64 (slots, 3): height, width, channels; rows start on slot 0.
        steps: int64 (steps, 16): kind (0 conv, 1 linear, 2 relax, 3 dot, 4 add, 5 scale, 6 cut),
            source, target, mode, lines that the target goes through next, position of the data,
            sign, then kernel, stride, padding, dilation (two numbers each) and groups.
        tensors: flat weights, conv (kernel, outputs, inputs / groups) and linear (outputs,
            inputs) with values in slot order; vectors of one number per slot entry.
        starts: int64 (b + 1,), where each region's part of ``index`` begins; empty with rows.
        index: int64 (k,), increasing entries of slot 0 in each region; empty with rows.
        input_slot: the slot of the network's input; -1 when nothing reaches it.
    """

    slots: Tensor
    steps: Tensor
    tensors: tuple[Tensor, ...]
    starts: Tensor
    index: Tensor
    input_slot: int

    def arguments(
        self, lines: Sequence[Tensor], boxes: Sequence[Tensor], rows: Tensor | None
    ) -> tuple[Tensor | list[Tensor] | int | None, ...]:
        """The leading arguments of the operators on programs."""
        return (
            self.slots, self.steps, list(self.tensors), list(lines), list(boxes),
            self.starts, self.index, rows, self.input_slot,
        )  # fmt: skip


@dataclass(frozen=True)
class RowShares:
    """Slopes of each row's own: below an unstable neuron ``1 - free (1 - share)``.

    Args:
        values: all shares, flat; the operators know their order.
        offsets: int64, where those of each group of rows begin.
        free: per activation (b, n) how far slopes may fall below 1; 0 for none.
    """

    values: Float[Tensor, " k"]
    offsets: Tensor
    free: tuple[Tensor, ...]
