"""Wall-clock budgets that are passed down, never global."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

__all__ = ["Deadline"]


@dataclass(frozen=True)
class Deadline:
    """A point in time; ``Deadline(None)`` never comes."""

    seconds: float | None = None
    start: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds since construction."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        """Seconds left, never negative; ``inf`` without a limit."""
        return math.inf if self.seconds is None else max(0.0, self.seconds - self.elapsed)

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return self.left <= 0.0

    def limit(self, part: float = 1.0, least: float = 1e-3) -> float | None:
        """Seconds for a call that takes a limit; None without one.

        They are ``part`` of what is left, but at least ``least``: a limit of 0 is an error there,
        and time may run out between a look at the clock and the call.
        """
        return None if self.seconds is None else max(part * self.left, least)

    def share(self, part: float) -> Deadline:
        """A deadline after ``part`` of what is left."""
        return Deadline(None if self.seconds is None else self.left * part)
