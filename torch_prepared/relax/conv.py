"""Convolution and average pooling, kept as convolutions in every direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax._base import AffineOperator, Parameters, PulledBack, per_row
from torch_prepared.relax._registry import register

__all__ = ["AvgPool", "Conv", "pad_values", "window"]


def window(node: Node, key: str) -> tuple[int, ...]:
    """An integer-tuple attribute (stride, padding, ...)."""
    return tuple(int(v) for v in node.attrs[key])  # type: ignore[union-attr]


def pad_values(x: Tensor, padding: tuple[int, ...], fill: float = 0.0) -> Tensor:
    """Pad the trailing axes; ``padding`` lists begins, then ends."""
    if not any(padding):
        return x
    d = len(padding) // 2
    pairs = [p for axis in reversed(range(d)) for p in (padding[axis], padding[axis + d])]
    return F.pad(x, pairs, value=fill)


def transpose_conv(
    rows: Tensor,
    weight: Tensor,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Transpose of the convolution: rows (r, o, *out) -> (r, i, *shape)."""
    d = len(stride)
    begins, ends = padding[:d], padding[d:]
    padded = [shape[a] + begins[a] + ends[a] for a in range(d)]
    reach = [
        (rows.shape[2 + a] - 1) * stride[a] + (weight.shape[2 + a] - 1) * dilation[a] + 1
        for a in range(d)
    ]
    function = F.conv_transpose2d if d == 2 else F.conv_transpose1d
    extra = [padded[a] - reach[a] for a in range(d)]
    fits = all(0 <= e < max(stride[a], dilation[a]) for a, e in enumerate(extra))
    output_padding = extra if fits else [0] * d
    full = function(rows, weight, None, stride, [0] * d, output_padding, groups, dilation)
    if not fits:  # inputs beyond the last window are never read: their rows are zero
        pairs = [p for a in reversed(range(d)) for p in (0, extra[a])]
        full = F.pad(full, pairs)
    inside = (slice(begins[a], begins[a] + shape[a]) for a in range(d))
    return full[(slice(None), slice(None), *inside)]


@register
class Conv(AffineOperator):
    """1-d and 2-d cross-correlation with stride, padding, dilation and groups."""

    op = "conv"

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return self._conv(
            node, inputs[0], self._weight(node, parameters), node.read("bias", parameters)
        )

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        weight = self._weight(node, parameters)
        center = self._conv(node, boxes[0].center, weight, node.read("bias", parameters))
        radius = self._conv(node, boxes[0].radius, weight.abs(), None)
        return Interval(center - radius, center + radius)

    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        bias = node.read("bias", parameters)
        shape = tuple(boxes[0].lower.shape[1:])
        moved = transpose_conv(
            per_row(rows),
            self._weight(node, parameters),
            shape[1:],
            window(node, "stride"),
            window(node, "padding"),
            window(node, "dilation"),
            int(node.attrs["groups"]),  # type: ignore[arg-type]
        )
        shift = None
        if bias is not None:
            shift = rows.sum(dim=tuple(range(3, rows.dim()))) @ bias
        return PulledBack((moved.reshape(*rows.shape[:2], *shape),), shift)

    def _weight(self, node: Node, parameters: Parameters) -> Tensor:
        return node.params["weight"].read(parameters)

    def _conv(self, node: Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding, d = window(node, "padding"), len(window(node, "stride"))
        symmetric = padding[:d] == padding[d:]
        function = F.conv2d if d == 2 else F.conv1d
        return function(
            x if symmetric else pad_values(x, padding),
            weight,
            bias,
            window(node, "stride"),
            padding[:d] if symmetric else (0,) * d,
            window(node, "dilation"),
            int(node.attrs["groups"]),  # type: ignore[arg-type]
        )


@register
class AvgPool(AffineOperator):
    """Average pooling: a depthwise convolution with constant weights."""

    op = "avg_pool"

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        padding, kernel = window(node, "padding"), window(node, "kernel")
        d = len(kernel)
        pool = F.avg_pool2d if d == 2 else F.avg_pool1d
        x = pad_values(inputs[0], padding)
        means = pool(x, kernel, window(node, "stride"))
        return means * self._correction(node, inputs[0].shape[2:], means)

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        return boxes[0].map(lambda end: self.value(node, [end], parameters))

    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        shape = tuple(boxes[0].lower.shape[1:])
        kernel = window(node, "kernel")
        flat = per_row(rows)
        flat = flat * self._correction(node, shape[1:], flat)
        size = 1
        for k in kernel:
            size *= k
        weight = torch.full(
            (shape[0], 1, *kernel), 1.0 / size, dtype=rows.dtype, device=rows.device
        )
        moved = transpose_conv(
            flat, weight, shape[1:], window(node, "stride"), window(node, "padding"),
            (1,) * len(kernel), shape[0],
        )  # fmt: skip
        return PulledBack((moved.reshape(*rows.shape[:2], *shape),), None)

    def _correction(self, node: Node, shape: Sequence[int], like: Tensor) -> Tensor:
        """Factor that undoes counting padded zeros, one per output position."""
        padding, kernel = window(node, "padding"), window(node, "kernel")
        if not any(padding) or bool(node.attrs["count_include_pad"]):
            return like.new_ones(())
        pool = F.avg_pool2d if len(kernel) == 2 else F.avg_pool1d
        ones = pad_values(like.new_ones(1, 1, *shape), padding)
        return 1.0 / pool(ones, kernel, window(node, "stride"))
