"""One sample of a batch in the terms of the package's single-problem solvers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from torch_prepared.core.rows import LinearRows
from torch_prepared.errors import PreparedError
from torch_prepared.solvers._base import solve
from torch_prepared.solvers._batched_separable import SeparableBatch
from torch_prepared.solvers._problem import LinearProgram
from torch_prepared.solvers._result import Status

__all__ = ["SingleAnswer", "solve_single"]


@dataclass(frozen=True, eq=False)
class SingleAnswer:
    """Status, point (n,), multipliers (m,) and Farkas ray (m,), on the batch's device."""

    status: Status
    x: Tensor | None
    y: Tensor | None
    ray: Tensor | None


def solve_single(batch: SeparableBatch) -> SingleAnswer:
    """Solve a batch of one sample by HiGHS, or by Clarabel where there is curvature."""
    part = {
        name: value.detach().cpu().numpy().reshape(value.shape[-1])
        for name, value in vars(batch).items()
        if name not in ("rows", "equal")
    }
    rows = batch.rows.detach().cpu().numpy().reshape(batch.rows.shape[-2:])
    equal = batch.equal.cpu().numpy()
    n, m = len(part["cost"]), len(part["rhs"])
    split = np.flatnonzero(part["weight"] > 0.0)
    # weight |x - center| becomes weight (up + down) with x - up + down = center.
    pick = sp.csr_matrix((np.ones(len(split)), (range(len(split)), split)), (len(split), n))
    one = sp.identity(len(split))
    matrix = sp.bmat([[-sp.csr_matrix(rows), None, None], [pick, -one, one]], format="csr")
    if not len(split):
        matrix = -sp.csr_matrix(rows)
    curve = np.concatenate([part["curve"], np.zeros(2 * len(split))])
    weight = part["weight"][split]
    problem = LinearProgram(
        np.concatenate([part["cost"] - part["curve"] * part["anchor"], weight, weight]),
        LinearRows(
            matrix, np.concatenate([-part["rhs"], part["center"][split]]),
            np.concatenate([equal, np.ones(len(split), bool)]),
        ),
        np.concatenate([part["lower"], np.zeros(2 * len(split))]),
        np.concatenate([part["upper"], np.full(2 * len(split), np.inf)]),
        quadratic=curve if curve.any() else None,
    )  # fmt: skip
    try:
        answer = solve(problem, "clarabel" if curve.any() else "highs")
    except PreparedError:
        return SingleAnswer(Status.UNKNOWN, None, None, None)

    def back(values: np.ndarray | None, size: int) -> Tensor | None:
        if values is None:
            return None
        return torch.from_numpy(np.array(values[:size])).to(batch.rhs)

    known = answer.status in (Status.INFEASIBLE, Status.UNBOUNDED)
    status = answer.status if known else Status.UNKNOWN
    return SingleAnswer(status, back(answer.x, n), back(answer.duals, m), back(answer.ray, m))
