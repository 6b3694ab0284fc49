"""Solving one mixed-integer program within what is left of the time, and what its answer is worth.

How sound a bound from here is: branch and bound works in floating point with tolerances, 1e-6 on
rows and on integrality. A switch that is off by 1e-6 opens its row by 1e-6 times the bound of its
neuron, so programs are built on tight bounds; the dual bound is lowered by ``TOLERANCE`` relative
to ``max(1, |bound|)`` before it is used. That accounts for the tolerances of the final relaxation
but is no proof: such bounds are called *claimed*.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from torch_prepared.bounds import RegionBatch, bound_nodes
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.interval import Interval
from torch_prepared.core.rows import Floats
from torch_prepared.errors import SpecError
from torch_prepared.invert._ball import Ball
from torch_prepared.invert._encoding import Program
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.solvers import HighsSolver, LinearProgram, Status, solve

__all__ = ["TOLERANCE", "Answer", "Effort", "bound_network", "minimize", "polish"]

TOLERANCE = 1e-6
_BOUNDS = ("crown", "ibp", "obbt")
Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Effort:
    """What a question may cost.

    Args:
        time_limit: wall seconds for the whole question; None for no limit. Both bounds hold
            whenever it ends.
        threads: of the solver; None leaves its default.
        bounds: what the constants of the switches come from: ``"crown"``, ``"ibp"``, or ``"obbt"``,
            linear programs on top of CROWN where the output is known (see ``_tighten``), which
            pays for preimages where branch and bound takes longer than seconds.
        mip_gap: relative gap at which branch and bound stops.
        seed: of the search for witnesses.
        progress: called with (lower, upper) of the radius whenever one is known better.
        stop: once set, and Ctrl-C sets it, the question ends as if its time were over, with the
            bounds found so far. None leaves ``KeyboardInterrupt`` to the caller.

    Raises:
        SpecError: a limit that is not positive, or unknown bounds.
    """

    time_limit: float | None = None
    threads: int | None = None
    bounds: str = "crown"
    mip_gap: float = 1e-4
    seed: int = 0
    progress: Progress | None = None
    stop: threading.Event | None = None

    def __post_init__(self) -> None:
        if self.time_limit is not None and not self.time_limit > 0:
            raise SpecError(f"time_limit: got {self.time_limit}; expected seconds above 0 or None")
        if self.threads is not None and self.threads < 1:
            raise SpecError(f"threads: got {self.threads}; expected at least 1 or None")
        if self.bounds not in _BOUNDS:
            raise SpecError(f"bounds: got {self.bounds!r}; expected one of {', '.join(_BOUNDS)}")
        if not 0 <= self.mip_gap < 1:
            raise SpecError(f"mip_gap: got {self.mip_gap}; expected at least 0 and below 1")

    def tell(self, lower: float, upper: float) -> None:
        """Pass bounds on to whoever listens."""
        if self.progress is not None:
            self.progress(lower, upper)

    def deadline(self) -> Deadline:
        """The clock of a question that begins now."""
        if self.stop is None:
            return Deadline(self.time_limit)
        return StoppableDeadline(self.time_limit, stop=self.stop)

    @property
    def stopped(self) -> bool:
        """Whether the question was stopped."""
        return self.stop is not None and self.stop.is_set()

    def until_stopped(self) -> UntilStopped:
        """Take Ctrl-C in a block for ``stop``, if there is one."""
        return UntilStopped(self.stop)


class UntilStopped:
    """A block that Ctrl-C leaves by setting ``stop``; who asks twice does not want to wait."""

    def __init__(self, stop: threading.Event | None) -> None:
        self._stop = stop

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        if not isinstance(error, KeyboardInterrupt) or self._stop is None or self._stop.is_set():
            return False
        self._stop.set()
        return True


@dataclass(frozen=True)
class StoppableDeadline(Deadline):
    """A deadline that has come, too, once ``stop`` is set."""

    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def left(self) -> float:
        """Seconds left; 0 once stopped."""
        return 0.0 if self.stop.is_set() else super().left

    def share(self, part: float) -> Deadline:
        """A deadline after ``part`` of what is left, stopped by the same event."""
        return StoppableDeadline(None if self.seconds is None else self.left * part, stop=self.stop)


@dataclass(frozen=True, eq=False)
class Answer:
    """What one program said.

    Attributes:
        bound: the optimum is at least this, tolerances deducted; inf when there is no solution.
        point: (p,) best solution found, its continuous part solved again, or None.
        finished: the solver ended on its own: optimal within its gap, or infeasible.
        seconds: wall time.
        message: the solver's words.
        problem: what was solved, None when nothing was.
    """

    bound: float
    point: Floats | None
    finished: bool
    seconds: float
    message: str
    problem: LinearProgram | None = None


def bound_network(net: PiecewiseNetwork, ball: Ball, bounds: str) -> dict[str, Interval]:
    """Intervals (1, *shape) of every node's value over the ball."""
    with torch.no_grad():
        regions = RegionBatch.of([ball.region])
        return bound_nodes(net.graph, regions, tighten=bounds != "ibp")


def minimize(
    program: Program,
    column: int,
    deadline: Deadline,
    effort: Effort,
    *,
    sign: float = 1.0,
    listen: Progress | None = None,
) -> Answer:
    """Minimize ``sign * column`` (so -1 maximizes it; ``bound`` is then of the negative).

    A failure of the solver is an answer whose bound is ``-inf``; one that was stopped has the bound
    that the solver last told.
    """
    if deadline.over:
        return Answer(-np.inf, None, False, 0.0, "time over")
    cost = np.zeros(program.columns)
    cost[column] = sign
    problem = LinearProgram(
        cost,
        program.build_rows(),
        program.unknowns.lower,
        program.unknowns.upper,
        program.integer,
    )
    told = [-np.inf]

    def hear(bound: float, best: float) -> None:
        told[0] = max(told[0], bound) if math.isfinite(bound) else told[0]
        if listen is not None:
            listen(bound, best)

    heard = None if listen is None and effort.stop is None else hear
    solver = HighsSolver(find_ray=False, mip_gap=effort.mip_gap, progress=heard)
    began, found = time.monotonic(), None
    with effort.until_stopped():
        found = solve(problem, solver, time_limit=deadline.limit(), threads=effort.threads)
    if found is None:
        bound = told[0] - TOLERANCE * max(1.0, abs(told[0]))
        return Answer(bound, None, False, time.monotonic() - began, "interrupted")
    if found.status is Status.INFEASIBLE:
        return Answer(np.inf, None, True, found.seconds, found.message)
    bound = -np.inf
    if found.status in (Status.OPTIMAL, Status.FEASIBLE, Status.TIME_LIMIT):
        bound = found.dual_bound - TOLERANCE * max(1.0, abs(found.dual_bound))
        bound = -np.inf if np.isnan(bound) else bound
    point = found.x if found.status.has_point else None
    if point is not None:
        point = polish(problem, point, effort)
    finished = found.status is Status.OPTIMAL
    return Answer(float(bound), point, finished, found.seconds, found.message, problem)


def polish(
    problem: LinearProgram,
    point: Floats,
    effort: Effort,
    narrow: Mapping[int, tuple[float, float]] | None = None,
) -> Floats:
    """The continuous part solved again with the integers fixed; ``point`` where that fails.

    ``narrow`` holds other bounds of some columns.
    """
    lower, upper = problem.lower.copy(), problem.upper.copy()
    if problem.integer is not None:
        whole = np.round(point[problem.integer])
        lower[problem.integer] = upper[problem.integer] = whole
    for column, (low, high) in (narrow or {}).items():
        lower[column], upper[column] = low, high
    if not bool((lower <= upper).all()):
        return point
    fixed = replace(problem, lower=lower, upper=upper, integer=None)
    found = solve(fixed, HighsSolver(find_ray=False), time_limit=5.0, threads=effort.threads)
    return found.x if found.status is Status.OPTIMAL and found.x is not None else point
