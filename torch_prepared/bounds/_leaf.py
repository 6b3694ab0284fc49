"""What bounds the boxes of a branch and bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from torch_prepared.core.interval import Interval

__all__ = ["LeafBounds", "LeafEngine"]


@dataclass(frozen=True)
class LeafBounds:
    """Bounds of output rows over boxes: ``values`` (b, s) and the input rows (b, s, n) behind."""

    values: Tensor
    inputs: Tensor

    def influence(self, row: Tensor) -> Tensor:
        """How much (b, n), by estimate, one row (b,) of each box changes per unit of each input."""
        return self.inputs[torch.arange(len(row)), row].abs()


class LeafEngine(Protocol):
    """Bounds every output row of one property over each of a batch of boxes (b, n)."""

    def __call__(self, box: Interval, /) -> LeafBounds:
        """Bounds with the engine's own relaxations."""
