"""Fully connected ReLU networks as chains of dense maps, bounded box by box by a native kernel.

Source: Zhang et al., CROWN (NeurIPS 2018), with the interval and intermediate bounds of
``bounds.crown``; the results agree with it up to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.bounds._leaf import LeafBounds
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.core.rounding import outward
from torch_prepared.errors import SpecError

__all__ = ["Chain", "ChainBounds"]

MAX_WEIGHTS = 1 << 22
"""Above this many weights one box no longer fits a core's cache, and batching does better."""


@dataclass(frozen=True)
class ChainBounds(LeafBounds):
    """:class:`LeafBounds` with the intervals (b, h) of all scalars that a ReLU reads.

    Args:
        hidden: these intervals.
        chain: the network that was bounded.
        rows: (s, m) or (b, s, m).
    """

    hidden: Interval
    chain: Chain
    rows: Tensor

    def influence(self, row: Tensor) -> Tensor:
        """Geometric mean (b, n) of what the bound's input row says and what gradients may be.

        Where a bound is loose, its own input row can be flat and says nothing of the input that the
        looseness comes from; the largest gradient that the ReLUs' intervals allow does. That one
        alone forgets which inputs the bound really feels. Together they need far fewer splits than
        either.

        Source: the latter is the smear function of interval analysis, as Wang et al. (USENIX
        Security 2018) use it on networks; the mean is ours.
        """
        rows = self.rows[torch.arange(len(row)), row] if self.rows.ndim == 3 else self.rows[row]
        reach = self.chain.gradient_reach(self.hidden, rows)
        return (reach * super().influence(row)).sqrt()


@dataclass(frozen=True)
class Chain:
    """``x -> W_L relu(... relu(W_1 x + b_1) ...) + b_L``, equal to a graph in exact arithmetic.

    Args:
        graph: the network the maps were read from.
        weights: W_k, one dtype, on the CPU, detached.
        biases: b_k, likewise.

    Soundness: where an elementwise affine node or two successive maps had to be folded together,
    products are formed in float64 and rounded once to the dtype. Bounds hold up to that and to
    the rounding of the operator; a certificate checker accounts for both.
    """

    graph: Graph
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]

    @classmethod
    def of(cls, graph: Graph, dtype: torch.dtype | None = None) -> Chain | None:
        """The chain equal to ``graph``, or None when there is none.

        Recognized are linear and ReLU nodes in alternation, with reshape, gather and elementwise
        affine nodes anywhere between.

        Args:
            graph: the network.
            dtype: float32 or float64; that of the graph's parameters when None.
        """
        if any(after.inputs != (before.name,) for before, after in pairwise(graph.nodes)):
            return None
        maps = _read_maps(graph)
        if maps is None or sum(part.weight.numel() for part in maps) > MAX_WEIGHTS:
            return None
        kind = graph.dtype if dtype is None else dtype
        return cls(
            graph,
            tuple(part.weight.to(kind).contiguous() for part in maps),
            tuple(part.bias.to(kind).contiguous() for part in maps),
        )

    @property
    def dtype(self) -> torch.dtype:
        """What bounds are computed in."""
        return self.weights[0].dtype

    @property
    def hidden_size(self) -> int:
        """Number of scalars that a ReLU reads."""
        return sum(len(bias) for bias in self.biases[:-1])

    def with_parameters(self, changed: Mapping[str, Tensor]) -> Chain:
        """The chain of the same graph with other tensors where ``changed`` names them.

        Raises:
            ModelFormatError: an unknown name, or values that are not finite.
        """
        chain = Chain.of(self.graph.with_parameters(changed), self.dtype)
        if chain is None:
            raise SpecError("parameters: got shapes that do not fit; expected those of the network")
        return chain

    def bounds(self, box: Interval, rows: Tensor, known: Interval | None = None) -> ChainBounds:
        """Lower bounds of ``rows . f(x)`` over each box.

        Args:
            box: (b, n), any floating dtype; rounded outward to the chain's.
            rows: (s, m) or (b, s, m), any floating dtype.
            known: intervals (b, h) proved for these boxes or larger ones, as in
                :attr:`ChainBounds.hidden`; intersected in.

        Returns:
            :class:`ChainBounds` in the chain's dtype. Not differentiable. NaN for boxes where
            anything is NaN, infinite or out of order; that proves nothing.

        Raises:
            SpecError: sizes that do not fit the network.
        """
        n, m = self.weights[0].shape[1], self.weights[-1].shape[0]
        for what, got, expected in (("box", box.lower, n), ("rows", rows, m)):
            if got.shape[-1] != expected:
                raise SpecError(
                    f"{what}: got {got.shape[-1]} numbers; expected {expected}, as the network has"
                )
        tight = self._rounded(box)
        wide = None if known is None else self._rounded(known)
        values, inputs, lower, upper = ops.chain_bounds(
            tight.lower,
            tight.upper,
            self.weights,
            self.biases,
            rows.detach().to("cpu", self.dtype),
            None if wide is None else wide.lower,
            None if wide is None else wide.upper,
        )
        return ChainBounds(values, inputs, Interval(lower, upper), self, rows)

    @torch.no_grad()
    def gradient_reach(self, hidden: Interval, rows: Tensor) -> Tensor:
        """Interval bounds of ``|d(rows . f)/dx|``.

        Args:
            hidden: (b, h), intervals of all scalars that a ReLU reads.
            rows: (b, m).

        Returns:
            (b, n) in the chain's dtype, rounded to nearest: for choices, not for proofs.
        """
        center = rows.detach().to("cpu", self.dtype) @ self.weights[-1]
        radius, last = torch.zeros_like(center), hidden.lower.shape[1]
        for weight in reversed(self.weights[:-1]):
            first = last - len(weight)
            lower, upper = hidden.lower[:, first:last], hidden.upper[:, first:last]
            low, high = center - radius, center + radius
            off = lower < 0  # the slope may be 0
            low = torch.where(off, low.clamp_max(0.0), low)
            high = torch.where(off, high.clamp_min(0.0), high)
            on = upper > 0  # the slope may be 1
            center = torch.where(on, 0.5 * (low + high), 0.0) @ weight
            radius = torch.where(on, 0.5 * (high - low), 0.0) @ weight.abs()
            last = first
        return center.abs() + radius

    def _rounded(self, box: Interval) -> Interval:
        """The box in the chain's dtype on the CPU, rounded outward where that changes it."""
        lower, upper = box.lower.detach().cpu(), box.upper.detach().cpu()
        if lower.dtype == upper.dtype == self.dtype:
            return Interval(lower, upper)
        return outward(lower, upper, self.dtype)


@dataclass(frozen=True)
class _Map:
    """``x -> weight @ x + bias`` (m, n), float64."""

    weight: Tensor
    bias: Tensor

    def pick(self, index: Tensor) -> _Map:
        return _Map(self.weight[index], self.bias[index])

    def scale(self, factor: Tensor, shift: Tensor) -> _Map:
        return _Map(self.weight * factor.unsqueeze(1), self.bias * factor + shift)

    def then(self, weight: Tensor, bias: Tensor) -> _Map:
        return _Map(weight @ self.weight, weight @ self.bias + bias)


@dataclass(frozen=True)
class _Selection:
    """``x -> factor * x[index] + shift`` from n scalars; what precedes a dense map."""

    size: int
    index: Tensor
    factor: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, size: int) -> _Selection:
        one = torch.ones(size, dtype=torch.float64)
        return cls(size, torch.arange(size), one, torch.zeros_like(one))

    def pick(self, index: Tensor) -> _Selection:
        return _Selection(self.size, self.index[index], self.factor[index], self.shift[index])

    def scale(self, factor: Tensor, shift: Tensor) -> _Selection:
        scaled = self.factor * factor, self.shift * factor + shift
        return _Selection(self.size, self.index, *scaled)

    def then(self, weight: Tensor, bias: Tensor) -> _Map:
        into = weight.new_zeros(len(weight), self.size)
        return _Map(into.index_add(1, self.index, weight * self.factor), weight @ self.shift + bias)


def _read_maps(graph: Graph) -> list[_Map] | None:
    """The dense maps between ReLUs, or None for another kind of network."""
    maps: list[_Map] = []
    current: _Map | _Selection = _Selection.identity(graph.input_size)
    for node in graph.nodes[1:]:
        if node.op == "relu":
            if not isinstance(current, _Map):
                return None
            maps.append(current)
            current = _Selection.identity(node.size)
            continue
        moved = _apply(graph, node, current)
        if moved is None:
            return None
        current = moved
    return [*maps, current] if isinstance(current, _Map) else None


def _apply(graph: Graph, node: Node, current: _Map | _Selection) -> _Map | _Selection | None:
    """One node after ``current``; None when it is not one that a chain can hold."""

    def read(role: str, fallback: float) -> Tensor:
        value = node.read(role, graph.parameters)
        if value is None:
            return torch.full((node.size,), fallback, dtype=torch.float64)
        wide = value.detach().to("cpu", torch.float64)
        return wide.expand(node.shape).reshape(-1)

    if node.op == "reshape":
        return current
    if node.op == "gather":
        return current.pick(torch.from_numpy(np.asarray(node.attrs["index"], np.int64).ravel()))
    if node.op == "scale":
        return current.scale(read("scale", 1.0), read("shift", 0.0))
    if node.op == "linear" and node.size == node.shape[-1]:
        weight = node.params["weight"].read(graph.parameters).detach().to("cpu", torch.float64)
        return current.then(weight, read("bias", 0.0))
    return None
