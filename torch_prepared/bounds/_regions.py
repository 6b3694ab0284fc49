"""A batch of input sets in the form the bound engine uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.core.interval import Interval
from torch_prepared.core.rounding import outward
from torch_prepared.errors import SpecError
from torch_prepared.specs import Box, InputSet

__all__ = ["RegionBatch"]


@dataclass(frozen=True)
class RegionBatch:
    """``b`` input sets: their bounding boxes (b, n) and, unless all are boxes, the sets.

    Soundness: boxes given in float64 are rounded outward to the dtype computed in.
    """

    lower: Tensor
    upper: Tensor
    sets: tuple[InputSet, ...] | None = None

    @classmethod
    def of(
        cls,
        sets: InputSet | Sequence[InputSet],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> RegionBatch:
        """The batch of the given sets, all of one size."""
        many = (sets,) if isinstance(sets, InputSet) else tuple(sets)
        if len({s.size for s in many}) != 1:
            raise SpecError(
                f"regions: got sizes {sorted({s.size for s in many})}; expected one common size "
                "and at least one region"
            )
        box = outward(
            torch.stack([s.lower for s in many]), torch.stack([s.upper for s in many]), dtype
        )
        plain = all(isinstance(s, Box) for s in many)
        return cls(box.lower.to(device), box.upper.to(device), None if plain else many)

    @property
    def box(self) -> Interval:
        """Bounding boxes, (b, n)."""
        return Interval(self.lower, self.upper)

    @property
    def is_box(self) -> bool:
        """Whether every region equals its bounding box."""
        return self.sets is None

    def __len__(self) -> int:
        return self.lower.shape[0]

    def __getitem__(self, index: slice) -> RegionBatch:
        sets = None if self.sets is None else self.sets[index]
        return RegionBatch(self.lower[index], self.upper[index], sets)

    def minimum(self, rows: Tensor) -> Tensor:
        """``min over region i of rows[i] . x``: rows (b, s, n) to (b, s)."""
        by_box = ops.concretize(rows, self.box.center, self.box.radius)
        if self.sets is None:
            return by_box
        exact = torch.stack([-s.support(-r) for s, r in zip(self.sets, rows, strict=True)])
        return torch.maximum(by_box, exact)
