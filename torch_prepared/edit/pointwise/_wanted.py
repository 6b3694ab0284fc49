"""What an edit must reach, and lazily generated rows: solve few, look at all, add those missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torch_prepared.certify import PointClaims
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.rows import Floats
from torch_prepared.edit.pointwise._examples import best_rows, row_values
from torch_prepared.edit.pointwise._layer import FreeLayer
from torch_prepared.solvers import Status

__all__ = ["Found", "Wanted", "solve_lazily"]

Integers = NDArray[np.int64]
TOLERANCE = 1e-7
ROUNDS = 40
MOST_NEW = 400


@dataclass(frozen=True, eq=False)
class Wanted:
    """Examples to edit, then examples to keep, in one set of claims.

    Args:
        claims: points 0 to ``edits - 1`` are to be edited, later ones kept.
        rows: positions of the rows that are asked for, one per point and clause.
        required: (len(rows),) value to reach.
        edits: number of points to edit.
        softness: inverse weight of a kept row's shortfall; None forbids it.
    """

    claims: PointClaims
    rows: Integers
    required: Floats
    edits: int
    softness: float | None

    @classmethod
    def of(
        cls,
        layer: FreeLayer,
        edits: PointClaims,
        keeps: PointClaims | None,
        margin: float,
        keep_weight: float | None,
    ) -> Wanted:
        """Rows of ``edits`` reach ``margin``; rows of ``keeps`` do not fall below it or below now.

        A kept row that is not above the margin must not fall further, so that the unchanged
        network satisfies all kept rows.
        """
        claims = edits if keeps is None else _join(edits, keeps)
        values = row_values(claims, layer.run(layer.prefix(claims.inputs)))
        rows = best_rows(claims, values)
        kept = claims.point[rows] >= len(edits.inputs)
        required = np.where(kept, np.minimum(margin, values[rows]), margin)
        softness = None if keep_weight is None else 1.0 / keep_weight
        return cls(claims, rows, required, len(edits.inputs), softness)

    @property
    def soft(self) -> NDArray[np.bool_]:
        """(len(rows),) which rows may fall short."""
        kept = self.claims.point[self.rows] >= self.edits
        return kept & (self.softness is not None)


@dataclass(frozen=True)
class Found:
    """A claimed change (p,), or why there is none."""

    status: Status
    d: Floats | None
    conflict: tuple[int, ...] = ()
    size: float = float("nan")
    bound: float = float("nan")
    message: str = ""
    rounds: int = 0
    active: int = 0


Step = Callable[[Integers], Found]
"""Solves for the rows at positions (within ``Wanted.rows``) that it is given."""


def solve_lazily(layer: FreeLayer, wanted: Wanted, step: Step, deadline: Deadline) -> Found:
    """Solve with the rows that are violated, add those that the answer violates, repeat.

    Infeasibility of some rows is infeasibility of all, so it is reported at once.
    """
    prefix = layer.prefix(wanted.claims.inputs)
    active = np.zeros(len(wanted.rows), dtype=bool)
    slack = TOLERANCE * (1.0 + np.abs(wanted.required))
    found = Found(Status.OPTIMAL, np.zeros(layer.count), size=0.0, bound=0.0)
    for number in range(ROUNDS):
        if found.d is None:
            return found
        outputs = layer.run(prefix, layer.moved(found.d))
        values = row_values(wanted.claims, outputs)[wanted.rows]
        lack = np.where(np.isnan(values), np.inf, wanted.required - values)
        new = np.flatnonzero((lack > slack) & ~active)
        if not len(new):
            return found
        if deadline.over:
            return Found(Status.TIME_LIMIT, None, message="time over while adding rows")
        edited = wanted.claims.point[wanted.rows[new]] < wanted.edits
        order = np.lexsort((-lack[new], ~edited))
        count = max(int(edited.sum()), MOST_NEW)
        active[new[order[:count]]] = True
        answer = step(np.flatnonzero(active))
        found = Found(
            answer.status, answer.d, answer.conflict, answer.size, answer.bound,
            answer.message, number + 1, int(active.sum()),
        )  # fmt: skip
    return Found(Status.UNKNOWN, None, message=f"rows still violated after {ROUNDS} rounds")


def _join(edits: PointClaims, keeps: PointClaims) -> PointClaims:
    return PointClaims(
        np.concatenate([edits.inputs, keeps.inputs]),
        np.concatenate([edits.rows, keeps.rows]),
        np.concatenate([edits.offset, keeps.offset]),
        np.concatenate([edits.point, keeps.point + len(edits.inputs)]),
        np.concatenate([edits.clause, keeps.clause]),
        edits.strict,
    )
