"""Rows gathered at earlier points, so that steps do not bounce between the sides of a kink."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_prepared.core.rows import Floats
from torch_prepared.edit._linearize import Linearization
from torch_prepared.edit._steps import Distance, Rows

__all__ = ["Bundle"]

OLDEST = 12  #: steps after which a row that no step leaned on is dropped
BYTES = 400_000_000


@dataclass
class Bundle:
    """Linearized margins: margin ``index[i]`` is near ``const[i] + jacobian[i] @ theta``.

    Args:
        distance: what steps are measured in.
    """

    distance: Distance
    rows: Rows | None = None
    index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    const: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    age: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.index)

    def add(self, line: Linearization, theta: Tensor, *, replace: bool = False) -> None:
        """Append the rows known at ``theta``; ``replace`` ousts those of the same margins."""
        if not len(line.rows):
            return
        if replace:
            self._keep(~torch.isin(self.index, line.rows))
        room = max(2 * len(line.value), BYTES // (8 * len(theta)))
        if len(self) + len(line.rows) > room:
            newest = self.age.argsort(stable=True)[: max(room - len(line.rows), 0)]
            self._keep(torch.zeros(len(self), dtype=torch.bool).index_fill_(0, newest, True))
        value = line.value[line.rows]
        self.rows = line.append(self.distance, self.rows)
        self.const = torch.cat([self.const, value - line.effect(theta)])
        self.index = torch.cat([self.index, line.rows])
        self.age = torch.cat([self.age, torch.zeros_like(line.rows)])

    def lines(self, theta: Tensor, value: Tensor) -> Tensor:
        """What the rows say of their margins at ``theta``, raised to the true ``value`` (m,).

        Margins are not concave: a row from elsewhere may lie below the truth.
        """
        if self.rows is None:
            return self.const
        said = self.const + self.rows.effect(theta)
        return torch.maximum(said, value[self.index])

    def used(self, multipliers: Floats) -> None:
        """Note which rows the last step leaned on; forget those idle for long."""
        active = torch.from_numpy(multipliers) > 0
        self.age = torch.where(active, 0, self.age + 1)
        self._keep(self.age < OLDEST)

    def _keep(self, mask: Tensor) -> None:
        if self.rows is None or bool(mask.all()):
            return
        kept = mask.nonzero().flatten()
        self.rows = self.rows.take(kept)
        self.index, self.const, self.age = self.index[kept], self.const[kept], self.age[kept]
