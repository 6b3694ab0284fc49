"""Activations whose lines come from the one statement of them, the fused operator.

``ops.activation_lines`` states which line is taken on which interval, for every activation here, on
CPU and GPU, with gradients; its plain-torch twin is the oracle in its tests. Nothing in this
package repeats that. What lives here besides is what the operator does not say: values, intervals
and lines for unknown bounds.
"""

from __future__ import annotations

from torch import Tensor

from torch_prepared import ops
from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax._base import AffinePair, ElementwiseOperator

__all__ = ["KernelActivation", "SmoothActivation"]


class KernelActivation(ElementwiseOperator):
    """An activation that ``ops.activation_coefficients`` knows."""

    def kind(self, node: Node) -> tuple[str, float]:
        """The operator's ``kind`` and ``param``."""
        return self.op, 0.0

    def lines(self, node: Node, box: Interval, alpha: Tensor | None = None) -> AffinePair:
        """:meth:`affine`; the operator gives NaN where the box holds NaN."""
        return self.affine(node, box, alpha)


class SmoothActivation(KernelActivation):
    """An activation with a derivative: ``alpha`` places the tangent points of both lines.

    0 is the lower end of the box, 1 the upper end; the operator moves the point into the range
    whose tangents are valid. By default it is the midpoint, so that the area between the lines is
    small.

    Source: Zhang et al., "Efficient Neural Network Robustness Certification with General
    Activation Functions" (NeurIPS 2018), the tangent rule of section 3.3.
    """

    parametric = True

    def affine(self, node: Node, box: Interval, alpha: Tensor | None = None) -> AffinePair:
        kind, param = self.kind(node)
        return AffinePair(*ops.activation_lines(box.lower, box.upper, kind, param, alpha))

    def alpha_start(self, node: Node, box: Interval) -> Tensor:
        return box.lower.new_full(box.lower.shape, 0.5)

    def facts(self, node: Node) -> ops.Smooth:
        """Value and derivatives in float64."""
        return ops.smooth_function(*self.kind(node))
