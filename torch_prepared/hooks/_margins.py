"""Certified margins of a model in training, and how they move with its weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import grad, vmap

from torch_prepared.bounds import (
    MarginBounds,
    PropertyBatch,
    bound_nodes,
    bound_rows,
    certified_margin,
)
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds.adjoint import margin_gradient
from torch_prepared.bounds.cost import crown_flops
from torch_prepared.core.graph import Graph
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.relax import evaluate_graph

__all__ = ["LiveMargins"]

CHUNK, CHUNK_ENTRIES = 64, 1 << 24  #: most properties, and gradient entries, of one pass
SMALL_FLOPS = 4e7  #: operations of CROWN, above which properties are taken one by one


@dataclass(frozen=True)
class LiveMargins:
    """``theta (p,) -> (b,)``: certified lower bounds of every property's margin.

    Args:
        graph: the network; its other parameters are constants.
        batch: b properties, in the graph's dtype and on its device.
        vector: the parameters that theta holds, p scalars.
    """

    graph: Graph
    batch: PropertyBatch
    vector: ParameterVector
    _latest: list[tuple[Tensor, MarginBounds]] = field(default_factory=list)

    def value(self, theta: Tensor) -> Tensor:
        """Margins (b,); NaN where weights overflow. ``theta`` must not be written to later."""
        return self._bounds(theta).margin

    @torch.no_grad()
    def _bounds(self, theta: Tensor) -> MarginBounds:
        """Bounds at ``theta``; those of the latest point are kept."""
        if not self._latest or not torch.equal(self._latest[0][0], theta):
            with torch.autocast(theta.device.type, enabled=False):
                changed = self.vector.split(theta)
                found = certified_margin(self.graph, self.batch, parameters=changed)
            self._latest[:] = [(theta, found)]
        return self._latest[0][1]

    def gradients(self, theta: Tensor, which: Tensor) -> Tensor:
        """Gradients (k, p) of the margins at positions ``which`` (k,).

        Small networks over boxes in chunks under ``vmap``, others one by one: a backward pass over
        the whole batch would cost each row the whole batch.
        """
        which = which.to(self.batch.rows.device)
        if not len(which):
            return theta.new_zeros(0, len(theta))
        with torch.enable_grad(), torch.autocast(theta.device.type, enabled=False):
            if self.batch.regions.is_box and crown_flops(self.graph) < SMALL_FLOPS:
                return self._gradients_of_boxes(theta, which)
            bound, changed = self._bounds(theta), self.vector.split(theta)
            return torch.stack(
                [
                    self.vector.flatten(
                        margin_gradient(
                            self.graph, self.batch[i : i + 1], changed, known=bound[i : i + 1]
                        )
                    )
                    for i in which.tolist()
                ]
            )

    def _gradients_of_boxes(self, theta: Tensor, which: Tensor) -> Tensor:
        """One vectorized pass per chunk; every value is tightened, as which need it may differ."""
        batch = self.batch

        def single(t: Tensor, *data: Tensor) -> Tensor:
            lower, upper, rows, offset, clause, present = (d[None] for d in data)
            one = PropertyBatch(RegionBatch(lower, upper), rows, offset, clause, present)
            changed = self.vector.split(t)
            boxes = bound_nodes(self.graph, one.regions, parameters=changed, every=True)
            values = bound_rows(self.graph, one.regions, boxes, rows, parameters=changed).lower
            return one.margins(values + offset)[0]

        data = (batch.regions.lower, batch.regions.upper, batch.rows, batch.offset)
        chosen = [d[which] for d in (*data, batch.clause, batch.present)]
        chunk = max(1, min(CHUNK, CHUNK_ENTRIES // max(1, len(theta))))
        mapped = vmap(grad(single), (None, *(0 for _ in chosen)), chunk_size=chunk)
        rows: Tensor = mapped(theta.detach(), *chosen)
        return rows

    @torch.no_grad()
    def usual_size(self, theta: Tensor) -> float:
        """Median over properties of the largest output row at the regions' centers; positive."""
        with torch.autocast(theta.device.type, enabled=False):
            centers = self.batch.regions.box.center
            y = evaluate_graph(self.graph, centers, self.vector.split(theta)).flatten(1)
            size = (self.batch.rows @ y[:, :, None]).abs().amax(dim=(1, 2)).median()
        return max(float(size), 1e-9)
