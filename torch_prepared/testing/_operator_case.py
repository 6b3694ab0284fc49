"""A node under test: boxes and points for it, and how far its bounds may miss by rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import Operator, PulledBack, lookup
from torch_prepared.testing.strategies import BoxKind, random_box

__all__ = ["BATCH", "ULPS", "OperatorCase"]

ULPS = 16  #: units in the last place that a sum of magnitudes may miss by
BATCH = 2


@dataclass(frozen=True)
class OperatorCase:
    """One node to test, and how far its bounds may miss by rounding.

    Args:
        name: of the case.
        node: its input names are not used.
        shapes: of the inputs, without the batch axis.
        parameters: float64, best multiples of 1/8 so that arithmetic on them is exact.
        reference: NumPy inputs (b, *shape_i) to the value (b, *shape), by independent code.
        exact: sums and products on dyadic data do not round.
    """

    name: str
    node: Node
    shapes: tuple[tuple[int, ...], ...]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    reference: Callable[..., np.ndarray] | None = None
    exact: bool = True

    @property
    def operator(self) -> Operator:
        """The registered operator."""
        return lookup(self.node.op)

    def draw(self, data: st.DataObject) -> tuple[list[Interval], BoxKind, torch.Generator]:
        """A box for every input, of what kind they are, and a generator for points in them."""
        kind = data.draw(st.sampled_from(list(BoxKind)))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        drawn = [random_box(kind, (BATCH, *shape), generator) for shape in self.shapes]
        return drawn, kind, generator

    def is_exact(self, kind: BoxKind) -> bool:
        """Whether nothing rounds: exact operators on dyadic data, or monotone ones on ends."""
        monotone = self.operator.traits.monotone and self.operator.traits.piecewise_linear
        return (self.exact and kind is BoxKind.DYADIC) or monotone

    def slack(
        self,
        box: Sequence[Interval],
        rows: Tensor | None = None,
        moved: PulledBack | None = None,
    ) -> Tensor | float:
        """Rounding of sums: ``ULPS`` units of the last place of the sum of all magnitudes."""
        reach = [torch.maximum(one.lower.abs(), one.upper.abs()) for one in box]
        magnitudes = {name: value.abs() for name, value in self.parameters.items()}
        largest = self.operator.value(self.node, reach, magnitudes).abs()
        unit = ULPS * 2.0**-52
        if rows is None or moved is None:
            return unit * (largest.max() + max(float(r.max()) for r in reach))
        total = (rows.abs() * largest.unsqueeze(1)).flatten(2).sum(-1)
        for part, one in zip(moved.inputs, reach, strict=True):
            total = total + (part.abs() * one.unsqueeze(1)).flatten(2).sum(-1)
        return unit * (total + (0.0 if moved.bias is None else moved.bias.abs()))

    def values(self, x: Sequence[Tensor]) -> Tensor:
        """Values (q, b, *shape) at points (q, b, *shape_i)."""
        y = self.operator.value(self.node, [one.flatten(0, 1) for one in x], self.parameters)
        return y.reshape(*x[0].shape[:2], *y.shape[1:])

    def gap(self, rows: Tensor, moved: PulledBack, x: Sequence[Tensor]) -> Tensor:
        """``rows . f(x) - sum_i inputs_i . x_i - bias`` at points (q, b, *shape_i), (q, b, s)."""
        gap = (rows * self.values(x).unsqueeze(2)).flatten(3).sum(-1)
        for part, one in zip(moved.inputs, x, strict=True):
            gap = gap - (part * one.unsqueeze(2)).flatten(3).sum(-1)
        return gap if moved.bias is None else gap - moved.bias

    def attack(
        self,
        rows: Tensor,
        moved: PulledBack,
        box: Sequence[Interval],
        start: Sequence[Tensor],
    ) -> list[Tensor]:
        """Points of the box that signed gradient steps on the gap lead to."""
        x = [one.clone() for one in start]
        for step in range(5):
            for one in x:
                one.requires_grad_(True)
            gap = self.gap(rows, moved, x).sum()
            gradients = torch.autograd.grad(gap, x, allow_unused=True)
            with torch.no_grad():
                x = [
                    (one if g is None else one - 0.5 ** (step + 1) * b.width * g.sign())
                    .clamp(b.lower, b.upper)
                    .detach()
                    for one, g, b in zip(x, gradients, box, strict=True)
                ]
        return x
