"""Editable parameters as one vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.core.graph import Graph
from torch_prepared.errors import SpecError

__all__ = ["ParameterVector"]

MOST_SCALARS = 2_000_000  #: that an editor moves when it may choose


@dataclass(frozen=True)
class ParameterVector:
    """Order and shapes of the parameters an edit may change; p scalars together."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, graph: Graph, layers: tuple[str, ...] | None = None) -> ParameterVector:
        """The editable parameters of ``layers``, or of all layers, in the graph's order.

        Raises:
            SpecError: a layer that the network does not have, or that has no editable parameter.
        """
        every = {
            node.name: None
            for node in graph.nodes
            if any(ref.name in graph.editable for ref in node.params.values())
        }
        strange = [name for name in layers or () if name not in every]
        if strange:
            raise SpecError(
                f"layers: got {strange[0]!r}; expected editable layers: {', '.join(every)}"
            )
        names: dict[str, None] = {}
        for node in graph.nodes:
            if layers is None or node.name in layers:
                names.update(
                    (r.name, None) for r in node.params.values() if r.name in graph.editable
                )
        order = tuple(names)
        return cls(order, tuple(graph.parameters[name].shape for name in order))

    @classmethod
    def chosen(
        cls, graph: Graph, layers: tuple[str, ...] | None, most: int = MOST_SCALARS
    ) -> ParameterVector:
        """The parameters of ``layers``; without a choice all, or the last ones of a large network.

        Args:
            graph: whose parameters they are.
            layers: names, or None.
            most: scalars beyond which only the last layers are taken, at least one.

        Raises:
            SpecError: as :meth:`of`.
        """
        every = cls.of(graph, layers)
        if layers is not None or every.count <= most:
            return every
        kept, count = list[str](), 0
        for node in reversed(graph.nodes):
            fresh = {r.name for r in node.params.values() if r.name in graph.editable} - set(kept)
            count += sum(graph.parameters[name].numel() for name in fresh)
            if count > most and kept:
                break
            kept += fresh
        pairs = [pair for pair in zip(every.names, every.shapes, strict=True) if pair[0] in kept]
        return cls(tuple(name for name, _ in pairs), tuple(shape for _, shape in pairs))

    @property
    def count(self) -> int:
        """Number of scalars, p."""
        return sum(shape.numel() for shape in self.shapes)

    def flatten(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """One vector (p,)."""
        return torch.cat([parameters[name].reshape(-1) for name in self.names])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Tensors by name: views of a vector (p,)."""
        parts = vector.split([shape.numel() for shape in self.shapes])
        return {n: v.view(s) for n, v, s in zip(self.names, parts, self.shapes, strict=True)}
