"""Mixed-integer rows whose solutions are exactly the points ``(x, f(x))`` of a network.

For an unstable ReLU ``h = max(z, 0)`` with ``l <= z <= u`` on the region, ``l < 0 < u``::

    h - s = z,   0 <= h <= u t,   0 <= s <= -l (1 - t),   t in {0, 1}

so that the dense row of the layer before it appears once. A stable ReLU needs no integer: it is an
equation or zero. ``leaky_relu`` is ``a z + (1 - a) max(z, 0)``; a maximum over a window has one
integer per scalar that can be the largest.

Source: Tjeng, Xiao & Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer
Programming" (ICLR 2019), section 4; the two-part form of the equation follows Fischetti & Jo,
"Deep neural networks and mixed integer linear optimization" (Constraints 2018).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.core.rows import Floats, LinearRows, RowBuilder, Unknowns
from torch_prepared.errors import SolverError
from torch_prepared.relax import AffineOperator, lookup
from torch_prepared.relax.pool import pool_windows

__all__ = ["Affine", "Copy", "Program", "Switches", "encode_copy", "node_matrices"]

Integers = NDArray[np.int64]
_SLACK = 2.0**-30  #: relative; covers the rounding in bounds that hold in exact arithmetic


@dataclass(frozen=True)
class Affine:
    """``matrix @ columns + offset``: some scalars as affine functions of the unknowns."""

    matrix: sp.csr_matrix
    offset: Floats

    @property
    def size(self) -> int:
        """Number of scalars."""
        return len(self.offset)

    def widen(self, columns: int) -> sp.csr_matrix:
        """The matrix over ``columns`` unknowns, zero in those added since."""
        m = self.matrix
        return sp.csr_matrix((m.data, m.indices, m.indptr), shape=(self.size, columns))

    def __sub__(self, other: Affine) -> Affine:
        width = max(self.matrix.shape[1], other.matrix.shape[1])
        difference = (self.widen(width) - other.widen(width)).tocsr()
        return Affine(difference, self.offset - other.offset)

    def __getitem__(self, index: Integers | NDArray[np.bool_]) -> Affine:
        return Affine(self.matrix[index], self.offset[index])

    def shifted(self, by: Floats) -> Affine:
        """Plus constants (k,)."""
        return Affine(self.matrix, self.offset + by)

    def both_signs(self) -> Affine:
        """Itself followed by its negative."""
        matrix = sp.vstack([self.matrix, -self.matrix], format="csr")
        return Affine(matrix, np.concatenate([self.offset, -self.offset]))

    def at(self, columns: Floats) -> Floats:
        """Values at a solution."""
        return np.asarray(self.matrix @ columns[: self.matrix.shape[1]] + self.offset)


class Program:
    """Columns, rows and integrality collected for one mixed-integer program."""

    def __init__(self) -> None:
        self.unknowns = Unknowns()
        self.rows = RowBuilder()
        self._integer: list[Integers] = []

    @property
    def columns(self) -> int:
        """Number of columns so far."""
        return self.unknowns.count

    @property
    def integer(self) -> NDArray[np.bool_]:
        """Mask (p,) of the columns that are whole numbers."""
        mask = np.zeros(self.columns, dtype=bool)
        for part in self._integer:
            mask[part] = True
        return mask

    def add(self, name: str, lower: Floats, upper: Floats, integer: bool = False) -> Integers:
        """New columns (k,) within bounds."""
        columns = self.unknowns.add(name, np.shape(lower), lower, upper).columns
        if integer:
            self._integer.append(columns)
        return columns

    def pick(self, columns: Integers) -> Affine:
        """The columns themselves as affine functions."""
        k = len(columns)
        matrix = sp.csr_matrix((np.ones(k), (np.arange(k), columns)), shape=(k, self.columns))
        return Affine(matrix, np.zeros(k))

    def at_least(self, value: Affine, bound: Floats | float = 0.0) -> Integers:
        """Rows ``value >= bound``; returns their numbers."""
        return self._append(value, self.rows.ge(np.broadcast_to(bound, value.size) - value.offset))

    def equal(self, value: Affine, target: Floats | float = 0.0) -> Integers:
        """Rows ``value == target``; returns their numbers."""
        return self._append(value, self.rows.eq(np.broadcast_to(target, value.size) - value.offset))

    def _append(self, value: Affine, rows: Integers) -> Integers:
        entries = value.matrix.tocoo()
        self.rows.add(rows[entries.row], entries.col, entries.data)
        return rows

    def build_rows(self) -> LinearRows:
        """All rows over all columns."""
        return self.rows.build(self.columns)


@dataclass(frozen=True)
class Switches:
    """The unstable scalars of one nonlinear node of one copy.

    Attributes:
        node: name of the node.
        index: (k,) positions in the node's input (relu) or output (max_pool).
        columns: (k,) the integer columns ``t``.
        choices: for max_pool the flat input position of each switch; None for relu.
        active: for relu the positions that are surely not below 0; the others that are not in
            ``index`` are surely not above.
    """

    node: str
    index: Integers
    columns: Integers
    choices: Integers | None = None
    active: Integers = field(default_factory=lambda: np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class Copy:
    """One evaluation of a network inside a program.

    Attributes:
        inputs: (n,) columns of the input.
        output: (m,) the output.
        switches: integers by nonlinear node.
        values: every node's value, by name.
    """

    inputs: Integers
    output: Affine
    switches: tuple[Switches, ...] = ()
    values: Mapping[str, Affine] = field(default_factory=dict)

    @property
    def integers(self) -> int:
        """Number of integer columns."""
        return sum(len(s.columns) for s in self.switches)


def encode_copy(
    program: Program, tag: str, graph: Graph, boxes: Mapping[str, Interval], inputs: Integers
) -> Copy:
    """Add columns and rows for ``f(x)`` at the input columns ``inputs``.

    Args:
        program: receives columns, rows and integers.
        tag: prefix of the columns' names.
        graph: float64 network of affine operators, relu, leaky_relu, max_pool.
        boxes: intervals (1, *shape) of every node's value over the region of the inputs.
        inputs: (n,) columns; several copies may share them.

    Raises:
        SolverError: an interval that is not finite, so that there are no rows.
    """
    values = {graph.nodes[0].name: program.pick(inputs)}
    switches: list[Switches] = []
    for node in graph.nodes[1:]:
        if lookup(node.op).traits.affine:
            values[node.name] = _affine(graph, node, values)
            continue
        lower, upper = _ends(boxes[node.inputs[0]], node)
        z, name = values[node.inputs[0]], f"{tag}.{node.name}"
        if node.op == "max_pool":
            shape = graph.node(node.inputs[0]).shape
            value, found = _max_pool(program, name, node, z, lower, upper, shape)
        else:
            value, found = _relu(program, name, node, z, lower, upper)
            slope = float(node.attrs.get("alpha", 0.0))  # type: ignore[arg-type]
            if slope:
                matrix = slope * z.widen(program.columns) + (1 - slope) * value.matrix
                value = Affine(sp.csr_matrix(matrix), slope * z.offset + (1 - slope) * value.offset)
        values[node.name] = value
        switches.append(found)
    return Copy(inputs, values[graph.nodes[-1].name], tuple(switches), values)


def _ends(box: Interval, node: Node) -> tuple[Floats, Floats]:
    """Interval ends (k,), moved outward by the rounding slack."""
    lower = box.lower[0].detach().double().flatten().numpy()
    upper = box.upper[0].detach().double().flatten().numpy()
    if not bool(np.isfinite(lower).all() and np.isfinite(upper).all()):
        raise SolverError(
            f"{node.name}: got bounds that are not finite over the region; expected a smaller "
            "radius or smaller weights"
        )
    slack = _SLACK * (1.0 + np.maximum(np.abs(lower), np.abs(upper)))
    return lower - slack, upper + slack


def node_matrices(graph: Graph, node: Node) -> tuple[sp.csr_matrix, ...]:
    """Linear part (m, n_i) of an affine node, one matrix per input."""
    operator = lookup(node.op)
    if not isinstance(operator, AffineOperator):
        raise TypeError(f"{node.name}: '{node.op}' is affine but no AffineOperator")
    shapes = [graph.node(name).shape for name in node.inputs]
    return operator.matrices(node, shapes, graph.parameters)


def _affine(graph: Graph, node: Node, values: Mapping[str, Affine]) -> Affine:
    matrices = node_matrices(graph, node)
    zeros = [torch.zeros(1, *graph.node(i).shape, dtype=torch.float64) for i in node.inputs]
    origin = lookup(node.op).value(node, zeros, graph.parameters)
    offset = origin.detach().flatten().numpy().copy()
    width = max(values[name].matrix.shape[1] for name in node.inputs)
    total = sp.csr_matrix((node.size, width))
    for name, matrix in zip(node.inputs, matrices, strict=True):
        total = total + matrix @ values[name].widen(width)
        offset = offset + matrix @ values[name].offset
    return Affine(sp.csr_matrix(total), offset)


def _relu(
    program: Program, name: str, node: Node, z: Affine, lower: Floats, upper: Floats
) -> tuple[Affine, Switches]:
    """``max(z, 0)`` as columns ``h``; stable zeros have none."""
    unstable = np.flatnonzero((lower < 0) & (upper > 0))
    active = np.flatnonzero(lower >= 0)
    on, off = upper[unstable], -lower[unstable]
    h = program.add(f"{name}.h", np.zeros(len(unstable)), on)
    s = program.add(f"{name}.s", np.zeros(len(unstable)), off)
    t = program.add(f"{name}.t", np.zeros(len(unstable)), np.ones(len(unstable)), integer=True)
    a = program.add(f"{name}.a", lower[active], upper[active])
    builder = program.rows
    program.equal(program.pick(h) - program.pick(s) - z[unstable])
    program.equal(program.pick(a) - z[active])
    rows = builder.ge(np.zeros(len(unstable)))  # u t - h >= 0
    builder.add(rows, t, on)
    builder.add(rows, h, -1.0)
    rows = builder.ge(-off)  # l (1 - t) <= -s
    builder.add(rows, t, -off)
    builder.add(rows, s, -1.0)
    matrix = sp.csr_matrix(
        (
            np.ones(len(unstable) + len(active)),
            (np.concatenate([unstable, active]), np.concatenate([h, a])),
        ),
        shape=(node.size, program.columns),
    )
    return Affine(matrix, np.zeros(node.size)), Switches(node.name, unstable, t, active=active)


def _max_pool(
    program: Program,
    name: str,
    node: Node,
    z: Affine,
    lower: Floats,
    upper: Floats,
    shape: tuple[int, ...],
) -> tuple[Affine, Switches]:
    """``y >= z_i``, ``y <= z_i + (max u - l_i) (1 - t_i)``, ``sum t = 1`` over each window."""
    windows = pool_windows(node, shape).numpy()
    inside = windows >= 0
    low = np.where(inside, lower[windows], -np.inf)
    high = np.where(inside, upper[windows], -np.inf)
    floor, ceiling = low.max(axis=1), high.max(axis=1)
    rivals = inside & (high >= floor[:, None])
    y = program.add(f"{name}.y", floor, ceiling)
    out, place = np.nonzero(rivals)
    source = windows[out, place]
    t = program.add(f"{name}.t", np.zeros(len(out)), np.ones(len(out)), integer=True)
    gap = program.pick(y)[out] - z[source]
    program.at_least(gap)
    reach = ceiling[out] - lower[source]
    rows = program.at_least(Affine(-gap.matrix, -gap.offset), -reach)
    program.rows.add(rows, t, -reach)
    rows = program.rows.eq(np.ones(node.size))
    program.rows.add(rows[out], t, 1.0)
    return program.pick(y), Switches(node.name, out.astype(np.int64), t, source.astype(np.int64))
