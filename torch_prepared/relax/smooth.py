"""Smooth activations: tanh, sigmoid (S-shaped), softplus, elu (convex)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax._base import AffinePair, ElementwiseOperator, Lines, Traits
from torch_prepared.relax._lines import (
    chord,
    convex_ceiling,
    s_shaped_ceiling,
    s_shaped_upper,
    tangent,
)
from torch_prepared.relax._registry import register

__all__ = ["ELU", "Sigmoid", "Softplus", "Tanh"]


class SmoothOperator(ElementwiseOperator):
    """An activation with a derivative."""

    parametric = True

    def slope(self, node: Node, x: Tensor) -> Tensor:
        """The first derivative, elementwise."""
        raise NotImplementedError


class SShaped(SmoothOperator):
    """Nondecreasing, convex left of 0, concave right of it, with finite limits ``limits``."""

    traits = Traits(monotone=True, inflections=(0.0,))
    limits: tuple[float, float]

    def curvature(self, node: Node, x: Tensor) -> Tensor:
        """The second derivative, elementwise."""
        raise NotImplementedError

    def affine(self, node: Node, box: Interval, alpha: Tensor | None = None) -> AffinePair:
        upper_slope, upper_offset = s_shaped_upper(
            lambda x: self.function(node, x),
            lambda x: self.slope(node, x),
            lambda x: self.curvature(node, x),
            box,
            alpha,
        )
        # x -> -f(-x) is S-shaped too: its upper line on [-u, -l] is our lower line, mirrored.
        lower_slope, lower_offset = s_shaped_upper(
            lambda x: -self.function(node, -x),
            lambda x: self.slope(node, -x),
            lambda x: -self.curvature(node, -x),
            Interval(-box.upper, -box.lower),
            alpha,
        )
        return AffinePair(lower_slope, -lower_offset, upper_slope, upper_offset)

    def enclosing_lines(self, node: Node, reference: Interval) -> tuple[Lines, Lines]:
        above = s_shaped_ceiling(
            lambda x: self.function(node, x),
            lambda x: self.slope(node, x),
            reference.upper,
        )
        slopes, offsets = s_shaped_ceiling(
            lambda x: -self.function(node, -x), lambda x: self.slope(node, -x), -reference.lower
        )
        return (slopes, -offsets), above

    def alpha_start(self, node: Node, box: Interval) -> Tensor:
        pure = (box.lower >= 0) | (box.upper <= 0)
        return torch.where(pure, 0.5, 0.0).to(box.lower.dtype)


@register
class Tanh(SShaped):
    """Hyperbolic tangent."""

    op = "tanh"
    limits = (-1.0, 1.0)

    def function(self, node: Node, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def slope(self, node: Node, x: Tensor) -> Tensor:
        return 1 - torch.tanh(x) ** 2

    def curvature(self, node: Node, x: Tensor) -> Tensor:
        y = torch.tanh(x)
        return -2 * y * (1 - y**2)


@register
class Sigmoid(SShaped):
    """Logistic function ``1 / (1 + exp(-x))``."""

    op = "sigmoid"
    limits = (0.0, 1.0)

    def function(self, node: Node, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def slope(self, node: Node, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * torch.sigmoid(-x)

    def curvature(self, node: Node, x: Tensor) -> Tensor:
        y = torch.sigmoid(x)
        return y * (1 - y) * (1 - 2 * y)


class Convex(SmoothOperator):
    """Convex and nondecreasing with slope in [0, 1]: chord above, tangent below.

    ``alpha`` places the tangent between the ends of the box; 1/2 by default.
    """

    traits = Traits(monotone=True, convex=True)

    def affine(self, node: Node, box: Interval, alpha: Tensor | None = None) -> AffinePair:
        f, slope = (lambda x: self.function(node, x)), (lambda x: self.slope(node, x))
        share = 0.5 if alpha is None else alpha
        lower_slope, lower_offset = tangent(f, slope, box.lower + share * box.width)
        upper_slope, upper_offset = chord(f, slope, box)
        return AffinePair(
            lower_slope,
            lower_offset,
            upper_slope.expand_as(lower_slope),
            upper_offset.expand_as(lower_slope),
        )

    def enclosing_lines(self, node: Node, reference: Interval) -> tuple[Lines, Lines]:
        f, slope = (lambda x: self.function(node, x)), (lambda x: self.slope(node, x))
        below = tangent(f, slope, reference.lower)
        above = convex_ceiling(f, reference.upper)
        return (below[0].unsqueeze(0), below[1].unsqueeze(0)), above

    def alpha_start(self, node: Node, box: Interval) -> Tensor:
        return torch.full_like(box.lower, 0.5)


@register
class Softplus(Convex):
    """``log(1 + exp(x))``, exact (no linearization above a threshold)."""

    op = "softplus"

    def function(self, node: Node, x: Tensor) -> Tensor:
        return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))

    def slope(self, node: Node, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


@register
class ELU(Convex):
    """``x`` right of zero, ``a (exp(x) - 1)`` left of it, with ``a = attrs["alpha"]`` in [0, 1]."""

    op = "elu"

    def function(self, node: Node, x: Tensor) -> Tensor:
        return F.elu(x, self._scale(node))

    def slope(self, node: Node, x: Tensor) -> Tensor:
        return torch.where(x > 0, torch.ones_like(x), self._scale(node) * torch.exp(x.clamp_max(0)))

    def _scale(self, node: Node) -> float:
        a = float(node.attrs["alpha"])  # type: ignore[arg-type]
        if not 0 <= a <= 1:
            raise UnsupportedOperationError(
                f"{node.name}: got ELU alpha {a}; expected one in [0, 1], where the function is "
                "convex"
            )
        return a
