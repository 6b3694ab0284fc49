"""A network cut before what may change: fixed values before it, expressions after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.bounds import editable_layers
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.rows import Floats
from torch_prepared.errors import SpecError, UnsupportedOperationError
from torch_prepared.relax import lookup

__all__ = ["BIASES", "FreeLayer", "Layers", "Prefix"]

BIASES = "biases"  #: stands for the biases of all layers
Layers = str | tuple[str, ...] | None
"""A layer's name (None: the last one), or layers whose biases move together."""

_CHUNK = 2048
Integers = NDArray[np.int64]
Prefix = Mapping[str, Tensor]
"""Values (b, *shape), float64, of the nodes that the layer and nodes after it read."""


@dataclass(frozen=True, eq=False)
class FreeLayer:
    """One layer whose weight (and bias) change by ``d`` (p,), or several whose biases alone do.

    Everything is affine in d up to the next nonlinear node: biases only add. The order of d is that
    of the stored tensors :attr:`names`.

    Args:
        graph: the network in float64 on the CPU.
        node: the layer; the first one of several.
        free: (p,) bool, which entries may change.
        shifted: the layers whose biases change; empty where a weight does.
    """

    graph: Graph
    node: Node
    free: NDArray[np.bool_]
    shifted: tuple[Node, ...] = ()

    @classmethod
    def of(cls, graph: Graph, layer: Layers, free: Tensor | None) -> FreeLayer:
        """The layer called ``layer`` (the last editable one when None), or the biases of several.

        Args:
            graph: the network as stored.
            layer: name, names of layers whose biases move, or :data:`BIASES` for all of them.
            free: bool, of the shape of the layer's stored weight; its bias is then fixed. None
                frees all.

        Raises:
            SpecError: no such layer, or a mask of another shape.
        """
        exact = graph.to(torch.float64, "cpu")
        known = editable_layers(exact)
        if isinstance(layer, tuple) or (layer == BIASES and BIASES not in known):
            return cls._of_biases(exact, layer, free)
        if not known or (layer is not None and layer not in known):
            raise SpecError(
                f"layer: got {layer!r}; expected an editable layer: {', '.join(known) or 'none'}"
            )
        node = exact.node(known[-1] if layer is None else layer)
        plain = cls(exact, node, np.zeros(0, dtype=bool))
        sizes = [exact.parameters[name].numel() for name in plain.names]
        mask = np.ones(sum(sizes), dtype=bool)
        if free is not None:
            shape = exact.parameters[plain.names[0]].shape
            if free.dtype != torch.bool or free.shape != shape:
                raise SpecError(
                    f"free: got {free.dtype} {tuple(free.shape)}; expected bool {tuple(shape)}, "
                    "the stored weight's shape"
                )
            mask[:] = False
            mask[: sizes[0]] = free.detach().cpu().reshape(-1).numpy()
        return cls(exact, node, mask)

    @classmethod
    def _of_biases(
        cls, exact: Graph, layers: str | tuple[str, ...], free: Tensor | None
    ) -> FreeLayer:
        own = {n.name: n for n in exact.nodes if _own_bias(exact, n) is not None}
        chosen = tuple(own) if isinstance(layers, str) else layers
        strange = [name for name in chosen if name not in own]
        if strange or not chosen:
            got = repr(strange[0]) if strange else "none"
            raise SpecError(
                f"layer: got {got}; expected layers with a bias of their own: "
                f"{', '.join(own) or 'none here'}"
            )
        if free is not None:
            raise SpecError("free: got a choice of weights, but biases move; expected none")
        nodes = tuple(n for n in own.values() if n.name in chosen)
        plain = cls(exact, nodes[0], np.zeros(0, dtype=bool), nodes)
        count = sum(exact.parameters[name].numel() for name in plain.names)
        return replace(plain, free=np.ones(count, dtype=bool))

    @cached_property
    def title(self) -> str:
        """For messages."""
        names = ", ".join(n.name for n in self.shifted)
        return f"biases of {names}" if names else self.node.name

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Stored parameters that change: the weight, then the bias if it is this layer's own."""
        if self.shifted:
            return tuple(n.params["bias"].name for n in self.shifted)
        weight, bias = self.node.params["weight"].name, _own_bias(self.graph, self.node)
        return (weight,) if bias is None else (weight, bias)

    @property
    def count(self) -> int:
        """Number of unknowns, p."""
        return len(self.free)

    @cached_property
    def after(self) -> tuple[Node, ...]:
        """What may change and all nodes that depend on it, in order."""
        found: dict[str, Node] = {}
        first = {n.name for n in self.shifted} or {self.node.name}
        for other in self.graph.nodes:
            if other.name in first or any(name in found for name in other.inputs):
                found[other.name] = other
        return tuple(found.values())

    @cached_property
    def is_last(self) -> bool:
        """Whether the output is affine in the layer's parameters."""
        return all(lookup(n.op).traits.affine for n in self.after)

    @cached_property
    def is_dense(self) -> bool:
        """Whether this is one layer that maps one vector to another."""
        return not self.shifted and self.node.op == "linear" and len(self.node.shape) == 1

    def prefix(self, inputs: Floats | Tensor) -> dict[str, Tensor]:
        """Values that the nodes after the cut read, for inputs (b, n)."""
        x = torch.as_tensor(inputs, dtype=torch.float64)
        inside = {n.name for n in self.after}
        wanted = {name for n in self.after for name in n.inputs if name not in inside}
        parts = [self._prefix(part, wanted) for part in x.split(_CHUNK)]
        return {name: torch.cat([p[name] for p in parts]) for name in sorted(wanted)}

    def _prefix(self, x: Tensor, wanted: set[str]) -> dict[str, Tensor]:
        inside = {n.name for n in self.after}
        values = {self.graph.nodes[0].name: x.reshape(len(x), *self.graph.input_shape)}
        with torch.no_grad():
            for node in self.graph.nodes[1:]:
                if node.name not in inside:
                    inputs = [values[name] for name in node.inputs]
                    values[node.name] = lookup(node.op).value(node, inputs, self.graph.parameters)
        return {name: values[name] for name in wanted}

    def run(self, prefix: Prefix, parameters: Mapping[str, Tensor] | None = None) -> Floats:
        """Flattened outputs (b, m) from the values before the cut."""
        return self.values(prefix, parameters)[self.graph.nodes[-1].name].flatten(1).numpy()

    def values(
        self, prefix: Prefix, parameters: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Values (b, *shape) of the layer and the nodes after it."""
        table = {**self.graph.parameters, **(parameters or {})}
        known = dict(prefix)
        with torch.no_grad():
            for node in self.after:
                inputs = [known[name] for name in node.inputs]
                known[node.name] = lookup(node.op).value(node, inputs, table)
        return {n.name: known[n.name] for n in self.after}

    def moved(self, d: Floats) -> dict[str, Tensor]:
        """Stored parameters after the change ``d`` (p,), float64; only those that differ."""
        found, start = {}, 0
        for name in self.names:
            old = self.graph.parameters[name]
            part = d[start : start + old.numel()]
            start += old.numel()
            if np.any(part):
                found[name] = old + torch.from_numpy(part.copy()).reshape(old.shape)
        return found

    @cached_property
    def columns(self) -> tuple[Integers, Integers | None]:
        """Unknown behind every entry of the weight, and of the bias, as the operator reads them."""
        weight = self.node.params["weight"]
        size = self.graph.parameters[weight.name].numel()
        index = torch.arange(size).reshape(self.graph.parameters[weight.name].shape)
        first = weight.read({weight.name: index}).numpy()
        if len(self.names) == 1:
            return first, None
        bias = self.node.params["bias"]
        index = size + torch.arange(self.graph.parameters[bias.name].numel())
        shaped = index.reshape(self.graph.parameters[bias.name].shape)
        return first, bias.read({bias.name: shaped}).numpy()

    def matrix(self, prefix: Prefix, i: int, node: Node) -> sp.csr_matrix | None:
        """How the flattened value of ``node`` at example i moves with d itself: (size, p).

        What comes through the inputs of ``node`` is not in it. None for a node without unknowns of
        its own; entries that are not free are zero.
        """
        if self.shifted:
            return self._bias_matrices.get(node.name)
        if node is not self.node:
            return None
        h = prefix[self.node.inputs[0]][i : i + 1]
        if not self.is_dense:
            return self._by_differentiation(h)
        weight, bias = self.columns
        feature = h.reshape(-1).numpy()
        live = np.flatnonzero(feature)
        size = self.node.size
        row = np.repeat(np.arange(size), len(live))
        column, value = weight[:, live].reshape(-1), np.tile(feature[live], size)
        if bias is not None:
            row = np.concatenate([row, np.arange(size)])
            column = np.concatenate([column, bias.reshape(-1)])
            value = np.concatenate([value, np.ones(size)])
        kept = self.free[column]
        entries = (value[kept], (row[kept], column[kept]))
        return sp.csr_matrix(entries, shape=(size, self.count))

    @cached_property
    def _bias_matrices(self) -> dict[str, sp.csr_matrix]:
        """By shifted layer: ones where an entry of its value has an entry of its bias added."""
        found, start = {}, 0
        for node in self.shifted:
            bias = node.params["bias"]
            stored = self.graph.parameters[bias.name]
            index = start + torch.arange(stored.numel()).reshape(stored.shape)
            entries = bias.read({bias.name: index}).reshape(-1).numpy()
            times = node.size // len(entries)  # channels come first, features last
            column = np.repeat(entries, times) if node.op == "conv" else np.tile(entries, times)
            row = np.arange(node.size)
            shape = (node.size, self.count)
            found[node.name] = sp.csr_matrix((np.ones(node.size), (row, column)), shape=shape)
            start += stored.numel()
        return found

    def _by_differentiation(self, h: Tensor) -> sp.csr_matrix:
        """The same for convolutions and layers along sequences, which are linear in d as well."""
        if self.node.size * self.count > 50_000_000:
            raise UnsupportedOperationError(
                f"{self.node.name}: {self.node.size} outputs times {self.count} weights are too "
                "many for a pointwise program; edit a later or fully connected layer"
            )

        def value(*tensors: Tensor) -> Tensor:
            table = {**self.graph.parameters, **dict(zip(self.names, tensors, strict=True))}
            return lookup(self.node.op).value(self.node, [h], table).reshape(-1)

        start = tuple(self.graph.parameters[name] for name in self.names)
        parts = torch.autograd.functional.jacobian(value, start)
        whole = torch.cat([part.reshape(self.node.size, -1) for part in parts], dim=1).numpy()
        return sp.csr_matrix(whole * self.free)


def _own_bias(graph: Graph, node: Node) -> str | None:
    """Name of the stored bias that this layer alone reads and that may change."""
    bias = node.params.get("bias") if node.op in ("linear", "conv") else None
    if bias is None or bias.name not in graph.editable or len(graph.readers(bias.name)) != 1:
        return None
    return bias.name
