"""From examples to a piecewise-linear program over one layer's weight change.

Everything before the layer is a constant; the layer's value is affine in the change; affine nodes
after it are composed; a ReLU whose argument cannot change sign within the unknowns' bounds is
linear, any other becomes a cell of the program (or, with a fixed pattern, a pair of sign rows).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.certify import PointClaims
from torch_prepared.core.graph import Node
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
        boxes = {name: Interval.point(value) for name, value in here.items()}
        for node in self.layer.after:
            shapes[node.name] = node.shape
            if node is self.layer.node:
                moved = self.layer.matrix(self.prefix, i)
                start = self.layer.values(here)[node.name].reshape(-1).numpy()
                known[node.name] = _widen(moved, self.width), start
                spread = np.zeros(node.size)
                if self.layer.after[1:] and self.pattern is None:
                    spread = _times(abs(moved).sum(axis=1), self.reach)
                boxes[node.name] = _box(start - spread, start + spread, node)
                continue
            if lookup(node.op).traits.affine:
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
                boxes[node.name] = lookup(node.op).interval(
                    node, inputs, self.layer.graph.parameters
                )
        return known[self.layer.graph.nodes[-1].name]

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


def _box(lower: Floats, upper: Floats, node: Node) -> Interval:
    ends = (torch.from_numpy(end).reshape(1, *node.shape) for end in (lower, upper))
    return Interval(*ends)
