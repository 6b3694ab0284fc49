"""Linear rows over named unknowns: the one currency between relaxations, bounds and solvers.

:class:`Unknowns` gives each named block of scalars a contiguous range of columns,
:class:`RowBuilder` collects coefficients as NumPy arrays (never one Python object per entry) and
:class:`LinearRows` is the frozen result ``matrix @ x >= rhs`` (``==`` where ``equal``). Everything
is float64: a row is exact data about the unknowns, and whoever derives it decides how to round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from torch_prepared.errors import SolverError

__all__ = ["Block", "Floats", "LinearRows", "RowBuilder", "Unknowns"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """One named array of unknowns: columns ``start .. start + size - 1`` in row-major order."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of scalar unknowns."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def stop(self) -> int:
        """One past the last column."""
        return self.start + self.size

    @property
    def columns(self) -> Integers:
        """Column of every unknown, int64, of the block's shape (a fresh array)."""
        return np.arange(self.start, self.stop, dtype=np.int64).reshape(self.shape)


class Unknowns:
    """Ordered, named blocks of scalar unknowns with bounds; blocks are only ever appended.

    Example:
        >>> unknowns = Unknowns()
        >>> weight = unknowns.add("weight", (2, 3))
        >>> norm = unknowns.add("norm", lower=0.0)
        >>> unknowns.count, weight.columns[1].tolist(), norm.start
        (7, [3, 4, 5], 6)
    """

    def __init__(self) -> None:
        self._blocks: dict[str, Block] = {}
        self._lower: list[Floats] = []
        self._upper: list[Floats] = []
        self._count = 0

    def add(
        self,
        name: str,
        shape: Sequence[int] = (),
        lower: ArrayLike = -np.inf,
        upper: ArrayLike = np.inf,
    ) -> Block:
        """Append a block and return its columns.

        Args:
            name: a new, unique name.
            shape: the block's shape; ``()`` is one scalar.
            lower: bounds broadcast to ``shape``; ``-inf`` leaves a side open.
            upper: likewise, ``+inf`` open.

        Raises:
            SolverError: the name exists, a bound is NaN, does not broadcast, or lower > upper.
        """
        if name in self._blocks:
            raise SolverError(f"unknown {name!r}: defined twice; expected a new name")
        block = Block(name, tuple(int(n) for n in shape), self._count)
        sides = []
        for side, value in (("lower", lower), ("upper", upper)):
            array = np.asarray(value, dtype=np.float64)
            try:
                array = np.broadcast_to(array, block.shape).ravel()
            except ValueError as error:
                raise SolverError(
                    f"unknown {name!r}: got {side} of shape {array.shape}; expected one that "
                    f"broadcasts to {block.shape}"
                ) from error
            sides.append(np.array(array))
        if not bool(np.all(sides[0] <= sides[1])):
            raise SolverError(
                f"unknown {name!r}: got lower > upper or NaN; expected lower <= upper"
            )
        self._blocks[name] = block
        self._lower.append(sides[0])
        self._upper.append(sides[1])
        self._count = block.stop
        return block

    @property
    def count(self) -> int:
        """Number of scalar unknowns, i.e. of columns."""
        return self._count

    @property
    def lower(self) -> Floats:
        """Lower bound of every column, (p,) (a fresh array)."""
        return np.concatenate([np.empty(0), *self._lower])

    @property
    def upper(self) -> Floats:
        """Upper bound of every column, (p,) (a fresh array)."""
        return np.concatenate([np.empty(0), *self._upper])

    def __getitem__(self, name: str) -> Block:
        try:
            return self._blocks[name]
        except KeyError:
            known = ", ".join(self._blocks) or "none"
            raise SolverError(f"unknown {name!r}: not defined; expected one of: {known}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._blocks

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks.values())

    def __len__(self) -> int:
        return len(self._blocks)

    def split(self, vector: ArrayLike) -> dict[str, Floats]:
        """Arrays by block name from one value per column, (p,) or longer.

        Columns beyond :attr:`count` (a solver's auxiliary columns) are ignored. The arrays are
        copies.

        Raises:
            SolverError: ``vector`` is not one-dimensional or too short.
        """
        values = np.asarray(vector, dtype=np.float64)
        if values.ndim != 1 or len(values) < self._count:
            raise SolverError(
                f"split: got shape {values.shape}; expected one axis of at least {self._count}"
            )
        return {b.name: values[b.start : b.stop].reshape(b.shape).copy() for b in self}


@dataclass(frozen=True, eq=False)
class LinearRows:
    """Rows ``matrix @ x >= rhs``; ``matrix @ x == rhs`` where ``equal``.

    Equalities are a mask and not two opposite rows: opposite rows have no interior, which
    interior-point methods need, they double the entries, and their two multipliers are not unique.

    Args:
        matrix: (k, p) float64; a SciPy sparse matrix (stored as CSR) or a dense array. Neither
            form is ever turned into the other except by :meth:`stack` of mixed parts.
        rhs: (k,) float64, finite. A vacuous row is to be left out.
        equal: (k,) bool; left out means inequalities only.

    Raises:
        SolverError: shapes that do not fit, or an entry that is NaN or infinite.
    """

    matrix: sp.csr_matrix | Floats
    rhs: Floats
    equal: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __post_init__(self) -> None:
        if sp.issparse(self.matrix):
            matrix = sp.csr_matrix(self.matrix, dtype=np.float64)
            if not matrix.has_canonical_format:
                matrix = matrix.copy()
                matrix.sum_duplicates()
            entries: Floats = matrix.data
        else:
            matrix = entries = np.asarray(self.matrix, dtype=np.float64)
        rhs = np.asarray(self.rhs, dtype=np.float64)
        equal = np.asarray(self.equal, dtype=bool)
        if not equal.size:
            equal = np.zeros(rhs.shape, dtype=bool)
        fits = matrix.ndim == 2 and rhs.ndim == 1 and equal.shape == rhs.shape
        if not fits or matrix.shape[0] != len(rhs):
            raise SolverError(
                f"rows: got matrix {matrix.shape}, rhs {rhs.shape}, equal {equal.shape}; "
                "expected (k, p), (k,), (k,)"
            )
        if not (bool(np.isfinite(entries).all()) and bool(np.isfinite(rhs).all())):
            raise SolverError(
                "rows: got NaN or infinite entries; expected finite ones; leave vacuous rows out "
                "and check the bounds the rows come from"
            )
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "rhs", rhs)
        object.__setattr__(self, "equal", equal)

    @staticmethod
    def empty(columns: int) -> LinearRows:
        """No rows over ``columns`` unknowns."""
        return LinearRows(sp.csr_matrix((0, columns)), np.empty(0))

    @staticmethod
    def stack(parts: Sequence[LinearRows], columns: int | None = None) -> LinearRows:
        """All rows of ``parts`` in order; dense only when every part is.

        Args:
            parts: rows over the same columns, or over a first part of them: unknowns are only
                ever appended, so earlier rows have coefficient zero in later columns.
            columns: columns of the result; the widest part's when None.
        """
        width = max([p.columns for p in parts], default=0) if columns is None else columns
        if not parts:
            return LinearRows.empty(width)
        wide = [part.widen(width) for part in parts]
        dense = all(isinstance(part.matrix, np.ndarray) for part in wide)
        join = np.concatenate if dense else _stack_sparse
        return LinearRows(
            join([part.matrix for part in wide]),
            np.concatenate([part.rhs for part in wide]),
            np.concatenate([part.equal for part in wide]),
        )

    @property
    def count(self) -> int:
        """Number of rows, k."""
        return len(self.rhs)

    @property
    def columns(self) -> int:
        """Number of unknowns, p."""
        return int(self.matrix.shape[1])

    @property
    def entries(self) -> int:
        """Stored coefficients."""
        return int(self.matrix.size if isinstance(self.matrix, np.ndarray) else self.matrix.nnz)

    def widen(self, columns: int) -> LinearRows:
        """The same rows over ``columns >= self.columns`` unknowns, zero in the new ones."""
        extra = columns - self.columns
        if extra < 0:
            raise SolverError(f"rows: got {columns} columns; expected at least {self.columns}")
        if extra == 0:
            return self
        if isinstance(self.matrix, np.ndarray):
            matrix = np.pad(self.matrix, ((0, 0), (0, extra)))
        else:
            m = self.matrix
            matrix = sp.csr_matrix((m.data, m.indices, m.indptr), shape=(self.count, columns))
        return LinearRows(matrix, self.rhs, self.equal)

    def select(self, index: NDArray[np.bool_] | Integers) -> LinearRows:
        """The rows chosen by a mask (k,) or by positions, in that order."""
        return LinearRows(self.matrix[index], self.rhs[index], self.equal[index])

    def violation(self, x: ArrayLike) -> Floats:
        """How far each row is from holding at ``x`` (p,): 0 where it holds, (k,).

        ``max(0, rhs - matrix @ x)``, or ``|rhs - matrix @ x|`` for an equality, in ordinary
        float64 arithmetic. A NaN counts as ``inf``, never as a row that holds.
        """
        gap = self.rhs - self.matrix @ np.asarray(x, dtype=np.float64)
        lack = np.where(self.equal, np.abs(gap), np.maximum(gap, 0.0))
        return np.where(np.isnan(lack), np.inf, lack)


def _stack_sparse(matrices: Sequence[sp.csr_matrix | Floats]) -> sp.csr_matrix:
    return sp.vstack([sp.csr_matrix(m) for m in matrices], format="csr")


class RowBuilder:
    """Collects the entries of a sparse :class:`LinearRows` array by array.

    First ask for rows (:meth:`ge`, :meth:`eq`), which gives their numbers in the shape of the
    right-hand side; then add coefficients with :meth:`add`, whose arguments broadcast. Entries at
    the same place are summed. The cost is a few NumPy copies of each array.

    Example:
        >>> unknowns = Unknowns()
        >>> w, v = unknowns.add("w", (2, 3)), unknowns.add("v", (2, 3))
        >>> builder = RowBuilder()
        >>> rows = builder.ge(np.zeros((2, 3)))           # v_ij - h_j w_ij >= 0
        >>> builder.add(rows, v.columns, 1.0)
        >>> builder.add(rows, w.columns, -np.array([0.5, 1.0, 2.0]))
        >>> builder.build(unknowns.count).matrix.shape
        (6, 12)
    """

    def __init__(self) -> None:
        self._rows: list[Integers] = []
        self._columns: list[Integers] = []
        self._values: list[Floats] = []
        self._rhs: list[Floats] = []
        self._equal: list[NDArray[np.bool_]] = []
        self._count = 0

    @property
    def count(self) -> int:
        """Number of rows asked for so far."""
        return self._count

    def ge(self, rhs: ArrayLike) -> Integers:
        """Open rows ``... >= rhs``; returns their numbers, int64, of the shape of ``rhs``."""
        return self._open(rhs, equal=False)

    def eq(self, rhs: ArrayLike) -> Integers:
        """Open rows ``... == rhs``; returns their numbers, int64, of the shape of ``rhs``."""
        return self._open(rhs, equal=True)

    def _open(self, rhs: ArrayLike, *, equal: bool) -> Integers:
        values = np.array(rhs, dtype=np.float64)
        first, self._count = self._count, self._count + values.size
        self._rhs.append(values.ravel())
        self._equal.append(np.full(values.size, equal))
        return np.arange(first, self._count, dtype=np.int64).reshape(values.shape)

    def add(self, rows: ArrayLike, columns: ArrayLike, values: ArrayLike) -> None:
        """Add ``values`` at ``(rows, columns)``; the three broadcast against each other."""
        r, c, v = np.broadcast_arrays(
            np.asarray(rows, dtype=np.int64),
            np.asarray(columns, dtype=np.int64),
            np.asarray(values, dtype=np.float64),
        )
        self._rows.append(r.flatten())
        self._columns.append(c.flatten())
        self._values.append(v.flatten())

    def build(self, columns: int) -> LinearRows:
        """The rows over ``columns`` unknowns; exact zeros are dropped.

        Raises:
            SolverError: an entry outside the opened rows or the columns, or one that is not finite.
        """
        rows = np.concatenate([np.empty(0, dtype=np.int64), *self._rows])
        cols = np.concatenate([np.empty(0, dtype=np.int64), *self._columns])
        values = np.concatenate([np.empty(0), *self._values])
        for axis, index, size in (("row", rows, self._count), ("column", cols, columns)):
            if index.size and not (0 <= int(index.min()) and int(index.max()) < size):
                raise SolverError(
                    f"rows: got an entry in {axis} {int(index.max())} (smallest "
                    f"{int(index.min())}); expected 0 to {size - 1}"
                )
        matrix = sp.csr_matrix((values, (rows, cols)), shape=(self._count, columns))
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return LinearRows(
            matrix,
            np.concatenate([np.empty(0), *self._rhs]),
            np.concatenate([np.empty(0, dtype=bool), *self._equal]),
        )
