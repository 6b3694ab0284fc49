"""What there is time for, judged by how long passes over all properties have taken."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch_prepared.core.deadline import Deadline

__all__ = ["Pace"]

GROWTH_SHARE = 0.55  #: of the time limit, at most; afterwards regions have full size
LEAP = 30  #: passes that the step to full size may take, kept for it
SEARCH = 120  #: passes without gradients; where they take longer, sizes are not searched for
SHRINK_SHARE = 0.75  #: of the time limit, when shrinking ends
FEWEST_PASSES = 2  #: of bounds, without which nothing can be restored
SLOW_SHARE = 0.03  #: of the time limit; gradients that take longer are asked for few rows
WARM = 0.5  #: of a first pass, which also prepares much, later ones are expected to take
SPARE = 1.5  #: times what a first candidate took, kept for the last


@dataclass
class Pace:
    """The clock of one search.

    Args:
        deadline: of the editor.
        pass_seconds: that the last gradients took.
        row_seconds: likewise, for one row.
        bound_seconds: that bounds alone have taken.
        reserve: seconds that the last candidate needs.
        passes: for gradients, so far.
    """

    deadline: Deadline
    pass_seconds: float = 0.0
    row_seconds: float = 0.0
    bound_seconds: float = 0.0
    reserve: float = 0.0
    passes: int = 0

    @contextmanager
    def gradients(self, rows: int) -> Iterator[None]:
        """Time a pass for the gradients of so many rows."""
        clock = time.monotonic()
        yield
        self.pass_seconds = time.monotonic() - clock
        self.row_seconds = self.pass_seconds / max(rows, 1)
        self.passes += 1

    @contextmanager
    def bounds(self) -> Iterator[None]:
        """Time a pass for the margins alone."""
        clock = time.monotonic()
        yield
        self.bound_seconds = time.monotonic() - clock

    @contextmanager
    def candidate(self) -> Iterator[None]:
        """Time what becomes of a candidate."""
        clock = time.monotonic()
        yield
        self.reserve = SPARE * (time.monotonic() - clock)

    @property
    def slow(self) -> bool:
        """Whether even single gradients take long."""
        limit = self.deadline.seconds
        return limit is not None and self.row_seconds > SLOW_SHARE * limit

    @property
    def cramped(self) -> bool:
        """Whether no pass fits in any more."""
        return self.deadline.seconds is not None and self.deadline.left < self.pass_seconds

    @property
    def hopeless(self) -> bool:
        """Whether there is no time for the few passes that even a single step takes."""
        limited = self.deadline.seconds is not None
        return limited and self.deadline.left < FEWEST_PASSES * self.bound_seconds

    @property
    def grows(self) -> bool:
        """Whether there is time for growing; a first pass that was held up does not end it."""
        return self._growing(WARM if self.passes == 1 else 1.0) > 0.0

    @property
    def growing(self) -> float:
        """Seconds left for growing; none where gradients take long."""
        return self._growing(1.0)

    def _growing(self, share: float) -> float:
        """Likewise, where a pass takes this share of what the last one took."""
        limit = self.deadline.seconds
        if limit is None:
            return math.inf
        passes = max(LEAP * share * self.pass_seconds, SEARCH * self.bound_seconds)
        leap = max((1 - GROWTH_SHARE) * limit, passes)
        return 0.0 if self.slow else self.deadline.left - leap

    def behind(self, done: float, seconds: float) -> bool:
        """Whether growing takes too long when a share of it that is done took so many seconds."""
        return seconds * (1.0 - done) > done * self.growing

    @property
    def ending(self) -> bool:
        """Whether the rest of the time belongs to checking what was found."""
        limit = self.deadline.seconds
        if limit is None:
            return False
        return self.deadline.left < max(self.reserve, (1 - SHRINK_SHARE) * limit)
