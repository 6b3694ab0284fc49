"""Rows for counterexample-guided edits: margins at points and over sub-boxes, with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from torch_prepared.bounds import PropertyBatch, RegionBatch, bound_nodes, bound_rows
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.edit._certify import LOW_DIMENSION
from torch_prepared.edit._held import bound_held_nodes
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import InputSet

SCREENED = 100_000
ROW_BYTES, FEWEST_ROWS = 1 << 29, 3

__all__ = ["PropertyRows", "low_points"]


@dataclass(frozen=True)
class PropertyRows:
    """Safety margins of one property as functions of the weights.

    Args:
        graph: the network, float64.
        quick: the network in the dtype that sub-boxes are bounded in.
        batch: exactly one property.
        vector: which parameters move; p scalars.
    """

    graph: Graph
    quick: Graph
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

    def leaf_rows(
        self, theta: Tensor, boxes: Interval, alphas: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients (q, p) and certified margins (q,) over boxes.

        Args:
            theta: (p,) the weights.
            boxes: (q, n).
            alphas: relaxation slopes by node, (q, *input shape), held fixed; None: CROWN's.
        """
        batch = self.batch.to(self.quick.dtype)

        def single(t: Tensor, lower: Tensor, upper: Tensor, own: dict[str, Tensor]) -> Tensor:
            region, changed = RegionBatch(lower[None], upper[None]), self.vector.split(t)
            given = {name: value[None, None] for name, value in own.items()} or None
            if given is None:
                known = bound_nodes(self.quick, region, parameters=changed, every=True)
            else:
                known = bound_held_nodes(self.quick, region, changed, given, every=True)
            values = bound_rows(
                self.quick, region, known, batch.rows, parameters=changed, alphas=given
            ).lower
            return batch.margins(values + batch.offset)[0]

        rows = vmap(grad_and_value(single), (None, 0, 0, 0), chunk_size=self._chunk())
        kind = self.quick.dtype
        given = {name: value.to(kind) for name, value in (alphas or {}).items()}
        jacobian, values = rows(theta.to(kind), boxes.lower.to(kind), boxes.upper.to(kind), given)
        return jacobian.double(), values.double()

    def _point_margins(self, theta: Tensor, points: Tensor) -> Tensor:
        y = evaluate_graph(self.graph, points, self.vector.split(theta)).flatten(1)
        return self.batch.margins(y @ self.batch.rows[0].T + self.batch.offset[0])

    @property
    def most_rows(self) -> int:
        """Gradients that fit into memory together."""
        return int(max(FEWEST_ROWS, ROW_BYTES // (8 * self.vector.count)))

    def _chunk(self) -> int:
        """Rows per vmap call, so that gradients and intermediate rows stay in memory."""
        return int(max(1, min(256, (1 << 27) // (8 * self.vector.count))))


def low_points(
    rows: PropertyRows, theta: Tensor, region: InputSet, below: float, generator: torch.Generator
) -> Tensor:
    """Inputs (q, n) of a region whose margin is below a threshold; at most 160, diverse.

    Random samples are screened, the best thousand move toward other samples where that lowers
    their margin, and of what is low enough the worst and a random part are kept.
    """
    count = SCREENED if region.size <= LOW_DIMENSION else 256
    x = region.sample(count, generator)
    margins = torch.cat([rows.at_points(theta, part) for part in x.split(20_000)])
    order = margins.topk(min(1000, count), largest=False).indices
    x, margins = x[order], margins[order]
    for reach in (0.3, 0.1, 0.03, 0.01) * 4:
        goal = region.sample(len(x), generator)
        share = reach * torch.rand(len(x), 1, generator=generator, dtype=x.dtype)
        trial = x + share * (goal - x)
        now = rows.at_points(theta, trial)
        better = now < margins
        x, margins = torch.where(better[:, None], trial, x), torch.where(better, now, margins)
    low = margins < below
    x, margins = x[low], margins[low]
    chance = torch.randperm(len(x), generator=generator)[:80]
    chosen: Tensor = torch.cat([margins.argsort()[:80], chance]).unique()
    return x[chosen]
