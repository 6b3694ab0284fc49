"""Operators that move or add values: reshape, gather, concat, add, reduce_sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax._base import (
    AffineOperator,
    Parameters,
    PulledBack,
    StructuralOperator,
)
from torch_prepared.relax._registry import register

__all__ = ["Add", "Concat", "Gather", "ReduceSum", "Reshape"]


@register
class Reshape(StructuralOperator):
    """The same values in row-major order under another shape."""

    op = "reshape"

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return inputs[0].reshape(inputs[0].shape[0], *node.shape)

    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        return PulledBack((rows.reshape(*rows.shape[:2], *boxes[0].lower.shape[1:]),), None)


@register
class Gather(StructuralOperator):
    """Picks scalars by flat index: transpose, slice, split, expand and gather in one."""

    op = "gather"

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        picked = inputs[0].flatten(1)[:, _index(node, inputs[0].device)]
        return picked.reshape(inputs[0].shape[0], *node.shape)

    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        shape = boxes[0].lower.shape[1:]
        moved = rows.new_zeros(*rows.shape[:2], int(np.prod(shape)))
        moved = moved.index_add(2, _index(node, rows.device), rows.flatten(2))
        return PulledBack((moved.reshape(*rows.shape[:2], *shape),), None)


@register
class Concat(StructuralOperator):
    """Joins values along one axis."""

    op = "concat"

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return torch.cat(list(inputs), dim=int(node.attrs["axis"]) + 1)  # type: ignore[arg-type]

    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        axis = int(node.attrs["axis"])  # type: ignore[arg-type]
        sizes = [box.lower.shape[axis + 1] for box in boxes]
        return PulledBack(torch.split(rows, sizes, dim=axis + 2), None)


@register
class Add(AffineOperator):
    """Signed sum of values of one shape: residual connections and differences."""

    op = "add"

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        total = None
        for sign, x in zip(_signs(node), inputs, strict=True):
            term = x if sign > 0 else -x
            total = term if total is None else total + term
        return total  # type: ignore[return-value]

    def magnitude(self, node: Node, reach: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return torch.stack(list(reach)).sum(0)

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        signs = _signs(node)
        ordered = [
            b if s > 0 else Interval(-b.upper, -b.lower) for s, b in zip(signs, boxes, strict=True)
        ]
        lower, upper = ordered[0].lower, ordered[0].upper
        for box in ordered[1:]:
            lower, upper = lower + box.lower, upper + box.upper
        return Interval(lower, upper)

    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        return PulledBack(tuple(rows if s > 0 else -rows for s in _signs(node)), None)


@register
class ReduceSum(AffineOperator):
    """``scale * x.sum(axes)``: sums and means over whole axes."""

    op = "reduce_sum"

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        total: Tensor = inputs[0].sum(dim=[axis + 1 for axis in _axes(node)])
        total = total * float(node.attrs["scale"])  # type: ignore[arg-type]
        return total.reshape(total.shape[0], *node.shape)

    def magnitude(self, node: Node, reach: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return self.value(node, reach, parameters).abs()

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        ends = boxes[0].map(lambda end: self.value(node, [end], parameters))
        return ends if float(node.attrs["scale"]) >= 0 else Interval(ends.upper, ends.lower)  # type: ignore[arg-type]

    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        shape = boxes[0].lower.shape[1:]
        kept = [1 if axis in _axes(node) else size for axis, size in enumerate(shape)]
        spread = rows.reshape(*rows.shape[:2], *kept).expand(*rows.shape[:2], *shape)
        return PulledBack((spread * float(node.attrs["scale"]),), None)  # type: ignore[arg-type]


def _index(node: Node, device: torch.device) -> Tensor:
    index = np.asarray(node.attrs["index"], dtype=np.int64).reshape(-1)
    return torch.as_tensor(index, device=device)


def _signs(node: Node) -> tuple[int, ...]:
    return tuple(int(sign) for sign in node.attrs["signs"])  # type: ignore[union-attr]


def _axes(node: Node) -> tuple[int, ...]:
    return tuple(int(axis) for axis in node.attrs["axes"])  # type: ignore[union-attr]
