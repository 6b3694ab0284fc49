"""Piecewise-linear programs over weight changes, and their exact solution by an SMT solver.

A :class:`ReluProgram` has unknowns ``d`` and cells ``a_k = max(0, z_k)`` where ``z_k`` is affine in
d and in earlier cells. It is what one edited layer of a ReLU network makes of a finite set of
examples. Z3 decides it in exact rational arithmetic (logic QF_LRA); every float64 coefficient is
taken as the rational number it is. Needs the package ``z3-solver``.

Source: Papusha et al., "Incorrect by Construction: Fine Tuning Neural Networks for Guaranteed
Performance on Finite Sets of Examples" (FoMLAS 2020), for the idea of solving for weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from torch_prepared.core.rows import Floats, LinearRows
from torch_prepared.errors import MissingDependencyError, SolverError
from torch_prepared.solvers._problem import Norm
from torch_prepared.solvers._result import Status

__all__ = ["ReluProgram", "SmtAnswer", "load_z3", "solve_smt"]

_LOOK_EVERY = 0.05  #: seconds between looks at the clock and for Ctrl-C
_GRACE = 1.0  #: seconds past the time limit after which Z3 is told again
_ENDS = 3.0  #: seconds in which Z3 ends when it is told to; else its thread is left behind


@dataclass(frozen=True, eq=False)
class ReluProgram:
    """Find d with ``lower <= d <= upper``, ``a = max(0, pre @ (d, a) + const)``, and rows.

    Args:
        lower: (p,) bounds of the unknowns; ``-inf`` is open.
        upper: (p,).
        pre: (K, p + K); row k has no entry in column ``p + k`` or later.
        const: (K,).
        low: (K,) proved lower bounds of the cells' arguments within the unknowns' bounds.
        high: (K,) upper bounds; needed finite by mixed-integer programs only.
        rows: over p + K columns.
        owner: (rows.count,) int64, the group (an example) of each row.
    """

    lower: Floats
    upper: Floats
    pre: sp.csr_matrix
    const: Floats
    low: Floats
    high: Floats
    rows: LinearRows
    owner: NDArray[np.int64]

    def __post_init__(self) -> None:
        p, k = len(self.lower), len(self.const)
        coo = self.pre.tocoo()
        fits = self.pre.shape == (k, p + k) and self.rows.columns == p + k
        fits &= len(self.upper) == p and len(self.low) == len(self.high) == k
        if not fits or len(self.owner) != self.rows.count or bool((coo.col >= p + coo.row).any()):
            raise SolverError("relu program: shapes that do not fit, or a cell that reads a later")

    @property
    def unknowns(self) -> int:
        """Number of unknowns, p."""
        return len(self.lower)

    @property
    def cells(self) -> int:
        """Number of cells, K."""
        return len(self.const)

    def evaluate(self, d: Floats) -> Floats:
        """Unknowns and the cells that follow from them, (p + K,), in float64."""
        full = np.concatenate([d, np.zeros(self.cells)])
        for k in range(self.cells):
            row = self.pre[[k]]
            full[self.unknowns + k] = max(0.0, float((row @ full)[0]) + self.const[k])
        return full


@dataclass(frozen=True)
class SmtAnswer:
    """An exact answer.

    Args:
        status: ``OPTIMAL``, ``FEASIBLE``, ``INFEASIBLE``, ``TIME_LIMIT`` or ``UNKNOWN``.
        values: the unknowns, exact, or None.
        size: their norm, exact, or None.
        conflict: groups of rows that contradict each other when infeasible (an unsatisfiable core,
            not always a smallest one).
        seconds: wall time.
    """

    status: Status
    values: tuple[Fraction, ...] | None
    size: Fraction | None
    conflict: tuple[int, ...]
    seconds: float


def load_z3() -> Any:
    """The module ``z3``.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import z3
    except ImportError as error:
        raise MissingDependencyError(
            "SMT solving: package z3-solver is not installed; expected it; "
            "pip install torch-prepared[smt]"
        ) from error
    return z3


def solve_smt(
    program: ReluProgram,
    *,
    norm: Norm | None = None,
    budget: float | None = None,
    time_limit: float | None = None,
    tolerance: float = 1e-3,
) -> SmtAnswer:
    """Decide a program exactly, and make the unknowns small when a norm is given.

    Args:
        program: cells' bounds ``low`` and ``high`` are not used.
        norm: ``LINF`` or ``L1`` to minimize; None asks for any solution.
        budget: largest allowed norm (``LINF`` when ``norm`` is None).
        time_limit: seconds.
        tolerance: relative gap at which bisection over the norm stops; the answer is then
            ``OPTIMAL`` in the sense that the norm cannot fall by more than this share.

    Raises:
        MissingDependencyError: z3 is not installed.
        SolverError: another norm.
        KeyboardInterrupt: within seconds of Ctrl-C, wherever Z3 is.
    """
    z3 = load_z3()
    if norm not in (None, Norm.L1, Norm.LINF):
        raise SolverError(f"smt: got norm {norm}; expected '1', 'inf' or None")
    start = time.monotonic()
    search = _Search(z3, program, norm or Norm.LINF, start, time_limit)
    status, best = search.check(None if budget is None else Fraction(budget))
    if status is not Status.FEASIBLE or best is None:
        conflict = search.core() if status is Status.INFEASIBLE else ()
        return SmtAnswer(status, None, None, conflict, time.monotonic() - start)
    if norm is not None:
        status, best = search.shrink(best, Fraction(tolerance))
    size = search.size(best)
    return SmtAnswer(status, best, size, (), time.monotonic() - start)


class _Search:
    """One Z3 solver with the program asserted, groups of rows under their own literals."""

    def __init__(
        self, z3: Any, program: ReluProgram, norm: Norm, start: float, limit: float | None
    ) -> None:
        self._z3, self._program, self._norm = z3, program, norm
        self._start, self._limit = start, limit
        self._context = z3.Context()  # of its own, as a thread left behind may still use it
        self._solver = z3.SolverFor("QF_LRA", ctx=self._context)
        self._solver.set("ctrl_c", False)  # Z3 would take Ctrl-C for its own and say "unknown"
        self._used = _used_unknowns(program)
        self._names = [z3.Real(f"d{i}", self._context) for i in range(program.unknowns)]
        self._values = list(self._names)
        for k in range(program.cells):
            z = self._sum(program.pre, k) + self._number(program.const[k])
            cell = z3.Real(f"a{k}", self._context)
            self._solver.add(cell == z3.If(z >= 0, z, 0))
            self._values.append(cell)
        for i in self._used:
            if np.isfinite(program.lower[i]):
                self._solver.add(self._names[i] >= self._number(program.lower[i]))
            if np.isfinite(program.upper[i]):
                self._solver.add(self._names[i] <= self._number(program.upper[i]))
        self._groups = {
            int(g): z3.Bool(f"g{int(g)}", self._context) for g in np.unique(program.owner)
        }
        matrix = sp.csr_matrix(program.rows.matrix)
        for r in range(program.rows.count):
            left, right = self._sum(matrix, r), self._number(program.rows.rhs[r])
            claim = left == right if program.rows.equal[r] else left >= right
            self._solver.add(z3.Implies(self._groups[int(program.owner[r])], claim))

    def _number(self, value: float) -> Any:
        exact = Fraction(float(value))
        return self._z3.RealVal(str(exact), self._context)

    def _sum(self, matrix: sp.csr_matrix, row: int) -> Any:
        first, last = matrix.indptr[row], matrix.indptr[row + 1]
        terms = [
            self._number(value) * self._values[column]
            for column, value in zip(
                matrix.indices[first:last], matrix.data[first:last], strict=True
            )
        ]
        return self._z3.Sum(terms) if terms else self._number(0.0)

    def _bound(self, size: Fraction) -> list[Any]:
        """Constraints ``norm(d) <= size``."""
        limit = self._z3.RealVal(str(size), self._context)
        names = [self._names[i] for i in self._used]
        if self._norm is Norm.LINF:
            return [c for d in names for c in (d <= limit, -d <= limit)]
        parts = [self._z3.If(d >= 0, d, -d) for d in names]
        return [self._z3.Sum(parts) <= limit] if parts else []

    def check(self, size: Fraction | None) -> tuple[Status, tuple[Fraction, ...] | None]:
        """Whether some d of norm at most ``size`` satisfies everything."""
        left = None
        if self._limit is not None:
            left = self._limit - (time.monotonic() - self._start)
            if left <= 0:
                return Status.TIME_LIMIT, None
            self._solver.set("timeout", max(1, int(1000 * left)))
        self._solver.push()
        if size is not None:
            self._solver.add(*self._bound(size))
        answer = self._decide(None if left is None else left + _GRACE)
        found: tuple[Status, tuple[Fraction, ...] | None] = Status.UNKNOWN, None
        if answer == self._z3.sat:
            found = Status.FEASIBLE, self._model()
        elif answer == self._z3.unsat:
            self._core = {str(c) for c in self._solver.unsat_core()}
            found = Status.INFEASIBLE, None
        elif "timeout" in self._solver.reason_unknown() or left is not None:
            found = Status.TIME_LIMIT, None
        self._solver.pop()
        return found

    def _decide(self, seconds: float | None) -> Any:
        """Z3's answer, from a thread of its own, so that this one hears Ctrl-C and passes it on."""
        answers: list[Any] = []
        failures: list[Exception] = []
        done = threading.Event()  # an interrupted Thread.join takes the thread for ended

        def work() -> None:
            try:
                answers.append(self._solver.check(*self._groups.values()))
            except self._z3.Z3Exception as error:
                failures.append(error)
            finally:
                done.set()

        clock = time.monotonic()
        threading.Thread(target=work, name="z3", daemon=True).start()
        try:
            while not done.wait(_LOOK_EVERY):
                if seconds is not None and time.monotonic() - clock > seconds:
                    self._context.interrupt()
        except BaseException:
            clock = time.monotonic()
            while not done.wait(_LOOK_EVERY) and time.monotonic() - clock < _ENDS:
                self._context.interrupt()
            raise
        if failures:
            raise SolverError(f"z3: gave no answer ({failures[0]})") from failures[0]
        return answers[0]

    def core(self) -> tuple[int, ...]:
        """Groups in the last unsatisfiable core."""
        return tuple(g for g, literal in self._groups.items() if str(literal) in self._core)

    def _model(self) -> tuple[Fraction, ...]:
        model, values = self._solver.model(), [Fraction(0)] * self._program.unknowns
        for i in self._used:
            number = model.eval(self._names[i], model_completion=True)
            values[i] = Fraction(number.numerator_as_long(), number.denominator_as_long())
        return tuple(values)

    def size(self, values: Sequence[Fraction]) -> Fraction:
        """The exact norm."""
        magnitudes = [abs(v) for v in values]
        if self._norm is Norm.LINF:
            return max(magnitudes, default=Fraction(0))
        return sum(magnitudes, Fraction(0))

    def shrink(
        self, best: tuple[Fraction, ...], tolerance: Fraction
    ) -> tuple[Status, tuple[Fraction, ...]]:
        """Bisect the norm between 0 and what was found."""
        low, high = Fraction(0), self.size(best)
        status, zero = self.check(low)
        if status is Status.FEASIBLE and zero is not None:
            return Status.OPTIMAL, zero
        while high - low > tolerance * high:
            middle = Fraction(float((low + high) / 2))
            if not low < middle < high:
                break
            status, found = self.check(middle)
            if status is Status.FEASIBLE and found is not None:
                best, high = found, self.size(found)
            elif status is Status.INFEASIBLE:
                low = middle
            else:
                return Status.FEASIBLE, best
        return Status.OPTIMAL, best


def _used_unknowns(program: ReluProgram) -> list[int]:
    """Unknowns with a coefficient somewhere; the others stay 0."""
    columns = np.concatenate([program.pre.indices, sp.csr_matrix(program.rows.matrix).indices])
    return [int(i) for i in np.unique(columns) if i < program.unknowns]
