"""Bounds by name: one entry for every method."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.bounds._program import programs_apply
from torch_prepared.bounds._properties import PropertyBatch
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds.alpha_crown import AlphaOptions, bound_rows_alpha
from torch_prepared.bounds.chain import Chain
from torch_prepared.bounds.cost import affordable_method, regions_at_once
from torch_prepared.bounds.crown import DEFAULT_MEMORY, bound_nodes, bound_rows
from torch_prepared.bounds.forward import propagate_forms
from torch_prepared.bounds.sound import sound_bounds
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.errors import SpecError
from torch_prepared.specs import InputSet, Property

__all__ = ["MarginBounds", "Method", "certified_margin", "compute_bounds"]


class Method(enum.Enum):
    """How to bound.

    ``IBP`` intervals everywhere; ``CROWN_IBP`` a backward pass for the output over interval
    relaxations; ``FORWARD`` the same over intervals of affine forms in the input, and those forms
    themselves (see ``forward``); ``CROWN`` backward passes for every unstable scalar;
    ``ALPHA_CROWN`` the same with slopes of each row's own, optimized jointly (see
    ``alpha_crown``); ``AUTO`` CROWN, FORWARD or CROWN_IBP, the first one whose cost is bearable
    (see ``cost.affordable_method``).
    """

    IBP = "ibp"
    CROWN_IBP = "crown-ibp"
    FORWARD = "forward"
    CROWN = "crown"
    ALPHA_CROWN = "alpha-crown"
    AUTO = "auto"

    @classmethod
    def named(cls, name: str | Method) -> Method:
        """The method called ``name``."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(m.value for m in cls)
            raise SpecError(f"method: got {name!r}; expected one of {known}") from None


@dataclass(frozen=True)
class _Options:
    """How rows are bounded; ``guided`` as in ``crown.bound_nodes``."""

    method: Method
    max_memory: int
    alpha: AlphaOptions | None
    sound: bool
    guided: bool


@dataclass(frozen=True)
class MarginBounds:
    """Certified lower bounds for a batch of properties.

    Args:
        margin: (b,) lower bound of the safety margin over each region; positive means proved in
            exact arithmetic.
        rows: (b, s) lower bound of every output row plus offset.
        boxes: intervals of every node's value.
        batch: the properties in batched form.
    """

    margin: Tensor
    rows: Tensor
    boxes: Mapping[str, Interval]
    batch: PropertyBatch

    def __getitem__(self, index: slice) -> MarginBounds:
        """The same of some properties."""
        boxes = {name: box[index] for name, box in self.boxes.items()}
        return MarginBounds(self.margin[index], self.rows[index], boxes, self.batch[index])


def compute_bounds(
    graph: Graph,
    regions: InputSet | Sequence[InputSet],
    rows: Tensor | None = None,
    *,
    method: str | Method = Method.CROWN,
    parameters: Mapping[str, Tensor] | None = None,
    max_memory: int = DEFAULT_MEMORY,
    alpha: AlphaOptions | None = None,
    sound: bool = False,
) -> Interval:
    """Bounds of output rows over every region.

    Args:
        graph: the network.
        regions: one input set or b of them, each of size n.
        rows: (b or 1, s, m) or (s, m) coefficients on the flattened output; the identity when
            None.
        method: a :class:`Method` or its name.
        parameters: tensors that replace the graph's own; the result is differentiable in them.
        max_memory: bytes that one backward pass, or the slopes of "alpha-crown", may take; with
            other methods regions go in parts, so that their intervals fit too.
        alpha: how "alpha-crown" optimizes; other methods ignore it.
        sound: let the bounds hold in spite of rounding, in float64 whatever the network's dtype
            (see ``sound``); for "ibp", "crown-ibp" and "crown".

    Returns:
        Interval (b, s) with ``lower <= rows . f(x) <= upper`` for all x of the region.

    Raises:
        SpecError: sizes or numbers that do not fit, or rows that are not finite.

    Soundness: in exact arithmetic, and with ``sound`` also as computed; the certificate checker
    accounts for rounding in code of its own. Where weights
    overflow the bounds are NaN, which proves nothing.
    """
    dtype = torch.float64 if sound else graph.dtype
    batch = RegionBatch.of(regions, dtype, graph.device)
    if rows is None:
        rows = torch.eye(graph.output_size)
    rows = rows.to(graph.device, dtype)
    rows = rows if rows.dim() == 3 else rows.unsqueeze(0)
    if rows.shape[0] not in (1, len(batch)):
        raise SpecError(f"rows: got {rows.shape[0]} sets; expected 1 or {len(batch)}, by region")
    both = torch.cat([rows, -rows], dim=1)
    chosen = Method.named(method)
    if not sound:  # which names the methods it knows
        chosen = _resolve(chosen, graph, len(batch), both, parameters, max_memory)
    size, chain = len(batch), None
    if chosen is not Method.ALPHA_CROWN:  # which goes in parts of its own
        size = regions_at_once(graph, both.shape[1], max_memory, dtype.itemsize)
    if chosen is Method.CROWN and parameters is None and not sound:
        chain = _native_chain(graph, batch, both)

    def bound(part: RegionBatch, own: Tensor) -> Tensor:
        if chain is not None:
            return chain.bounds(part.box, own[0] if len(own) == 1 else own).values
        options = _Options(chosen, max_memory, alpha, sound, guided=True)
        return _row_bounds(graph, part, own, parameters, None, options)[0]

    spans = [slice(first, first + size) for first in range(0, len(batch), size)]
    parts = [bound(batch[span], both if len(both) == 1 else both[span]) for span in spans]
    found = torch.cat(parts)
    lower, negated = found.chunk(2, dim=1)
    return Interval(lower, -negated)


def certified_margin(
    graph: Graph,
    properties: Property | Sequence[Property] | PropertyBatch,
    *,
    method: str | Method = Method.CROWN,
    parameters: Mapping[str, Tensor] | None = None,
    known: Mapping[str, Interval] | None = None,
    max_memory: int = DEFAULT_MEMORY,
    alpha: AlphaOptions | None = None,
    sound: bool = False,
) -> MarginBounds:
    """Lower bounds of each property's safety margin, differentiable in the weights.

    Args:
        graph: the network.
        properties: one, several, or an already batched form (which fixes dtype and device).
        method: a :class:`Method` or its name.
        parameters: tensors that replace the graph's own.
        known: intervals proved elsewhere for the same weights; intersected in.
        max_memory: bytes that one backward pass, or the slopes of "alpha-crown", may take.
        alpha: how "alpha-crown" optimizes; other methods ignore it.
        sound: see :func:`compute_bounds`.

    Returns:
        :class:`MarginBounds`. Where weights overflow the margin is NaN, which proves nothing.

    Raises:
        SpecError: no properties, regions of other sizes, or a known interval that holds NaN or
            whose ends are out of order.
    """
    if isinstance(properties, Property):
        properties = (properties,)
    batch = (
        properties
        if isinstance(properties, PropertyBatch)
        else PropertyBatch.of(properties, torch.float64 if sound else graph.dtype, graph.device)
    )
    chosen = Method.named(method)
    options = _Options(chosen, max_memory, alpha, sound, guided=False)
    values, boxes = _row_bounds(graph, batch.regions, batch.rows, parameters, known, options)
    values = values + batch.offset
    if sound:
        values = torch.nextafter(values, torch.full_like(values, -torch.inf))
    return MarginBounds(batch.margins(values), values, boxes, batch)


def _check(graph: Graph, regions: RegionBatch, rows: Tensor, known: Mapping[str, Interval]) -> None:
    """Refuse misfits, NaN and crossed ends from outside; one look at the device in good cases."""
    for what, got, expected in (
        ("regions", regions.lower.shape[1], graph.input_size),
        ("rows", rows.shape[2], graph.output_size),
    ):
        if got != expected:
            raise SpecError(f"{what}: got {got} numbers; expected {expected}, as the network has")
    good = [torch.isfinite(rows).all(), *((box.lower <= box.upper).all() for box in known.values())]
    if bool(torch.stack(good).all()):
        return
    for name, box in known.items():
        Interval.checked(box.lower, box.upper, f"known interval of '{name}'")
    raise SpecError("rows: got NaN or infinite coefficients; expected finite ones")


def _row_bounds(
    graph: Graph,
    regions: RegionBatch,
    rows: Tensor,
    parameters: Mapping[str, Tensor] | None,
    known: Mapping[str, Interval] | None,
    options: _Options,
) -> tuple[Tensor, dict[str, Interval]]:
    _check(graph, regions, rows, known or {})
    method, max_memory = options.method, options.max_memory
    if options.sound:
        if method not in (Method.IBP, Method.CROWN_IBP, Method.CROWN):
            raise SpecError(
                f"sound=True: got method {method.value!r}; expected 'ibp', 'crown-ibp' or 'crown'"
            )
        return sound_bounds(
            graph,
            regions,
            rows,
            tighten=method is Method.CROWN,
            shallow=method is Method.IBP,
            parameters=parameters,
            known=known,
            guided=options.guided,
            max_memory=max_memory,
        )
    if method is Method.ALPHA_CROWN:
        return bound_rows_alpha(
            graph,
            regions,
            rows,
            parameters=parameters,
            known=known,
            options=options.alpha,
            guided=options.guided,
            max_memory=max_memory,
        )
    method = _resolve(method, graph, len(regions), rows, parameters, max_memory)
    if method is Method.FORWARD:
        return _forward(graph, regions, rows, parameters, max_memory, known)
    boxes = bound_nodes(
        graph,
        regions,
        parameters=parameters,
        tighten=method is Method.CROWN,
        known=known,
        guided=options.guided,
        max_memory=max_memory,
    )
    shallow = method is Method.IBP
    bound = bound_rows(graph, regions, boxes, rows, parameters=parameters, shallow=shallow)
    return bound.lower, boxes


def _native_chain(graph: Graph, regions: RegionBatch, rows: Tensor) -> Chain | None:
    """The network as dense layers and ReLUs, whose CROWN is one native call, or None.

    Without programs, and for what :func:`_check` refuses, the general way is taken.
    """
    ends = regions.lower, regions.upper
    if not regions.is_box or not programs_apply([rows, *ends, *graph.parameters.values()]):
        return None
    if rows.shape[2] != graph.output_size or ends[0].shape[1] != graph.input_size:
        return None
    if not all(bool(torch.isfinite(part).all()) for part in (rows, *ends)):
        return None
    return Chain.of(graph)


def _resolve(
    method: Method,
    graph: Graph,
    regions: int,
    rows: Tensor,
    parameters: Mapping[str, Tensor] | None,
    max_memory: int,
) -> Method:
    """The method itself, or the one that AUTO stands for with so many regions."""
    if method is not Method.AUTO:
        return method
    tensors = [rows, *({**graph.parameters, **(parameters or {})}).values()]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return Method(
        affordable_method(
            graph, regions, max_memory, native=programs_apply(tensors), saved=differentiable
        )
    )


def _forward(
    graph: Graph,
    regions: RegionBatch,
    rows: Tensor,
    parameters: Mapping[str, Tensor] | None,
    max_memory: int,
    known: Mapping[str, Interval] | None,
) -> tuple[Tensor, dict[str, Interval]]:
    """The better of a backward pass over the forms' intervals and the output's own form."""
    boxes, form = propagate_forms(
        graph, regions, parameters=parameters, known=known, max_memory=max_memory
    )
    back = bound_rows(graph, regions, boxes, rows, parameters=parameters).lower
    spread = rows.expand(len(regions), *rows.shape[1:])
    return torch.maximum(back, form.bound_rows(regions, spread)), boxes
