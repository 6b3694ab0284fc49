"""What bounds the boxes of a branch and bound: a quick engine, and one with slopes to optimize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from torch_prepared.core.interval import Interval

if TYPE_CHECKING:
    from torch_prepared.bounds.shared_slopes import SharedSlopes

__all__ = ["LeafBounds", "LeafEngine", "SlopedEngine"]


@dataclass(frozen=True)
class LeafBounds:
    """Bounds of output rows over boxes: ``values`` (b, s) and the input rows (b, s, n) behind."""

    values: Tensor
    inputs: Tensor


class LeafEngine(Protocol):
    """Bounds every output row of one property over each of a batch of boxes (b, n)."""

    def __call__(self, box: Interval, /) -> LeafBounds:
        """Bounds with the engine's own relaxations."""


@dataclass(frozen=True)
class SlopedEngine:
    """A quick engine, and a slower one for boxes that have slopes of their own.

    Args:
        plain: with the usual slopes.
        slopes: with given ones, which it also optimizes.
    """

    plain: LeafEngine
    slopes: SharedSlopes

    def __call__(self, box: Interval, /) -> LeafBounds:
        """Bounds with the usual slopes."""
        return self.plain(box)
