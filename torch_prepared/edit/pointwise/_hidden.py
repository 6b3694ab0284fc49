"""One hidden layer: a linear program with the pattern of ReLUs fixed, then a mixed-integer one.

The linear program over the pattern of a proposal gives a first change, whose norm bounds the
weights of any better one; with these bounds most ReLUs cannot switch and need no binary.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import numpy as np
import torch

from torch_prepared.core.deadline import Deadline
from torch_prepared.edit.pointwise._layer import FreeLayer, Prefix
from torch_prepared.edit.pointwise._linear import LinearAnswer, PointNorm, solve_linear
from torch_prepared.edit.pointwise._program import Pattern, build_program
from torch_prepared.edit.pointwise._wanted import Found, Wanted
from torch_prepared.relax import lookup
from torch_prepared.solvers import Norm, Status
from torch_prepared.solvers.smt import solve_smt

__all__ = ["Proposal", "pattern_of", "solve_hidden", "solve_with_z3"]

logger = logging.getLogger(__name__)

MOST_CELLS = 4000
_SMT_NORMS = {PointNorm.LINF: Norm.LINF, PointNorm.L1: Norm.L1}
OWN_SHARE, OTHER_SHARE = 0.15, 0.5  #: of the time, for a pattern
OWN_SECONDS = 15.0  #: at most for the layer's own pattern, where another one can be had
IMPROVE_SECONDS = 20.0  #: for branch and bound when there is an answer already
Proposal = Callable[[], FreeLayer]
"""Makes the layer of a nearby network that satisfies the rows, or comes close."""


def pattern_of(layer: FreeLayer, prefix: Prefix) -> Pattern:
    """Which arguments of ReLUs after the layer are positive."""
    values = layer.values(prefix)
    return {n.name: values[n.inputs[0]] > 0 for n in layer.after if not lookup(n.op).traits.affine}


def solve_hidden(
    layer: FreeLayer,
    wanted: Wanted,
    norm: PointNorm,
    budget: float | None,
    propose: Proposal | None,
    deadline: Deadline,
    threads: int | None,
) -> Found:
    """The smallest change of a hidden layer found in time; ``OPTIMAL`` only when HiGHS proved it.

    Args:
        layer: what may change.
        wanted: all rows are required at once.
        norm: ``LINF``, ``L1`` or ``L0``.
        budget: largest change of one weight.
        propose: for a second pattern, when that of the layer itself admits no change.
        deadline: for everything.
        threads: CPU threads.
    """
    prefix = layer.prefix(wanted.claims.inputs)
    own = deadline.limit(OWN_SHARE)
    if propose is not None:
        own = OWN_SECONDS if own is None else min(own, OWN_SECONDS)
    first = _fixed(layer, layer, prefix, wanted, norm, budget, own, threads)
    if first.d is None and propose is not None and not deadline.over:
        logger.info("own pattern: %s; asking for another", first.message)
        near = propose()
        limit = deadline.limit(OTHER_SHARE)
        first = _fixed(layer, near, prefix, wanted, norm, budget, limit, threads)
    reach = budget if first.d is None else float(np.abs(first.d).max(initial=0.0))
    if norm is PointNorm.L1 and first.d is not None:
        reach = min(first.size, np.inf if budget is None else budget)
    if norm is PointNorm.L0 and budget is not None:
        reach = budget
    if reach is None or not np.isfinite(reach):
        message = "no change found with a fixed pattern; give a budget to search all patterns"
        return Found(Status.UNKNOWN, None, message=message)
    if reach == 0.0 or deadline.over:
        return _found(first)
    program = build_program(
        layer, prefix, wanted.claims, wanted.rows, wanted.required, reach=reach * (1 + 1e-6)
    )
    logger.info("mixed-integer program: %d cells, %d rows", program.cells, program.rows.count)
    if program.cells > MOST_CELLS:
        return _found(first)
    answer = solve_linear(
        program,
        norm,
        soft=wanted.soft,
        weight=0.0 if wanted.softness is None else 1.0 / wanted.softness,
        time_limit=_seconds(deadline, found=first.d is not None),
        threads=threads,
    )
    if answer.d is not None and (first.d is None or answer.size <= first.size):
        return _found(answer)
    if answer.status is Status.INFEASIBLE and first.d is None:
        return _found(answer)
    if first.d is None:
        return _found(answer)
    bound = answer.bound if np.isfinite(answer.bound) else first.bound
    kept = dataclasses.replace(first, status=Status.FEASIBLE, bound=bound)
    return _found(kept)


def solve_with_z3(
    layer: FreeLayer,
    wanted: Wanted,
    norm: PointNorm,
    budget: float | None,
    deadline: Deadline,
) -> Found:
    """All rows decided in rational arithmetic; hard rows only."""
    prefix = layer.prefix(wanted.claims.inputs)
    reach = np.inf if budget is None else budget
    program = build_program(layer, prefix, wanted.claims, wanted.rows, wanted.required, reach=reach)
    answer = solve_smt(
        program,
        norm=_SMT_NORMS[norm],
        time_limit=deadline.limit(),
    )
    if answer.values is None or answer.size is None:
        return Found(answer.status, None, answer.conflict, message=f"z3: {answer.status.value}")
    d = np.array([float(v) for v in answer.values])
    size = float(answer.size)
    bound = size if answer.status is Status.OPTIMAL else np.nan
    return Found(answer.status, d, size=size, bound=bound, message=f"z3: {answer.status.value}")


def _fixed(
    layer: FreeLayer,
    near: FreeLayer,
    prefix: Prefix,
    wanted: Wanted,
    norm: PointNorm,
    budget: float | None,
    seconds: float | None,
    threads: int | None,
) -> LinearAnswer:
    """The smallest change that keeps the pattern of ``near``."""
    with torch.no_grad():
        pattern = pattern_of(near, prefix)
    reach = np.inf if budget is None else budget
    program = build_program(
        layer, prefix, wanted.claims, wanted.rows, wanted.required, reach=reach, pattern=pattern
    )
    soft = np.concatenate(
        [wanted.soft, np.zeros(program.rows.count - len(wanted.rows), dtype=bool)]
    )
    kind = PointNorm.L1 if norm is PointNorm.L0 else norm
    limit = None if seconds is None else max(seconds, 0.1)
    weight = 0.0 if wanted.softness is None else 1.0 / wanted.softness
    answer = solve_linear(
        program, kind, soft=soft, weight=weight, time_limit=limit, threads=threads
    )
    if norm is PointNorm.L0 and answer.d is not None:
        count = float(np.count_nonzero(np.abs(answer.d) > 1e-12))
        answer = dataclasses.replace(answer, size=count, bound=0.0)
    # Optimal for this pattern only: nothing is known of others.
    status = Status.FEASIBLE if answer.status is Status.OPTIMAL else answer.status
    return dataclasses.replace(answer, status=status, bound=0.0)


def _seconds(deadline: Deadline, *, found: bool) -> float | None:
    """Time for branch and bound."""
    left = deadline.limit(least=0.1)
    if not found:
        return left
    return IMPROVE_SECONDS if left is None else min(left, IMPROVE_SECONDS)


def _found(answer: LinearAnswer) -> Found:
    status = answer.status
    if status is Status.INFEASIBLE and answer.bound == 0.0:
        status = Status.UNKNOWN  # only a fixed pattern was refuted
    return Found(
        status, answer.d, answer.conflict, answer.size, answer.bound, message=answer.message
    )
