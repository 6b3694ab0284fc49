"""Certified margins and their Jacobian at a point of weight space."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torch_prepared.bounds import PropertyBatch, certified_margin
from torch_prepared.core.graph import Graph
from torch_prepared.edit._vector import ParameterVector

__all__ = ["Linearization", "MarginFunction"]


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


@dataclass(frozen=True)
class MarginFunction:
    """``theta (p,) -> (m,)``: certified lower bounds of the clauses of all properties.

    Not sound for a finite step of theta by linearization; the true bound is recomputed at every
    point visited, so the last one is as sound as the bound engine.
    """

    graph: Graph
    batch: PropertyBatch
    vector: ParameterVector

    @cached_property
    def _single(self) -> tuple[Graph, PropertyBatch]:
        """The network and properties in float32, enough for directions."""
        return self.graph.to(torch.float32), self.batch.to(torch.float32)

    def value(self, theta: Tensor) -> Tensor:
        """Margins at ``theta``, all clauses of all properties, (m,)."""
        with torch.no_grad():
            return self._margins(self.graph, self.batch, theta)

    def linearize(self, theta: Tensor, near: float) -> Linearization:
        """Margins, and gradients of those below ``near`` in one batched backward pass."""
        value = self.value(theta)
        rows = (value < near).nonzero().flatten()
        if not len(rows):
            return Linearization(value, rows, theta.new_zeros(0, len(theta)))
        point = theta.detach().float().requires_grad_()
        with torch.enable_grad():
            margins = self._margins(*self._single, point)
        units = torch.nn.functional.one_hot(rows, len(value)).to(margins)
        (jacobian,) = torch.autograd.grad(margins, point, units, is_grads_batched=True)
        return Linearization(value, rows, jacobian)

    def _margins(self, graph: Graph, batch: PropertyBatch, theta: Tensor) -> Tensor:
        bound = certified_margin(graph, batch, parameters=self.vector.split(theta))
        return batch.clause_margins(bound.rows)[batch.present]
