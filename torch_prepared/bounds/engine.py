"""The fastest available way to bound many boxes of one network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_prepared.bounds._properties import PropertyBatch
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds.branch import LeafBounds, LeafEngine
from torch_prepared.bounds.crown import bound_nodes, bound_rows
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.core.rounding import outward

__all__ = ["leaf_engine"]


def leaf_engine(
    graph: Graph, batch: PropertyBatch, parameters: Mapping[str, Tensor] | None = None
) -> LeafEngine:
    """An engine for the rows of ``batch`` (one property), in the graph's dtype.

    Args:
        graph: the network.
        batch: exactly one property.
        parameters: tensors that replace the graph's own.
    """
    rows = batch.rows.to(graph.device, graph.dtype)

    def engine(box: Interval) -> LeafBounds:
        rounded = outward(box.lower, box.upper, graph.dtype)
        regions = RegionBatch(rounded.lower.to(graph.device), rounded.upper.to(graph.device))
        with torch.no_grad():
            boxes = bound_nodes(graph, regions, parameters=parameters)
            found = bound_rows(graph, regions, boxes, rows, parameters=parameters)
        return LeafBounds(found.lower, found.inputs)

    return engine
