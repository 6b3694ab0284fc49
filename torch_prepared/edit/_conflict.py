"""Properties that no network satisfies together, whatever its weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from torch_prepared.core.rows import LinearRows
from torch_prepared.solvers import LinearProgram, Status, solve
from torch_prepared.specs import Property

__all__ = ["find_conflicts"]

MOST_PROGRAMS = 400
MOST_PROPERTIES = 2000
ENOUGH, TOUCHING = 1e-9, -1e-6
"""Margins, in units of a row's largest coefficient, above which sets meet: strict or not."""


def find_conflicts(properties: Sequence[Property]) -> tuple[tuple[str, str], ...]:
    """Pairs of properties with a common input and without a common safe output.

    At an input x of both regions any network's ``f(x)`` must lie in both safe sets, so where these
    do not meet no choice of weights helps. Whether they meet is one linear program per pair of
    disjuncts: maximize the least margin t over all outputs y. Only conflicts that a solver shows
    are named; at most 400 programs are solved, and larger groups that contradict each other only
    together are not looked for.

    Args:
        properties: b of them, on one network.

    Returns:
        Names of both properties of each conflict.
    """
    found, budget = [], MOST_PROGRAMS
    for first, second in _overlapping(properties):
        count = math.prod(len(offset) for p in (first, second) for _, offset in p.safe.clauses)
        if budget <= 0:
            break
        if count > budget:
            continue
        budget -= count
        if not _meet(first, second):
            found.append((first.name, second.name))
    return tuple(found)


def _overlapping(properties: Sequence[Property]) -> Iterator[tuple[Property, Property]]:
    """Pairs whose regions share the middle of their boxes' intersection."""
    if not 1 < len(properties) <= MOST_PROPERTIES:
        return
    lower = torch.stack([p.region.lower for p in properties])
    upper = torch.stack([p.region.upper for p in properties])
    for i, first in enumerate(properties[:-1]):
        low, high = torch.maximum(lower[i], lower[i + 1 :]), torch.minimum(upper[i], upper[i + 1 :])
        for j in (low <= high).all(dim=1).nonzero().flatten().tolist():
            second = properties[i + 1 + j]
            middle = torch.clamp((low[j] + high[j]) / 2, low[j], high[j])[None]
            if bool(first.region.contains(middle) & second.region.contains(middle)):
                yield first, second


def _meet(first: Property, second: Property) -> bool:
    """Whether the safe sets have a common output, as far as a solver can tell."""
    strict = first.safe.strict or second.safe.strict
    enough = ENOUGH if strict else TOUCHING
    for (a, s), (b, t) in itertools.product(first.safe.polytopes(), second.safe.polytopes()):
        best = _best_margin(torch.cat([a, b]), torch.cat([s, t]))
        if best is None or best > enough:
            return True
    return False


def _best_margin(rows: Tensor, offset: Tensor) -> float | None:
    """The largest t <= 1 with ``rows @ y + offset >= t`` for some y, rows scaled to size one.

    None where the solver is not sure.
    """
    scale = rows.abs().amax(dim=1)
    rows, offset = rows / scale[:, None], offset / scale
    matrix = np.concatenate([rows.numpy(), -np.ones((len(rows), 1))], axis=1)
    columns = matrix.shape[1]
    open_ends = np.full(columns, np.inf)
    upper = np.append(open_ends[:-1], 1.0)
    cost = np.append(np.zeros(columns - 1), -1.0)
    answer = solve(
        LinearProgram(cost, LinearRows(matrix, -offset.numpy()), -open_ends, upper), time_limit=5.0
    )
    if answer.status is not Status.OPTIMAL or answer.x is None:
        return None
    return float(answer.x[-1])
