"""Solvers of linear rows: one verb, :func:`solve`, and interchangeable solver objects.

The differentiable layers are loaded on first use: they bring PyTorch's compiler with them, which
takes a second.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING

from torch_prepared.solvers._base import (
    LPSolver,
    find_solver,
    register_solver,
    solve,
    solver_names,
)
from torch_prepared.solvers._batched_gram import Gram
from torch_prepared.solvers._problem import LinearProgram, Norm, minimize_norm
from torch_prepared.solvers._residuals import farkas_gap
from torch_prepared.solvers._result import Solution, Status
from torch_prepared.solvers.conic import ConicBackend, ConicSolver
from torch_prepared.solvers.highs import HighsMethod, HighsSolver
from torch_prepared.solvers.projection import DualProjection, gram_matrix, project

if TYPE_CHECKING:
    from torch_prepared.solvers.layer import (
        BatchReport,
        LPLayer,
        OnFailure,
        ProjectionLayer,
        project_batch,
        project_streamed,
        solve_lp_batch,
    )

__all__ = [
    "BatchReport",
    "ConicBackend",
    "ConicSolver",
    "DualProjection",
    "Gram",
    "HighsMethod",
    "HighsSolver",
    "LPLayer",
    "LPSolver",
    "LinearProgram",
    "Norm",
    "OnFailure",
    "ProjectionLayer",
    "Solution",
    "Status",
    "farkas_gap",
    "find_solver",
    "gram_matrix",
    "minimize_norm",
    "project",
    "project_batch",
    "project_streamed",
    "register_solver",
    "solve",
    "solve_lp_batch",
    "solver_names",
]

register_solver("highs", HighsSolver)
for _method in (HighsMethod.IPM, HighsMethod.SIMPLEX, HighsMethod.HIPO, HighsMethod.PDLP):
    _name = f"highs-{_method.name.lower()}"
    register_solver(_name, partial(HighsSolver, method=_method, name=_name))
for _backend in ConicBackend:
    register_solver(_backend.value.lower(), partial(ConicSolver, _backend))

_LAZY = frozenset(
    (
        "BatchReport",
        "LPLayer",
        "OnFailure",
        "ProjectionLayer",
        "project_batch",
        "project_streamed",
        "solve_lp_batch",
    )
)


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module("torch_prepared.solvers.layer"), name)
    raise AttributeError(f"module 'torch_prepared.solvers' has no attribute {name!r}")
