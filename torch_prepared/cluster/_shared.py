"""Margins and rows of which every rank holds a part, as the leader's editor sees them."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_prepared.cluster import _shards
from torch_prepared.cluster._ranks import Ranks
from torch_prepared.cluster._shards import NOTHING
from torch_prepared.edit._linearize import Linearization, MarginFunction
from torch_prepared.edit._steps import Distance, Rows, bordered

__all__ = ["SharedMargins"]


@dataclass(frozen=True)
class SharedMargins(MarginFunction):
    """A margin function of which every rank bounds and linearizes its own properties.

    Args:
        ranks: all of them.
        positions: (b,) int64, of the properties in the task.
        size: to which regions are shrunk.
        spread: whether gradients stay with the ranks, each keeping those of its own weights.
        parts: the properties of each rank.
    """

    ranks: Ranks = field(kw_only=True, repr=False)
    positions: Tensor = field(kw_only=True)
    parts: Sequence[slice] = field(kw_only=True)
    spread: bool = field(kw_only=True)
    size: float = field(kw_only=True, default=1.0)

    def scaled(self, size: float) -> SharedMargins:
        return dataclasses.replace(self, size=size)

    def value(self, theta: Tensor, slopes: Tensor) -> Tensor:
        told = self.ranks.call(_shards.value, [theta], self._deal(slopes))
        return torch.cat([values[0] for values in told if values])

    def choose(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        told = [pair for pair in self.ranks.call(_shards.choose, [theta], self._deal()) if pair]
        return torch.cat([value for value, _ in told]), torch.cat([slopes for _, slopes in told])

    def linearize(
        self, theta: Tensor, slopes: Tensor, value: Tensor, rows: Tensor
    ) -> Linearization:
        if not len(rows):
            return Linearization(value, rows, torch.zeros(0, len(theta)))
        dealt, order = self._deal(slopes), []
        for part, mine in zip(self.parts, dealt, strict=True):
            owner = self.owners[rows]
            order.append(rows[(owner >= part.start) & (owner < part.stop)])
            mine.append(order[-1] - int((self.owners < part.start).sum()))
        told = self.ranks.call(
            _shards.linearize, [theta, torch.tensor([int(not self.spread)])], dealt
        )
        answer = torch.cat([values[0] for values in told])
        if not self.spread:
            return Linearization(value, torch.cat(order), answer)
        return _SpreadLinearization(value, torch.cat(order), torch.zeros(0, 0), self.ranks, answer)

    def _deal(self, *tensors: Tensor) -> list[list[Tensor]]:
        """What every rank needs: positions, size, and its rows of tensors (b, ...)."""
        size = torch.tensor([self.size], dtype=torch.float64)
        return [
            [self.positions[part], size, *(tensor[part] for tensor in tensors)]
            for part in self.parts
        ]


@dataclass(frozen=True)
class _SpreadLinearization(Linearization):
    """Gradients that the ranks hold: to be appended to rows at once, before any others are made."""

    ranks: Ranks
    along: Tensor

    def effect(self, vector: Tensor) -> Tensor:
        """Products with the point that the gradients belong to, the only ``vector`` asked for."""
        return self.along

    def append(self, distance: Distance, rows: Rows | None) -> Rows:
        number = self.ranks.number()
        old = rows.number if isinstance(rows, _SpreadRows) else NOTHING
        told = self.ranks.call(_shards.append, [torch.tensor([old, number])])
        k, products = len(self.rows), told[0][0]
        fresh, cross, image = products[:k], products[k:], torch.cat([part[-1] for part in told])
        if rows is not None:
            fresh = bordered(rows.products, cross, fresh)
            image = torch.cat([rows.image, image])
        return _SpreadRows.keep(self.ranks, number, fresh, image)


@dataclass(frozen=True)
class _SpreadRows(Rows):
    """Rows whose columns the ranks hold; their products and images are here."""

    ranks: Ranks
    number: int

    @classmethod
    def keep(cls, ranks: Ranks, number: int, products: Tensor, image: Tensor) -> _SpreadRows:
        """Rows called ``number`` by the ranks, who forget them when nobody needs this object."""
        rows = cls(torch.zeros(0, 0), products, image, ranks, number)
        weakref.finalize(rows, ranks.forget, number)
        return rows

    def take(self, kept: Tensor) -> _SpreadRows:
        number = self.ranks.number()
        self.ranks.call(_shards.take, [torch.tensor([self.number, number]), kept])
        return self.keep(self.ranks, number, self.products[kept][:, kept], self.image[kept])

    def effect(self, vector: Tensor) -> Tensor:
        return self.ranks.call(_shards.effect, [torch.tensor([self.number]), vector])[0][0]

    def combine(self, weights: Tensor) -> Tensor:
        told = self.ranks.call(_shards.combine, [torch.tensor([self.number]), weights])
        return torch.cat([values[0] for values in told])
