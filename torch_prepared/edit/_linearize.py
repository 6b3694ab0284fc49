"""Certified margins and their Jacobian at a point of weight space, for held relaxation slopes.

An operator's own choice of its lower line jumps where the choice changes (ReLU in CROWN: where
``u = -l``), and the bound jumps with it, however small the step. With the slopes held the bound
is continuous in the weights, and any slopes in [0, 1] give a sound bound. So steps are judged with
the slopes they were computed for, and the slopes are data of a point like its weights.

Where gradients of one region would take too much memory at once, slopes are not held: bounds come
from native passes, and gradients are gathered value by value, of the lowest margins only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_prepared.bounds import PropertyBatch, bound_rows, certified_margin
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds.adjoint import margin_gradient
from torch_prepared.bounds.cost import crown_bytes, crown_flops
from torch_prepared.bounds.crown import tightened_names
from torch_prepared.certify import ProofTree, Slopes
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.edit._certify import within_clauses
from torch_prepared.edit._held import bound_held_nodes
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.relax import lookup
from torch_prepared.relax.relu import TwoPiece
from torch_prepared.specs import Property

if TYPE_CHECKING:
    from torch_prepared.edit._steps import Distance, Rows

__all__ = ["Linearization", "MarginFunction"]

AT_ONCE = 1 << 28  #: bytes of one region's gradients beyond which they are gathered by value
PASS_MEMORY = 1 << 28  #: bytes of one pass of these
BLOCK, BLOCK_FLOPS = 4, 4e7  #: most properties, and operations, of one backward pass


@dataclass(frozen=True)
class Linearization:
    """Row margins ``value`` (m,) at a point and, for the rows asked for, their gradients.

    Args:
        value: certified lower bound of every required row, float64.
        rows: (k,) positions whose gradients are known.
        jacobian: (k, p), float32.
    """

    value: Tensor
    rows: Tensor
    jacobian: Tensor

    def effect(self, vector: Tensor) -> Tensor:
        """Inner products (k,) of the gradients with a vector (p,), float64."""
        return self.jacobian.double() @ vector

    def append(self, distance: Distance, rows: Rows | None) -> Rows:
        """``rows`` and then the gradients."""
        return distance.extend(rows, self.jacobian)


@dataclass(frozen=True)
class MarginFunction:
    """``theta (p,), slopes (b, a) -> (m,)``: certified lower bounds of all properties' clauses.

    Not sound for a finite step of theta by linearization; the true bound is recomputed at every
    point visited, so the last one is as sound as the bound engine.
    """

    graph: Graph
    batch: PropertyBatch
    vector: ParameterVector

    def scaled(self, size: float) -> MarginFunction:
        """The same margins for regions' bounding boxes shrunk around their centers.

        Only to find a start with: the boxes are not rounded outward.
        """
        center = (self.batch.regions.lower + self.batch.regions.upper) / 2
        radius = size * (self.batch.regions.upper - self.batch.regions.lower) / 2
        regions = RegionBatch(center - radius, center + radius)
        batch = dataclasses.replace(self.batch, regions=regions)
        return MarginFunction(self.graph, batch, self.vector)

    @cached_property
    def owners(self) -> Tensor:
        """(m,) the property of every margin."""
        return self.batch.present.nonzero()[:, 0]

    @cached_property
    def bent(self) -> tuple[tuple[Node, TwoPiece], ...]:
        """Nodes whose lower line has a slope to choose; a of them count all scalars together."""
        pairs = ((node, lookup(node.op)) for node in self.graph.nodes[1:])
        return tuple((node, op) for node, op in pairs if isinstance(op, TwoPiece))

    @cached_property
    def _single(self) -> tuple[Graph, PropertyBatch]:
        """The network and properties in float32, enough for directions."""
        return self.graph.to(torch.float32), self.batch.to(torch.float32)

    def value(self, theta: Tensor, slopes: Tensor) -> Tensor:
        """Margins at ``theta`` with ``slopes``, (m,)."""
        with torch.no_grad():
            return self._margins(self.graph, self.batch, theta, slopes)[0]

    def choose(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Margins (m,) at ``theta`` with every operator's own slopes, and these (b, a)."""
        with torch.no_grad():
            value, boxes = self._margins(self.graph, self.batch, theta, None)
        chosen = [op.alpha_start(n, boxes[n.inputs[0]]).flatten(1) for n, op in self.bent]
        return value, torch.cat([*chosen, value.new_zeros(len(self.batch), 0)], dim=1)

    def linearize(
        self, theta: Tensor, slopes: Tensor, value: Tensor, rows: Tensor
    ) -> Linearization:
        """Gradients of margins ``rows`` (k,), some properties at a time.

        A property's margins depend on its own bounds only, yet one backward pass carries every row
        through every property of its batch: work that grows with the square of the batch. Of a
        large network only each property's lowest margin is differentiated.
        """
        if self._large:
            return self._gather(theta, value, rows)
        size = max(1, min(BLOCK, int(BLOCK_FLOPS / crown_flops(self.graph))))
        jacobian = torch.zeros(len(rows), len(theta))
        block = self.owners[rows] // size
        for part in block.unique().tolist():
            mine = block == part
            jacobian[mine] = self._gradients(
                theta, slopes, rows[mine], slice(part * size, (part + 1) * size)
            )
        return Linearization(value, rows, jacobian)

    def _gradients(self, theta: Tensor, slopes: Tensor, rows: Tensor, part: slice) -> Tensor:
        """Gradients of margins ``rows`` (k,) of the properties in ``part``: (k, p), float32."""
        graph, batch = self._single
        point = theta.detach().float().requires_grad_()
        with torch.enable_grad():
            margins, _ = self._margins(graph, batch[part], point, slopes[part].float())
        first = int((self.owners < part.start).sum())
        units = torch.nn.functional.one_hot(rows - first, len(margins)).to(margins)
        (jacobian,) = torch.autograd.grad(margins, point, units, is_grads_batched=True)
        return jacobian

    @cached_property
    def _large(self) -> bool:
        """Whether gradients of one region are too large to be held at once."""
        return crown_bytes(self.graph, torch.float32.itemsize) > AT_ONCE

    def _gather(self, theta: Tensor, value: Tensor, rows: Tensor) -> Linearization:
        """Gradients of the lowest of each property's margins among ``rows``, value by value."""
        graph, batch = self._single
        changed = self.vector.split(theta.detach().float())
        clauses, kept, found = self.batch.present.nonzero()[:, 1], [], []
        for owner in self.owners[rows].unique().tolist():
            mine = rows[self.owners[rows] == owner]
            lowest = int(mine[value[mine].argmin()])
            part = _one_clause(batch[owner : owner + 1], int(clauses[lowest]))
            gradient = margin_gradient(graph, part, changed, max_memory=PASS_MEMORY)
            kept.append(lowest)
            found.append(self.vector.flatten(gradient))
        if not kept:
            return Linearization(value, rows, torch.zeros(0, len(theta)))
        return Linearization(value, torch.tensor(kept), torch.stack(found))

    def proofs(
        self, theta: Tensor, slopes: Tensor, properties: tuple[Property, ...]
    ) -> tuple[ProofTree, ...]:
        """Single-leaf proofs that use the slopes."""
        with torch.no_grad():
            rows, _ = self._row_values(self.graph, self.batch, theta, slopes)
        best = self.batch.best_rows(rows)
        plan = tightened_names(self.graph, self.batch.regions.is_box)
        sizes = [node.size for node, _ in self.bent]
        trees = []
        for i, prop in enumerate(properties):
            table = {}
            for (node, op), part in zip(self.bent, slopes[i].split(sizes), strict=True):
                least = op.small_slope(node)
                table[node.name] = Slopes(lower=(least + (1 - least) * part)[None].numpy())
            picked = within_clauses(prop, best[i].tolist())
            trees.append(ProofTree.leaf(picked, tighten=plan, slopes=table, tighten_slopes=table))
        return tuple(trees)

    def _margins(
        self, graph: Graph, batch: PropertyBatch, theta: Tensor, slopes: Tensor | None
    ) -> tuple[Tensor, dict[str, Interval]]:
        rows, boxes = self._row_values(graph, batch, theta, slopes)
        return batch.clause_margins(rows)[batch.present], boxes

    def _row_values(
        self, graph: Graph, batch: PropertyBatch, theta: Tensor, slopes: Tensor | None
    ) -> tuple[Tensor, dict[str, Interval]]:
        """Lower bounds (b, s) of all rows plus offsets, and the intervals behind them."""
        changed = self.vector.split(theta)
        if slopes is None or not self.bent or self._large:
            bound = certified_margin(graph, batch, parameters=changed)
            return bound.rows, dict(bound.boxes)
        alphas = self._alphas(slopes)
        boxes = bound_held_nodes(graph, batch.regions, changed, alphas)
        lower = bound_rows(
            graph, batch.regions, boxes, batch.rows, parameters=changed, alphas=alphas
        ).lower
        return lower + batch.offset, boxes

    def _alphas(self, slopes: Tensor) -> dict[str, Tensor]:
        parts = slopes.split([node.size for node, _ in self.bent], dim=1)
        return {
            node.name: part.reshape(len(part), 1, *node.shape)
            for (node, _), part in zip(self.bent, parts, strict=True)
        }


def _one_clause(batch: PropertyBatch, clause: int) -> PropertyBatch:
    """One property with only one of its clauses."""
    mine = batch.clause[0] == clause
    mine &= ~torch.isneginf(batch.offset[0])  # padding
    return dataclasses.replace(
        batch,
        rows=batch.rows[:, mine],
        offset=batch.offset[:, mine],
        clause=torch.zeros_like(batch.clause[:, mine]),
        present=torch.ones_like(batch.present[:, :1]),
    )
