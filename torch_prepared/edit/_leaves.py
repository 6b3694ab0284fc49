"""Rows for counterexample-guided edits: margins at points and over sub-boxes, with gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from torch_prepared.bounds import PropertyBatch, RegionBatch, bound_nodes, bound_rows
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.relax import evaluate_graph

__all__ = ["PropertyRows"]


@dataclass(frozen=True)
class PropertyRows:
    """Safety margins of one property as functions of the weights.

    Args:
        graph: the network, float64.
        batch: exactly one property.
        vector: which parameters move; p scalars.
    """

    graph: Graph
    batch: PropertyBatch
    vector: ParameterVector

    def at_points(self, theta: Tensor, points: Tensor) -> Tensor:
        """Margins (q,) at inputs (q, n); exact up to rounding."""
        with torch.no_grad():
            return self._point_margins(theta, points)

    def point_rows(self, theta: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (q, p) and margins (q,) at inputs (q, n)."""
        single = lambda t, x: self._point_margins(t, x[None])[0]  # noqa: E731 vmapped below
        return vmap(grad_and_value(single), (None, 0), chunk_size=self._chunk())(theta, points)

    def leaf_rows(self, theta: Tensor, boxes: Interval) -> tuple[Tensor, Tensor]:
        """Gradients (q, p) and CROWN margins (q,) over boxes (q, n)."""

        def single(t: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
            region = RegionBatch(lower[None], upper[None])
            changed = self.vector.split(t)
            known = bound_nodes(self.graph, region, parameters=changed, every=True)
            values = bound_rows(
                self.graph, region, known, self.batch.rows, parameters=changed
            ).lower
            return self.batch.margins(values + self.batch.offset)[0]

        rows = vmap(grad_and_value(single), (None, 0, 0), chunk_size=self._chunk())
        return rows(theta, boxes.lower, boxes.upper)

    def _point_margins(self, theta: Tensor, points: Tensor) -> Tensor:
        y = evaluate_graph(self.graph, points, self.vector.split(theta)).flatten(1)
        return self.batch.margins(y @ self.batch.rows[0].T + self.batch.offset[0])

    def _chunk(self) -> int:
        """Rows per vmap call, so that gradients and intermediate rows stay in memory."""
        return int(max(1, min(256, (1 << 27) // (8 * self.vector.count))))
