"""Elementwise intervals with the order of their ends enforced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.errors import SpecError

__all__ = ["Interval"]


@dataclass(frozen=True)
class Interval:
    """All tensors x with ``lower <= x <= upper`` elementwise; both of one shape.

    Construct with :meth:`checked` where the ends come from outside; the plain constructor
    trusts its caller and is what the inner loops use.
    """

    lower: Tensor
    upper: Tensor

    @classmethod
    def checked(cls, lower: Tensor, upper: Tensor, where: str = "interval") -> Interval:
        """The interval, or SpecError when an end is NaN or the ends are out of order."""
        if not bool((lower <= upper).all()):
            bad = int((~(lower <= upper)).flatten().nonzero()[0])
            raise SpecError(
                f"{where}: got lower {lower.flatten()[bad].item()!r} and upper "
                f"{upper.flatten()[bad].item()!r} at flat index {bad}; expected lower <= upper"
            )
        return cls(lower, upper)

    @classmethod
    def point(cls, value: Tensor) -> Interval:
        """The interval that holds ``value`` alone."""
        return cls(value, value)

    @property
    def center(self) -> Tensor:
        """Midpoints."""
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        """Half widths."""
        return (self.upper - self.lower) / 2

    @property
    def width(self) -> Tensor:
        """Full widths."""
        return self.upper - self.lower

    def intersect(self, other: Interval) -> Interval:
        """Common part. Rounding may cross ends of touching intervals: then both ends are kept."""
        lower = torch.maximum(self.lower, other.lower)
        upper = torch.minimum(self.upper, other.upper)
        crossed = lower > upper
        return Interval(
            torch.where(crossed, torch.minimum(lower, upper), lower),
            torch.where(crossed, torch.maximum(lower, upper), upper),
        )

    def map(self, transform) -> Interval:  # type: ignore[no-untyped-def]
        """Both ends through a shape-changing ``transform`` (reshape, gather, detach...)."""
        return Interval(transform(self.lower), transform(self.upper))

    def __getitem__(self, index) -> Interval:  # type: ignore[no-untyped-def]
        return Interval(self.lower[index], self.upper[index])
