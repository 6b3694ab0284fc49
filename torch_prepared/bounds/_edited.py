"""The layer whose weight is unknown: exact infima of its output over a constant input box."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.core.rows import Block, Floats, RowBuilder, Unknowns
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax.conv import pad_values, window

__all__ = ["EditedLayer", "Infimum", "spread_bias"]

Integers = NDArray[np.int64]
Number = TypeVar("Number", np.float64, np.int64)
MAX_TAPS = 40_000_000


@dataclass
class Infimum:
    """``const + entries @ unknowns`` per row: lower bounds that are linear in the unknowns."""

    const: Floats
    entries: list[tuple[Integers, Integers, Floats]] = field(default_factory=list)

    def open(self, builder: RowBuilder, rhs: Floats) -> Integers:
        """Rows ``const + entries @ unknowns >= rhs``; their numbers."""
        opened = builder.ge(rhs - self.const)
        for row, column, value in self.entries:
            builder.add(opened[row], column, value)
        return opened


@dataclass
class EditedLayer:
    """``y[out] = sum over taps of (w + d)[weight] h[inp]``, plus ``(b + d_b)``.

    A tap is one multiplication of the layer; per (out, inp) there is at most one. Where ``exact``
    is False ``|w + d|`` is replaced by ``sign(w) (w + d)``: right until the sign flips, and wrong
    (too optimistic) after that. Sums of several weights are always exact.
    """

    name: str
    input_name: str
    out: Integers
    inp: Integers
    weight: Integers
    base: Floats
    column: Integers
    bias: Floats
    bias_column: Integers
    exact: NDArray[np.bool_]
    size: int
    _magnitude: Integers = field(init=False)
    _fixed: NDArray[np.bool_] = field(init=False)  #: weights whose sign was taken as unchanged

    def __post_init__(self) -> None:
        self._magnitude = np.full(len(self.base), -1, dtype=np.int64)
        self._fixed = np.zeros(len(self.base), dtype=bool)
        order = np.argsort(self.out, kind="stable")
        self.out, self.inp, self.weight = self.out[order], self.inp[order], self.weight[order]
        self._start = np.searchsorted(self.out, np.arange(self.size + 1))

    @classmethod
    def build(
        cls,
        graph: Graph,
        node: Node,
        deltas: Mapping[str, Block],
        exact: NDArray[np.bool_] | None = None,
    ) -> EditedLayer:
        """The taps of a linear or convolution node, with the columns of its unknown changes."""
        ref = node.params["weight"]
        base = ref.read(graph.parameters).detach().double()
        columns = ref.read({ref.name: torch.from_numpy(deltas[ref.name].columns)})
        shape = graph.node(node.inputs[0]).shape
        out, inp, weight = (
            _linear_taps(node, shape, base)
            if node.op == "linear"
            else _conv_taps(node, shape, base)
        )
        bias, bias_column = np.zeros(node.size), np.full(node.size, -1, dtype=np.int64)
        bias_ref = node.params.get("bias")
        if bias_ref is not None:
            bias = spread_bias(
                node, bias_ref.read(graph.parameters).detach().double().reshape(-1).numpy()
            )
            if bias_ref.name in deltas:
                index = torch.from_numpy(deltas[bias_ref.name].columns)
                bias_column = spread_bias(
                    node, bias_ref.read({bias_ref.name: index}).reshape(-1).numpy()
                )
        flat = base.reshape(-1).numpy()
        return cls(
            node.name, node.inputs[0], out, inp, weight, flat, columns.reshape(-1).numpy(),
            bias, bias_column, np.ones(len(flat), bool) if exact is None else exact, node.size,
        )  # fmt: skip

    def flipped(self, delta: Floats) -> NDArray[np.bool_]:
        """Weights (p,) whose sign was taken as unchanged and is not after the change ``delta``."""
        after = self.base + delta
        return self._fixed & (np.where(self.base < 0, -after, after) < 0)

    def add_infimum(
        self,
        into: Infimum,
        part: sp.csr_matrix,
        box: Interval,
        unknowns: Unknowns,
        builder: RowBuilder,
    ) -> None:
        """Add ``inf over the box of part @ y`` to ``into``; new columns and rows as needed."""
        lower, upper = (end.detach().double().reshape(-1).numpy() for end in (box.lower, box.upper))
        center, radius = (lower + upper) / 2, (upper - lower) / 2
        coo = part.tocoo()
        count = self._start[coo.col + 1] - self._start[coo.col]
        position = np.repeat(self._start[coo.col] - np.cumsum(count) + count, count)
        tap = position + np.arange(len(position))
        row, value = np.repeat(coo.row, count).astype(np.int64), np.repeat(coo.data, count)
        inp, weight = self.inp[tap], self.weight[tap]
        rows = part.shape[0]

        middle = value * center[inp]
        into.const += np.bincount(row, middle * self.base[weight], minlength=rows)
        into.entries.append((row, self.column[weight], middle))
        into.const += np.bincount(coo.row, coo.data * self.bias[coo.col], minlength=rows)
        known = self.bias_column[coo.col] >= 0
        into.entries.append(
            (coo.row[known].astype(np.int64), self.bias_column[coo.col[known]], coo.data[known])
        )
        wide = radius[inp] > 0
        row, value, inp, weight = row[wide], value[wide], inp[wide], weight[wide]
        group, member, size = np.unique(
            row * len(center) + inp, return_inverse=True, return_counts=True
        )
        alone = size[member] == 1
        self._single(
            into, row[alone], value[alone], radius[inp[alone]], weight[alone], unknowns, builder
        )
        self._several(into, group, member, ~alone, row, value, radius, weight, unknowns, builder)

    def _single(
        self,
        into: Infimum,
        row: Integers,
        value: Floats,
        radius: Floats,
        weight: Integers,
        unknowns: Unknowns,
        builder: RowBuilder,
    ) -> None:
        """``- |value| radius |w + d|`` through a shared column ``t >= |w + d|`` or a fixed sign."""
        amount = np.abs(value) * radius
        fixed = ~self.exact[weight]
        self._fixed[weight[fixed]] = True
        sign = np.where(self.base[weight] < 0, -1.0, 1.0)
        np.subtract.at(into.const, row[fixed], (amount * np.abs(self.base[weight]))[fixed])
        into.entries.append((row[fixed], self.column[weight[fixed]], -(amount * sign)[fixed]))
        new = np.unique(weight[~fixed])
        new = new[self._magnitude[new] < 0]
        if len(new):
            block = unknowns.add(f"|{self.name}|{unknowns.count}", (len(new),), lower=0.0)
            self._magnitude[new] = block.columns
            for side in (1.0, -1.0):
                opened = builder.ge(side * self.base[new])
                builder.add(opened, block.columns, 1.0)
                builder.add(opened, self.column[new], -side)
        into.entries.append((row[~fixed], self._magnitude[weight[~fixed]], -amount[~fixed]))

    def _several(
        self,
        into: Infimum,
        group: Integers,
        member: Integers,
        chosen: NDArray[np.bool_],
        row: Integers,
        value: Floats,
        radius: Floats,
        weight: Integers,
        unknowns: Unknowns,
        builder: RowBuilder,
    ) -> None:
        """``- radius_j |sum of value (w + d)|`` for sums of several weights on one input."""
        if not chosen.any():
            return
        used, local = np.unique(member[chosen], return_inverse=True)
        block = unknowns.add(f"|{self.name} rows|{unknowns.count}", (len(used),), lower=0.0)
        base = np.bincount(local, (value * self.base[weight])[chosen], minlength=len(used))
        for side in (1.0, -1.0):
            opened = builder.ge(side * base)
            builder.add(opened, block.columns, 1.0)
            builder.add(opened[local], self.column[weight[chosen]], -side * value[chosen])
        owner, inp = group[used] // len(radius), group[used] % len(radius)
        into.entries.append((owner, block.columns, -radius[inp]))


def spread_bias(node: Node, per_channel: NDArray[Number]) -> NDArray[Number]:
    """A bias by output scalar: last axis for linear, first axis for convolution."""
    copies = node.size // len(per_channel)
    return np.tile(per_channel, copies) if node.op == "linear" else np.repeat(per_channel, copies)


def _linear_taps(
    node: Node, shape: tuple[int, ...], weight: torch.Tensor
) -> tuple[Integers, Integers, Integers]:
    m, n = weight.shape
    copies = int(np.prod(shape[:-1], dtype=np.int64))
    _check_taps(node, copies * m * n)
    p, i, j = np.meshgrid(np.arange(copies), np.arange(m), np.arange(n), indexing="ij")
    return (p * m + i).ravel(), (p * n + j).ravel(), (i * n + j).ravel()


def _conv_taps(
    node: Node, shape: tuple[int, ...], weight: torch.Tensor
) -> tuple[Integers, Integers, Integers]:
    """Taps of a convolution, padded positions left out."""
    groups = int(node.attrs["groups"])  # type: ignore[arg-type]
    channels, per_group = weight.shape[0], weight.shape[0] // groups
    kernel, d = tuple(weight.shape[2:]), len(shape) - 1
    flat = torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(1, *shape) + 1
    x = pad_values(flat, window(node, "padding"))
    geometry = [kernel, window(node, "dilation"), window(node, "stride")]
    if d == 1:
        x, geometry = x.unsqueeze(2), [(1, g[0]) for g in geometry]
    columns = F.unfold(x, geometry[0], dilation=geometry[1], stride=geometry[2])
    index = columns[0].round().long().numpy() - 1  # (i k..., positions), -1 marks padding
    taps, places = index.shape
    _check_taps(node, channels * (taps // groups) * places)
    per = taps // groups
    o, k, p = np.meshgrid(np.arange(channels), np.arange(per), np.arange(places), indexing="ij")
    inp = index[(o // per_group) * per + k, p]
    inside = inp >= 0
    return (o * places + p)[inside], inp[inside], (o * per + k)[inside]


def _check_taps(node: Node, count: int) -> None:
    if count > MAX_TAPS:
        raise UnsupportedOperationError(
            f"{node.name}: got {count} multiplications; expected at most {MAX_TAPS} for rows in "
            "its unknown weight; edit a smaller layer"
        )
