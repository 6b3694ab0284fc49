"""Safe sets of outputs in conjunctive form, and the property that pairs one with a region."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torch_prepared.certify import PropertyRecord
from torch_prepared.errors import SpecError
from torch_prepared.specs._base import InputSet, RealVector, as_vector

__all__ = ["MAX_CLAUSES", "Property", "SafeSet"]

MAX_CLAUSES = 10_000
"""Most clauses or disjuncts that one safe set is expanded to."""

Clause = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class SafeSet:
    r"""Outputs y (flattened row-major, m) that satisfy every one of some clauses.

    y is safe iff in every clause (A, b) some row i has :math:`A_i \cdot y + b_i > 0`
    (:math:`\ge 0` when not ``strict``).

    Args:
        clauses: pairs of rows (r, m) and offset (r,), finite; stored as float64 copies on the CPU.
        strict: whether a row must be positive or only not negative.

    Raises:
        SpecError: no clause, a clause without rows, unequal widths, a row of zeros, or NaN or
            infinite entries.

    Example:
        >>> import torch
        >>> safe = SafeSet.argmax(1, classes=3)
        >>> safe.contains(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])).tolist()
        [True, False]
    """

    clauses: tuple[Clause, ...]
    strict: bool = True
    _rows: Tensor = field(init=False, repr=False)
    _offset: Tensor = field(init=False, repr=False)
    _index: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check and copy the clauses; pack them for :meth:`margin`."""
        clauses = tuple(_checked_clause(*clause, k) for k, clause in enumerate(self.clauses))
        if not clauses:
            raise SpecError("SafeSet: got no clauses; expected at least one")
        widths = {rows.shape[1] for rows, _ in clauses}
        if len(widths) > 1:
            raise SpecError(f"SafeSet: got clauses over {sorted(widths)} outputs; expected one m")
        longest = max(len(offset) for _, offset in clauses)
        starts = itertools.accumulate((len(offset) for _, offset in clauses), initial=0)
        index = [
            [start + min(row, len(offset) - 1) for row in range(longest)]
            for start, (_, offset) in zip(starts, clauses, strict=False)
        ]
        object.__setattr__(self, "clauses", clauses)
        object.__setattr__(self, "_rows", torch.cat([rows for rows, _ in clauses]))
        object.__setattr__(self, "_offset", torch.cat([offset for _, offset in clauses]))
        object.__setattr__(self, "_index", torch.tensor(index))

    @classmethod
    def from_polytopes(
        cls, polytopes: Sequence[tuple[RealVector, RealVector]], strict: bool = False
    ) -> SafeSet:
        r"""The union of polytopes :math:`\{y : A y \le b\}` (:math:`<` when ``strict``).

        Distributed to clauses: one per choice of a row from every polytope.

        Raises:
            SpecError: malformed polytopes, or more than ``MAX_CLAUSES`` clauses.
        """
        if not polytopes:
            raise SpecError("SafeSet.from_polytopes: got no polytopes; expected at least one")
        halves = [_negated(*polytope, index) for index, polytope in enumerate(polytopes)]
        count = math.prod(len(offset) for _, offset in halves)
        if count > MAX_CLAUSES:
            raise SpecError(
                f"SafeSet.from_polytopes: got a union that expands to {count} clauses; expected at "
                f"most {MAX_CLAUSES}; drop redundant rows or split the property"
            )
        if len({rows.shape[1] for rows, _ in halves}) > 1:
            raise SpecError("SafeSet.from_polytopes: the polytopes differ in the number of outputs")
        picks = itertools.product(*(range(len(offset)) for _, offset in halves))
        clauses = tuple(
            (
                torch.stack([rows[i] for i, (rows, _) in zip(pick, halves, strict=True)]),
                torch.stack([offset[i] for i, (_, offset) in zip(pick, halves, strict=True)]),
            )
            for pick in picks
        )
        return cls(clauses, strict)

    @classmethod
    def polytope(cls, rows: RealVector, bound: RealVector, strict: bool = False) -> SafeSet:
        r"""One polytope :math:`\{y : A y \le b\}`; rows (k, m), bound (k,)."""
        return cls.from_polytopes([(rows, bound)], strict)

    @classmethod
    def argmax(cls, label: int, classes: int) -> SafeSet:
        """Output ``label`` is strictly larger than each of the other ``classes - 1``.

        Raises:
            SpecError: fewer than two classes, or a label outside of 0 to classes - 1.
        """
        return cls._extreme(label, classes, 1.0)

    @classmethod
    def argmin(cls, label: int, classes: int) -> SafeSet:
        """Output ``label`` is strictly smaller than every other; see :meth:`argmax`."""
        return cls._extreme(label, classes, -1.0)

    @classmethod
    def interval(cls, lower: Sequence[float], upper: Sequence[float]) -> SafeSet:
        """``lower <= y <= upper`` in every coordinate; infinite ends constrain nothing.

        Raises:
            SpecError: unequal sizes, NaN, lower > upper, or no finite end at all.
        """
        if len(lower) != len(upper):
            raise SpecError(
                f"SafeSet.interval: got {len(lower)} lower and {len(upper)} upper ends; expected "
                "equally many"
            )
        clauses: list[Clause] = []
        for index, (low, high) in enumerate(zip(lower, upper, strict=True)):
            if not low <= high:
                raise SpecError(
                    f"SafeSet.interval: got [{low}, {high}] at index {index}; expected an interval"
                )
            for sign, end in ((1.0, -float(low)), (-1.0, float(high))):
                if end != math.inf:
                    row = torch.zeros(1, len(lower), dtype=torch.float64)
                    row[0, index] = sign
                    clauses.append((row, torch.tensor([end], dtype=torch.float64)))
        if not clauses:
            raise SpecError("SafeSet.interval: got no finite end; expected at least one")
        return cls(tuple(clauses), strict=False)

    @property
    def size(self) -> int:
        """Number m of scalars in one output."""
        return int(self._rows.shape[1])

    def polytopes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The disjuncts: rows (k, m) and offset (k,), one row picked from each of k clauses.

        The safe set is the union over them of ``{y : rows @ y + offset > 0}`` (``>= 0``).

        Raises:
            SpecError: there are more than ``MAX_CLAUSES`` of them.
        """
        count = math.prod(len(offset) for _, offset in self.clauses)
        if count > MAX_CLAUSES:
            raise SpecError(
                f"SafeSet.polytopes: got {count} disjuncts; expected at most {MAX_CLAUSES}; choose "
                "a row per clause instead of listing them"
            )
        for pick in itertools.product(*(range(len(offset)) for _, offset in self.clauses)):
            chosen = list(zip(pick, self.clauses, strict=True))
            yield (
                torch.stack([rows[i] for i, (rows, _) in chosen]),
                torch.stack([offset[i] for i, (_, offset) in chosen]),
            )

    def margin(self, y: Tensor) -> Tensor:
        """Least over the clauses of the largest ``rows @ y + offset``: (..., m) to (...).

        In the dtype and on the device of ``y``, differentiable in it, with ordinary rounding. y
        is safe iff the exact value is positive (not negative when not ``strict``). NaN in y gives
        NaN.

        Raises:
            SpecError: the last axis of ``y`` is not m long.
        """
        if y.dim() == 0 or y.shape[-1] != self.size:
            raise SpecError(
                f"SafeSet: got y of shape {tuple(y.shape)}; expected (..., {self.size})"
            )
        rows, offset = self._rows.to(y), self._offset.to(y)
        values = y @ rows.T + offset
        return values[..., self._index.to(y.device)].amax(dim=-1).amin(dim=-1)

    def contains(self, y: Tensor) -> Tensor:
        """Whether outputs (..., m) are safe, by the float64 margin: bool (...); NaN is unsafe."""
        margin = self.margin(y.detach().to(torch.float64))
        return margin > 0 if self.strict else margin >= 0

    def record(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """The clauses as NumPy copies, for the checker."""
        return tuple((rows.numpy().copy(), off.numpy().copy()) for rows, off in self.clauses)

    @classmethod
    def _extreme(cls, label: int, classes: int, sign: float) -> SafeSet:
        if classes < 2 or not 0 <= label < classes:
            raise SpecError(
                f"SafeSet: got label {label} of {classes} classes; expected at least two classes "
                "and a label from 0 to classes - 1"
            )
        rows = -sign * torch.eye(classes, dtype=torch.float64)
        rows[:, label] = sign
        zero = torch.zeros(1, dtype=torch.float64)
        return cls(tuple((rows[k : k + 1], zero) for k in range(classes) if k != label))


@dataclass(frozen=True, eq=False)
class Property:
    """For all x of ``region`` the network's flattened output lies in ``safe``."""

    region: InputSet
    safe: SafeSet
    name: str = "property"

    def record(self) -> PropertyRecord:
        """What the independent checker sees."""
        return PropertyRecord(
            self.region.record(), self.safe.record(), strict=self.safe.strict, name=self.name
        )

    def check_against(self, input_size: int, output_size: int) -> None:
        """Refuse networks of other sizes.

        Raises:
            SpecError: the network's input or output has another number of scalars.
        """
        if self.region.size != input_size:
            raise SpecError(
                f"property '{self.name}': got a region of {self.region.size} inputs; expected "
                f"{input_size}, as the network has; check that they belong together"
            )
        if self.safe.size != output_size:
            raise SpecError(
                f"property '{self.name}': got a safe set of {self.safe.size} outputs; expected "
                f"{output_size}, as the network has; check that they belong together"
            )


def _checked_clause(rows: Tensor, offset: Tensor, index: int) -> Clause:
    """Private float64 copies of one clause, shapes and values checked."""
    shape = tuple(rows.shape)
    if len(shape) != 2 or 0 in shape or tuple(offset.shape) != shape[:1]:
        raise SpecError(
            f"SafeSet clause {index}: got rows {shape} and offset {tuple(offset.shape)}; expected "
            "(r, m) and (r,)"
        )
    matrix = as_vector(rows, f"SafeSet clause {index} rows").reshape(shape)
    zero = (matrix == 0).all(dim=1)
    if bool(zero.any()):
        raise SpecError(
            f"SafeSet clause {index}: row {int(zero.nonzero()[0, 0])} is zero; expected a row that "
            "constrains an output"
        )
    return matrix, as_vector(offset, f"SafeSet clause {index} offset")


def _negated(rows: RealVector, bound: RealVector, index: int) -> Clause:
    """Rows and offset of ``bound - rows @ y >= 0``."""
    matrix = torch.as_tensor(rows, dtype=torch.float64, device="cpu")
    vector = as_vector(bound, f"polytope {index} bound")
    if matrix.dim() != 2 or len(matrix) != len(vector):
        raise SpecError(
            f"polytope {index}: got rows {tuple(matrix.shape)} and {len(vector)} bounds; expected "
            "(k, m) and k"
        )
    return -matrix, vector
