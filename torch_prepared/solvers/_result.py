"""What a solver answers: an enumerated status and numbers that this package checked itself."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from torch_prepared.core.rows import Floats

__all__ = ["Solution", "Status"]


class Status(Enum):
    """Outcome of a solve. None of these is a proof about a network: only certificates are."""

    OPTIMAL = "optimal"  #: a feasible point, and the solver claims that no better one exists
    FEASIBLE = "feasible"  #: a feasible point; stopped early, or optimality was not confirmed
    INFEASIBLE = "infeasible"  #: no feasible point; ``ray`` shows it where one was found
    UNBOUNDED = "unbounded"  #: the objective has no lower bound on a nonempty feasible set
    TIME_LIMIT = "time limit"  #: time over without a feasible point
    UNKNOWN = "unknown"  #: anything else: "almost optimal", numerical trouble, a failed check

    @property
    def has_point(self) -> bool:
        """Whether the solution holds a point that passed the feasibility check."""
        return self in (Status.OPTIMAL, Status.FEASIBLE)


@dataclass(frozen=True, eq=False)
class Solution:
    """A solver's answer after this package's own residual checks.

    Attributes:
        status: see :class:`Status`.
        x: (p,) the point, or None. With ``UNKNOWN`` it is the solver's unreliable last point.
        duals: (k,) multipliers of the rows, nonnegative on inequalities, or None (a mixed-integer
            program has none).
        objective: objective at ``x``; NaN without a point.
        dual_bound: lower bound of the optimal value, recomputed from ``duals`` (for a
            mixed-integer program the solver's own), ``-inf`` when there is none. It holds up to
            rounding and to reduced costs of open columns below the dual tolerance.
        violation: largest violation of a row, bound or integrality at ``x``, relative to
            ``max(1, |right-hand side|)``; ``inf`` without a point.
        ray: (k,) Farkas multipliers when ``INFEASIBLE`` and found: nonnegative on inequalities,
            ``ray @ rhs`` exceeds the largest value of ``ray @ matrix @ x`` within the bounds.
        seconds: wall time.
        solver: name and method that gave the answer.
        message: one line for people: why, and what to try next.
    """

    status: Status
    x: Floats | None
    duals: Floats | None
    objective: float
    dual_bound: float
    violation: float
    ray: Floats | None
    seconds: float
    solver: str
    message: str

    @property
    def gap(self) -> float:
        """``(objective - dual_bound) / max(1, |objective|)``; inf when either is missing."""
        gap = (self.objective - self.dual_bound) / max(1.0, abs(self.objective))
        return float("inf") if np.isnan(gap) else float(gap)
