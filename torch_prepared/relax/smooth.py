"""Smooth activations: tanh, sigmoid (S-shaped), softplus, elu (convex), gelu, silu (gated)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax._base import Lines, Parameters, Traits
from torch_prepared.relax._kernel import SmoothActivation
from torch_prepared.relax._lines import (
    convex_ceiling,
    gated_ceiling,
    gated_floor,
    s_shaped_ceiling,
)
from torch_prepared.relax._registry import register

__all__ = ["ELU", "Gelu", "Sigmoid", "Silu", "Softplus", "Tanh"]


class Monotone(SmoothActivation):
    """Nondecreasing: the image of an interval is that of its ends."""

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        ends = self.function(node, boxes[0].lower), self.function(node, boxes[0].upper)
        # Computed values of ends that nearly agree may come out in the wrong order.
        return Interval(torch.minimum(*ends), torch.maximum(*ends))


class SShaped(Monotone):
    """Nondecreasing, convex left of 0, concave right of it, with finite limits."""

    traits = Traits(monotone=True, inflections=(0.0,))

    def enclosing_lines(self, node: Node, reference: Interval) -> tuple[Lines, Lines]:
        facts = self.facts(node)
        above = s_shaped_ceiling(
            lambda x: facts.value(x)[0], lambda x: facts.derivative(x)[0], reference.upper
        )
        # x -> -f(-x) is S-shaped too: lines above it are lines below f, mirrored.
        slopes, offsets = s_shaped_ceiling(
            lambda x: -facts.value(-x)[0], lambda x: facts.derivative(-x)[0], -reference.lower
        )
        return (slopes, -offsets), above


@register
class Tanh(SShaped):
    """Hyperbolic tangent."""

    op = "tanh"

    def function(self, node: Node, x: Tensor) -> Tensor:
        return torch.tanh(x)


@register
class Sigmoid(SShaped):
    """Logistic function ``1 / (1 + exp(-x))``."""

    op = "sigmoid"

    def function(self, node: Node, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class Convex(Monotone):
    """Convex and nondecreasing with slope in [0, 1]: chord above, tangent below."""

    traits = Traits(monotone=True, convex=True)

    def enclosing_lines(self, node: Node, reference: Interval) -> tuple[Lines, Lines]:
        facts = self.facts(node)
        slope = facts.derivative(reference.lower)[0]
        offset = facts.value(reference.lower)[0] - slope * reference.lower
        above = convex_ceiling(lambda x: facts.value(x)[0], reference.upper)
        return (slope.unsqueeze(0), offset.unsqueeze(0)), above


@register
class Softplus(Convex):
    """``log(1 + exp(x))``, exact (no linearization above a threshold)."""

    op = "softplus"

    def function(self, node: Node, x: Tensor) -> Tensor:
        return x.clamp_min(0) + torch.log1p(torch.exp(-x.abs()))


@register
class ELU(Convex):
    """``x`` right of zero, ``a (exp(x) - 1)`` left of it, with ``a = attrs["alpha"]`` in [0, 1]."""

    op = "elu"

    def kind(self, node: Node) -> tuple[str, float]:
        a = float(node.attrs["alpha"])  # type: ignore[arg-type]
        if not 0 <= a <= 1:
            raise UnsupportedOperationError(
                f"{node.name}: got ELU alpha {a}; expected one in [0, 1], where the function is "
                "convex"
            )
        return self.op, a

    def function(self, node: Node, x: Tensor) -> Tensor:
        return F.elu(x, self.kind(node)[1])


class Valley(NamedTuple):
    """Where a gated function has its minimum, and where its slope is largest.

    ``bottom`` is the place and ``least`` the value of the minimum, both rounded to nearest;
    ``inflection`` is the positive place where convex turns concave.
    """

    bottom: float
    least: float
    inflection: float


class Gated(SmoothActivation):
    """``x g(x)`` with an S-shaped gate g from 0 to 1 and ``g(x) + g(-x) = 1``.

    Falls from 0 at minus infinity to a minimum left of 0, then rises and approaches x. Concave,
    convex between two inflections, concave.
    """

    traits = Traits(inflections=(-2.3993572805154675, -math.sqrt(2), math.sqrt(2), 2.4))

    def valley(self, node: Node) -> Valley:
        """Facts of the node's function."""
        raise NotImplementedError

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        """The larger value of the ends above; below the smaller one, or the minimum between."""
        bottom, least, _ = self.valley(node)
        (box,) = boxes
        ends = self.function(node, box.lower), self.function(node, box.upper)
        floor = torch.nextafter(ends[0].new_tensor(least), ends[0].new_tensor(-torch.inf))
        # The function is flat there, so rounding of the place does no harm; 1e-8 covers it.
        between = (box.lower <= bottom + 1e-8) & (box.upper >= bottom - 1e-8)
        return Interval(torch.where(between, floor, torch.minimum(*ends)), torch.maximum(*ends))

    def enclosing_lines(self, node: Node, reference: Interval) -> tuple[Lines, Lines]:
        facts, (bottom, least, inflection) = self.facts(node), self.valley(node)
        floor = math.nextafter(least, -math.inf)
        below = gated_floor(facts, inflection, bottom, floor, reference.lower)
        return below, gated_ceiling(facts, inflection, reference.upper)


@register
class Gelu(Gated):
    """``x Phi(x)`` with the normal distribution function, or PyTorch's form of it by tanh.

    ``attrs["approximate"]`` is "none" (the default) or "tanh".
    """

    op = "gelu"

    def kind(self, node: Node) -> tuple[str, float]:
        form = node.attrs.get("approximate", "none")
        if form not in ("none", "tanh"):
            raise UnsupportedOperationError(
                f"{node.name}: got gelu with approximate={form!r}; expected 'none' or 'tanh'"
            )
        return ("gelu" if form == "none" else "gelu_tanh"), 0.0

    def function(self, node: Node, x: Tensor) -> Tensor:
        # Both forms keep their relative accuracy on the left tail, unlike 1 + erf and 1 + tanh.
        near = x.clamp_min(-50.0)
        if self.kind(node)[0] == "gelu":
            return near * (0.5 * torch.erfc(-math.sqrt(0.5) * near))
        return near * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (near + 0.044715 * near**3))

    def valley(self, node: Node) -> Valley:
        if self.kind(node)[0] == "gelu":
            return Valley(-0.7517915246935645, -0.16997120747990366, math.sqrt(2))
        return Valley(-0.752461422071016, -0.17004075057125406, 1.4185040087908283)


@register
class Silu(Gated):
    """``x sigmoid(x)``."""

    op = "silu"

    def function(self, node: Node, x: Tensor) -> Tensor:
        return F.silu(x.clamp_min(-800.0))

    def valley(self, node: Node) -> Valley:
        return Valley(-1.278464542761074, -0.2784645427610738, 2.3993572805154675)
