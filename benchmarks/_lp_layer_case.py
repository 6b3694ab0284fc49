"""One timed case of ``fig_lp_layer``, in its own process: reads JSON settings, prints JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.solvers import project_batch, solve_lp_batch

__all__ = ["Case", "Inputs", "make_inputs"]

_REPEAT_BELOW = 4.0  #: seconds; slower cases are timed once
_STEP = 1e-7  #: small, so that few samples have a kink within it

Solver = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One point of the grid: ``kind`` is ``"projection"`` or ``"l1"``."""

    kind: str
    method: str
    n: int
    m: int
    batch: int
    threads: int


@dataclass(frozen=True, eq=False)
class Inputs:
    """Points (b, n), rows (b, m, n), right-hand sides (b, m), upstream gradients (b, n)."""

    x0: Tensor
    rows: Tensor
    rhs: Tensor
    upstream: Tensor


def make_inputs(case: Case) -> Inputs:
    """Dense Gaussian rows around a hidden feasible point, seed 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, inside = normal(case.batch, case.m, case.n), normal(case.batch, case.n, 1)
    room = 0.1 * torch.rand(case.batch, case.m, generator=generator, dtype=torch.float64)
    rhs = (rows @ inside)[:, :, 0] + room
    return Inputs(normal(case.batch, case.n), rows, rhs, normal(case.batch, case.n))


def _ours(case: Case) -> Solver:
    if case.kind == "projection":
        return lambda x0, rows, rhs: project_batch(x0, rows, rhs).x
    one = torch.ones(case.n, dtype=torch.float64)
    return lambda x0, rows, rhs: solve_lp_batch(rows, rhs, weight=one, center=x0).x


def _peer(case: Case) -> Solver:
    """Cvxpylayers with one of diffcp's solvers, its defaults otherwise."""
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    x, target = cp.Variable(case.n), cp.Parameter(case.n)
    rows, rhs = cp.Parameter((case.m, case.n)), cp.Parameter(case.m)
    distance = x - target
    objective = 0.5 * cp.sum_squares(distance) if case.kind == "projection" else cp.norm1(distance)
    problem = cp.Problem(cp.Minimize(objective), [rows @ x <= rhs])
    # As many workers as our solver has threads.
    settings: dict[str, object] = dict.fromkeys(("n_jobs_forward", "n_jobs_backward"), case.threads)
    settings["solve_method"] = case.method.upper()
    layer = CvxpyLayer(problem, parameters=[target, rows, rhs], variables=[x])
    return lambda p, a, b: layer(p, a, b, solver_args=settings)[0]


def _qpth(case: Case) -> Solver:
    from qpth.qp import QPFunction  # optional peer, absent from PyPI's supported set

    eye = torch.eye(case.n, dtype=torch.float64).expand(case.batch, -1, -1)
    none = torch.empty(0, dtype=torch.float64)
    return lambda p, a, b: QPFunction(verbose=-1)(eye, -p, a, b, none, none)


def run_case(case: Case) -> dict[str, object]:
    """Seconds forward and backward, violation, and error of a directional derivative."""
    torch.set_num_threads(case.threads)
    data = make_inputs(case)
    start = time.perf_counter()
    make = _ours if case.method == "ours" else _qpth if case.method == "qpth" else _peer
    solver = make(case)
    setup = time.perf_counter() - start
    if case.method == "ours":  # the first call pays for lazy initialization of the library
        small = make_inputs(Case(case.kind, "ours", 8, 2, 2, case.threads))
        _ours(Case(case.kind, "ours", 8, 2, 2, case.threads))(small.x0, small.rows, small.rhs)
    forward, backward = [], []
    while not forward or (forward[0] + backward[0] < _REPEAT_BELOW and len(forward) < 5):
        leaves = [t.clone().requires_grad_() for t in (data.x0, data.rows, data.rhs)]
        start = time.perf_counter()
        x = solver(*leaves)
        middle = time.perf_counter()
        (x * data.upstream).sum().backward()
        end = time.perf_counter()
        forward.append(middle - start)
        backward.append(end - middle)
    excess = (data.rows @ x.detach()[:, :, None])[:, :, 0] - data.rhs
    violation = float((excess.clamp_min(0.0) / data.rhs.abs().clamp_min(1.0)).max())
    grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return {
        "setup": setup,
        "forward": statistics.median(forward),
        "backward": statistics.median(backward),
        "spread": max(forward) - min(forward) + max(backward) - min(backward),
        "repeats": len(forward),
        "violation": violation,
        **_gradient_error(case, data, grads),
    }


def _gradient_error(case: Case, data: Inputs, grads: list[Tensor]) -> dict[str, float]:
    """Largest error over the batch of derivatives along one random direction per sample.

    Against central differences of re-solves by our solver, relative to ``max(1, |derivative|)``.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = [data.x0, data.rows, data.rhs]
    scale = data.rows.shape[2] ** -0.5
    toward = [
        torch.randn(t.shape, generator=generator, dtype=t.dtype) * (scale if t.dim() == 3 else 1.0)
        for t in inputs
    ]
    ours = _ours(case)
    with torch.no_grad():
        high, low = (
            ours(*(t + sign * _STEP * d for t, d in zip(inputs, toward, strict=True)))
            for sign in (1.0, -1.0)
        )
    found = ((high - low) * data.upstream).sum(1) / (2.0 * _STEP)
    claimed = sum((g * d).flatten(1).sum(1) for g, d in zip(grads, toward, strict=True))
    error = (torch.as_tensor(claimed) - found).abs() / found.abs().clamp_min(1.0)
    return {"gradient_error": float(error.max()), "gradient_error_median": float(error.median())}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(run_case(Case(**json.loads(sys.argv[1])))))
