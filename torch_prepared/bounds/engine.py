"""Which engine bounds the leaves of a branch and bound over one network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.bounds._leaf import LeafBounds, LeafEngine
from torch_prepared.bounds._properties import PropertyBatch
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds.chain import Chain
from torch_prepared.bounds.crown import DEFAULT_MEMORY, bound_nodes, bound_rows
from torch_prepared.bounds.shared_slopes import SharedSlopes, SlopedEngine
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.core.rounding import outward
from torch_prepared.errors import SpecError

__all__ = ["chain_engine", "general_engine", "leaf_engine"]


def leaf_engine(
    graph: Graph,
    batch: PropertyBatch,
    parameters: Mapping[str, Tensor] | None = None,
    *,
    max_memory: int = DEFAULT_MEMORY,
) -> LeafEngine:
    """The fastest engine for this network: the native chain where it applies, else the general.

    Args:
        graph: the network.
        batch: one property; its rows are bounded, its region is not read.
        parameters: tensors that replace the graph's own.
        max_memory: bytes that one backward pass of the general engine may take.

    Returns:
        A function from boxes (b, n) to :class:`LeafBounds` in the graph's dtype.

    Raises:
        SpecError: not exactly one property, or rows that do not fit the network.

    Soundness: in exact arithmetic for the boxes rounded outward to the graph's dtype; NaN where
    weights overflow, which proves nothing.
    """
    changed = graph if parameters is None else graph.with_parameters(parameters)
    chain = None
    if ops.build_info().native and changed.device.type == "cpu":
        chain = Chain.of(changed)
    plain = (
        general_engine(changed, batch, max_memory=max_memory)
        if chain is None
        else chain_engine(chain, batch)
    )
    sloped = SharedSlopes.of(changed, batch)
    return plain if sloped is None else SlopedEngine(plain, sloped)


def chain_engine(chain: Chain, batch: PropertyBatch) -> LeafEngine:
    """Bounds of one property's rows by :meth:`Chain.bounds`; raises as :func:`leaf_engine`."""
    rows = _only_rows(batch, chain.weights[-1].shape[0])

    def bound(box: Interval) -> LeafBounds:
        return chain.bounds(box, rows)

    return bound


def general_engine(
    graph: Graph, batch: PropertyBatch, *, max_memory: int = DEFAULT_MEMORY
) -> LeafEngine:
    """Bounds of one property's rows for any network, in chunks under the memory budget.

    Raises as :func:`leaf_engine`.
    """
    rows = _only_rows(batch, graph.output_size).to(graph.device, graph.dtype).unsqueeze(0)
    largest = max(node.size for node in graph.nodes)
    total = sum(node.size for node in graph.nodes)
    item = torch.finfo(graph.dtype).bits // 8
    chunk = max(1, max_memory // (8 * item * (largest * largest + 2 * total)))

    @torch.no_grad()
    def bound(box: Interval) -> LeafBounds:
        parts = [_bound_chunk(graph, rows, box[first : first + chunk], max_memory)
                 for first in range(0, len(box.lower), chunk)]  # fmt: skip
        if not parts:
            empty = rows.new_zeros(0, rows.shape[1], graph.input_size)
            return LeafBounds(empty[..., 0], empty)
        return LeafBounds(
            torch.cat([part.values for part in parts]), torch.cat([part.inputs for part in parts])
        )

    return bound


def _bound_chunk(graph: Graph, rows: Tensor, box: Interval, max_memory: int) -> LeafBounds:
    tight = outward(box.lower, box.upper, graph.dtype).map(lambda end: end.to(graph.device))
    regions = RegionBatch(tight.lower, tight.upper)
    boxes = bound_nodes(graph, regions, max_memory=max_memory)
    found = bound_rows(graph, regions, boxes, rows)
    return LeafBounds(found.lower, found.inputs)


def _only_rows(batch: PropertyBatch, outputs: int) -> Tensor:
    """The rows (s, m) of the only property of a batch."""
    if len(batch) != 1 or batch.rows.shape[2] != outputs:
        raise SpecError(
            f"property: got {len(batch)} properties on {batch.rows.shape[2]} outputs; expected "
            f"one property on the network's {outputs}"
        )
    return batch.rows[0]
