"""Intervals that remember which slope below a backward pass alone would choose.

CROWN takes the slope below a kink by which end of the interval is farther from it. An end that
interval arithmetic makes a little tighter than the backward pass may turn that choice around, and
then the tighter interval gives looser rows later. With the choice of the backward pass and lines on
the tighter interval, each step is at least as tight as CROWN without intersections.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import ElementwiseOperator
from torch_prepared.relax._base import AffinePair
from torch_prepared.relax.relu import TwoPiece

__all__ = ["GuidedInterval", "default_lines", "default_start", "reaches_up"]


@dataclass(frozen=True)
class GuidedInterval(Interval):
    """An interval and, of the same shape, whether CROWN takes the steep slope below on it.

    Any choice gives valid lines, so operations that forget it (``map``, ``intersect``) cost
    tightness only.
    """

    steep: Tensor

    def __getitem__(self, index) -> GuidedInterval:  # type: ignore[no-untyped-def]
        return GuidedInterval(self.lower[index], self.upper[index], self.steep[index])


def reaches_up(box: Interval) -> Tensor:
    """Whether the upper end is farther from zero than the lower one."""
    return box.upper.detach() > -box.lower.detach()


def default_lines(operator: ElementwiseOperator, node: Node, box: Interval) -> AffinePair:
    """The operator's lines (b, n) on a box (b, *shape), with the slope below that it remembers."""
    flat = box.map(lambda end: end.flatten(1))
    if isinstance(box, GuidedInterval) and isinstance(operator, TwoPiece):
        return operator.affine(node, flat, box.steep.flatten(1).to(box.lower.dtype))
    return operator.lines(node, flat)


def default_start(operator: ElementwiseOperator, node: Node, box: Interval) -> Tensor:
    """The relaxation parameter (b, *shape) of :func:`default_lines`.

    Raises:
        UnsupportedOperationError: the operator has none.
    """
    if isinstance(box, GuidedInterval) and isinstance(operator, TwoPiece):
        return box.steep.to(box.lower.dtype)
    return operator.alpha_start(node, box)
