"""Axis-aligned boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.certify import InputRecord
from torch_prepared.errors import SpecError
from torch_prepared.specs._base import InputSet, RealVector, as_vector, check_order

__all__ = ["Box", "box_support", "sample_box"]


@dataclass(frozen=True, eq=False, init=False)
class Box(InputSet):
    r"""All x with ``lower <= x <= upper`` in every coordinate.

    Args:
        lower: any shape, n scalars, finite; stored flattened row-major in float64.
        upper: as many scalars.

    Raises:
        SpecError: NaN or infinite entries, unequal sizes, or lower > upper.

    Soundness:
        ``contains`` is exact; ``support`` is exact up to the outward rounding that every
        region's support function adds.

    Example:
        >>> import torch
        >>> box = Box([0.0, -1.0], [1.0, 1.0])
        >>> round(float(box.support(torch.tensor([1.0, 2.0]).double())), 6)
        3.0
    """

    lower: Tensor
    upper: Tensor

    def __init__(self, lower: RealVector, upper: RealVector) -> None:
        """Check and store the sides."""
        low, high = as_vector(lower, "Box lower"), as_vector(upper, "Box upper")
        check_order(low, high, "Box")
        object.__setattr__(self, "lower", low)
        object.__setattr__(self, "upper", high)

    def split(self, dim: int, value: float) -> tuple[Box, Box]:
        """The closed halves ``x[dim] <= value`` and ``x[dim] >= value``; together the box.

        Raises:
            SpecError: no such coordinate, or ``value`` outside of its interval.
        """
        if not 0 <= dim < self.size:
            raise SpecError(f"Box.split: got dim {dim}; expected 0 to {self.size - 1}")
        if not float(self.lower[dim]) <= value <= float(self.upper[dim]):
            raise SpecError(
                f"Box.split: got value {value} for dim {dim}; expected one in "
                f"[{float(self.lower[dim])}, {float(self.upper[dim])}]"
            )
        left, right = self.upper.clone(), self.lower.clone()
        left[dim] = right[dim] = value
        return Box(self.lower, left), Box(right, self.upper)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw uniformly; see :meth:`InputSet.sample`."""
        return sample_box(self.lower, self.upper, count, generator)

    def corner(self, rows: Tensor) -> Tensor:
        """An exact maximizer: the upper end where the entry is >= 0, else the lower end."""
        return torch.where(rows >= 0, self.upper.to(rows.device), self.lower.to(rows.device))

    def record(self) -> InputRecord:
        """Kind ``"box"``."""
        return InputRecord("box", self.lower.numpy().copy(), self.upper.numpy().copy())

    def _contains(self, points: Tensor) -> Tensor:
        return ((points >= self.lower) & (points <= self.upper)).all(dim=1)

    def _support(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return box_support(rows, self.lower, self.upper)


def box_support(rows: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """``rows @ center + |rows| @ radius``, and the magnitude of its terms for the error bound.

    The center form has a subgradient inside the box also where an entry of a row is zero. The
    rounding of center and radius is relative to ``max(|lower|, |upper|)``, hence in the bound.
    """
    low, high = lower.to(rows.device), upper.to(rows.device)
    magnitude = torch.maximum(low.abs(), high.abs())
    size = rows.abs()
    value = rows @ (low / 2 + high / 2) + size @ (high / 2 - low / 2)
    return value, 4 * (size.detach() @ magnitude)


def sample_box(lower: Tensor, upper: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Uniform points of a box, float64 (count, n); safe for ends of opposite huge size."""
    share = torch.rand(count, lower.numel(), generator=generator, dtype=torch.float64)
    return torch.clamp(lower * (1 - share) + upper * share, lower, upper)
