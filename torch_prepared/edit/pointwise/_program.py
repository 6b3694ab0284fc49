"""From examples to a piecewise-linear program over the change of one layer, or of several biases.

Everything before the first of them is a constant; a layer's value is affine in the change; affine
nodes are composed; a ReLU whose argument cannot change sign within the unknowns' bounds is
linear, any other becomes a cell of the program (or, with a fixed pattern, a pair of sign rows).
Which ones can is said by intervals, tightened by CROWN over the box of the first layer's value: the
rows of a fully connected layer have their own unknowns, so that nothing is lost by that box.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.bounds import RegionBatch, bound_nodes
from torch_prepared.certify import PointClaims
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.core.rows import Floats, LinearRows
from torch_prepared.edit.pointwise._layer import FreeLayer, Prefix
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax import lookup
from torch_prepared.solvers.smt import ReluProgram

__all__ = ["Pattern", "build_program"]

Integers = NDArray[np.int64]
Pattern = Mapping[str, Tensor]
"""Which arguments of each ReLU are positive: bool (b, *shape) by node."""
_SLACK = 1e-9


def build_program(
    layer: FreeLayer,
    prefix: Prefix,
    claims: PointClaims,
    rows: Integers,
    required: Floats,
    *,
    reach: float = np.inf,
    pattern: Pattern | None = None,
) -> ReluProgram:
    """The program whose solutions give every chosen row at least its required value.

    Args:
        layer: what may change.
        prefix: values at the claims' points.
        claims: examples.
        rows: positions of the rows to require.
        required: (len(rows),) values of ``rows @ y + offset`` to reach.
        reach: largest allowed change of one weight.
        pattern: fixes the sign of every argument of a ReLU after the layer: a restriction, without
            cells.

    Raises:
        UnsupportedOperationError: a nonlinear node after the layer that is no ReLU.
    """
    points = np.unique(claims.point[rows])
    relus = sum(n.size for n in layer.after if not lookup(n.op).traits.affine)
    width = layer.count + (0 if pattern is not None else relus * len(points))
    build = _Build(layer, prefix, reach, pattern, width)
    found = []
    for i in points.tolist():
        output, const = build.example(i)
        mine = np.flatnonzero(claims.point[rows] == i)
        matrix = sp.csr_matrix(claims.rows[rows[mine]]) @ output
        rhs = required[mine] - claims.offset[rows[mine]] - claims.rows[rows[mine]] @ const
        found.append((matrix, rhs, np.full(len(mine), i, dtype=np.int64)))
    found += build.signs
    p, k = layer.count, len(build.const)
    matrices = [sp.csr_matrix(m)[:, : p + k] for m, _, _ in found]
    bound = np.where(layer.free, reach, 0.0)
    pre = sp.vstack(build.pre, format="csr")[:, : p + k] if k else sp.csr_matrix((0, p))
    return ReluProgram(
        -bound,
        bound,
        sp.csr_matrix(pre),
        np.array(build.const),
        np.array(build.low),
        np.array(build.high),
        LinearRows(sp.vstack(matrices, format="csr"), np.concatenate([r for _, r, _ in found])),
        np.concatenate([o for _, _, o in found]),
    )


@dataclass
class _Build:
    """Expressions over (d, cells) of the nodes after the layer, example by example."""

    layer: FreeLayer
    prefix: Prefix
    reach: float
    pattern: Pattern | None
    width: int
    pre: list[sp.csr_matrix] = field(default_factory=list)
    const: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    signs: list[tuple[sp.csr_matrix, Floats, Integers]] = field(default_factory=list)
    _maps: dict[str, tuple[tuple[sp.csr_matrix, ...], Floats]] = field(default_factory=dict)

    def example(self, i: int) -> tuple[sp.csr_matrix, Floats]:
        """The output at example i: matrix (m, width) and constant (m,)."""
        here = {name: value[i : i + 1] for name, value in self.prefix.items()}
        shapes = {name: tuple(value.shape[1:]) for name, value in here.items()}
        known: dict[str, tuple[sp.csr_matrix, Floats]] = {}
        closer: dict[str, Interval] = {}
        boxes = {name: Interval.point(value) for name, value in here.items()}
        for node in self.layer.after:
            shapes[node.name] = node.shape
            table = self.layer.graph.parameters
            moved = self.layer.matrix(self.prefix, i, node)
            if not any(name in known for name in node.inputs):
                with torch.no_grad():
                    start = lookup(node.op).value(node, [here[n] for n in node.inputs], table)
                empty = sp.csr_matrix((node.size, self.width))
                known[node.name] = empty, start.reshape(-1).numpy()
            elif lookup(node.op).traits.affine:
                known[node.name] = self._affine(node, known, here, shapes)
            elif node.op == "relu":
                known[node.name] = self._relu(node, i, *known[node.inputs[0]], boxes)
            else:
                raise UnsupportedOperationError(
                    f"{node.name}: operator '{node.op}' after the edited layer; expected 'relu' or "
                    "affine ones; edit the last layer, or use norm 'behavior'"
                )
            if self.pattern is None:
                inputs = [boxes[name] for name in node.inputs]
                box = lookup(node.op).interval(node, inputs, table)
                tight = closer.get(node.name)
                boxes[node.name] = box if tight is None else box.intersect(tight)
            if moved is not None:
                matrix, const = known[node.name]
                known[node.name] = sp.csr_matrix(matrix + _widen(moved, self.width)), const
                if self.pattern is None:
                    spread = _times(abs(moved).sum(axis=1), self.reach)
                    boxes[node.name] = _spread(boxes[node.name], spread)
                    closer |= self._crown(node, boxes[node.name])
        return known[self.layer.graph.nodes[-1].name]

    @cached_property
    def _rest(self) -> Graph | None:
        """The network after the only layer that changes, if it reads nothing else."""
        first, *rest = self.layer.after
        names = {n.name for n in self.layer.after}
        alone = len(self.layer.shifted) <= 1 and any(n.op == "relu" for n in rest)
        if not alone or not all(name in names for n in rest for name in n.inputs):
            return None
        start = Node(first.name, "input", (), first.shape)
        return Graph((start, *rest), self.layer.graph.parameters, frozenset())

    def _crown(self, node: Node, box: Interval) -> dict[str, Interval]:
        """Intervals of nodes after ``node``, over all of its values in ``box``."""
        finite = bool(torch.isfinite(box.lower).all() and torch.isfinite(box.upper).all())
        if self._rest is None or self._rest.nodes[0].name != node.name or not finite:
            return {}
        region = RegionBatch(box.lower.flatten(1), box.upper.flatten(1))
        with torch.no_grad():
            return bound_nodes(self._rest, region)

    def _affine(
        self,
        node: Node,
        known: Mapping[str, tuple[sp.csr_matrix, Floats]],
        here: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> tuple[sp.csr_matrix, Floats]:
        if node.name not in self._maps:
            operator, table = lookup(node.op), self.layer.graph.parameters
            inputs = [shapes[name] for name in node.inputs]
            matrices = operator.matrices(node, inputs, table)  # type: ignore[attr-defined]
            zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in inputs]
            with torch.no_grad():
                const = operator.value(node, zeros, table).reshape(-1).numpy()
            self._maps[node.name] = matrices, const
        matrices, const = self._maps[node.name]
        total = sp.csr_matrix((node.size, self.width))
        const = const.copy()
        for name, matrix in zip(node.inputs, matrices, strict=True):
            if name in known:
                total = total + matrix @ known[name][0]
                const += matrix @ known[name][1]
            else:
                const += matrix @ here[name].reshape(-1).numpy()
        return sp.csr_matrix(total), const

    def _relu(
        self,
        node: Node,
        i: int,
        matrix: sp.csr_matrix,
        const: Floats,
        boxes: Mapping[str, Interval],
    ) -> tuple[sp.csr_matrix, Floats]:
        if self.pattern is not None:
            on = self.pattern[node.name][i].reshape(-1).numpy()
            sign = np.where(on, 1.0, -1.0)
            moves = np.diff(matrix.indptr) > 0
            rows = (sp.diags_array(sign) @ matrix)[moves]
            owner = np.full(int(moves.sum()), i, dtype=np.int64)
            self.signs.append((sp.csr_matrix(rows), (-sign * const)[moves], owner))
            return sp.csr_matrix(sp.diags_array(on.astype(np.float64)) @ matrix), const * on
        box = boxes[node.inputs[0]]
        low, high = (end.reshape(-1).numpy() for end in (box.lower, box.upper))
        low = np.where(np.isnan(low), -np.inf, low - _SLACK * (1.0 + np.abs(low)))
        high = np.where(np.isnan(high), np.inf, high + _SLACK * (1.0 + np.abs(high)))
        on, cells = low >= 0, np.flatnonzero((low < 0) & (high > 0))
        start = self.layer.count + len(self.const)
        self.pre.append(matrix[cells])
        self.const += const[cells].tolist()
        self.low += low[cells].tolist()
        self.high += high[cells].tolist()
        columns = start + np.arange(len(cells))
        units = sp.csr_matrix((np.ones(len(cells)), (cells, columns)), shape=matrix.shape)
        kept = sp.diags_array(on.astype(np.float64)) @ matrix
        return sp.csr_matrix(kept + units), const * on


def _times(sums: Floats, reach: float) -> Floats:
    """``sums * reach`` where 0 times infinity is 0."""
    flat = np.asarray(sums, dtype=np.float64).reshape(-1)
    return np.where(flat > 0, np.where(flat > 0, flat, 1.0) * reach, 0.0)


def _widen(matrix: sp.csr_matrix, width: int) -> sp.csr_matrix:
    shape = (matrix.shape[0], width)
    return sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), shape=shape)


def _spread(box: Interval, spread: Floats) -> Interval:
    """The box widened by ``spread`` (size,) on both sides."""
    wide = torch.from_numpy(spread).reshape(box.lower.shape)
    return Interval(box.lower - wide, box.upper + wide)
