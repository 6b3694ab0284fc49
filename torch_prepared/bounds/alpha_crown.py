"""alpha-CROWN: relaxation slopes of each row's own, optimized jointly with those of all values.

Every scalar that a backward pass bounds, and every output row, has its own lower slopes in all
activations before it. Gradient ascent on the sum of the output rows' lower bounds moves all of
them at once: the bounds of inner values depend on their slopes, and the lines built on those
bounds are differentiated too. Any slopes in range give valid bounds, so each iterate counts: the
result is the best of all, never worse than CROWN.

Source: Xu et al., "Fast and Complete: Enabling Complete Neural Network Verification with Rapid and
Massively Parallel Incomplete Verifiers" (ICLR 2021). Ours: gradients of whole backward passes in
closed form (the adjoint of a row is a point moved forward), in native code where that applies.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.bounds._program import Bounder, Lowered, programs_apply
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds._slopes import RowSlopes, TargetSlopes, ancestors, start_alphas
from torch_prepared.bounds.crown import (
    DEFAULT_MEMORY,
    bound_nodes,
    bound_rows,
    needed_scalars,
    tightened_names,
    unstable_order,
)
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import ElementwiseOperator, lookup
from torch_prepared.relax._base import Parameters
from torch_prepared.relax.relu import TwoPiece

__all__ = ["AlphaOptions", "BoundState", "Problem", "bound_rows_alpha", "optimize"]

Boxes = dict[str, Interval]
_COPIES = 5  # a slope, its gradient, two moments, and room for a temporary


@dataclass(frozen=True)
class AlphaOptions:
    """How slopes are optimized.

    Args:
        iterations: steps of Adam.
        learning_rate: of the first step; slopes live in [0, 1].
        decay: factor on the learning rate after each step.
        momentum: factors on Adam's first and second moments per step. Gradients change at once
            when kinks are passed, so old ones say less than in the training of networks.
    """

    iterations: int = 20
    learning_rate: float = 0.25
    decay: float = 0.98
    momentum: tuple[float, float] = (0.7, 0.9)


class BoundState(NamedTuple):
    """One evaluation: output rows' lower bounds (b, s) and intervals of all values."""

    lower: Tensor
    boxes: Boxes


class _Part(NamedTuple):
    """Regions that are optimized together, their rows (b, s, m), and what CROWN says of them."""

    regions: RegionBatch
    rows: Tensor
    start: BoundState


def bound_rows_alpha(
    graph: Graph,
    regions: RegionBatch,
    rows: Tensor,
    *,
    parameters: Parameters | None = None,
    known: Mapping[str, Interval] | None = None,
    options: AlphaOptions | None = None,
    guided: bool = False,
    max_memory: int = DEFAULT_MEMORY,
) -> tuple[Tensor, Boxes]:
    """Lower bounds of output rows with optimized slopes.

    Args:
        graph: the network.
        regions: b input sets.
        rows: (b or 1, s, m) coefficients on the flattened output.
        parameters: tensors that replace the graph's own.
        known: intervals proved elsewhere; intersected in.
        options: of the optimization.
        guided: of the CROWN bounds to start from, as in ``crown.bound_nodes``.
        max_memory: bytes that slopes and their optimizer may take; regions go in parts.

    Returns:
        ``(lower, boxes)``: (b, s), and an interval for every value. Where gradients are enabled
        and parameters want them, both are differentiable in the parameters with the slopes held
        fixed at their last values; the bound is then the one at those slopes.

    Soundness: as CROWN, for any slopes. A region whose CROWN bounds are NaN keeps NaN.
    """
    options = options or AlphaOptions()
    table = graph.parameters if parameters is None else {**graph.parameters, **parameters}
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in (*table.values(), rows))
    fixed = {name: value.detach() for name, value in table.items()}
    spread = rows.detach().expand(len(regions), *rows.shape[1:])
    with torch.no_grad():
        boxes = bound_nodes(
            graph, regions, parameters=fixed, known=known, guided=guided, max_memory=max_memory
        )
        lower = bound_rows(graph, regions, boxes, spread, parameters=fixed).lower
    start = BoundState(lower, boxes)
    lowered = None if wants else _native(graph, regions, fixed, start)
    per_region = _bytes_per_region(graph, regions, start, spread.shape[1], lowered is not None)
    chunk = max(1, int(max_memory / max(per_region, 1.0)))
    parts = []
    for first in range(0, len(regions), chunk):
        span = slice(first, first + chunk)
        begin = BoundState(lower[span], {name: box[span] for name, box in boxes.items()})
        part = _Part(regions[span], spread[span], begin)
        if lowered is not None:
            parts.append(optimize(_Native(graph, fixed, part), begin, options))
            continue
        plain = _Plain(graph, fixed, part, max_memory)
        found = optimize(plain, begin, options)
        if wants:
            own = rows.expand(len(regions), *rows.shape[1:])[span]
            found = plain.evaluate({**table}, own, known, span)
        parts.append(found)
    joined = {
        name: Interval(
            torch.cat([part.boxes[name].lower for part in parts]),
            torch.cat([part.boxes[name].upper for part in parts]),
        )
        for name in boxes
    }
    return torch.cat([part.lower for part in parts]), joined


def _native(
    graph: Graph, regions: RegionBatch, table: Parameters, start: BoundState
) -> Lowered | None:
    """The lowered network when native code can optimize its slopes, else None."""
    nonlinear = [lookup(node.op) for node in graph.nodes[1:]]
    if not all(op.traits.affine or isinstance(op, TwoPiece) for op in nonlinear):
        return None
    if not regions.is_box or not programs_apply([regions.lower, start.lower, *table.values()]):
        return None
    return Lowered.of(graph, table)


def _bytes_per_region(
    graph: Graph, regions: RegionBatch, start: BoundState, rows: int, native: bool
) -> float:
    """An estimate of what the slopes of one region take, the largest of the batch."""
    item = start.lower.element_size()
    total = torch.zeros(len(regions))
    for name, count in _row_counts(graph, regions, start, rows).items():
        before = torch.zeros(len(regions))
        for node in ancestors(graph, name):
            if isinstance(lookup(node.op), ElementwiseOperator):
                box = start.boxes[node.inputs[0]]
                moving = needed_scalars(box, (node,)).sum(1) if native else box.lower[0].numel()
                before = before + moving
        total = total + count * before
    return float(total.max()) * item * _COPIES if len(regions) else 0.0


def _row_counts(
    graph: Graph, regions: RegionBatch, start: BoundState, rows: int
) -> dict[str, Tensor]:
    """How many rows each target has in each region."""
    found = {graph.nodes[-1].name: torch.full((len(regions),), float(rows))}
    for name in tightened_names(graph, regions.is_box):
        needed = needed_scalars(start.boxes[name], _readers(graph, name))
        found[name] = 2.0 * needed.sum(dim=1)
    return found


def _readers(graph: Graph, name: str) -> tuple[Node, ...]:
    """Nonlinear nodes that read a value."""
    return tuple(
        node for node in graph.nodes[1:]
        if name in node.inputs and not lookup(node.op).traits.affine
    )  # fmt: skip


class Problem(ABC):
    """What the optimizer needs: leaves, and an evaluation that is differentiable in them.

    ``known`` holds the best intervals so far; evaluations intersect with them.
    """

    leaves: list[Tensor]
    known: Boxes

    @abstractmethod
    def run(self) -> BoundState:
        """Bounds at the present slopes."""

    def project(self) -> None:
        """Move the leaves into their ranges."""
        for leaf in self.leaves:
            leaf.clamp_(0.0, 1.0)


def optimize(problem: Problem, start: BoundState, options: AlphaOptions) -> BoundState:
    """Adam on all leaves; the best bound of every row and of every value.

    Each iterate builds its lines on the best intervals of all before it. What it passes back to
    slopes is the gradient of their own bounds all the same.
    """
    best = start.lower
    problem.known = dict(start.boxes)
    if not problem.leaves or not options.iterations:
        return start
    fused = all(leaf.device.type == "cpu" for leaf in problem.leaves)
    adam = torch.optim.Adam(
        problem.leaves, lr=options.learning_rate, betas=options.momentum, fused=fused
    )
    rate = torch.optim.lr_scheduler.ExponentialLR(adam, options.decay)
    for step in range(options.iterations + 1):
        with torch.set_grad_enabled(step < options.iterations):
            state = problem.run()
            loss = -state.lower.sum()
        # Comparisons with NaN are false: a NaN iterate is ignored, a NaN start stays.
        best = torch.where(state.lower.detach() > best, state.lower.detach(), best)
        problem.known = {n: _better(box, state.boxes[n]) for n, box in problem.known.items()}
        if step == options.iterations:
            break
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        rate.step()
        with torch.no_grad():
            problem.project()
    return BoundState(best, problem.known)


def _better(old: Interval, new: Interval) -> Interval:
    """The common part of two valid intervals; NaN in the new one is ignored."""
    if old is new:
        return old
    lower, upper = new.lower.detach(), new.upper.detach()
    inner = Interval(
        torch.where(lower > old.lower, lower, old.lower),
        torch.where(upper < old.upper, upper, old.upper),
    )
    return inner.intersect(inner)


class _Native(Problem):
    """Slopes in the native operators' own layout; piecewise linear networks over boxes."""

    def __init__(self, graph: Graph, table: Parameters, part: _Part) -> None:
        regions, rows, start = part
        lowered = Lowered.of(graph, table)
        if lowered is None:
            raise ValueError(f"{graph.nodes[-1].name}: no native program for this network")
        self._lowered, self._graph, self._start = lowered, graph, start
        self._own: dict[str, tuple[Bounder, ops.RowShares]] = {}
        self.known = start.boxes
        self.leaves = []
        for name in tightened_names(graph, regions.is_box):
            needed = needed_scalars(start.boxes[name], _readers(graph, name))
            if bool(needed.any()):
                self._add(name, lowered.scalars(graph.node(name), needed))
        self._add("", lowered.rows(graph.nodes[-1], rows, None))

    def _add(self, name: str, bounder: Bounder) -> None:
        """Own shares for the rows of one target."""
        lines = self._lowered.lines(bounder, self._start.boxes)
        free = [self._lowered.enter_lines(node, self._free(node)) for node in bounder.activations]
        shares = bounder.shares(lines, self._start.boxes, free)
        leaf = shares.values.requires_grad_()
        self._own[name] = (bounder, shares)
        if leaf.numel():
            self.leaves.append(leaf)

    def _free(self, node: Node) -> Tensor:
        """How far the slope below may fall short of 1: (b, n), 0 where the function is affine."""
        operator = lookup(node.op)
        if not isinstance(operator, TwoPiece):
            raise TypeError(f"{node.name}: operator '{node.op}' is not piecewise linear")
        box = self._start.boxes[node.inputs[0]].map(lambda end: end.flatten(1))
        return (1.0 - operator.small_slope(node)) * (~operator.stable(box)).to(box.lower.dtype)

    def run(self) -> BoundState:
        """Bounds of all values in turn, then of the output rows."""
        boxes, lines = dict(self.known), {}
        for node in self._graph.nodes[1:]:
            operator = lookup(node.op)
            if isinstance(operator, ElementwiseOperator):
                box = boxes[node.inputs[0]].map(lambda end: end.flatten(1))
                lines[node.name] = self._lowered.enter_lines(
                    node, torch.stack([*operator.lines(node, box)])
                )
                with torch.no_grad():
                    image = operator.interval(node, [boxes[node.inputs[0]]], {})
                    boxes[node.name] = image.intersect(self.known[node.name])
            elif node.name in self._own:
                bounder, shares = self._own[node.name]
                wanted = [lines[part.name] for part in bounder.activations]
                old = self.known[node.name]
                boxes[node.name] = bounder.tighten(old, wanted, boxes, shares)
        bounder, shares = self._own[""]
        needed = [lines[node.name] for node in bounder.activations]
        return BoundState(bounder.lower(needed, boxes, shares)[0], boxes)


class _Plain(Problem):
    """Slopes as plain tensors: any operator, region, device; differentiable in parameters."""

    def __init__(self, graph: Graph, table: Parameters, part: _Part, max_memory: int) -> None:
        regions, rows, start = part
        self._graph, self._regions, self._table = graph, regions, table
        self._rows, self._start, self._max_memory = rows, start, max_memory
        self.known = start.boxes
        targets = {}
        for name in tightened_names(graph, regions.is_box):
            order, counts = unstable_order(start.boxes[name], _readers(graph, name))
            if order.shape[1]:
                alphas = start_alphas(graph, start.boxes, name, 2 * order.shape[1])
                targets[name] = TargetSlopes(order, counts, alphas)
        output = graph.nodes[-1].name
        self._slopes = RowSlopes(targets, start_alphas(graph, start.boxes, output, rows.shape[1]))
        self.leaves = self._slopes.leaves()

    def run(self) -> BoundState:
        """Bounds at the present slopes."""
        return self._bound(self._table, self._rows, self.known, cuts=False)

    def evaluate(
        self,
        table: Parameters,
        rows: Tensor,
        known: Mapping[str, Interval] | None,
        span: slice,
    ) -> BoundState:
        """The bound at the present slopes as a function of parameters and rows.

        Scalars that CROWN found stable stay so: their lines are constant.
        """
        mine = {} if known is None else {name: box[span] for name, box in known.items()}
        for name, part in self._slopes.targets.items():
            stable = self._where_not_bounded(name, part)
            mine[name] = mine[name].intersect(stable) if name in mine else stable
        for leaf in self.leaves:
            leaf.requires_grad_(False)
        return self._bound(table, rows, mine, cuts=True)

    def _where_not_bounded(self, name: str, part: TargetSlopes) -> Interval:
        """The start's interval of a value, without ends where ``part`` bounds it anew."""
        box = self._start.boxes[name]
        anew = torch.zeros_like(box.lower, dtype=torch.bool).flatten(1)
        anew = anew.scatter(1, part.order, part.counts).reshape_as(box.lower)
        return Interval(
            box.lower.masked_fill(anew, -torch.inf), box.upper.masked_fill(anew, torch.inf)
        )

    def _bound(
        self, table: Parameters, rows: Tensor, known: Mapping[str, Interval] | None, cuts: bool
    ) -> BoundState:
        boxes = bound_nodes(
            self._graph,
            self._regions,
            parameters=table,
            known=known,
            slopes={
                name: dataclasses.replace(part, through=not cuts)
                for name, part in self._slopes.targets.items()
            },
            max_memory=self._max_memory,
        )
        found = bound_rows(
            self._graph,
            self._regions,
            boxes,
            rows,
            parameters=table,
            alphas=self._slopes.rows,
            cuts=cuts,
        )
        return BoundState(found.lower, boxes)
