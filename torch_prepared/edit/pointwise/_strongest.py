"""Which weights of a layer move the examples' margins most."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torch_prepared.certify import PointClaims
from torch_prepared.core.graph import Graph
from torch_prepared.edit.pointwise._examples import best_rows, row_values
from torch_prepared.edit.pointwise._layer import FreeLayer, Layers
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph

__all__ = ["strongest_weights"]


def strongest_weights(graph: Graph, claims: PointClaims, layer: Layers, count: int) -> Tensor:
    """The ``count`` weights w with the largest sum over examples of ``|d margin / d w|``.

    The margin of an example is the least over its clauses of the largest row, at the network as it
    is. Of equal weights the first ones in the stored order are taken.

    Args:
        graph: the network as stored.
        claims: the examples to edit.
        layer: name; None for the last one.
        count: 1 to the number of the layer's weights.

    Returns:
        Bool, of the stored weight's shape.

    Raises:
        SpecError: no such layer, several of them, or another number.
    """
    chosen = FreeLayer.of(graph, layer, None)
    if chosen.shifted:
        raise SpecError("free: got a number of weights, but biases move; expected none")
    name = chosen.names[0]
    weight = chosen.graph.parameters[name]
    if not 1 <= count <= weight.numel():
        raise SpecError(
            f"free: got {count}; expected 1 to {weight.numel()}, the weights of {chosen.node.name}"
        )
    total = torch.zeros_like(weight)
    moving = weight.detach().clone().requires_grad_()
    for i, x in enumerate(torch.from_numpy(claims.inputs)):
        y = evaluate_graph(chosen.graph, x[None], {name: moving}).reshape(-1)
        (slope,) = torch.autograd.grad(_margin(claims, i, y), moving)
        total += slope.abs()
    order = torch.argsort(total.reshape(-1), descending=True, stable=True)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.reshape(weight.shape)


def _margin(claims: PointClaims, i: int, y: Tensor) -> Tensor:
    """The row of example i that decides, as a function of the output (m,)."""
    outputs = np.zeros((len(claims.inputs), len(y)))
    outputs[i] = y.detach().numpy()
    values = row_values(claims, outputs)
    best = best_rows(claims, values)
    mine = best[claims.point[best] == i]
    row = int(mine[values[mine].argmin()])
    return torch.from_numpy(claims.rows[row]) @ y + float(claims.offset[row])
