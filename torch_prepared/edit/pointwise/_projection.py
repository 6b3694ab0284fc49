"""The last layer moved least in what it does: a projection with as many unknowns as rows.

With features h of the layer, ``A = E[h h'] + damping`` over reference inputs and a change D, the
mean squared change of the layer's value is ``trace(D A D')``. A row that multiplies the layer's
value by c and is evaluated at features h has the inner product ``(c . c') (h' A^-1 h')`` with
another one, so the dual needs no matrix of the layer's size. Soft rows add the inverse of their
weight to the diagonal, which penalizes squared shortfalls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from torch_prepared.certify import PointClaims
from torch_prepared.core.rows import Floats
from torch_prepared.edit.pointwise._layer import FreeLayer, Prefix
from torch_prepared.errors import SpecError
from torch_prepared.relax import lookup
from torch_prepared.solvers import Status, project

__all__ = ["LastLayer"]

Integers = NDArray[np.int64]
DAMPING = 1e-3


@dataclass(frozen=True, eq=False)
class LastLayer:
    """A dense last layer with its metric.

    Args:
        layer: the layer.
        inverse: (n + 1, n + 1) or (n, n), the inverse of A.
        tail: (m, k) how the output moves with the layer's value.
    """

    layer: FreeLayer
    inverse: Floats
    tail: Floats

    @classmethod
    def of(cls, layer: FreeLayer, reference: Prefix | None) -> LastLayer:
        """Metric of the mean squared change on the reference, the 2-norm without one.

        Raises:
            SpecError: a layer that is not dense and last, or whose entries are partly fixed.
        """
        if not (layer.is_dense and layer.is_last and bool(layer.free.all())):
            raise SpecError(
                f"{layer.node.name}: norms '2' and 'behavior' need a last, fully connected, wholly "
                "free layer; expected that, or norm '1', 'inf' or '0'"
            )
        size = layer.node.params["weight"].read(layer.graph.parameters).shape[1]
        matrix = np.eye(size + (len(layer.names) == 2))
        if reference is not None:
            h = features(layer, reference)
            matrix = h.T @ h / len(h)
            matrix += np.eye(len(matrix)) * max(DAMPING * np.trace(matrix) / len(matrix), 1e-12)
        value = torch.zeros(1, layer.node.size, dtype=torch.float64)
        inverse = np.asarray(np.linalg.inv(matrix), dtype=np.float64)
        return cls(layer, inverse, _tail(layer, value))

    def step(
        self,
        claims: PointClaims,
        prefix: Prefix,
        rows: Integers,
        lift: Floats,
        softness: Floats,
    ) -> tuple[Status, Floats | None, tuple[int, ...]]:
        """The smallest d for which each row rises by ``lift``.

        Args:
            claims: examples.
            prefix: values at all of the claims' points.
            rows: positions of rows.
            lift: (rows,) rise to reach.
            softness: (rows,) inverse weight of squared shortfalls; 0 forbids them.

        Returns:
            Status, the change (p,) or None, and points in conflict when infeasible.
        """
        h = features(self.layer, prefix)[claims.point[rows]]
        c = claims.rows[rows] @ self.tail
        moved = h @ self.inverse
        gram = (c @ c.T) * (moved @ h.T)
        gram = 0.5 * (gram + gram.T)
        gram[np.diag_indices(len(gram))] += softness
        answer = project(gram, lift)
        if answer.status is Status.INFEASIBLE:
            ray = np.ones(len(rows)) if answer.ray is None else np.abs(answer.ray)
            used = claims.point[rows][ray > 1e-6 * ray.max(initial=0.0)]
            return answer.status, None, tuple(np.unique(used).tolist())
        change = (c * answer.multipliers[:, None]).T @ moved
        d = np.zeros(self.layer.count)
        weight, bias = self.layer.columns
        d[weight] = change[:, : weight.shape[1]]
        if bias is not None:
            d[bias] = change[:, -1]
        return answer.status, d, ()


def features(layer: FreeLayer, prefix: Prefix) -> Floats:
    """The layer's input (b, n), with a column of ones when its bias moves too."""
    h = prefix[layer.node.inputs[0]].flatten(1).numpy()
    return np.concatenate([h, np.ones((len(h), 1))], axis=1) if len(layer.names) == 2 else h


def _tail(layer: FreeLayer, value: torch.Tensor) -> Floats:
    """The matrix from the layer's value to the output; all nodes between are affine."""
    inside = {n.name for n in layer.after}
    others = {name for n in layer.after[1:] for name in n.inputs if name not in inside}
    table = layer.graph.parameters
    known = {
        name: torch.zeros(1, *layer.graph.node(name).shape, dtype=torch.float64) for name in others
    }

    def output(v: torch.Tensor) -> torch.Tensor:
        from_layer = {**known, layer.node.name: v.reshape(1, *layer.node.shape)}
        for node in layer.after[1:]:
            inputs = [from_layer[name] for name in node.inputs]
            from_layer[node.name] = lookup(node.op).value(node, inputs, table)
        return from_layer[layer.graph.nodes[-1].name].reshape(-1)

    jacobian = torch.autograd.functional.jacobian(output, value)
    return np.asarray(jacobian.reshape(layer.graph.output_size, -1).numpy())
