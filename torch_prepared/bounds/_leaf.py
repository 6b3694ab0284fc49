"""What bounds the boxes of a branch and bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from torch_prepared.core.interval import Interval

__all__ = ["LeafBounds", "LeafEngine"]


@dataclass(frozen=True)
class LeafBounds:
    """Bounds of output rows over boxes: ``values`` (b, s) and the input rows (b, s, n) behind."""

    values: Tensor
    inputs: Tensor


class LeafEngine(Protocol):
    """Bounds every output row of one property over each of a batch of boxes (b, n)."""

    def __call__(self, box: Interval, /) -> LeafBounds:
        """Bounds with the engine's own relaxations."""
