"""Piecewise linear activations: relu, leaky_relu."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_prepared import ops
from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax._base import AffinePair, Lines, Traits
from torch_prepared.relax._kernel import KernelActivation
from torch_prepared.relax._registry import register

__all__ = ["LeakyReLU", "ReLU"]


class TwoPiece(KernelActivation):
    """``max(x, a x)`` with ``0 <= a <= 1``: convex, one kink at zero.

    Upper line: the chord. Lower line: any slope in [a, 1] through the origin; by default the one
    of smaller area, ``1`` where ``ops.leans_up(l, u)`` and ``a`` elsewhere.

    Source: Zhang et al., CROWN (NeurIPS 2018), adaptive lower slope.
    """

    traits = Traits(monotone=True, convex=True, piecewise_linear=True)

    def small_slope(self, node: Node) -> float:
        """The slope ``a`` left of zero."""
        return 0.0

    def function(self, node: Node, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.small_slope(node))

    def kind(self, node: Node) -> tuple[str, float]:
        return "leaky_relu", self.small_slope(node)

    def affine(self, node: Node, box: Interval, alpha: Tensor | None = None) -> AffinePair:
        kind, a = self.kind(node)
        slope, offset, *above = ops.activation_lines(box.lower, box.upper, kind, a)
        # The line below is piecewise constant in the box, so no gradient needs to pass it.
        pair = AffinePair(slope.detach(), offset.detach(), *above)
        if alpha is None:
            return pair
        # One upper line serves the lower lines of all rows.
        free = a + (1 - a) * alpha
        return pair._replace(lower_slope=torch.where(self.stable(box), pair.lower_slope, free))

    def alpha_start(self, node: Node, box: Interval) -> Tensor:
        return ops.leans_up(box.lower, box.upper).to(box.lower.dtype)

    def enclosing_lines(self, node: Node, reference: Interval) -> tuple[Lines, Lines]:
        zero, one = torch.zeros_like(reference.lower), torch.ones_like(reference.lower)
        a = self.small_slope(node)
        above = torch.stack([one, a * one]), torch.stack([zero, zero])
        active = torch.where(reference.lower >= 0, one, a * one).unsqueeze(0)
        return (active, torch.zeros_like(active)), above

    def stable(self, box: Interval) -> Tensor:
        """Where the function is affine on the box, so tighter input bounds cannot help."""
        return (box.lower >= 0) | (box.upper <= 0)


@register
class ReLU(TwoPiece):
    """``max(x, 0)``."""

    op = "relu"
    parametric = True

    def function(self, node: Node, x: Tensor) -> Tensor:
        return torch.relu(x)


@register
class LeakyReLU(TwoPiece):
    """``max(x, a x)`` with ``a = attrs["alpha"]`` in [0, 1]."""

    op = "leaky_relu"
    parametric = True

    def small_slope(self, node: Node) -> float:
        a = float(node.attrs["alpha"])  # type: ignore[arg-type]
        if not 0 <= a <= 1:
            raise UnsupportedOperationError(
                f"{node.name}: got negative slope {a}; expected one in [0, 1], where the "
                "function is convex"
            )
        return a
