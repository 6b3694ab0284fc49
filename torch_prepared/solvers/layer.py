"""Differentiable linear-program and projection layers.

**Gradients of a linear program.** Its optimum is a vertex and stays there when the cost changes a
little, so the gradient with respect to the cost is zero almost everywhere and useless for
learning; that is mathematics, not a defect. Gradients with respect to rows, right-hand sides,
centers and bounds are useful. Where the cost must learn, ask for ``smoothing``.

Both layers solve batches with this package's solver on any device. ``from_cvxpy`` takes a program
declared in CVXPY instead, through cvxpylayers, with this package's solver or cvxpylayers' own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_prepared.core.rows import LinearRows
from torch_prepared.errors import MissingDependencyError, SolverError
from torch_prepared.solvers._batched_lp import ProgramSolution, solve_lp_batch
from torch_prepared.solvers._batched_projection import Metric, Projection, project_batch
from torch_prepared.solvers._batched_report import BatchReport, OnFailure, eager
from torch_prepared.solvers._batched_streamed import StreamedProjection, project_streamed
from torch_prepared.solvers._problem import Norm

if TYPE_CHECKING:
    from torch_prepared.solvers._batched_cvxpy import DeclaredLayer

__all__ = [
    "BatchReport",
    "LPLayer",
    "OnFailure",
    "ProgramSolution",
    "Projection",
    "ProjectionLayer",
    "StreamedProjection",
    "project_batch",
    "project_streamed",
    "solve_lp_batch",
]


class _RowsLayer(nn.Module):
    """Rows ``A x <= b`` as buffers, given once or with each call."""

    A: Tensor | None
    b: Tensor | None
    equal: Tensor | None

    def __init__(self, rows: LinearRows | None, on_failure: OnFailure | str) -> None:
        super().__init__()
        self.on_failure = OnFailure(on_failure)
        matrix = rhs = equal = None
        if rows is not None:  # stored as matrix @ x >= rhs
            dense = rows.matrix if isinstance(rows.matrix, np.ndarray) else rows.matrix.toarray()
            matrix, rhs = torch.from_numpy(-dense), torch.from_numpy(-rows.rhs)
            equal = torch.from_numpy(rows.equal.copy()) if bool(rows.equal.any()) else None
        self.register_buffer("A", matrix)
        self.register_buffer("b", rhs)
        self.register_buffer("equal", equal)
        self.report: BatchReport | None = None

    def _data(self, given_a: Tensor | None, given_b: Tensor | None) -> tuple[Tensor, Tensor]:
        matrix = self.A if given_a is None else given_a
        rhs = self.b if given_b is None else given_b
        if matrix is None or rhs is None:
            raise SolverError(
                f"{type(self).__name__}: got no rows; expected them at construction or A and b "
                "with the call"
            )
        return matrix, rhs

    @staticmethod
    def from_cvxpy(
        problem: Any, parameters: Sequence[Any], variables: Sequence[Any], *,
        backend: str = "batched", on_failure: OnFailure | str = OnFailure.KEEP,
    ) -> DeclaredLayer:  # fmt: skip
        """A layer for a program declared in CVXPY; its ``forward(*parameters)`` returns variables.

        Args:
            problem: a DPP-compliant ``cvxpy.Problem``: for ``"batched"`` a linear objective plus
                squares of variables, and linear constraints.
            parameters: in the order of the call's arguments.
            variables: those wanted back, in order.
            backend: ``"batched"``, or ``"diffcp"``, ``"clarabel"``, ``"ecos"``, ``"scs"``.
            on_failure: see :class:`OnFailure`.

        Raises:
            MissingDependencyError: CVXPY or cvxpylayers is not installed.
            SolverError: a program that the batched solver does not treat.
        """
        try:
            # Not at the top: cvxpylayers patches CVXPY when it is imported.
            declared = importlib.import_module("torch_prepared.solvers._batched_cvxpy")
        except ImportError as error:
            raise MissingDependencyError(
                "layer: from_cvxpy needs cvxpylayers 1.x; install it with 'pip install "
                "cvxpylayers' or state the program by rows"
            ) from error
        layer: DeclaredLayer = declared.DeclaredLayer(
            problem, parameters, variables, backend=backend, on_failure=on_failure
        )
        return layer


class ProjectionLayer(_RowsLayer):
    """Nearest point to the input with ``A x <= b``, as a module.

    Args:
        rows: rows shared by all samples (their ``>=`` is turned around); None: A and b come with
            each call.
        metric: positive diagonal (n,) of the distance ``(x - x0) @ M (x - x0) / 2``; None: 1.
        inverse_metric: instead, a function applying a constant ``M^{-1}`` along the last axis.
        warm_start: begin with the rows that were active at the last call of the same batch size.
        on_failure: see :class:`OnFailure`.

    Attributes:
        report: per-sample statuses of the last call.

    Example:
        >>> rows = LinearRows(np.array([[1.0, 1.0]]), np.array([2.0]))
        >>> ProjectionLayer(rows)(torch.zeros(1, 2, dtype=torch.float64)).tolist()
        [[1.0, 1.0]]
    """

    metric: Tensor | None

    def __init__(
        self,
        rows: LinearRows | None = None,
        *,
        metric: Tensor | None = None,
        inverse_metric: Metric | None = None,
        warm_start: bool = False,
        on_failure: OnFailure | str = OnFailure.KEEP,
    ) -> None:
        super().__init__(rows, on_failure)
        self.register_buffer("metric", metric)
        self.inverse_metric = inverse_metric
        self.warm_start = warm_start

    @eager
    def forward(self, x0: Tensor, A: Tensor | None = None, b: Tensor | None = None) -> Tensor:  # noqa: N803
        """Points of x0's shape and dtype; see :func:`project_batch`.

        Raises:
            SolverError: no rows given, or what :func:`project_batch` refuses.
        """
        matrix, rhs = self._data(A, b)
        start = None
        if self.warm_start and self.report is not None:
            before = self.report.active
            shape = (len(x0) if x0.dim() == 2 else 1, matrix.shape[-2])
            usable = tuple(before.shape) == shape and before.device == x0.device
            start = before if usable and bool(self.report.solved.all()) else None
        found = project_batch(
            x0, matrix, rhs, metric=self.metric, inverse_metric=self.inverse_metric,
            equal=self.equal, start=start, on_failure=self.on_failure,
        )  # fmt: skip
        self.report = found.report
        return found.x


class LPLayer(_RowsLayer):
    """A linear program, or the nearest point in a weighted 1-norm, as a module.

    **Without smoothing the gradient with respect to ``cost`` and ``weight`` is zero** almost
    everywhere: the optimum is a vertex. See the module's first paragraph.

    Args:
        rows: rows shared by all samples (their ``>=`` is turned around); None: A and b come with
            each call.
        norm: None: minimize ``cost @ x``; ``Norm.L1``: the distance ``|x - center|_1`` as well.
        lower: (n,) bounds; None: open.
        upper: likewise.
        smoothing: adds ``smoothing |x - center|^2 / 2``.
        warm_start: begin from the last call's points where the shapes are the same.
        on_failure: see :class:`OnFailure`.

    Attributes:
        report: per-sample statuses of the last call.

    Raises:
        SolverError: another norm.

    Example:
        >>> rows = LinearRows(np.array([[1.0, 2.0]]), np.array([4.0]))     # x_0 + 2 x_1 >= 4
        >>> layer = LPLayer(rows, norm=Norm.L1)
        >>> layer(center=torch.zeros(2, dtype=torch.float64)).round(decimals=9).tolist()
        [0.0, 2.0]
    """

    lower: Tensor | None
    upper: Tensor | None

    def __init__(
        self,
        rows: LinearRows | None = None,
        *,
        norm: Norm | str | None = None,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
        smoothing: float = 0.0,
        warm_start: bool = False,
        on_failure: OnFailure | str = OnFailure.KEEP,
    ) -> None:
        super().__init__(rows, on_failure)
        self.norm = None if norm is None else Norm(norm)
        if self.norm not in (None, Norm.L1):
            raise SolverError(
                f"LPLayer: got norm {self.norm}; expected '1' or None; use ProjectionLayer for '2' "
                "or from_cvxpy for others"
            )
        self.register_buffer("lower", lower)
        self.register_buffer("upper", upper)
        self.smoothing, self.warm_start = smoothing, warm_start
        self._last: tuple[Tensor, Tensor] | None = None

    @eager
    def forward(
        self,
        cost: Tensor | None = None,
        *,
        center: Tensor | None = None,
        weight: Tensor | None = None,
        A: Tensor | None = None,  # noqa: N803
        b: Tensor | None = None,
    ) -> Tensor:
        """Optimal points (b, n), or (n,) if nothing has a batch axis; see :func:`solve_lp_batch`.

        Args:
            cost: (b, n) or (n,); None: 0.
            center: of the 1-norm and of the smoothing; None: 0.
            weight: of the 1-norm; None: 1 with ``norm="1"``, else 0.
            A: rows in place of those given at construction.
            b: likewise.
        """
        matrix, rhs = self._data(A, b)
        if weight is None and self.norm is Norm.L1:
            weight = torch.ones_like(matrix[..., 0, :]) if matrix.shape[-2] else None
        start = self._last if self.warm_start else None
        found = solve_lp_batch(
            matrix, rhs, cost=cost, weight=weight, center=center, lower=self.lower,
            upper=self.upper, equal=self.equal, smoothing=self.smoothing,
            start=start if start is not None and self._fits(start, matrix, rhs, cost, center)
            else None, on_failure=self.on_failure,
        )  # fmt: skip
        self.report = found.report
        x = found.x.detach()
        self._last = (x if x.dim() == 2 else x[None], found.report.multipliers)
        if not bool(found.report.solved.all()):
            self._last = None
        return found.x

    @staticmethod
    def _fits(start: tuple[Tensor, Tensor], *tensors: Tensor | None) -> bool:
        """Whether an earlier solution has the shape of this call's."""
        matrix = tensors[0]
        assert matrix is not None  # noqa: S101 - for mypy
        ranks = zip(tensors, (3, 2, 2, 2), strict=True)
        counts = [len(t) for t, rank in ranks if t is not None and t.dim() == rank]
        shape = (max(counts, default=1), *matrix.shape[-2:])
        return (len(start[0]), start[1].shape[1], start[0].shape[1]) == shape
