"""CROWN whose lower slopes are optimized box by box and shared by all rows of a box.

A neuron has one lower slope in every backward pass over a box, so that the slopes of a box are one
vector: small enough to store by the thousands in a tree of splits and to write into a certificate.
Most of what optimized slopes gain over CROWN remains, where slopes of each row's own
(``bounds.alpha_crown``) would have to be found anew for every box.

Source: the optimized relaxations of Xu et al., "Fast and Complete" (ICLR 2021), with shared slopes
as that paper's implementation offers; slopes as part of a split tree are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.bounds._leaf import LeafBounds, LeafEngine
from torch_prepared.bounds._program import Bounder, Lowered, programs_apply
from torch_prepared.bounds._properties import PropertyBatch
from torch_prepared.bounds._slopes import ancestors
from torch_prepared.bounds.alpha_crown import AlphaOptions
from torch_prepared.bounds.chain import Chain
from torch_prepared.bounds.crown import needed_scalars, tightened_names
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.core.rounding import outward
from torch_prepared.relax import lookup
from torch_prepared.relax.relu import TwoPiece

__all__ = ["SharedSlopes", "SlopedEngine"]

Boxes = dict[str, Interval]
DEFAULT = AlphaOptions(iterations=8, learning_rate=0.3, decay=0.9, momentum=(0.4, 0.9))


class SharedSlopes:
    """Bounds of one property's rows over boxes, with slopes for each box.

    Args:
        graph: piecewise linear, on the CPU; see :meth:`of`.
        batch: exactly one property, whose rows are bounded.
        options: how slopes are optimized.

    Soundness: as CROWN, for any slopes in [0, 1]; NaN proves nothing.
    """

    def __init__(
        self, graph: Graph, batch: PropertyBatch, options: AlphaOptions | None = None
    ) -> None:
        self._options = options or DEFAULT
        self._chain = Chain.of(graph) if graph.device.type == "cpu" else None
        self._graph, self._table = graph, graph.parameters
        self._rows = batch.rows[0].to(graph.dtype)
        self._last = graph.nodes[-1]
        self._tightened = set(tightened_names(graph))
        needed = {node.name for node in ancestors(graph, self._last.name)}
        self.activations = tuple(
            node
            for node in graph.nodes[1:]
            if node.name in needed and isinstance(lookup(node.op), TwoPiece)
        )
        self._readers: dict[str, tuple[Node, ...]] = {}
        for node in self.activations:
            source = node.inputs[0]
            self._readers[source] = (*self._readers.get(source, ()), node)

    @classmethod
    def of(cls, graph: Graph, batch: PropertyBatch) -> SharedSlopes | None:
        """The engine of a network, or None where it does not apply."""
        operators = [lookup(node.op) for node in graph.nodes[1:]]
        with torch.no_grad():
            if not all(op.traits.affine or isinstance(op, TwoPiece) for op in operators):
                return None
            if not programs_apply(list(graph.parameters.values())):
                return None
            if Lowered.of(graph, graph.parameters) is None:
                return None
        engine = cls(graph, batch)
        return engine if engine.activations else None

    @property
    def size(self) -> int:
        """Number of slopes of one box."""
        return sum(node.size for node in self.activations)

    def by_node(self, slopes: Tensor) -> dict[str, Tensor]:
        """Slopes (b, size) by activation node, (b, *input shape)."""
        parts = zip(self.activations, self._split(slopes), strict=True)
        return {node.name: part.reshape(-1, *node.shape) for node, part in parts}

    def lower_lines(self, slopes: Tensor) -> dict[str, Tensor]:
        """What slopes (b, size) in [0, 1] are for each activation node's lower line, (b, n)."""
        parts = zip(self.activations, self._split(slopes), strict=True)
        small = {node.name: _two_piece(node).small_slope(node) for node in self.activations}
        return {n.name: small[n.name] + (1.0 - small[n.name]) * part for n, part in parts}

    @torch.no_grad()
    def bound(self, box: Interval, slopes: Tensor) -> LeafBounds:
        """Bounds of all rows over each box.

        Args:
            box: (b, n), any floating dtype; rounded outward to the network's.
            slopes: (b, :attr:`size`); a negative one stands for CROWN's choice.
        """
        if self._chain is not None:
            row = torch.zeros(len(slopes), dtype=torch.int64)
            options = dataclasses.replace(self._options, iterations=0)
            return self._run_chain(box, slopes, row, row, options)[1]
        tight = self._enter(box)
        rows = self._rows.expand(len(slopes), *self._rows.shape)
        lower, inputs, _ = self._run(tight, slopes.to(self._rows.dtype), rows, cuts=True)
        return LeafBounds(lower, inputs)

    @torch.no_grad()
    def chosen(self, box: Interval, slopes: Tensor) -> Tensor:
        """The slopes (b, size) with CROWN's choices written out; 0 where a neuron is stable."""
        tight = self._enter(box)
        rows = self._rows[:1].expand(len(slopes), 1, -1)
        _, _, boxes = self._run(tight, slopes.to(self._rows.dtype), rows, cuts=False)
        parts = []
        for node, mine in zip(self.activations, self._split(slopes), strict=True):
            ends = boxes[node.inputs[0]].map(lambda end: end.flatten(1))
            operator = _two_piece(node)
            value = torch.where(mine < 0, operator.alpha_start(node, ends).to(mine), mine)
            parts.append(value.masked_fill(operator.stable(ends), 0.0))
        return torch.cat(parts, dim=1)

    def search(
        self, box: Interval, slopes: Tensor, row: Tensor, enough: Tensor
    ) -> tuple[Tensor, LeafBounds]:
        """Better slopes for each box.

        Args:
            box: (b, n).
            slopes: (b, size) to begin with; negative ones stand for CROWN's choices.
            row: (b,) which of the property's rows to raise.
            enough: (b,) a bound of that row at which a box needs no more steps.

        Returns:
            The best slopes met (b, size), multiples of ``1 / ops.SLOPE_LEVELS`` or, where a neuron
            is stable, possibly negative; and what :meth:`bound` says of them.
        """
        if self._chain is not None:
            return self._run_chain(box, slopes, row, enough, self._options)
        found = self._search(box, slopes, row, enough)
        return found, self.bound(box, found)

    def _search(self, box: Interval, slopes: Tensor, row: Tensor, enough: Tensor) -> Tensor:
        """The search on any network."""
        options, found = self._options, self.chosen(box, slopes)
        one, two = options.momentum
        tight, active = self._enter(box), torch.arange(len(found))
        rows = self._rows[row].unsqueeze(1)
        value = found.clone()
        best = torch.full((len(found),), -torch.inf, dtype=self._rows.dtype)
        first, second, rate = torch.zeros_like(value), torch.zeros_like(value), 1.0
        enough, start = enough.to(self._rows.dtype), best
        for step in range(1, options.iterations + 2):
            leaf = value.detach().to(self._rows.dtype).clone()
            leaf.requires_grad_(step <= options.iterations)
            part = tight[active]
            lower, _, _ = self._run(part, leaf, rows[active], cuts=False)
            now = lower.detach()[:, 0]
            better = now > best[active]
            best[active[better]] = now[better]
            found[active[better]] = leaf.detach().to(found.dtype)[better]
            if step > options.iterations:
                break
            (gradient,) = torch.autograd.grad(lower.sum(), leaf)
            going = torch.isfinite(now) & ~(now > enough[active])
            start = now if step == 1 else start
            if step > ops.SLOPE_PATIENCE:
                gained, lack = best[active] - start, enough[active] - best[active]
                going &= gained > lack
            if not bool(going.any()):
                break
            active, value, start = active[going], value[going], start[going]
            gradient = gradient[going].nan_to_num(0.0, 0.0, 0.0).to(value.dtype)
            first = one * first[going] + (1 - one) * gradient
            second = two * second[going] + (1 - two) * gradient.square()
            scale = (second / (1 - two**step)).sqrt() + 1e-12
            value = value + options.learning_rate * rate * first / (1 - one**step) / scale
            value = value.clamp(0.0, 1.0)
            rate *= options.decay
        return (found * ops.SLOPE_LEVELS).round() / ops.SLOPE_LEVELS

    def _run_chain(
        self, box: Interval, slopes: Tensor, row: Tensor, enough: Tensor, options: AlphaOptions
    ) -> tuple[Tensor, LeafBounds]:
        """Search and bounds by the native kernel of chains."""
        if self._chain is None:
            raise ValueError("not a chain")
        tight, kind = self._enter(box), self._rows.dtype
        found, values, inputs = ops.chain_slopes(
            tight.lower,
            tight.upper,
            self._chain.weights,
            self._chain.biases,
            self._rows,
            row,
            enough.to(kind),
            slopes.to(kind),
            options.iterations,
            options.learning_rate,
            options.decay,
            options.momentum,
        )
        return found.float(), LeafBounds(values, inputs)

    def _enter(self, box: Interval) -> Interval:
        return outward(box.lower, box.upper, self._rows.dtype)

    def _split(self, slopes: Tensor) -> tuple[Tensor, ...]:
        sizes = [node.size for node in self.activations]
        return tuple(torch.split(slopes, sizes, dim=1))

    def _run(
        self, box: Interval, slopes: Tensor, rows: Tensor, cuts: bool
    ) -> tuple[Tensor, Tensor, Boxes]:
        """Bounds (b, s) of rows (b, s, m), rows on the inputs, and all intervals."""
        lowered = Lowered.of(self._graph, self._table)
        if lowered is None:
            raise ValueError(f"{self._last.name}: no native program for this network")
        start = self._graph.nodes[0]
        boxes: Boxes = {start.name: box.map(lambda end: end.reshape(-1, *start.shape))}
        own = dict(zip((node.name for node in self.activations), self._split(slopes), strict=True))
        lines: dict[str, Tensor] = {}
        for node in self._graph.nodes[1:]:
            operator = lookup(node.op)
            with torch.no_grad():
                image = operator.interval(node, [boxes[name] for name in node.inputs], self._table)
            if node.name in own:
                ends = boxes[node.inputs[0]].map(lambda end: end.flatten(1))
                lines[node.name] = lowered.enter_lines(node, _lines(node, ends, own[node.name]))
            elif node.name in self._tightened and node.name in self._readers:
                needed = needed_scalars(image, self._readers[node.name])
                bounder = lowered.scalars(node, needed)
                image = bounder.tighten(image, _wanted(bounder, lines), boxes)
            boxes[node.name] = image
        bounder = lowered.rows(self._last, rows, boxes if cuts else None)
        lower, inputs, _ = bounder.lower(_wanted(bounder, lines), boxes)
        return lower, lowered.layout.leave(start.name, inputs), boxes


def _two_piece(node: Node) -> TwoPiece:
    operator = lookup(node.op)
    if not isinstance(operator, TwoPiece):
        raise TypeError(f"{node.name}: operator '{node.op}' is not piecewise linear")
    return operator


def _wanted(bounder: Bounder, lines: Mapping[str, Tensor]) -> list[Tensor]:
    """The lines that a bounder goes through, in its order."""
    return [lines[node.name] for node in bounder.activations]


def _lines(node: Node, ends: Interval, slopes: Tensor) -> Tensor:
    """Lines (4, b, n) of an activation with given lower slopes, or CROWN's where negative."""
    operator = _two_piece(node)
    usual = operator.alpha_start(node, ends)
    return torch.stack([*operator.lines(node, ends, torch.where(slopes < 0, usual, slopes))])


@dataclass(frozen=True)
class SlopedEngine:
    """A quick engine, and a slower one for boxes that have slopes of their own.

    Args:
        plain: with the usual slopes.
        slopes: with given ones, which it also optimizes.
    """

    plain: LeafEngine
    slopes: SharedSlopes

    def __call__(self, box: Interval, /) -> LeafBounds:
        """Bounds with the usual slopes."""
        return self.plain(box)
