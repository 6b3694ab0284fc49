"""Norm balls, clipped to a box."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_prepared.certify import InputRecord
from torch_prepared.errors import SpecError
from torch_prepared.specs._base import (
    InputSet,
    RealVector,
    add_up,
    as_vector,
    check_order,
    subtract_down,
)
from torch_prepared.specs.box import box_support, sample_box

__all__ = ["LpBall"]

_BISECTIONS = 50


@dataclass(frozen=True, eq=False, init=False)
class LpBall(InputSet):
    r"""All x with :math:`\|x - c\|_p \le r` and ``lower <= x <= upper``.

    Args:
        center: any shape, n scalars, finite; stored flattened row-major in float64.
        radius: finite, >= 0, in the unit of the inputs.
        p: 1, 2 or ``math.inf``.
        lower: clips the ball from below; n scalars (finite) or None. Once constructed, ``lower``
            and ``upper`` are the tightest box around the clipped ball, which describes the same
            set.
        upper: clips the ball from above.

    Raises:
        SpecError: malformed numbers, another p, or a ball that misses the clipping box.

    Soundness:
        ``contains`` is exact: points within rounding of the surface are decided in integers.
        ``support`` for p = inf is that of the box. For p = 1 and 2 it is exact when the clip does
        not touch the ball's box, and otherwise the Lagrangian dual
        :math:`\min_t \max_{l \le x \le u} c \cdot x + t\,(r - \|x - c_0\|)` (squares and t/2 for
        p = 2) at a t found by bisection: every t >= 0 gives an upper bound (weak duality), the
        optimal one the maximum, because the problem is convex.
    """

    center: Tensor
    radius: float
    p: float
    lower: Tensor
    upper: Tensor
    _touches_clip: bool = field(init=False, repr=False)

    def __init__(
        self,
        center: RealVector,
        radius: float,
        p: float,
        lower: RealVector | None = None,
        upper: RealVector | None = None,
    ) -> None:
        """Check the numbers, store them, and shrink the box to the clipped ball."""
        middle = as_vector(center, "LpBall center")
        if not 0 <= radius < math.inf:
            raise SpecError(f"LpBall: got radius {radius}; expected a finite number >= 0")
        if p not in (1, 2, math.inf):
            raise SpecError(f"LpBall: got p = {p}; expected 1, 2 or math.inf")
        no_clip = torch.full_like(middle, math.inf)
        low = -no_clip if lower is None else as_vector(lower, "LpBall lower")
        high = no_clip if upper is None else as_vector(upper, "LpBall upper")
        check_order(low, high, "LpBall")
        if low.numel() != middle.numel():
            raise SpecError(
                f"LpBall: got {middle.numel()} center and {low.numel()} clip entries; expected "
                "equally many"
            )
        object.__setattr__(self, "center", middle)
        object.__setattr__(self, "radius", float(radius))
        object.__setattr__(self, "p", float(p))
        reach = torch.full_like(middle, float(radius))
        ball_low, ball_high = subtract_down(middle, reach), add_up(middle, reach)
        touches = bool(((low > ball_low) | (high < ball_high)).any())
        object.__setattr__(self, "_touches_clip", touches)
        object.__setattr__(self, "lower", torch.maximum(low, ball_low))
        object.__setattr__(self, "upper", torch.minimum(high, ball_high))
        self._refuse_empty_or_infinite(low, high)
        self._tighten()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Points uniform in the ball, those outside the clip moved inside; all contained."""
        if self.p == math.inf:
            return self._pull_inside(sample_box(self.lower, self.upper, count, generator))
        shape = (count, self.size)
        if self.p == 2:
            raw = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            first, second = torch.rand((2, *shape), generator=generator, dtype=torch.float64)
            raw = torch.log1p(-first) - torch.log1p(-second)
        norms = torch.linalg.vector_norm(raw, self.p, dim=1, keepdim=True).clamp(min=1e-300)
        length = torch.rand((count, 1), generator=generator, dtype=torch.float64)
        points = self.center + raw / norms * (self.radius * length ** (1 / self.size))
        return self._pull_inside(torch.clamp(points, self.lower, self.upper))

    def corner(self, rows: Tensor) -> Tensor:
        """A contained maximizer up to rounding; see :meth:`InputSet.corner`."""
        flat = rows.detach().to(torch.float64).reshape(-1, self.size)
        if self.p == math.inf or self.radius == 0:
            points = torch.where(flat >= 0, self.upper.to(flat), self.lower.to(flat))
        else:
            points, _ = self._saddle_point(flat)
        return self._pull_inside(points.cpu()).reshape(rows.shape).to(rows.device)

    def record(self) -> InputRecord:
        """Kind ``"lp_ball"``: center, radius, p and the tightest box."""
        return InputRecord(
            "lp_ball",
            self.lower.numpy().copy(),
            self.upper.numpy().copy(),
            center=self.center.numpy().copy(),
            radius=self.radius,
            p=self.p,
        )

    @property
    def _anchor(self) -> Tensor:
        """The point of the box nearest to the center; contained, as the set is not empty."""
        return torch.clamp(self.center, self.lower, self.upper)

    def _refuse_empty_or_infinite(self, low: Tensor, high: Tensor) -> None:
        finite = torch.isfinite(self.lower) & torch.isfinite(self.upper)
        if not bool(finite.all()):
            index = int((~finite).nonzero()[0, 0])
            raise SpecError(f"LpBall: center and radius overflow float64 at index {index}")
        nearest = torch.clamp(self.center, low, high)
        if not self._exactly_inside(nearest):
            index = int((nearest - self.center).abs().argmax())
            raise SpecError(
                f"LpBall: the ball of radius {self.radius} does not meet its clipping box "
                f"(farthest at index {index}); expected a region that is not empty"
            )

    def _tighten(self) -> None:
        """Shrink the box where the clip pushes the center's nearest point off the center."""
        gap = (self._anchor - self.center).abs()
        if self.p == math.inf or not bool(gap.any()):
            return
        power = (gap / self.radius) ** self.p
        rounding = 8 * (self.size + 8) * 2.0**-53
        share = (1 - (power.sum() - power) + rounding).clamp(0, 1) ** (1 / self.p)
        reach = self.radius * share * (1 + 2.0**-50)
        low = torch.maximum(self.lower, subtract_down(self.center, reach))
        high = torch.minimum(self.upper, add_up(self.center, reach))
        object.__setattr__(self, "lower", low)
        object.__setattr__(self, "upper", high)

    def _contains(self, points: Tensor) -> Tensor:
        inside = ((points >= self.lower) & (points <= self.upper)).all(dim=1)
        if self.radius == 0:
            return inside & (points == self.center).all(dim=1)
        norm: Tensor = torch.linalg.vector_norm((points - self.center) / self.radius, self.p, dim=1)
        rounding = 4 * (self.size + 16) * 2.0**-53
        surely = norm * (1 + rounding) + 2.0**-500 <= 1
        possibly = ~(norm * (1 - rounding) > 1)
        for index in (inside & possibly & ~surely).nonzero()[:, 0].tolist():
            inside[index] = self._exactly_inside(points[index])
        return inside & possibly

    def _exactly_inside(self, point: Tensor) -> bool:
        """Whether the norm of ``point - center`` is at most the radius, in integers."""
        values: list[float] = [*point.tolist(), *self.center.tolist(), self.radius]
        if not all(map(math.isfinite, values)):
            return False
        ratios = [value.as_integer_ratio() for value in values]
        unit = max(denominator for _, denominator in ratios)
        scaled: list[int] = [numerator * (unit // denominator) for numerator, denominator in ratios]
        radius = scaled.pop()
        offsets = [
            abs(a - b) for a, b in zip(scaled[: self.size], scaled[self.size :], strict=True)
        ]
        if self.p == 1:
            return sum(offsets) <= radius
        if self.p == 2:
            return sum(offset * offset for offset in offsets) <= radius * radius
        return max(offsets) <= radius

    def _pull_inside(self, points: Tensor) -> Tensor:
        """Move points that are not contained toward the anchor, ever faster, until they are."""
        for factor in (*(1 - 2.0**-k for k in range(46, 0, -1)), *[0.5] * 40, 0.0):
            outside = ~self._contains(points)
            if not bool(outside.any()):
                break
            moved = self._anchor + factor * (points[outside] - self._anchor)
            points = points.clone()
            points[outside] = torch.clamp(moved, self.lower, self.upper)
        return points

    def _support(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        boxed, scale = box_support(rows, self.lower, self.upper)
        if self.p == math.inf or self.radius == 0:
            return boxed, scale
        if not self._touches_clip:
            center = self.center.to(rows.device)
            reach = self.radius * (rows.abs().amax(-1) if self.p == 1 else _length(rows))
            return rows @ center + reach, rows.detach().abs() @ center.abs() + 2 * reach.detach()
        with torch.no_grad():
            saddle, multiplier = self._saddle_point(rows.reshape(-1, self.size))
            dual, added = self._lagrangian(rows, multiplier.reshape(rows.shape[:-1]))
            # The error bounds differ, so the smaller of two bounds that already hold is chosen.
            rounding = (2 * self.size + 64) * 2.0**-52
            better = torch.isfinite(dual) & (dual + rounding * added <= boxed + rounding * scale)
        # The value is the dual's, the gradient the maximizer.
        dual = dual + ((rows - rows.detach()) * saddle.reshape(rows.shape)).sum(-1)
        return torch.where(better, dual, boxed), torch.where(better, added, scale)

    def _lagrangian(self, rows: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
        """The dual function (...) at multipliers (...) >= 0, and the magnitude of its terms."""
        center = self.center.to(rows.device)
        x = self._maximizer(rows, multiplier)
        share, size = (x - center).abs() / self.radius, x.abs() + center.abs()
        if self.p == 1:
            penalty, used = self.radius * multiplier, share.sum(-1)
        else:
            penalty, used = self.radius * multiplier / 2, (share * share).sum(-1)
        # Rounding of x and of x - center moves the penalty by share * size and size ** 2.
        relative = size / self.radius
        moved = (relative * (1 + 2 * share) + 2.0**-50 * relative * relative).sum(-1)
        added = (rows.abs() * size).sum(-1) + penalty * (1 + used + moved)
        return (rows * x).sum(-1) + penalty * (1 - used), added

    def _saddle_point(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Maximizers (k, n) over the set and dual multipliers (k,) for rows (k, n), by bisection.

        A multiplier is in the unit of the rows: the price of one radius.
        """
        if self.p == 1:
            larger = rows.abs().amax(dim=1)
        else:
            slack = 1 - float(self._share(self._anchor[None])[0])
            larger = _length(rows) / max(slack, 2.0**-40)
        larger = larger.clamp(min=2.0**-1000)
        smaller = torch.zeros_like(larger)
        for _ in range(_BISECTIONS):
            middle = smaller + (larger - smaller) / 2
            outside = self._share(self._maximizer(rows, middle)) > 1
            smaller = torch.where(outside, middle, smaller)
            larger = torch.where(outside, larger, middle)
        outer, inner = self._maximizer(rows, smaller), self._maximizer(rows, larger)
        share_outer, share_inner = self._share(outer), self._share(inner)
        mix = torch.nan_to_num((1 - share_inner) / (share_outer - share_inner), 0.0, 0.0, 0.0)
        return inner + mix.clamp(0, 1)[:, None] * (outer - inner), larger

    def _maximizer(self, rows: Tensor, multiplier: Tensor) -> Tensor:
        """For rows (..., n) the point of the box that maximizes the Lagrangian at (...)."""
        center = self.center.to(rows.device)
        low, high = self.lower.to(rows.device), self.upper.to(rows.device)
        price = multiplier[..., None]
        if self.p == 2:
            step = torch.where(rows == 0, 0.0, rows / price)
            return torch.clamp(center + self.radius * step, low, high)
        x = torch.where(rows > price, high, torch.clamp(center, low, high))
        return torch.where(rows < -price, low, x)

    def _share(self, points: Tensor) -> Tensor:
        """Norm of ``points - center`` in units of the radius."""
        offset = (points - self.center.to(points.device)) / self.radius
        norm: Tensor = torch.linalg.vector_norm(offset, self.p, dim=-1)
        return norm


def _length(rows: Tensor) -> Tensor:
    """Euclidean norm (...) of rows (..., n), safe against underflow; gradient 0 at zero."""
    largest = rows.detach().abs().amax(dim=-1, keepdim=True).clamp(min=2.0**-1000)
    norm: Tensor = torch.linalg.vector_norm(rows / largest, dim=-1)
    return norm * largest[..., 0]
