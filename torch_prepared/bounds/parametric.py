"""Bounds that stay linear in unknown weights: the interval-parametric relaxation of PREPARED.

One affine layer's weight and bias and, after it, biases only are unknown: ``theta' = theta + d``.
Everything before the layer is fixed, so its input ``h`` lies in a constant box with center c and
radius r, and for *every* weight w

    max over the box of  w . h  =  w . c + |w| . r,

which is linear in (w, t) once ``t >= w`` and ``t >= -w``. This is exact, where a relaxation over a
range of weights would be loose, and the columns t do not depend on the region, so any number of
regions share them. Later bounds are columns u, l tied by rows
``u' >= M+ u + M- l + const + d_bias`` and, at an activation, ``u' >= above_k(u)``,
``l' <= below_k(l)`` with lines valid on all reals.
Affine nodes between activations are composed before they are bounded, and so is a property's row,
so residual sums and the last layer lose nothing.

Two unknowns are never multiplied: such a choice of layers is refused.

Source: Tao and Thakur, "Provable Editing of Deep Neural Networks using Parametric Linear
Relaxation" (NeurIPS 2024). Ours: center/radius columns shared by all regions (the paper has a pair
of columns per weight and region), composition of affine nodes, lines for smooth activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from torch_prepared.bounds._edited import EditedLayer, Infimum, spread_bias
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.core.rows import Block, Floats, LinearRows, RowBuilder, Unknowns
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax import ElementwiseOperator, lookup
from torch_prepared.relax.pool import pool_windows

__all__ = ["ParametricBounds", "editable_layers"]

Integers = NDArray[np.int64]
Boxes = Mapping[str, Interval]


def editable_layers(graph: Graph) -> tuple[str, ...]:
    """Names of the layers whose weight a one-layer edit may change, first to last."""
    found = []
    for node in graph.nodes:
        weight = node.params.get("weight")
        if node.op not in ("linear", "conv") or weight is None:
            continue
        if weight.name in graph.editable and len(graph.readers(weight.name)) == 1:
            found.append(node.name)
    return tuple(found)


@dataclass(frozen=True)
class SymbolicBox:
    """Bounds of a node's flattened value: per scalar a column, or -1 and a constant."""

    lower_column: Integers
    upper_column: Integers
    lower: Floats
    upper: Floats


@dataclass(frozen=True)
class AffineValue:
    """``sum_f parts[f] @ value(f) + const + bias @ unknowns`` over frontier values f."""

    parts: Mapping[str, sp.csr_matrix]
    const: Floats
    bias: sp.csr_matrix


@dataclass
class ParametricBounds:
    """Rows over one layer's weight and bias changes (and later biases) that bound any network.

    Args:
        graph: the network, any dtype; computed in float64.
        layer: name of the edited linear or convolution node.
        biases: also let the biases of later layers change, except those read anywhere else too.
        exact: flat mask of weights whose absolute value gets its own column; elsewhere the sign is
            taken as unchanged, which is valid only for weights that keep it, see
            :meth:`flipped`. None means all.

    Raises:
        UnsupportedOperationError: the layer's weight is shared, a later layer reads the edited
            value twice through unknowns, or an operator after it has no parametric relaxation.
    """

    graph: Graph
    layer: str
    biases: bool = True
    exact: NDArray[np.bool_] | None = None
    unknowns: Unknowns = field(default_factory=Unknowns)
    builder: RowBuilder = field(default_factory=RowBuilder)
    deltas: dict[str, Block] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.graph.to(torch.float64, "cpu")
        layers = editable_layers(self.graph)
        if self.layer not in layers:
            raise UnsupportedOperationError(
                f"{self.layer}: got no layer of that name whose weight is its own and editable; "
                f"expected one of the editable layers: {', '.join(layers) or 'none'}"
            )
        node = self.graph.node(self.layer)
        self._after = self._dependents(node)
        self._add_delta(node.params["weight"].name)
        for part in (node, *(n for n in self.graph.nodes if n.name in self._after)):
            ref = part.params.get("bias")
            if ref is None or not (part is node or self.biases):
                continue
            if ref.name in self.graph.editable and self._only_a_bias(ref.name):
                self._add_delta(ref.name)
        self._edited = EditedLayer.build(self.graph, node, self.deltas, self.exact)

    def _add_delta(self, name: str) -> None:
        """Columns for the change of a stored parameter, in its stored shape."""
        if name not in self.deltas:
            shape = tuple(self.graph.parameters[name].shape)
            self.deltas[name] = self.unknowns.add(f"d:{name}", shape)

    def _only_a_bias(self, name: str) -> bool:
        """Whether a parameter is read as a bias by the layer and layers after it, nowhere else."""
        return all(
            (reader.name == self.layer or reader.name in self._after)
            and reader.op in ("linear", "conv")
            and all(role == "bias" for role, ref in reader.params.items() if ref.name == name)
            for reader in self.graph.readers(name)
        )

    def _dependents(self, node: Node) -> set[str]:
        """Names of nodes after ``node`` whose value depends on it."""
        found: set[str] = set()
        for other in self.graph.nodes:
            if any(name == node.name or name in found for name in other.inputs):
                found.add(other.name)
        if node.inputs[0] in found:
            raise UnsupportedOperationError(f"{node.name}: reads its own output")
        return found

    def rows(self) -> LinearRows:
        """All rows so far, over all unknowns so far."""
        return self.builder.build(self.unknowns.count)

    def flipped(self, delta: Floats) -> NDArray[np.bool_]:
        """Weights, flat, whose sign the rows take as unchanged and that ``delta`` changes.

        Where there is none the rows say what they claim.
        """
        return self._edited.flipped(delta)

    def add_property(
        self, boxes: Boxes, rows: Floats, offset: Floats, margin: float, tag: str
    ) -> None:
        """Require ``rows @ y + offset >= margin`` on one region.

        Args:
            boxes: intervals (1, *shape) of every node's value for the unedited network. Those of
                values before the layer are used as facts; later ones only choose the lines.
            rows: (s, m) coefficients on the flattened output.
            offset: (s,).
            margin: to be reached by every row.
            tag: prefix of the new unknowns' names; unique per call.
        """
        output, symbolic = self._propagate(boxes, tag)
        final = _apply(sp.csr_matrix(rows), output)
        self._infimum(final, symbolic, boxes).open(self.builder, margin - offset)

    def add_enclosure(self, boxes: Boxes, tag: str) -> tuple[Block, Block]:
        """Columns ``(lower, upper)`` (m,) that enclose the output, whatever the unknowns."""
        output, symbolic = self._propagate(boxes, tag)
        return self._new_bounds(output, symbolic, boxes, f"{tag}:output")

    def _propagate(self, boxes: Boxes, tag: str) -> tuple[AffineValue, dict[str, SymbolicBox]]:
        """The output as an affine value over frontier values, and the frontier's bounds."""
        values: dict[str, AffineValue] = {}
        symbolic: dict[str, SymbolicBox] = {}
        for node in self.graph.nodes:
            if node.name == self.layer:
                values[node.name] = self._identity(node.name, node.size)
            elif node.name not in self._after:
                continue
            elif lookup(node.op).traits.affine:
                values[node.name] = self._compose(node, values, symbolic, boxes)
            else:
                symbolic[node.name] = self._activate(node, values, symbolic, boxes, tag)
                values[node.name] = self._identity(node.name, node.size)
        return values[self.graph.nodes[-1].name], symbolic

    def _identity(self, name: str, size: int) -> AffineValue:
        eye = sp.identity(size, format="csr")
        nothing = sp.csr_matrix((size, self.unknowns.count))
        return AffineValue({name: eye}, np.zeros(size), nothing)

    def _constant(self, name: str, symbolic: dict[str, SymbolicBox], box: Interval) -> None:
        """Make a value that does not depend on the unknowns a frontier with constant bounds."""
        lower = box.lower.detach().double().reshape(-1).numpy()
        upper = box.upper.detach().double().reshape(-1).numpy()
        constant = np.full(lower.shape, -1, dtype=np.int64)
        symbolic[name] = SymbolicBox(constant, constant, lower, upper)

    def _compose(
        self,
        node: Node,
        values: dict[str, AffineValue],
        symbolic: dict[str, SymbolicBox],
        boxes: Boxes,
    ) -> AffineValue:
        """An affine node after the edited layer."""
        shapes = [tuple(boxes[name].lower.shape[1:]) for name in node.inputs]
        operator = lookup(node.op)
        matrices = operator.matrices(node, shapes, self.graph.parameters)  # type: ignore[attr-defined]
        zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]
        const = operator.value(node, zeros, self.graph.parameters).detach().numpy().reshape(-1)
        parts: dict[str, sp.csr_matrix] = {}
        bias = self._bias_columns(node)
        for name, matrix in zip(node.inputs, matrices, strict=True):
            if name not in values:
                if name not in symbolic:
                    self._constant(name, symbolic, boxes[name])
                values[name] = self._identity(name, int(np.prod(boxes[name].lower.shape[1:])))
            inner = values[name]
            for frontier, part in inner.parts.items():
                moved = matrix @ part
                parts[frontier] = parts[frontier] + moved if frontier in parts else moved
            const = const + matrix @ inner.const
            bias = _add_wide(bias, matrix @ inner.bias)
        return AffineValue(parts, const, bias)

    def _bias_columns(self, node: Node) -> sp.csr_matrix:
        """How an unknown bias of ``node`` enters its flattened value: (m, unknowns)."""
        empty = sp.csr_matrix((node.size, self.unknowns.count))
        ref = node.params.get("bias")
        if ref is None or ref.name not in self.deltas:
            return empty
        stored = torch.from_numpy(self.deltas[ref.name].columns)
        columns = spread_bias(node, ref.read({ref.name: stored}).reshape(-1).numpy())
        shape = (node.size, self.unknowns.count)
        return sp.csr_matrix((np.ones(node.size), (np.arange(node.size), columns)), shape=shape)

    def _activate(
        self,
        node: Node,
        values: dict[str, AffineValue],
        symbolic: dict[str, SymbolicBox],
        boxes: Boxes,
        tag: str,
    ) -> SymbolicBox:
        """A nonlinear node: bound its input, then tie new output bounds to that by lines."""
        name = node.inputs[0]
        if node.op == "max_pool" or not isinstance(lookup(node.op), ElementwiseOperator):
            return self._pool(node, values, symbolic, boxes, tag)
        operator = lookup(node.op)
        low, high = self._new_bounds(values[name], symbolic, boxes, f"{tag}:{node.name}:in")
        reference = boxes[name].map(lambda end: end.detach().double().reshape(-1))
        below, above = operator.enclosing_lines(node, reference)  # type: ignore[attr-defined]
        out_low = self.unknowns.add(f"{tag}:{node.name}:low", (node.size,))
        out_high = self.unknowns.add(f"{tag}:{node.name}:high", (node.size,))
        for slope, offset in zip(*(t.numpy() for t in above), strict=True):
            opened = self.builder.ge(offset)
            self.builder.add(opened, out_high.columns, 1.0)
            self.builder.add(opened, high.columns, -slope)
        for slope, offset in zip(*(t.numpy() for t in below), strict=True):
            opened = self.builder.ge(-offset)
            self.builder.add(opened, out_low.columns, -1.0)
            self.builder.add(opened, low.columns, slope)
        zero = np.zeros(node.size)
        return SymbolicBox(out_low.columns, out_high.columns, zero, zero)

    def _pool(
        self,
        node: Node,
        values: dict[str, AffineValue],
        symbolic: dict[str, SymbolicBox],
        boxes: Boxes,
        tag: str,
    ) -> SymbolicBox:
        """Max pooling: ``u' >= u_i`` for all i of a window; ``l' <= l_i`` for its likeliest i."""
        if node.op != "max_pool":
            raise UnsupportedOperationError(
                f"{node.name}: operator '{node.op}' has no relaxation for unknown bounds; edit a "
                "layer after it"
            )
        name = node.inputs[0]
        low, high = self._new_bounds(values[name], symbolic, boxes, f"{tag}:{node.name}:in")
        index = pool_windows(node, boxes[name].lower.shape[1:]).numpy()
        out_low = self.unknowns.add(f"{tag}:{node.name}:low", (node.size,))
        out_high = self.unknowns.add(f"{tag}:{node.name}:high", (node.size,))
        inside = index >= 0
        opened = self.builder.ge(np.zeros(int(inside.sum())))
        owner = np.broadcast_to(out_high.columns[:, None], index.shape)[inside]
        self.builder.add(opened, owner, 1.0)
        self.builder.add(opened, high.columns[index[inside]], -1.0)
        floor = boxes[name].lower.detach().double().reshape(-1).numpy()[np.maximum(index, 0)]
        best = np.where(inside, floor, -np.inf).argmax(axis=1)
        chosen = index[np.arange(len(index)), best]
        opened = self.builder.ge(np.zeros(node.size))
        self.builder.add(opened, out_low.columns, -1.0)
        self.builder.add(opened, low.columns[chosen], 1.0)
        zero = np.zeros(node.size)
        return SymbolicBox(out_low.columns, out_high.columns, zero, zero)

    def _new_bounds(
        self,
        value: AffineValue,
        symbolic: dict[str, SymbolicBox],
        boxes: Boxes,
        name: str,
    ) -> tuple[Block, Block]:
        """Columns ``(low, high)`` with rows ``high >= sup value`` and ``low <= inf value``."""
        size = len(value.const)
        low = self.unknowns.add(f"{name}:low", (size,))
        high = self.unknowns.add(f"{name}:high", (size,))
        below = self._infimum(value, symbolic, boxes)
        opened = below.open(self.builder, np.zeros(size))
        self.builder.add(opened, low.columns, -1.0)
        above = self._infimum(_apply(-sp.identity(size, format="csr"), value), symbolic, boxes)
        opened = above.open(self.builder, np.zeros(size))
        self.builder.add(opened, high.columns, 1.0)
        return low, high

    def _infimum(
        self, value: AffineValue, symbolic: Mapping[str, SymbolicBox], boxes: Boxes
    ) -> Infimum:
        """The smallest ``value`` over all frontier values within their bounds."""
        found = Infimum(value.const.copy())
        bias = value.bias.tocoo()
        found.entries.append((bias.row.astype(np.int64), bias.col.astype(np.int64), bias.data))
        for frontier, part in value.parts.items():
            if frontier == self.layer:
                fixed = boxes[self._edited.input_name]
                self._edited.add_infimum(found, part, fixed, self.unknowns, self.builder)
                continue
            box, coo = symbolic[frontier], part.tocoo()
            positive = coo.data > 0
            column = np.where(positive, box.lower_column[coo.col], box.upper_column[coo.col])
            end = np.where(positive, box.lower[coo.col], box.upper[coo.col])
            free = column >= 0
            row = coo.row.astype(np.int64)
            found.entries.append((row[free], column[free], coo.data[free]))
            np.add.at(found.const, row[~free], (coo.data * end)[~free])
        return found


def _apply(matrix: sp.csr_matrix, value: AffineValue) -> AffineValue:
    """``matrix @ value``."""
    return AffineValue(
        {name: sp.csr_matrix(matrix @ part) for name, part in value.parts.items()},
        matrix @ value.const,
        sp.csr_matrix(matrix @ value.bias),
    )


def _add_wide(a: sp.csr_matrix, b: sp.csr_matrix) -> sp.csr_matrix:
    """Sum of matrices over the first columns of the same unknowns."""
    width = max(a.shape[1], b.shape[1])
    grown = [
        sp.csr_matrix((m.data, m.indices, m.indptr), shape=(m.shape[0], width)) for m in (a, b)
    ]
    return grown[0] + grown[1]
