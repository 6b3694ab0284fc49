"""One backward pass: rows pulled back from some values to the input, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_prepared import ops
from torch_prepared.bounds._guided import default_lines
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import AffinePair, ElementwiseOperator, PulledBack, lookup
from torch_prepared.relax._base import Parameters

__all__ = ["RowBound", "Setting", "descend"]


class RowBound(NamedTuple):
    """``lower`` (b, s) and the affine form behind it: ``inputs`` (b, s, n) and ``const`` (b, s)."""

    lower: Tensor
    inputs: Tensor
    const: Tensor


@dataclass(frozen=True)
class Setting:
    """What backward passes go through.

    Args:
        graph: the network.
        regions: b input sets.
        boxes: intervals of the values met; may grow, but what is there does not change.
        table: every parameter.
        pulls: by activation, what is taken off the rows (b, s, *shape) on its input.
    """

    graph: Graph
    regions: RegionBatch
    boxes: Mapping[str, Interval]
    table: Parameters
    pulls: Mapping[str, Tensor] = field(default_factory=dict)
    _lines: dict[str, AffinePair] = field(default_factory=dict)

    def inputs(self, node: Node) -> list[Interval]:
        """Intervals of a node's inputs."""
        return [self.boxes[name] for name in node.inputs]

    def pull_back(self, node: Node, rows: Tensor, alpha: Tensor | None) -> PulledBack:
        """Rows (b, s, *shape) on a node's value as rows on its inputs."""
        moved = self._pull_back(node, rows, alpha)
        if node.name not in self.pulls:
            return moved
        return moved._replace(inputs=(moved.inputs[0] - self.pulls[node.name],))

    def _pull_back(self, node: Node, rows: Tensor, alpha: Tensor | None) -> PulledBack:
        operator = lookup(node.op)
        if alpha is not None or not isinstance(operator, ElementwiseOperator):
            return operator.pull_back(node, rows, self.inputs(node), self.table, alpha)
        if node.name not in self._lines:  # every pass goes through the same ones
            box = self.boxes[node.inputs[0]]
            self._lines[node.name] = default_lines(operator, node, box)
        return operator.through(rows, self._lines[node.name])


def descend(
    setting: Setting,
    pending: dict[str, Tensor],
    const: Tensor,
    alphas: Mapping[str, Tensor] | None,
    cuts: bool,
    shallow: bool = False,
) -> RowBound:
    """Pull ``pending`` rows (consumed) plus ``const`` back to the input.

    Args:
        setting: what is pulled back through.
        pending: rows (b, s, *shape) by name of the value they are on; (1, s, *shape) where all
            regions have the same and ``shallow`` is set.
        const: (b or 1, s), as ``pending``.
        alphas: relaxation parameters by node; None for default lines.
        cuts: also evaluate over boxes on the way where all rows are on one value.
        shallow: stop at the first nonlinear values.
    """
    boxes, best, count = setting.boxes, None, len(setting.regions)
    for node in reversed(setting.graph.nodes):
        rows = pending.pop(node.name, None)
        if rows is None:
            continue
        if node.op == "input":
            inputs = rows.flatten(2).expand(count, -1, -1)
            lower = const + setting.regions.minimum(inputs)
            return RowBound(lower if best is None else torch.maximum(best, lower), inputs, const)
        operator = lookup(node.op)
        stop = shallow and not operator.traits.affine
        if stop or (cuts and not pending and node.name in boxes):
            box = boxes[node.name].map(lambda end: end.flatten(1))
            here = const + _minimum(rows.flatten(2), box)
            if stop:
                const = here
                continue
            best = here if best is None else torch.maximum(best, here)
        alpha = None if alphas is None else alphas.get(node.name)
        moved = setting.pull_back(node, rows, alpha)
        if moved.bias is not None:
            const = const + moved.bias
        for name, part in zip(node.inputs, moved.inputs, strict=True):
            pending[name] = pending[name] + part if name in pending else part
    # Nothing went as far as the input. A single zero stands for all its coefficients.
    const = const.expand(count, -1)
    none = const.new_zeros(()).expand(*const.shape, setting.graph.input_size)
    return RowBound(const if best is None else torch.maximum(best, const), none, const)


def _minimum(rows: Tensor, box: Interval) -> Tensor:
    """Minima (b, s) of rows (b or 1, s, n) over boxes (b, n): common rows are two products."""
    if len(rows) == 1 < len(box.lower):
        return F.linear(box.center, rows[0]) - F.linear(box.radius, rows[0].abs())
    return ops.concretize(rows, box.center, box.radius)
