"""Affine layers: linear, scale, batch_norm."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax._base import AffineOperator, Parameters, PulledBack, absolute, dot
from torch_prepared.relax._registry import register

__all__ = ["BatchNorm", "Linear", "Scale"]


@register
class Linear(AffineOperator):
    """``x @ weight.T + bias`` over the last axis."""

    op = "linear"

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return F.linear(
            inputs[0], _required(node, "weight", parameters), node.read("bias", parameters)
        )

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        weight = _required(node, "weight", parameters)
        center = F.linear(boxes[0].center, weight, node.read("bias", parameters))
        radius = F.linear(boxes[0].radius, weight.abs())
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
        moved = rows @ _required(node, "weight", parameters)
        return PulledBack((moved,), None if bias is None else dot(rows, bias))

    def select(
        self, node: Node, index: Tensor, boxes: Sequence[Interval], parameters: Parameters
    ) -> PulledBack:
        if len(node.shape) != 1:
            return super().select(node, index, boxes, parameters)
        bias = node.read("bias", parameters)
        rows = _required(node, "weight", parameters)[index]
        return PulledBack((rows,), None if bias is None else bias[index])

    def matrices(
        self, node: Node, shapes: Sequence[tuple[int, ...]], parameters: Parameters
    ) -> tuple[sp.csr_matrix, ...]:
        weight = _required(node, "weight", parameters).detach().to("cpu", torch.float64).numpy()
        copies = int(np.prod(shapes[0][:-1], dtype=np.int64))
        matrix = sp.csr_matrix(weight)
        return (matrix if copies == 1 else sp.kron(sp.identity(copies), matrix, format="csr"),)


class ElementwiseAffine(AffineOperator):
    """``x * factor + shift`` with constants that broadcast against x."""

    def constants(self, node: Node, parameters: Parameters) -> tuple[Tensor | None, Tensor | None]:
        """``(factor, shift)``, each broadcastable against the value's shape, or None."""
        raise NotImplementedError

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        factor, shift = self.constants(node, parameters)
        x = inputs[0] if factor is None else inputs[0] * factor
        return x if shift is None else x + shift

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        ends = boxes[0].map(lambda end: self.value(node, [end], parameters))
        return Interval(
            torch.minimum(ends.lower, ends.upper), torch.maximum(ends.lower, ends.upper)
        )

    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        factor, shift = self.constants(node, parameters)
        moved = rows if factor is None else rows * factor
        return PulledBack((moved,), None if shift is None else dot(rows, shift))


@register
class Scale(ElementwiseAffine):
    """``x * scale + shift``."""

    op = "scale"

    def constants(self, node: Node, parameters: Parameters) -> tuple[Tensor | None, Tensor | None]:
        return node.read("scale", parameters), node.read("shift", parameters)


@register
class BatchNorm(ElementwiseAffine):
    """Batch normalization with stored statistics (evaluation mode), along the first axis."""

    op = "batch_norm"

    def magnitude(self, node: Node, reach: Sequence[Tensor], parameters: Parameters) -> Tensor:
        # The shift subtracts the mean: its size is that of a mean of the opposite sign.
        mean, variance = node.params["mean"].name, node.params["var"].name
        sizes = absolute(node, parameters)
        return self.value(
            node, reach, {**sizes, mean: -sizes[mean], variance: parameters[variance]}
        )

    def constants(self, node: Node, parameters: Parameters) -> tuple[Tensor | None, Tensor | None]:
        mean = _required(node, "mean", parameters)
        variance = _required(node, "var", parameters)
        weight, bias = node.read("weight", parameters), node.read("bias", parameters)
        factor = (variance + float(node.attrs["eps"])).rsqrt()  # type: ignore[arg-type]
        factor = factor if weight is None else factor * weight
        shift = -mean * factor if bias is None else bias - mean * factor
        along = (-1,) + (1,) * (len(node.shape) - 1)
        return factor.reshape(along), shift.reshape(along)


def _required(node: Node, role: str, parameters: Parameters) -> Tensor:
    return node.params[role].read(parameters)
