"""Max pooling: the one nonlinear operator here that mixes scalars."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax._base import Operator, Parameters, PulledBack, Traits
from torch_prepared.relax._registry import register
from torch_prepared.relax.conv import pad_values, window

__all__ = ["MaxPool", "pool_windows"]


def pool_windows(node: Node, shape: Sequence[int]) -> Tensor:
    """Flat input indices of each output's window, (m, k); -1 marks padding.

    ``shape`` is the input's shape (channels, length...) without the batch axis.
    """
    kernel, stride = window(node, "kernel"), window(node, "stride")
    dilation, padding = window(node, "dilation"), window(node, "padding")
    channels, d = shape[0], len(kernel)
    flat = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64).reshape(1, *shape)
    x = pad_values(flat + 1, padding)  # 0 marks padding until the shift back
    x = x if d == 2 else x.unsqueeze(2)
    pairs = (
        (kernel, stride, dilation)
        if d == 2
        else tuple((1, v[0]) for v in (kernel, stride, dilation))
    )
    columns = F.unfold(x, pairs[0], dilation=pairs[2], stride=pairs[1])
    count = columns.shape[1] // channels
    columns = columns.reshape(channels, count, -1).transpose(1, 2).reshape(-1, count)
    return columns.round().long()[: node.size] - 1


@register
class MaxPool(Operator):
    """Maximum over windows.

    Lower line: the window's scalar with the largest lower bound (any scalar is valid). Upper line:
    that scalar when it dominates all others on the box, else the constant ``max u``.
    """

    op = "max_pool"
    parametric = True
    traits = Traits(monotone=False, piecewise_linear=True)

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return self._pool(node, inputs[0])

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        return boxes[0].map(lambda end: self._pool(node, end))

    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        shape = boxes[0].lower.shape[1:]
        index = pool_windows(node, shape).to(rows.device)
        lower, upper = boxes[0].lower.flatten(1), boxes[0].upper.flatten(1)
        outside = index < 0
        lowers = lower[:, index.clamp_min(0)].masked_fill(outside, -torch.inf)  # (b, m, k)
        uppers = upper[:, index.clamp_min(0)].masked_fill(outside, -torch.inf)
        # Padding must not be chosen, not even among infinite lower ends.
        reach = lowers.clamp_min(torch.finfo(lowers.dtype).min).masked_fill(outside, -torch.inf)
        which = reach.argmax(dim=2)
        best = lowers.gather(2, which.unsqueeze(2)).squeeze(2)
        others = uppers.scatter(2, which.unsqueeze(2), -torch.inf).amax(dim=2)
        dominated = best >= others
        ceiling = uppers.amax(dim=2)
        chosen = torch.gather(index.expand(which.shape[0], -1, -1), 2, which.unsqueeze(2))[..., 0]
        flat = rows.flatten(2)
        positive, negative = flat.clamp_min(0), flat.clamp_max(0)
        moved = positive + negative * dominated.unsqueeze(1).to(flat.dtype)
        bias = (negative * torch.where(dominated, 0.0, ceiling).unsqueeze(1)).sum(dim=2)
        target = flat.new_zeros(*flat.shape[:2], lower.shape[1])
        target = target.scatter_add(2, chosen.unsqueeze(1).expand_as(moved), moved)
        return PulledBack((target.reshape(*rows.shape[:2], *shape),), bias)

    def _pool(self, node: Node, x: Tensor) -> Tensor:
        kernel = window(node, "kernel")
        pool = F.max_pool2d if len(kernel) == 2 else F.max_pool1d
        padded = pad_values(x, window(node, "padding"), fill=-torch.inf)
        return pool(padded, kernel, window(node, "stride"), 0, window(node, "dilation"))
