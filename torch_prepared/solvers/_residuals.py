"""Independent checks of what a solver claims: violation, dual bound, Farkas ray.

Everything here is ordinary float64 arithmetic on the program as it was stated, not on the
solver's scaled or presolved copy. It is meant to catch wrong claims, not to prove anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from torch_prepared.core.rows import Floats, LinearRows
from torch_prepared.solvers._problem import LinearProgram
from torch_prepared.solvers._result import Solution, Status

__all__ = [
    "Claim",
    "dual_bound",
    "elastic_program",
    "farkas_gap",
    "judge",
    "max_violation",
    "with_ray",
]

FEASIBILITY_TOLERANCE = 1e-6  #: relative to max(1, |right-hand side|)
DUAL_TOLERANCE = 1e-6  #: reduced cost of an open column, relative to max(1, |cost|)
GAP_TOLERANCE = 1e-5  #: relative to max(1, |objective|)


def max_violation(problem: LinearProgram, x: Floats) -> float:
    """Largest violation at ``x`` (p,), relative to ``max(1, |right-hand side|)``.

    Rows, bounds and integrality all count. NaN or infinite entries of ``x`` give ``inf``.
    """
    if x.shape != (problem.columns,) or not bool(np.isfinite(x).all()):
        return float("inf")
    rhs_scale = np.maximum(1.0, np.abs(problem.rows.rhs))
    parts = [problem.rows.violation(x) / rhs_scale]
    for bound, sign in ((problem.lower, 1.0), (problem.upper, -1.0)):
        closed = np.isfinite(bound)
        lack = sign * (bound[closed] - x[closed])
        parts.append(np.maximum(lack, 0.0) / np.maximum(1.0, np.abs(bound[closed])))
    if problem.integer is not None:
        whole = x[problem.integer]
        parts.append(np.abs(whole - np.round(whole)))
    return max((float(part.max()) for part in parts if part.size), default=0.0)


def dual_bound(problem: LinearProgram, x: Floats | None, duals: Floats) -> float:
    """Lower bound of the optimal value from row multipliers (k,), integrality ignored.

    With ``y`` the multipliers (negative ones on inequalities replaced by 0) and
    ``z = cost + Q x - matrix.T y`` the reduced costs, the bound is
    ``rhs @ y - x @ Q @ x / 2 + sum_j min(z_j t : lower_j <= t <= upper_j)``.
    A reduced cost below the dual tolerance counts as 0 where the minimum would be ``-inf``: the
    bound is then that of a program whose costs differ by so little.

    Args:
        problem: the program.
        x: (p,) a point where Q is linearized, needed only for a quadratic objective.
        duals: (k,) multipliers.
    """
    y = np.where(problem.rows.equal, duals, np.maximum(duals, 0.0))
    cost, constant = problem.cost, 0.0
    if problem.quadratic is not None:
        if x is None:
            return -float("inf")
        curvature = problem.curvature(x)
        cost, constant = cost + curvature, -0.5 * float(x @ curvature)
    reduced = cost - problem.rows.matrix.T @ y
    end = np.where(reduced > 0, problem.lower, problem.upper)
    open_end = ~np.isfinite(end)
    small = np.abs(reduced) <= DUAL_TOLERANCE * np.maximum(1.0, np.abs(cost))
    if bool((open_end & ~small).any()) or not bool(np.isfinite(reduced).all()):
        return -float("inf")
    terms = reduced * np.where(open_end, 0.0, end)
    return float(problem.rows.rhs @ y + terms.sum() + constant)


def farkas_gap(problem: LinearProgram, ray: Floats) -> float:
    """How clearly ``ray`` (k,) shows that ``rows`` contradict the bounds; > 0 means it does.

    ``ray @ rhs - max(ray @ matrix @ x : lower <= x <= upper)``, with the ray scaled to largest
    entry 1: weighing and adding the rows asks for more than any x within the bounds gives.
    """
    size = float(np.abs(ray).max(initial=0.0))
    if not 0.0 < size < np.inf:
        return -float("inf")
    feasibility = LinearProgram(
        np.zeros(problem.columns), problem.rows, problem.lower, problem.upper
    )
    return dual_bound(feasibility, None, ray / size)


def elastic_program(problem: LinearProgram) -> LinearProgram:
    """Minimize the sum of the row violations within the bounds: always feasible and bounded.

    Its optimum is 0 exactly when the program (without integrality) is feasible; otherwise its
    row multipliers are a Farkas ray of the program. Violations are extra columns after the
    program's own: one per inequality, then one more per equality.
    """
    k, p, equal = problem.rows.count, problem.columns, problem.rows.equal
    above = sp.identity(k, format="csr")
    below = -above[:, np.flatnonzero(equal)]
    matrix = sp.hstack([sp.csr_matrix(problem.rows.matrix), above, below], format="csr")
    added = matrix.shape[1] - p
    return LinearProgram(
        np.concatenate([np.zeros(p), np.ones(added)]),
        LinearRows(matrix, problem.rows.rhs, equal),
        np.concatenate([problem.lower, np.zeros(added)]),
        np.concatenate([problem.upper, np.full(added, np.inf)]),
    )


@dataclass(frozen=True)
class Claim:
    """What a solver says before anything is checked.

    Attributes:
        status: its verdict; ``TIME_LIMIT`` and ``FEASIBLE`` mean "stopped early" because of the
            time or of another limit, whatever ``x`` is worth.
        x: (p,) its point, or None.
        duals: (k,) its row multipliers, or None.
        bound: a lower bound that only it can give (branch and bound), or None.
        message: its words.
    """

    status: Status
    message: str
    x: Floats | None = None
    duals: Floats | None = None
    bound: float | None = None


def judge(problem: LinearProgram, claim: Claim, *, seconds: float, solver: str) -> Solution:
    """A :class:`Solution` that says no more than the residuals support.

    A point counts only with violations within the feasibility tolerance; ``OPTIMAL`` needs, for a
    continuous program, multipliers whose dual bound meets the objective.
    """
    if claim.status in (Status.INFEASIBLE, Status.UNBOUNDED):
        nothing = float("nan")
        bound = float("inf") if claim.status is Status.INFEASIBLE else -float("inf")
        return Solution(
            claim.status, None, None, nothing, bound, float("inf"), None, seconds, solver,
            claim.message,
        )  # fmt: skip
    x, duals = claim.x, claim.duals
    violation = float("inf") if x is None else max_violation(problem, x)
    objective, lower = float("nan"), -float("inf")
    feasible = x is not None and violation <= FEASIBILITY_TOLERANCE
    if x is not None and feasible:
        objective = problem.objective(x)
    if duals is not None:
        duals = np.where(problem.rows.equal, duals, np.maximum(duals, 0.0))
        lower = dual_bound(problem, x, duals)
    if claim.bound is not None:
        lower = max(lower, claim.bound)
    status, message = _supported(problem, claim, feasible, objective - lower, objective)
    if not feasible and x is not None:
        message = f"{message}; the last point violates the program by {violation:.1e}"
    return Solution(status, x, duals, objective, lower, violation, None, seconds, solver, message)


def _supported(
    problem: LinearProgram, claim: Claim, feasible: bool, gap: float, objective: float
) -> tuple[Status, str]:
    """The strongest status that the checks allow, and the message that goes with it."""
    if claim.status is Status.TIME_LIMIT:
        return (Status.FEASIBLE if feasible else Status.TIME_LIMIT), claim.message
    if not claim.status.has_point or not feasible:
        return Status.UNKNOWN, claim.message
    confirmed = abs(gap) <= GAP_TOLERANCE * max(1.0, abs(objective))
    if claim.status is Status.OPTIMAL and problem.integer is None and not confirmed:
        return Status.FEASIBLE, f"{claim.message}; not confirmed, duality gap {gap:.1e}"
    return claim.status, claim.message


def with_ray(
    problem: LinearProgram, verdict: Solution, solve: Callable[[LinearProgram], Solution]
) -> Solution:
    """Back an ``INFEASIBLE`` verdict by a checked Farkas ray, or take it back.

    Solves :func:`elastic_program` by ``solve``. A feasible point found on the way makes the
    verdict ``UNKNOWN``; when no ray is found in time the verdict stands, without one.
    """
    elastic = solve(elastic_program(problem))
    verdict = replace(verdict, seconds=verdict.seconds + elastic.seconds)
    if elastic.x is not None and problem.integer is None:
        violation = max_violation(problem, elastic.x[: problem.columns])
        if violation <= FEASIBILITY_TOLERANCE:
            message = (
                f"{verdict.message}; but a point with violation {violation:.1e} exists: infeasible "
                "by less than the tolerance, or badly scaled"
            )
            return replace(
                verdict, status=Status.UNKNOWN, dual_bound=-float("inf"), message=message
            )
    if elastic.duals is not None and farkas_gap(problem, elastic.duals) > 0.0:
        return replace(verdict, ray=elastic.duals)
    return replace(verdict, message=f"{verdict.message}; no Farkas ray was found")
