"""The smallest sufficient set: a mixed-integer program whose rows are found as they are needed.

Minimize the number of kept features subject to cuts that every sufficient set satisfies. A
minimizer that the bounds call sufficient is a smallest set; else it gives new cuts (box and
zonotope proofs: always violated ones; CROWN: those of concrete inputs, or the exclusion of that
one set).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.core.rows import LinearRows
from torch_prepared.interpret._query import Query
from torch_prepared.interpret._search import Found
from torch_prepared.solvers import HighsSolver, LinearProgram, Status

__all__ = ["exact_search"]

_MAX_ROUNDS = 400
_MAX_EXCLUSIONS = 50
_MAX_PAIRS = 6000
_BATCH = 512
_CLEAR = 1e-5  #: violation of a scaled row that a solver cannot overlook


def exact_search(query: Query, start: Found, ordered: Tensor, deadline: Deadline) -> Found:
    """A smallest sufficient set, or ``start`` with the best lower bound that time allowed.

    Args:
        query: the reduced proofs.
        start: a sufficient set.
        ordered: (c,) the features that the proof uses.
        deadline: when to stop.

    Soundness: that no smaller set exists is HiGHS's claim, in floating point; sufficiency is not.
    """
    if start.count <= 1:  # the empty set was tried
        return start if start.count == 0 else _with(start, fewest=1)
    for size in (1, 2):
        if start.count <= size:
            return _with(start, fewest=start.count)
        masks = _all_of_size(query.features.size, ordered, size)
        if masks is None:
            break
        for part in torch.split(masks, _BATCH):
            if deadline.over:
                return _with(start, fewest=size, complete=False)
            fine = query.sufficient(part).nonzero().flatten()
            if len(fine):
                return Found(part[fine[0]], irreducible=True, fewest=size)
        start = _with(start, fewest=size + 1)
    return _branch_and_cut(query, start, ordered, deadline)


def _branch_and_cut(query: Query, start: Found, ordered: Tensor, deadline: Deadline) -> Found:
    everything = torch.zeros(query.features.size, dtype=torch.bool, device=ordered.device)
    everything[ordered] = True
    pool = _Pool(query, ordered)
    for mask in (everything, start.mask, torch.zeros_like(everything)):
        pool.add_cuts(mask)
    fewest, exclusions = start.fewest, 0
    for _ in range(_MAX_ROUNDS):
        if fewest >= start.count:
            return _with(start, fewest=start.count)
        if deadline.over:
            break
        solution = HighsSolver(mip_gap=0.0).solve(pool.program(fewest), time_limit=deadline.limit())
        if solution.status is Status.INFEASIBLE:
            break  # impossible as ``start`` is feasible, but for rounding: claim nothing
        if math.isfinite(solution.dual_bound):
            fewest = max(fewest, math.ceil(solution.dual_bound - 1e-6))
        if solution.x is None or solution.status is not Status.OPTIMAL:
            break
        mask = torch.zeros_like(everything)
        mask[ordered[torch.from_numpy(solution.x > 0.5).to(ordered.device)]] = True
        if bool(query.sufficient(mask[None])[0]):
            return Found(mask, irreducible=int(mask.sum()) <= fewest, fewest=fewest)
        if not pool.add_cuts(mask):
            exclusions += 1
            if exclusions > _MAX_EXCLUSIONS:
                break
            pool.exclude(mask)
    return _with(start, fewest=min(fewest, start.count), complete=False)


class _Pool:
    """Rows of the program over the candidate features ``ordered`` (c,)."""

    def __init__(self, query: Query, ordered: Tensor) -> None:
        self._query, self._ordered = query, ordered
        self._rows: list[np.ndarray] = []
        self._rhs: list[float] = []

    def add_cuts(self, mask: Tensor) -> bool:
        """Add the cuts of ``mask``; whether one of them clearly excludes it."""
        coefficients, constants = self._query.cuts(mask)
        rows = coefficients[:, self._ordered].cpu().numpy()
        need = self._query.features.slack - constants.cpu().numpy()
        chosen, excluded = mask[self._ordered].cpu().numpy(), False
        for row, rhs in zip(rows, need, strict=True):
            scale = float(np.abs(row).max(initial=0.0))
            if not (math.isfinite(scale) and math.isfinite(rhs)) or scale <= 0.0:
                continue
            row, rhs = row / scale, rhs / scale
            excluded |= bool(row @ chosen < rhs - _CLEAR)
            if np.minimum(row, 0.0).sum() < rhs:  # otherwise every set satisfies it
                self._rows.append(row)
                self._rhs.append(rhs)
        return excluded

    def exclude(self, mask: Tensor) -> None:
        """Rule out exactly the set ``mask``."""
        chosen = mask[self._ordered].cpu().numpy()
        self._rows.append(np.where(chosen, -1.0, 1.0))
        self._rhs.append(1.0 - float(chosen.sum()))

    def program(self, fewest: int) -> LinearProgram:
        """Fewest features such that all rows hold; at least ``fewest``."""
        count = len(self._ordered)
        rows = np.stack([*self._rows, np.ones(count)])
        rhs = np.array([*self._rhs, float(fewest)])
        return LinearProgram(
            np.ones(count),
            LinearRows(rows, rhs),
            np.zeros(count),
            np.ones(count),
            integer=np.ones(count, dtype=bool),
        )


def _all_of_size(n: int, ordered: Tensor, size: int) -> Tensor | None:
    """All sets of one or two features as masks (q, n); None when there are too many."""
    if math.comb(len(ordered), size) > _MAX_PAIRS:
        return None
    chosen = torch.combinations(ordered.flip(0), size)
    masks = torch.zeros(len(chosen), n, dtype=torch.bool, device=ordered.device)
    return masks.scatter(1, chosen, True)


def _with(found: Found, fewest: int, complete: bool = True) -> Found:
    smallest = found.count <= fewest
    return Found(found.mask, found.irreducible or smallest, fewest, complete)
