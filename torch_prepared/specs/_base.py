"""The one interface of every input region, and the rounding helpers the regions share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_prepared.certify import InputRecord
from torch_prepared.errors import SpecError

__all__ = ["InputSet", "RealVector", "add_up", "as_vector", "check_order", "subtract_down"]

RealVector = Tensor | np.ndarray | Sequence[float] | float

_EPS = 2.0**-53
_TINY = 2.0**-1022
_FLOAT32_DIGIT = 2.0**-23


class InputSet(ABC):
    r"""A non-empty compact convex region P of network inputs, flattened row-major to (n,).

    Everything is stored in float64 on the CPU; ``support`` works on the device of its argument.
    Subclasses are frozen dataclasses: file, constructor checks, five methods, and the suite in
    ``torch_prepared.testing.input_set`` inherited by a test class.

    Attributes:
        lower: float64 (n,), with ``upper`` the tightest box around the region (rounded outward).
        upper: float64 (n,).
    """

    lower: Tensor
    upper: Tensor

    @property
    def size(self) -> int:
        """Number n of scalars in one input."""
        return self.lower.numel()

    def contains(self, x: Tensor, *, rounding: bool = False) -> Tensor:
        """Which points lie in the region, judged on the float64 values as they are.

        Args:
            x: (b, n), or (b, ...) with n scalars per point; any floating dtype and device.
            rounding: also count points that the last digit of float32 alone keeps out of the
                region's box: a region with sides thinner than that has hardly any float32 points.

        Returns:
            bool (b,) on the CPU. A point with NaN or infinite entries is in no region.

        Raises:
            SpecError: the points do not have n scalars each.
        """
        points = x.detach().to("cpu", torch.float64)
        if points.dim() < 2 or points[0:1].numel() != self.size * min(len(points), 1):
            raise SpecError(
                f"{type(self).__name__}.contains: got points of shape {tuple(x.shape)}; expected "
                f"(b, {self.size}); add the batch axis or choose the region made for this network"
            )
        points = points.reshape(len(points), self.size)
        if rounding:
            nearest = torch.clamp(points, self.lower, self.upper)
            close = (points - nearest).abs() <= _FLOAT32_DIGIT * points.abs()
            points = torch.where(close, nearest, points)
        return self._contains(points) & torch.isfinite(points).all(dim=1)

    def support(self, rows: Tensor) -> Tensor:
        r"""Support function: for every row c at least :math:`\max_{x \in P} c \cdot x`.

        Args:
            rows: (..., n), floating, on any device that has float64.

        Returns:
            (...) in the dtype and on the device of ``rows``; differentiable in ``rows`` with a
            maximizer as gradient. NaN in a row gives NaN, never a number.

        Raises:
            SpecError: the rows do not have n entries or are not floating point.

        Soundness:
            Each class says whether its maximum is exact or an upper bound. It is evaluated in
            float64, an a-priori bound on the accumulated rounding (at most 2n + 64 operations per
            term) is added, and the sum is rounded upward to the dtype of ``rows``; so the result
            is an upper bound in exact reals for the rows as they are stored.
        """
        if not rows.is_floating_point() or rows.dim() == 0 or rows.shape[-1] != self.size:
            raise SpecError(
                f"{type(self).__name__}.support: got rows of shape {tuple(rows.shape)} and dtype "
                f"{rows.dtype}; expected floating (..., {self.size})"
            )
        with torch.autocast(rows.device.type, enabled=False):
            value, scale = self._support(rows.to(torch.float64))
            count = 2 * self.size + 64
            slack = scale.detach() * (count * _EPS / (1 - count * _EPS)) + count * _TINY
            return _round_up(value + slack, rows.dtype)

    @abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` points of the region: float64 (count, n) on the CPU, all contained."""

    @abstractmethod
    def corner(self, rows: Tensor) -> Tensor:
        """For every row of (..., n) a contained maximizer of it: float64 (..., n), rows' device.

        Where a maximizer is no float64 point, a contained point within rounding of one.
        """

    @abstractmethod
    def record(self) -> InputRecord:
        """What the independent checker sees: plain NumPy copies."""

    @abstractmethod
    def _contains(self, points: Tensor) -> Tensor:
        """Membership of float64 points (b, n): bool (b,)."""

    @abstractmethod
    def _support(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Value (...) for float64 rows, and the sum of the magnitudes of the added terms."""


def as_vector(value: RealVector, name: str) -> Tensor:
    """A private float64 CPU copy of ``value``, flattened row-major.

    Raises:
        SpecError: no entries, not real numbers, or an entry that is NaN or infinite.
    """
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"{name}: got {type(value).__name__}; expected real numbers") from error
    vector = tensor.reshape(-1).clone()
    if vector.numel() == 0:
        raise SpecError(f"{name}: got an empty tensor; expected at least one number")
    bad = ~torch.isfinite(vector)
    if bool(bad.any()):
        index = int(bad.nonzero()[0, 0])
        raise SpecError(f"{name}: got {float(vector[index])} at index {index}; expected a number")
    return vector


def check_order(lower: Tensor, upper: Tensor, name: str) -> None:
    """Refuse boxes whose sides differ in length or cross.

    Raises:
        SpecError: naming the first index at which ``lower > upper``.
    """
    if lower.numel() != upper.numel():
        raise SpecError(
            f"{name}: got {lower.numel()} lower and {upper.numel()} upper bounds; expected equally "
            "many"
        )
    crossed = ~(lower <= upper)
    if bool(crossed.any()):
        index = int(crossed.nonzero()[0, 0])
        raise SpecError(
            f"{name}: got lower {float(lower[index])!r} > upper {float(upper[index])!r} at index "
            f"{index}; expected lower <= upper; the region would be empty"
        )


def add_up(a: Tensor, b: Tensor) -> Tensor:
    """The smallest float64 at or above a + b, elementwise; exact sums stay as they are."""
    total, error = _two_sum(a, b)
    return torch.where(error > 0, torch.nextafter(total, torch.full_like(total, torch.inf)), total)


def subtract_down(a: Tensor, b: Tensor) -> Tensor:
    """The largest float64 at or below a - b, elementwise; exact differences stay as they are."""
    return -add_up(-a, b)


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rounded sum and its exact error (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in another dtype, never below itself; the gradient passes unchanged."""
    if value.dtype == dtype:
        return value
    info = torch.finfo(dtype)
    rounded = value.clamp(min=info.min).to(dtype)
    with torch.no_grad():
        shift = (2 * info.eps * value.abs() + info.tiny).to(dtype)
        shift = torch.where(rounded.to(value.dtype) < value, shift, torch.zeros_like(shift))
    return rounded + shift
