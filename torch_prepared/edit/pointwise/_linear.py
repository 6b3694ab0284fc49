"""Piecewise-linear programs by HiGHS: linear without cells, mixed-integer with them.

A cell ``a = max(0, z)`` with ``low <= z <= high`` becomes ``a >= 0, a >= z, a <= z - low (1 - s),
a <= high s`` with a binary s. The number of changed weights has binaries ``|d_i| <= reach q_i``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from torch_prepared.core.rows import Floats, LinearRows, RowBuilder, Unknowns
from torch_prepared.errors import SolverError
from torch_prepared.solvers import LinearProgram, Solution, Status, minimize_norm, solve
from torch_prepared.solvers import Norm as LinearNorm
from torch_prepared.solvers.smt import ReluProgram

__all__ = ["LinearAnswer", "PointNorm", "maximize_row", "solve_linear"]

CLAIMED_VIOLATION = 1e-5
Integers = NDArray[np.int64]


class PointNorm(enum.Enum):
    """What a pointwise edit minimizes."""

    LINF = "inf"  #: the largest change of a weight
    L1 = "1"  #: the sum of changes
    L0 = "0"  #: the number of changed weights; needs a budget
    L2 = "2"  #: the root of the sum of squares
    BEHAVIOR = "behavior"  #: the output change on reference inputs


@dataclass(frozen=True)
class LinearAnswer:
    """What the solver claims.

    Args:
        status: see :class:`Status`.
        d: (p,) the change, or None.
        size: its norm; NaN without one.
        bound: the solver's lower bound of the norm.
        conflict: owners of rows in the Farkas ray when infeasible; all owners when none was found.
        message: one line.
    """

    status: Status
    d: Floats | None
    size: float
    bound: float
    conflict: tuple[int, ...]
    message: str


def solve_linear(
    program: ReluProgram,
    norm: PointNorm,
    *,
    soft: NDArray[np.bool_] | None = None,
    weight: float = 0.0,
    time_limit: float | None = None,
    threads: int | None = None,
) -> LinearAnswer:
    """The smallest change that satisfies all rows, but for ``soft`` ones.

    Args:
        program: with finite cell bounds; ``L0`` needs finite bounds of the unknowns as well.
        norm: ``LINF``, ``L1`` or ``L0``.
        soft: (rows,) rows whose shortfall costs ``weight`` each instead of being forbidden.
        weight: cost of a unit of shortfall.
        time_limit: seconds.
        threads: CPU threads.

    Raises:
        SolverError: bounds that are not finite where they must be.
    """
    used = _used(program)
    if not len(used) and not program.cells:
        return _fixed_answer(program, soft)
    problem = _assemble(program, used, norm, soft, weight)
    solution = solve(problem, time_limit=time_limit, threads=threads)
    if solution.status is Status.INFEASIBLE:
        return LinearAnswer(
            Status.INFEASIBLE, None, np.nan, np.inf, _conflict(program, solution), solution.message
        )
    claimed = solution.x is not None and solution.violation <= CLAIMED_VIOLATION
    if not claimed or solution.x is None:
        status = solution.status if not solution.status.has_point else Status.UNKNOWN
        return LinearAnswer(status, None, np.nan, -np.inf, (), solution.message)
    d = np.zeros(program.unknowns)
    d[used] = solution.x[: len(used)]
    if norm is PointNorm.L0:
        chosen = solution.x[problem.columns - len(used) :] > 0.5
        d[used[~chosen]] = 0.0
    sizes = {
        PointNorm.LINF: float(np.abs(d).max(initial=0.0)),
        PointNorm.L1: float(np.abs(d).sum()),
    }
    size = sizes.get(norm, float(np.count_nonzero(d)))
    status = solution.status if solution.status.has_point else Status.FEASIBLE
    return LinearAnswer(status, d, size, solution.dual_bound, (), solution.message)


def _fixed_answer(program: ReluProgram, soft: NDArray[np.bool_] | None) -> LinearAnswer:
    """Nothing may move: either everything holds as it is, or some rows never will."""
    lack = program.rows.violation(np.zeros(program.unknowns)) > CLAIMED_VIOLATION
    hard = lack if soft is None else lack & ~soft
    if not hard.any():
        return LinearAnswer(Status.OPTIMAL, np.zeros(program.unknowns), 0.0, 0.0, (), "")
    conflict = tuple(np.unique(program.owner[hard]).tolist())
    message = "no weight that may change matters to these examples"
    return LinearAnswer(Status.INFEASIBLE, None, np.nan, np.inf, conflict, message)


def _used(program: ReluProgram) -> Integers:
    """Unknowns that appear in a row or a cell and may move."""
    columns = np.concatenate([program.pre.indices, sp.csr_matrix(program.rows.matrix).indices])
    found = np.unique(columns).astype(np.int64)
    found = found[found < program.unknowns]
    return found[program.upper[found] > program.lower[found]]


@dataclass(frozen=True, eq=False)
class _Columns:
    """Unknowns d (those used), cells a and their binaries s, and rows over them."""

    unknowns: Unknowns
    builder: RowBuilder
    column: Integers

    @classmethod
    def of(cls, program: ReluProgram, used: Integers) -> _Columns:
        p, k = program.unknowns, program.cells
        if not (np.isfinite(program.low).all() and np.isfinite(program.high).all()):
            raise SolverError("mixed-integer program: cells without finite bounds; give a budget")
        unknowns = Unknowns()
        d = unknowns.add("d", (len(used),), program.lower[used], program.upper[used])
        a = unknowns.add("a", (k,), 0.0, np.maximum(program.high, 0.0))
        unknowns.add("s", (k,), 0.0, 1.0)
        column = np.full(p + k, -1, dtype=np.int64)
        column[used], column[p:] = d.columns, a.columns
        return cls(unknowns, RowBuilder(), column)

    def place(self, opened: Integers, matrix: sp.csr_matrix, sign: float) -> None:
        """Add ``sign * matrix`` over (d, a) to opened rows."""
        coo = matrix.tocoo()
        kept = self.column[coo.col] >= 0
        entries = sign * coo.data[kept]
        self.builder.add(opened[coo.row[kept]], self.column[coo.col[kept]], entries)

    def add_cells(self, program: ReluProgram) -> None:
        """Rows that tie every cell to its argument."""
        if not program.cells:
            return
        builder, a, s = self.builder, self.unknowns["a"], self.unknowns["s"]
        below = builder.ge(program.const)  # a - z >= 0
        builder.add(below, a.columns, 1.0)
        self.place(below, program.pre, -1.0)
        above = builder.ge(program.low - program.const)  # z - a - low (1 - s) >= 0
        self.place(above, program.pre, 1.0)
        builder.add(above, a.columns, -1.0)
        builder.add(above, s.columns, program.low)
        on = builder.ge(np.zeros(program.cells))  # high s - a >= 0
        builder.add(on, s.columns, program.high)
        builder.add(on, a.columns, -1.0)


def maximize_row(
    program: ReluProgram, row: int, *, time_limit: float | None, threads: int | None
) -> tuple[float, Floats | None]:
    """The largest value of one of a program's rows, the others left out.

    Args:
        program: with finite bounds.
        row: which one of ``program.rows``.
        time_limit: seconds.
        threads: CPU threads.

    Returns:
        The solver's upper bound of ``rows[row] @ (d, a) - rhs[row]``, infinite where it has none,
        and the unknowns (p,) of the best point it found, or None.

    Soundness: the bound is HiGHS's claim, within its tolerances; the point's value is not used.
    """
    used = np.arange(program.unknowns)
    columns = _Columns.of(program, used)
    columns.add_cells(program)
    matrix = sp.csr_matrix(program.rows.matrix)[[row]].tocoo()
    cost = np.zeros(columns.unknowns.count)
    np.subtract.at(cost, columns.column[matrix.col], matrix.data)
    integer = np.zeros(columns.unknowns.count, dtype=bool)
    integer[columns.unknowns["s"].columns] = True
    problem = LinearProgram(
        cost,
        columns.builder.build(columns.unknowns.count),
        columns.unknowns.lower,
        columns.unknowns.upper,
        integer if program.cells else None,
    )
    solution = solve(problem, time_limit=time_limit, threads=threads)
    bound = -solution.dual_bound if np.isfinite(solution.dual_bound) else np.inf
    sure = solution.status in (Status.OPTIMAL, Status.FEASIBLE, Status.TIME_LIMIT)
    d = None if solution.x is None else solution.x[: program.unknowns]
    return float(bound - program.rows.rhs[row]) if sure else np.inf, d


def _assemble(
    program: ReluProgram,
    used: Integers,
    norm: PointNorm,
    soft: NDArray[np.bool_] | None,
    weight: float,
) -> LinearProgram:
    columns = _Columns.of(program, used)
    unknowns, builder, d = columns.unknowns, columns.builder, columns.unknowns["d"]
    opened = builder.ge(program.rows.rhs)
    columns.place(opened, sp.csr_matrix(program.rows.matrix), 1.0)
    cost = np.zeros(0)
    if soft is not None and bool(soft.any()):
        slack = unknowns.add("slack", (int(soft.sum()),), 0.0)
        builder.add(opened[soft], slack.columns, 1.0)
        cost = np.full(slack.size, weight)
    columns.add_cells(program)
    rows = builder.build(unknowns.count)
    integer = np.zeros(unknowns.count, dtype=bool)
    integer[unknowns["s"].columns] = True
    if norm is PointNorm.L0:
        return _count(unknowns, rows, integer, program, used, cost)
    kind = LinearNorm.L1 if norm is PointNorm.L1 else LinearNorm.LINF
    plain = minimize_norm(unknowns, rows, d.columns, norm=kind)
    objective = plain.cost.copy()
    if len(cost):
        objective[unknowns["slack"].columns] = cost
    mask = np.concatenate([integer, np.zeros(plain.columns - len(integer), dtype=bool)])
    return replace(plain, cost=objective, integer=mask if program.cells else None)


def _count(
    unknowns: Unknowns,
    rows: LinearRows,
    integer: NDArray[np.bool_],
    program: ReluProgram,
    used: Integers,
    slack_cost: Floats,
) -> LinearProgram:
    """Binaries that say which weights change."""
    reach = program.upper[used]
    if not np.isfinite(reach).all():
        raise SolverError("norm '0': got no budget; expected the largest change of one weight")
    q = unknowns.add("q", (len(used),), 0.0, 1.0)
    builder = RowBuilder()
    for sign in (-1.0, 1.0):  # reach q -+ d >= 0
        opened = builder.ge(np.zeros(len(used)))
        builder.add(opened, q.columns, reach)
        builder.add(opened, unknowns["d"].columns, sign)
    cost = np.zeros(unknowns.count)
    cost[q.columns] = 1.0
    if len(slack_cost):
        cost[unknowns["slack"].columns] = slack_cost
    mask = np.concatenate([integer, np.ones(len(used), dtype=bool)])
    joined = LinearRows.stack([rows, builder.build(unknowns.count)], unknowns.count)
    return LinearProgram(cost, joined, unknowns.lower, unknowns.upper, mask)


def _conflict(program: ReluProgram, solution: Solution) -> tuple[int, ...]:
    """Owners of the rows that the Farkas ray uses."""
    owners = program.owner
    if solution.ray is not None:
        ray = np.abs(solution.ray[: program.rows.count])
        if ray.max(initial=0.0) > 0:
            owners = owners[ray > 1e-9 * ray.max()]
    return tuple(np.unique(owners).tolist())
