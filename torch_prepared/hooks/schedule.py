"""When a hook looks at the model, and below which certified margin it edits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch_prepared.errors import SpecError

__all__ = ["AtEnd", "EverySteps", "Schedule", "WhenMarginBelow"]


class Schedule(ABC):
    """A policy as two predicates; both must depend on their arguments alone, so that runs repeat.

    Attributes:
        floor: margin that an edit has to reach at least, in output units.
    """

    @property
    def floor(self) -> float:
        """See the class."""
        return 0.0

    @abstractmethod
    def due(self, step: int) -> bool:
        """Whether margins are evaluated after ``step`` optimizer steps (1 after the first)."""

    def wants_edit(self, lowest: float, missed: float) -> bool:
        """Whether the lowest certified margin calls for an edit.

        Args:
            lowest: certified margin, in output units; NaN where bounds overflow.
            missed: a small positive margin, the hook's own limit.
        """
        return not lowest >= missed


@dataclass(frozen=True)
class EverySteps(Schedule):
    """Every ``every`` optimizer steps, from step ``start`` on; edits where a margin is missed."""

    every: int = 250
    start: int = 0

    def __post_init__(self) -> None:
        """Check the period."""
        _check(type(self).__name__, self.every, self.start)

    def due(self, step: int) -> bool:
        """See :class:`Schedule`."""
        return step >= self.start and step % self.every == 0


@dataclass(frozen=True)
class WhenMarginBelow(Schedule):
    """Looks every ``every`` optimizer steps; edits when the lowest margin is below ``value``."""

    value: float
    every: int = 250
    start: int = 0

    def __post_init__(self) -> None:
        """Check the period and the margin."""
        _check(type(self).__name__, self.every, self.start)
        if self.value != self.value:
            raise SpecError("WhenMarginBelow: got value NaN; expected a margin in output units")

    @property
    def floor(self) -> float:
        """See :class:`Schedule`."""
        return max(self.value, 0.0)

    def due(self, step: int) -> bool:
        """See :class:`Schedule`."""
        return step >= self.start and step % self.every == 0

    def wants_edit(self, lowest: float, missed: float) -> bool:
        """See :class:`Schedule`."""
        return not lowest >= self.value


@dataclass(frozen=True)
class AtEnd(Schedule):
    """Never during training; ``finish`` does all."""

    def due(self, step: int) -> bool:
        """See :class:`Schedule`."""
        return False


def _check(where: str, every: int, start: int) -> None:
    if every < 1 or start < 0:
        raise SpecError(
            f"{where}: got every={every}, start={start}; expected every >= 1 and start >= 0"
        )
