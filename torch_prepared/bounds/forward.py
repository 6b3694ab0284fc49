"""Forward mode: affine forms in the network's input, pushed forward with an interval of error.

Every value v is enclosed by ``A x + [low, high]`` with A (n, m). Affine nodes act on A and on the
interval; an elementwise node is enclosed by two parallel lines, whose slope scales A and whose
offsets join the interval. One pass costs n + 2 evaluations of the network, where backward passes
cost one for each scalar that feeds a nonlinear node: cheaper wherever inputs are few, and looser,
since the errors of neurons are added up as intervals.

Source: Singh et al., "Fast and Effective Robustness Certification" (NeurIPS 2018) for parallel
lines; Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond"
(NeurIPS 2020) for forward mode. Ours: errors as one interval a scalar, intersected at every value
with interval arithmetic, for any operator of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import ElementwiseOperator, lookup
from torch_prepared.relax._base import Parameters
from torch_prepared.relax.relu import TwoPiece

__all__ = ["AffineForm", "propagate_forms"]

Boxes = dict[str, Interval]
_COPIES = 4  # forms held at once: a node's inputs and output, and temporaries


class AffineForm(NamedTuple):
    """``A x + [low, high]``: ``slopes`` (b, n, *shape), None for zero; errors (b, *shape)."""

    slopes: Tensor | None
    errors: Interval

    def box(self, regions: RegionBatch) -> Interval:
        """The interval of the form over the regions."""
        if self.slopes is None:
            return self.errors
        flat, shape = self.slopes.flatten(2), self.errors.lower.shape
        if regions.is_box:
            middle = (regions.box.center.unsqueeze(1) @ flat).reshape(shape)
            reach = (regions.box.radius.unsqueeze(1) @ flat.abs()).reshape(shape)
            return Interval(
                self.errors.lower + (middle - reach), self.errors.upper + (middle + reach)
            )
        rows = flat.transpose(1, 2)
        below, above = regions.minimum(rows), -regions.minimum(-rows)
        return Interval(
            self.errors.lower + below.reshape(shape), self.errors.upper + above.reshape(shape)
        )

    def bound_rows(self, regions: RegionBatch, rows: Tensor) -> Tensor:
        """Lower bounds (b, s) of ``rows . value``: rows (b, s, m)."""
        errors = self.errors.map(lambda end: end.flatten(1).unsqueeze(2))
        const = rows.clamp_min(0) @ errors.lower + rows.clamp_max(0) @ errors.upper
        if self.slopes is None:
            return const.squeeze(2)
        return const.squeeze(2) + regions.minimum(rows @ self.slopes.flatten(2).transpose(1, 2))


def propagate_forms(
    graph: Graph,
    regions: RegionBatch,
    *,
    parameters: Parameters | None = None,
    known: Mapping[str, Interval] | None = None,
    max_memory: int = 1 << 30,
) -> tuple[Boxes, AffineForm]:
    """An interval (b, *shape) for every node, and the output's affine form.

    Args:
        graph: the network.
        regions: b input sets.
        parameters: tensors that replace the graph's own; the result is differentiable in them.
        known: intervals proved elsewhere; intersected in.
        max_memory: bytes that forms may take without gradients; regions go in parts.

    Soundness: in exact arithmetic, as interval propagation, which it is never worse than.
    """
    table = graph.parameters if parameters is None else {**graph.parameters, **parameters}
    item = regions.lower.element_size()
    largest = max(node.size for node in graph.nodes)
    chunk = max(1, max_memory // (_COPIES * item * graph.input_size * largest))
    parts = []
    for first in range(0, max(1, len(regions)), chunk):
        span = slice(first, first + chunk)
        mine = {name: box[span] for name, box in (known or {}).items()}
        parts.append(_propagate(graph, regions[span], table, mine))
    if len(parts) == 1:
        return parts[0]
    boxes = {name: _join([part[0][name] for part in parts]) for name in parts[0][0]}
    slopes = [part[1].slopes for part in parts]
    joined = None if slopes[0] is None else torch.cat([s for s in slopes if s is not None])
    return boxes, AffineForm(joined, _join([part[1].errors for part in parts]))


def _join(parts: list[Interval]) -> Interval:
    return Interval(torch.cat([p.lower for p in parts]), torch.cat([p.upper for p in parts]))


def _propagate(
    graph: Graph, regions: RegionBatch, table: Parameters, known: Mapping[str, Interval]
) -> tuple[Boxes, AffineForm]:
    start, last = graph.nodes[0], {}
    for position, node in enumerate(graph.nodes):
        last.update(dict.fromkeys(node.inputs, position))
    unit = torch.eye(start.size, dtype=regions.lower.dtype, device=regions.lower.device)
    zero = regions.lower.new_zeros(len(regions), *start.shape)
    spread = unit.reshape(1, start.size, *start.shape).expand(len(regions), -1, *start.shape)
    forms = {start.name: AffineForm(spread, Interval(zero, zero))}
    boxes = {start.name: regions.box.map(lambda end: end.reshape(end.shape[0], *start.shape))}
    for position, node in enumerate(graph.nodes[1:], start=1):
        operator, inputs = lookup(node.op), [boxes[name] for name in node.inputs]
        box = operator.interval(node, inputs, table)
        if node.name in known:
            box = box.intersect(known[node.name])
        if operator.traits.affine:
            form = _affine(node, [forms[name] for name in node.inputs], table)
        elif isinstance(operator, ElementwiseOperator):
            form = _elementwise(operator, node, forms[node.inputs[0]], inputs[0], box)
        else:
            form = AffineForm(None, box)
        forms[node.name] = form
        boxes[node.name] = box.intersect(form.box(regions))
        for name in node.inputs:
            if last[name] == position:
                forms.pop(name, None)
    return boxes, forms[graph.nodes[-1].name]


def _affine(node: Node, inputs: list[AffineForm], table: Parameters) -> AffineForm:
    """The linear part acts on slopes, the interval rule on errors."""
    operator = lookup(node.op)
    errors = operator.interval(node, [form.errors for form in inputs], table)
    like = next((form.slopes for form in inputs if form.slopes is not None), None)
    if like is None:
        return AffineForm(None, errors)
    b, n = like.shape[:2]
    columns, origins = [], []
    for form in inputs:
        shape = form.errors.lower.shape[1:]
        slopes = like.new_zeros(b, n, *shape) if form.slopes is None else form.slopes
        columns.append(slopes.reshape(b * n, *shape))
        origins.append(like.new_zeros(1, *shape))
    image = operator.value(node, columns, table) - operator.value(node, origins, table)
    return AffineForm(image.reshape(b, n, *node.shape), errors)


def _elementwise(
    operator: ElementwiseOperator, node: Node, form: AffineForm, box: Interval, image: Interval
) -> AffineForm:
    """Both sides by lines of one slope."""
    if form.slopes is None:
        return AffineForm(None, image)
    slope, offsets = _parallel(operator, node, box, image)
    ends = slope * form.errors.lower, slope * form.errors.upper
    errors = Interval(torch.minimum(*ends) + offsets.lower, torch.maximum(*ends) + offsets.upper)
    return AffineForm(form.slopes * slope.unsqueeze(1), errors)


def _parallel(
    operator: ElementwiseOperator, node: Node, box: Interval, image: Interval
) -> tuple[Tensor, Interval]:
    """``slope x + [low, high]`` around the function on the box.

    Of a bent line: the chord above, and below the line of the same slope through 0. Of others the
    mean slope of both lines, each turned about the end that keeps it on its side (the distance
    between turned lines is the same for every slope between), or 0 with the image of the box where
    that is closer.
    """
    lines = operator.lines(node, box)
    if isinstance(operator, TwoPiece):
        return lines.upper_slope, Interval(lines.lower_offset, lines.upper_offset)
    tilt = (lines.upper_slope - lines.lower_slope) / 2
    turned = tilt * box.lower, tilt * box.upper
    level = tilt == 0  # also where the box is infinite
    found = Interval(
        lines.lower_offset + torch.where(level, 0.0, torch.minimum(-turned[0], -turned[1])),
        lines.upper_offset + torch.where(level, 0.0, torch.maximum(*turned)),
    )
    better = (found.width < image.width) | torch.isnan(found.width)  # NaN is not lost
    slope = torch.where(better, (lines.lower_slope + lines.upper_slope) / 2, 0.0)
    return slope, Interval(
        torch.where(better, found.lower, image.lower), torch.where(better, found.upper, image.upper)
    )
