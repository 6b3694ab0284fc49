"""Iterates of the interior-point method for separable programs, and their complementary pairs."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from torch_prepared.solvers._batched_separable import SeparableBatch, times

__all__ = ["Model", "Pairs", "Point"]


@dataclass
class Point:
    """An iterate, or a change of it.

    Rows have slack s and price y, (b, m); kinks p, q and t, bounds prices low and high, (b, n).
    """

    x: Tensor
    s: Tensor
    p: Tensor
    q: Tensor
    y: Tensor
    t: Tensor
    low: Tensor
    high: Tensor

    def take(self, index: Tensor) -> Point:
        return Point(*(getattr(self, field.name)[index] for field in fields(self)))

    def replaced(self, mask: Tensor, other: Point) -> Point:
        """The other where ``mask`` (b, 1)."""
        names = [field.name for field in fields(self)]
        return Point(*(torch.where(mask, getattr(other, k), getattr(self, k)) for k in names))


@dataclass
class Pairs:
    """Complementary pairs: values (moved with x) and prices (moved with y), each a list."""

    values: list[Tensor]
    prices: list[Tensor]

    def products(self) -> list[Tensor]:
        return [v * z for v, z in zip(self.values, self.prices, strict=True)]


class Model:
    """A batch with the masks of what has a slack, a kink, a lower and an upper bound."""

    def __init__(self, batch: SeparableBatch) -> None:
        self.batch = batch
        self.fixed = batch.lower >= batch.upper
        self.masks = [
            (~batch.equal).expand_as(batch.rhs),
            (batch.weight > 0.0) & ~self.fixed,
            (batch.weight > 0.0) & ~self.fixed,
            batch.lower.isfinite() & ~self.fixed,
            batch.upper.isfinite() & ~self.fixed,
        ]
        self.count = sum(
            (mask.sum(1).to(batch.rhs) for mask in self.masks), batch.rhs.new_zeros(())
        )
        self.count = self.count.clamp_min(1.0)
        self.used = [bool(mask.any()) for mask in self.masks]
        self.straight = ~(batch.curve > 0.0).any(1)
        self.narrow = batch.size[2] < batch.size[1] and not bool(batch.equal.any())

    def start(self, x: Tensor) -> Point:
        """A point well inside every pair, near x (b, n)."""
        batch = self.batch
        room = 0.25 * (batch.upper - batch.lower).clamp_max(4.0)
        x = torch.maximum(torch.minimum(x, batch.upper - room), batch.lower + room)
        x = torch.where(self.fixed, batch.lower, x)
        gap = batch.rhs - times(batch.rows, x)
        lack = torch.where(batch.equal, gap.abs(), -gap).amax(1, keepdim=True).clamp_min(1e-2)
        away = x - batch.center
        p = away.clamp_min(0.0) + lack
        one = torch.ones_like(x)
        _, kink, _, low, high = self.masks
        return Point(
            x, torch.where(batch.equal, 0.0, torch.maximum(gap, lack)),
            torch.where(kink, p, 1.0), torch.where(kink, p - away, 1.0),
            torch.where(batch.equal, 0.0, torch.ones_like(gap)),
            torch.zeros_like(x), low * one, high * one,
        )  # fmt: skip

    def pairs(self, at: Point) -> Pairs:
        """The pairs at a point, 1 and 1 where there is none."""
        batch = self.batch
        values = [at.s, at.p, at.q, at.x - batch.lower, batch.upper - at.x]
        prices = [at.y, batch.weight - at.t, batch.weight + at.t, at.low, at.high]
        return Pairs(self._masked(values, 1.0), self._masked(prices, 1.0))

    def changes(self, d: Point) -> Pairs:
        """How the pairs move, 0 where there is none."""
        values = self._masked([d.s, d.p, d.q, d.x, -d.x], 0.0)
        return Pairs(values, self._masked([d.y, -d.t, d.t, d.low, d.high], 0.0))

    def _masked(self, values: list[Tensor], other: float) -> list[Tensor]:
        triples = zip(values, self.masks, self.used, strict=True)
        return [torch.where(mask, value, other) for value, mask, used in triples if used]

    def spread(self, values: list[Tensor]) -> list[Tensor]:
        """Back to one entry per kind of pair; those not used are never read."""
        rest = iter(values)
        return [next(rest) if used else self.count for used in self.used]

    def mean(self, products: list[Tensor]) -> Tensor:
        """Mean of ``value * price`` over the pairs there are, (b,)."""
        total: Tensor = self.batch.rhs.new_zeros(())
        masks = [mask for mask, used in zip(self.masks, self.used, strict=True) if used]
        for product, mask in zip(products, masks, strict=True):
            total = total + torch.where(mask, product, 0.0).sum(1)
        return total.expand(len(self.batch.rhs)) / self.count
