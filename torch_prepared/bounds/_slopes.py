"""Relaxation parameters of each row's own, as plain tensors: any device, operator and gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.bounds._guided import default_start
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax import ElementwiseOperator, lookup

__all__ = ["RowSlopes", "TargetSlopes", "ancestors"]


def ancestors(graph: Graph, name: str) -> list[Node]:
    """The node called ``name`` and all it depends on but the input, last first."""
    wanted, found = {name}, []
    for node in reversed(graph.nodes[1:]):
        if node.name in wanted:
            found.append(node)
            wanted.update(node.inputs)
    return found


@dataclass(frozen=True)
class TargetSlopes:
    """Of the rows on one value.

    Args:
        order: (b, k) positions of the scalars that are bounded; their lower ends come first in
            the row axis below, then their upper ends.
        counts: (b, k) which of these count; the rest is padding.
        alphas: by activation node (b, 2 k, *input shape), in [0, 1].
        through: gradients pass through intersections with other bounds as if there were none, so
            that slopes whose bounds are worse at present go on moving.
    """

    order: Tensor
    counts: Tensor
    alphas: Mapping[str, Tensor]
    through: bool = False


@dataclass(frozen=True)
class RowSlopes:
    """Of every value that is tightened, and of the output rows.

    Args:
        targets: by name of the value.
        rows: alphas of the output rows by activation node (b, s, *input shape).
    """

    targets: Mapping[str, TargetSlopes]
    rows: Mapping[str, Tensor]

    def leaves(self) -> list[Tensor]:
        """All alphas."""
        inner = [alpha for part in self.targets.values() for alpha in part.alphas.values()]
        return [*inner, *self.rows.values()]


def start_alphas(
    graph: Graph, boxes: Mapping[str, Interval], target: str, rows: int
) -> dict[str, Tensor]:
    """Alphas (b, rows, *shape) that reproduce the default relaxations, ready to be optimized."""
    found = {}
    for node in ancestors(graph, target):
        operator = lookup(node.op)
        if not isinstance(operator, ElementwiseOperator):
            continue
        try:
            start = default_start(operator, node, boxes[node.inputs[0]])
        except UnsupportedOperationError:
            continue
        spread = start.detach().unsqueeze(1).expand(-1, rows, *start.shape[1:])
        found[node.name] = spread.clone(memory_format=torch.contiguous_format).requires_grad_()
    return found
