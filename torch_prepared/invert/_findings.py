"""What is known of a radius while it is being looked for."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch_prepared.core.deadline import Deadline
from torch_prepared.invert._ball import Ball
from torch_prepared.invert._result import Certified, Evidence, Outcome, Pair, RadiusBound
from torch_prepared.invert._solve import Answer, Effort

__all__ = ["Findings"]

_CONTRADICTION = 1e-5  #: a claimed bound may pass an exact collision by so much, relatively
Reach = Callable[[Pair], float]


class Findings:
    """Bounds that only ever improve; a claim that an exact collision contradicts is dropped.

    Args:
        ball: the largest ball asked for.
        effort: who listens, and the gap that counts as closed.
        reach: radius at which a pair collides.
        separation: least distance of the pairs that claims are about.
        distance: the distance that ``separation`` is about.
        deadline: the clock of the whole question; starts now when None.
        output_tolerance: outputs that differ by no more count as the same.
    """

    def __init__(
        self,
        ball: Ball,
        effort: Effort,
        reach: Reach,
        separation: float,
        distance: Reach,
        deadline: Deadline | None = None,
        output_tolerance: float = 0.0,
    ) -> None:
        self.ball = ball
        self.deadline = deadline or effort.deadline()
        self.lower = 0.0
        self.proved = 0.0
        self.upper = math.inf
        self.witness: Pair | None = None
        self.certified: Certified | None = None
        self.integers = 0
        self.steps: list[str] = []
        self.effort = effort
        self.output_tolerance = output_tolerance
        self._reach = reach
        self._distance = distance
        self._separation = separation
        self._evidence = Evidence.NONE
        self._apart = 0.0
        self._excluded = math.inf  #: least radius of a witness that claims speak of
        self._finished = False

    @property
    def limit(self) -> float:
        """Radius beyond which nothing needs to be looked for."""
        return min(self.ball.radius, self.upper)

    @property
    def closed(self) -> bool:
        """Whether the bounds agree."""
        return self.limit - self.lower <= 2 * self.effort.mip_gap * max(self.limit, 1e-12)

    def note(self, text: str) -> None:
        """Record a step."""
        self.steps.append(f"{self.deadline.elapsed:.1f} s: {text}")

    def offer(self, pair: Pair | None, source: str) -> None:
        """An exact collision, or None."""
        if pair is None:
            return
        reach = self._reach(pair)
        if reach <= self.ball.radius and self._distance(pair) >= self._separation:
            self._excluded = min(self._excluded, reach)
        if reach < self.upper and reach <= self.ball.radius:
            self.upper, self.witness = reach, pair
            self.note(f"exact collision at radius {reach:.6g} ({source})")
            self.effort.tell(self.lower, self.upper)

    def prove(
        self, radius: float, evidence: Evidence, source: str, separation: float = 0.0
    ) -> None:
        """A bound that holds without trust in a solver, for pairs at least ``separation`` apart."""
        radius = min(radius, self.ball.radius)
        if radius > self.proved:
            self.proved = min(radius, self.upper)
            self.note(f"no collision within {radius:.6g}: {evidence.value} ({source})")
        if radius >= self.lower and radius > 0.0:
            self.lower, self._evidence = min(radius, self.upper), evidence
            self._apart = separation
        self.effort.tell(self.lower, self.upper)

    def claim(self, answer: Answer, tested: float, source: str) -> None:
        """The bound of a program over the ball of radius ``tested``."""
        radius = min(answer.bound, tested)
        if radius > self._excluded * (1.0 + _CONTRADICTION):
            self.note(f"the solver claimed {radius:.6g}, which a collision contradicts; dropped")
            return
        self._finished = self._finished or answer.finished
        radius = min(radius, self.upper)
        if radius > self.lower:
            self.lower, self._evidence = radius, Evidence.CLAIMED
            self._apart = self._separation
            self.note(f"no collision within {radius:.6g}: claimed ({source})")
        else:
            self.note(f"{source}: {answer.message}, bound {answer.bound:.6g}")
        self.effort.tell(self.lower, self.upper)

    def result(self, message: str = "") -> RadiusBound:
        """The answer as it stands."""
        if self.witness is None and self.lower >= self.ball.radius * (1 - 1e-12):
            outcome = Outcome.EXCLUDED
        elif self.closed or (self._finished and self.witness is not None):
            outcome = Outcome.SOLVED
        else:
            outcome = Outcome.OPEN
        texts = {
            Outcome.EXCLUDED: f"no collision within {self.ball.radius:.6g}",
            Outcome.SOLVED: "the bounds agree within the tolerances",
            Outcome.OPEN: "time over" if self.deadline.over else "not decided",
        }
        stopped = outcome is Outcome.OPEN and self.effort.stopped
        return RadiusBound(
            self.lower,
            self.proved,
            self.upper,
            self._evidence,
            outcome,
            self.ball.norm,
            self._apart,
            self.witness,
            self.certified,
            self.integers,
            self.deadline.elapsed,
            message or ("interrupted" if stopped else texts[outcome]),
            tuple(self.steps),
            self.output_tolerance,
            stopped,
        )

    def zero(self, pair: Pair | None, message: str) -> RadiusBound:
        """The answer that every ball holds a collision, of which ``pair`` is one."""
        self.upper, self.witness = 0.0, pair
        self._evidence = Evidence.CERTIFIED
        return self.result(message)
