"""Bounds that hold in spite of rounding: a-priori error terms beside every computed number.

All arithmetic is float64, which no setting for reduced precision touches, so a user's flags for
TF32 or bfloat16 products neither matter nor change. For a sum of k products in any order, with or
without fused operations, the computed value is off by at most ``g_k sum |a_i b_i|`` with
``g_k = k u / (1 - k u)``, u = 2^-53. Three uses:

- Intervals: with center c, radius r and ``h >= |x|``, the image of an affine node has radius
  ``|W| r + g (|W| h + |b|)``.
- Rows: pulling rows R back through an affine node changes ``R y`` by at most ``|R| slack``, where
  ``slack = g (|W| h + |b|)`` is one vector a region; lines of activations likewise.
- Sums of constants: the sizes of all terms are added up beside them.

Factors of two absorb the rounding of the error terms themselves and of a few final operations;
``_UNDERFLOW`` absorbs results below the normal range. Lines and values of smooth activations carry
the error bounds of ``ops.activation_coefficients``, under its assumption on exp, tanh and erfc.

Source: Higham, "Accuracy and Stability of Numerical Algorithms" (2nd ed., 2002), section 3.1 and
theorem 3.1 for g_k; Rump, "Fast and parallel interval arithmetic" (1999) for center and radius.
The certificate checker states the same theory in independent code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from torch_prepared.bounds._guided import GuidedInterval, default_lines, reaches_up
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds.crown import needed_scalars, tightened_names, unstable_order
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax import AffineOperator, AffinePair, lookup
from torch_prepared.relax._base import Parameters, unit_rows
from torch_prepared.relax._kernel import KernelActivation, SmoothActivation
from torch_prepared.relax.pool import MaxPool

__all__ = ["gamma", "sound_bounds"]

UNIT = 2.0**-53
_SPARE = 16  # roundings granted to every sum besides its own
_UNDERFLOW = 2.0**-900
Boxes = dict[str, Interval]


def gamma(terms: int) -> float:
    """Twice ``g_(terms + 16)`` in float64; infinite when the sum is too long for the theory."""
    total = (terms + _SPARE) * UNIT
    return 2 * total / (1 - total) if total < 0.25 else float("inf")


class _Ball(NamedTuple):
    """``|x - center| <= radius`` and ``|x| <= reach``, for a box (b, *shape)."""

    center: Tensor
    radius: Tensor
    reach: Tensor

    @classmethod
    def of(cls, box: Interval) -> _Ball:
        center = 0.5 * box.lower + 0.5 * box.upper
        radius = torch.maximum(box.upper - center, center - box.lower)
        reach = torch.maximum(box.lower.abs(), box.upper.abs())
        return cls(center, radius * (1 + 4 * UNIT) + _UNDERFLOW, reach)

    def minimum(self, rows: Tensor) -> Tensor:
        """Lower bounds (b, s) of ``rows . x``: rows (b, s, *shape)."""
        flat = rows.flatten(2)
        center, radius, reach = (part.flatten(1).unsqueeze(2) for part in self)
        spread = radius + gamma(2 * flat.shape[2]) * reach
        return (flat @ center - flat.abs() @ spread).squeeze(2)


@dataclass
class _Sound:
    """One network over regions, with what is known so far."""

    graph: Graph
    table: Parameters
    boxes: Boxes
    _slack: dict[str, Tensor] = field(default_factory=dict)
    _lines: dict[str, AffinePair] = field(default_factory=dict)

    def interval(self, node: Node) -> Interval:
        """The node's image of its inputs' intervals, rounding included."""
        operator, inputs = lookup(node.op), [self.boxes[name] for name in node.inputs]
        if isinstance(operator, MaxPool):
            return operator.interval(node, inputs, self.table)
        if isinstance(operator, AffineOperator):
            balls = [_Ball.of(box) for box in inputs]
            center = operator.value(node, [ball.center for ball in balls], self.table)
            zeros = [torch.zeros_like(ball.radius) for ball in balls]
            size = operator.magnitude(node, [ball.radius for ball in balls], self.table)
            size = size - operator.magnitude(node, zeros, self.table)  # without the bias
            radius = (size + self.slack(node)) * (1 + 8 * UNIT)
            return Interval(center - radius, center + radius)
        if isinstance(operator, SmoothActivation):
            return _smooth_interval(operator, node, inputs[0])
        if isinstance(operator, KernelActivation):  # bent lines: one product
            image = operator.interval(node, inputs, self.table)
            return Interval(
                image.lower - 4 * UNIT * image.lower.abs(),
                image.upper + 4 * UNIT * image.upper.abs(),
            )
        raise UnsupportedOperationError(
            f"{node.name}: operator '{node.op}' states no bound of its rounding; "
            "leave sound=True out, or check a certificate"
        )

    def slack(self, node: Node) -> Tensor:
        """(b, *shape): how much a unit coefficient on the node's value may lose on its way down."""
        if node.name not in self._slack:
            self._slack[node.name] = self._find_slack(node)
        return self._slack[node.name]

    def _find_slack(self, node: Node) -> Tensor:
        operator = lookup(node.op)
        balls = [_Ball.of(self.boxes[name]) for name in node.inputs]
        if isinstance(operator, AffineOperator):
            size = operator.magnitude(node, [ball.reach for ball in balls], self.table)
            terms = node.size + sum(self.graph.node(name).size for name in node.inputs)
            return gamma(terms) * size + _UNDERFLOW
        if isinstance(operator, MaxPool):
            # The chosen scalar of a window lies within the window's own interval.
            terms = node.size + balls[0].reach[0].numel()
            return gamma(terms) * _Ball.of(self.interval(node)).reach + _UNDERFLOW
        lines = self.lines(node)
        steep = torch.maximum(lines.lower_slope.abs(), lines.upper_slope.abs())
        shift = torch.maximum(lines.lower_offset.abs(), lines.upper_offset.abs())
        size = steep * balls[0].reach.flatten(1) + shift
        return (gamma(node.size) * size + _UNDERFLOW).reshape_as(balls[0].reach)

    def lines(self, node: Node) -> AffinePair:
        """Lines of an activation in float64, which hold with their rounding."""
        if node.name not in self._lines:
            operator = cast(KernelActivation, lookup(node.op))  # interval() refuses others
            box = self.boxes[node.inputs[0]]
            self._lines[node.name] = default_lines(operator, node, box)
        return self._lines[node.name]

    def descend(self, start: str, rows: Tensor, cuts: bool, shallow: bool = False) -> Tensor:
        """Lower bounds (b, s) of ``rows . value(start)``: rows (b, s, *shape)."""
        pending, total = {start: rows}, _Sum.zero(rows)
        best: Tensor | None = None
        for node in reversed(self.graph.nodes):
            mine = pending.pop(node.name, None)
            if mine is None:
                continue
            if node.op == "input" or (shallow and not lookup(node.op).traits.affine):
                total = total.plus(_Ball.of(self.boxes[node.name]).minimum(mine))
                continue
            if cuts and not pending and node.name in self.boxes:
                here = total.plus(_Ball.of(self.boxes[node.name]).minimum(mine)).below()
                best = here if best is None else torch.maximum(best, here)
            total = total.minus(mine, self.slack(node))
            total = self._pull(node, mine, pending, total)
        last = total.below()
        return last if best is None else torch.maximum(best, last)

    def _pull(self, node: Node, rows: Tensor, pending: dict[str, Tensor], total: _Sum) -> _Sum:
        operator, inputs = lookup(node.op), [self.boxes[name] for name in node.inputs]
        if isinstance(operator, KernelActivation):
            moved = operator.through(rows, self.lines(node))
        else:
            moved = operator.pull_back(node, rows, inputs, self.table)
        total = total if moved.bias is None else total.plus(moved.bias)
        for name, part in zip(node.inputs, moved.inputs, strict=True):
            if name in pending:  # one rounding of each coefficient
                reach = _Ball.of(self.boxes[name]).reach
                pending[name] = pending[name] + part
                total = total.minus(pending[name], gamma(1) * reach)
            else:
                pending[name] = part
        return total


class _Sum(NamedTuple):
    """A computed sum (b, s), the sizes of its terms, its errors so far and how many terms."""

    value: Tensor
    size: Tensor
    error: Tensor
    terms: int

    @classmethod
    def zero(cls, rows: Tensor) -> _Sum:
        zero = rows.new_zeros(rows.shape[:2])
        return cls(zero, zero, zero, 0)

    def plus(self, term: Tensor) -> _Sum:
        return _Sum(self.value + term, self.size + term.abs(), self.error, self.terms + 1)

    def minus(self, rows: Tensor, slack: Tensor) -> _Sum:
        """Less an error ``|rows| . slack`` with rows (b, s, *shape), slack (b, *shape)."""
        lost = (rows.flatten(2).abs() @ slack.flatten(1).unsqueeze(2)).squeeze(2)
        return self._replace(error=self.error + lost)

    def below(self) -> Tensor:
        """A lower bound of the exact sum."""
        return self.value - (2 * self.error + gamma(self.terms) * self.size + _UNDERFLOW)


def _smooth_interval(operator: SmoothActivation, node: Node, box: Interval) -> Interval:
    """Values of the ends with their errors; between them the operator's own rule."""
    image = operator.interval(node, [box], {})
    low, high = (operator.facts(node).value(end) for end in (box.lower, box.upper))
    below = torch.minimum(low[0] - low[1], high[0] - high[1])
    above = torch.maximum(low[0] + low[1], high[0] + high[1])
    # A value between the ends that is less than both is a constant, rounded down.
    return Interval(
        torch.minimum(below, image.lower) - _UNDERFLOW,
        torch.maximum(above, image.upper) + _UNDERFLOW,
    )


def sound_bounds(
    graph: Graph,
    regions: RegionBatch,
    rows: Tensor,
    *,
    tighten: bool = True,
    shallow: bool = False,
    parameters: Parameters | None = None,
    known: Mapping[str, Interval] | None = None,
    guided: bool = False,
    max_memory: int = 1 << 30,
) -> tuple[Tensor, Boxes]:
    """Lower bounds (b, s) of output rows and an interval for every value, in float64.

    Args:
        graph: the network, of any floating dtype; its weights are taken as stored.
        regions: b input sets; those that are no boxes count as their bounding boxes.
        rows: (b or 1, s, m).
        tighten: backward passes for scalars that feed nonlinear nodes; else intervals.
        shallow: stop the rows at the first nonlinear values.
        parameters: tensors that replace the graph's own.
        known: intervals proved elsewhere; intersected in as they are.
        guided: as in ``crown.bound_nodes``.
        max_memory: bytes that the rows of one backward pass may take.

    Raises:
        UnsupportedOperationError: an operator that states no bound of its rounding, or a
            convolution on a device whose libraries may not sum products.

    Soundness: for exact real arithmetic on the stored weights and given regions, whatever the
    order of sums; see the module. NaN proves nothing.
    """
    table = graph.parameters if parameters is None else {**graph.parameters, **parameters}
    wide = {n: t.double() if t.is_floating_point() else t for n, t in table.items()}
    for node in graph.nodes:
        if node.op == "conv" and regions.lower.device.type != "cpu":
            raise UnsupportedOperationError(
                f"{node.name}: got a convolution on {regions.lower.device}, where libraries may "
                "use transforms instead of sums of products; expected the CPU with sound=True"
            )
    start = graph.nodes[0]
    box = regions.box.map(lambda end: end.double().reshape(len(regions), *start.shape))
    work = _Sound(graph, wide, {start.name: box})
    chosen = set(tightened_names(graph)) if tighten else set()
    for node in graph.nodes[1:]:
        box = work.interval(node)
        if known is not None and node.name in known:
            box = box.intersect(known[node.name].map(lambda end: end.double()))
        work.boxes[node.name] = box
        if node.name in chosen:
            box = _tightened(work, node, box, max_memory)
            work.boxes[node.name] = box if guided else box.map(lambda end: end)
    last = graph.nodes[-1]
    spread = rows.double().expand(len(regions), *rows.shape[1:])
    spread = spread.reshape(*spread.shape[:2], *last.shape)
    lower = work.descend(last.name, spread, cuts=not shallow, shallow=shallow)
    if not shallow:
        lower = torch.maximum(lower, work.descend(last.name, spread, cuts=False, shallow=True))
    return lower, work.boxes


def _tightened(work: _Sound, node: Node, box: Interval, max_memory: int) -> Interval:
    """Intersect with backward passes for the scalars that some reader is nonlinear on."""
    readers = tuple(
        n for n in work.graph.nodes[1:]
        if node.name in n.inputs and not lookup(n.op).traits.affine
    )  # fmt: skip
    if not bool(needed_scalars(box, readers).any()):
        return box
    order, counts = unstable_order(box, readers)
    largest = max(n.size for n in work.graph.nodes)
    size = max(1, max_memory // (64 * order.shape[0] * largest))
    lower, upper, steep = (end.flatten(1) for end in (box.lower, box.upper, reaches_up(box)))
    for part, used in zip(order.split(size, dim=1), counts.split(size, dim=1), strict=True):
        units = unit_rows(part, node, lower)
        found = work.descend(node.name, torch.cat([units, -units], dim=1), cuts=False)
        low, high = found.chunk(2, dim=1)
        old = Interval(lower.gather(1, part), upper.gather(1, part))
        new = Interval(low, -high)
        tight = old.intersect(new)
        choice = torch.where(used, reaches_up(new), reaches_up(old))
        lower = lower.scatter(1, part, torch.where(used, tight.lower, old.lower))
        upper = upper.scatter(1, part, torch.where(used, tight.upper, old.upper))
        steep = steep.scatter(1, part, choice)
    return GuidedInterval(*(end.reshape_as(box.lower) for end in (lower, upper, steep)))
