"""Sketches of the outputs' sensitivity to the weights: one gradient per reference input.

A row's part in a linear layer is an outer product of what the layer read and of the gradient at
its output, and is kept as these two factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.relax import lookup
from torch_prepared.relax.conv import pad_values, window

__all__ = ["FlatSketch", "Sketch", "row_scalars", "sketch_rows"]


class _Block(ABC):
    """Sketch rows restricted to one parameter: k matrices of the parameter's shape."""

    name: str

    @abstractmethod
    def gram(self) -> Tensor:
        """Inner products of the rows (k, k)."""

    @abstractmethod
    def times(self, directions: Tensor) -> Tensor:
        """Inner products with directions (m, *shape): (m, k)."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """Sums of rows by weights (m, k): (m, *shape)."""


@dataclass(frozen=True)
class _OuterBlock(_Block):
    """Rows ``outer[i] x inner[i]`` of a linear layer's weight, in the operator's layout."""

    name: str
    ref: ParameterRef
    outer: Tensor
    inner: Tensor
    shape: torch.Size

    def gram(self) -> Tensor:
        return (self.outer @ self.outer.T) * (self.inner @ self.inner.T)

    def times(self, directions: Tensor) -> Tensor:
        table = {self.ref.name: directions}
        return torch.stack(
            [
                ((self.outer @ _read(self.ref, d)) * self.inner).sum(dim=1)
                for d in table[self.ref.name]
            ]
        )

    def combine(self, weights: Tensor) -> Tensor:
        made = [(self.outer * w[:, None]).T @ self.inner for w in weights]
        return torch.stack([_unread(self.ref, m, self.shape) for m in made])


@dataclass(frozen=True)
class _DenseBlock(_Block):
    """Rows (k, *shape) of any parameter, stored."""

    name: str
    rows: Tensor

    def gram(self) -> Tensor:
        flat = self.rows.flatten(1)
        return flat @ flat.T

    def times(self, directions: Tensor) -> Tensor:
        return directions.flatten(1) @ self.rows.flatten(1).T

    def combine(self, weights: Tensor) -> Tensor:
        return (weights @ self.rows.flatten(1)).reshape(len(weights), *self.rows.shape[1:])


class Sketch(ABC):
    """Sketch rows R (k, p) over a whole parameter vector."""

    @abstractmethod
    def gram(self) -> Tensor:
        """``R R'`` (k, k), float64."""

    @abstractmethod
    def times(self, rows: Tensor) -> Tensor:
        """``rows R'``: (m, p) to (m, k), float32."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """``weights R``: (m, k) to (m, p), float32."""


@dataclass(frozen=True)
class _BlockSketch(Sketch):
    """Rows parameter by parameter, outer products kept as factors."""

    vector: ParameterVector
    blocks: tuple[_Block, ...]

    def gram(self) -> Tensor:
        return self._products.clone()

    @cached_property
    def _products(self) -> Tensor:
        return torch.stack([block.gram().double() for block in self.blocks]).sum(dim=0)

    def times(self, rows: Tensor) -> Tensor:
        parts = self._split(rows.float())
        return torch.stack([block.times(parts[block.name]) for block in self.blocks]).sum(dim=0)

    def combine(self, weights: Tensor) -> Tensor:
        made = {block.name: block.combine(weights.float()).flatten(1) for block in self.blocks}
        missing = torch.zeros(len(weights), 1)
        return torch.cat(
            [
                made[name] if name in made else missing.expand(-1, shape.numel())
                for name, shape in zip(self.vector.names, self.vector.shapes, strict=True)
            ],
            dim=1,
        )

    def _split(self, rows: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self.vector.shapes]
        named = zip(self.vector.names, self.vector.shapes, rows.split(sizes, dim=1), strict=True)
        return {name: part.reshape(-1, *shape) for name, shape, part in named}


@dataclass(frozen=True)
class FlatSketch(Sketch):
    """Rows (k, p), float32: the principal directions of a small network's sketch."""

    rows: Tensor

    def gram(self) -> Tensor:
        return (self.rows @ self.rows.T).double()

    def times(self, rows: Tensor) -> Tensor:
        return rows.float() @ self.rows.T

    def combine(self, weights: Tensor) -> Tensor:
        return weights.float() @ self.rows


def sketch_rows(
    graph: Graph, vector: ParameterVector, inputs: Tensor, directions: Tensor
) -> Sketch:
    """Rows ``directions[i] @ J(inputs[i])``, J being the Jacobian of the outputs by the weights.

    One backward pass gives all of them: the gradient at every layer's output, by sample.
    """
    values: dict[str, Tensor] = {graph.nodes[0].name: inputs.reshape(-1, *graph.input_shape)}
    layers = [n for n in graph.nodes if any(r.name in vector.names for r in n.params.values())]
    with torch.enable_grad():
        for node in graph.nodes[1:]:
            value = lookup(node.op).value(node, [values[i] for i in node.inputs], graph.parameters)
            needs = node in layers and not value.requires_grad
            values[node.name] = value.requires_grad_() if needs else value
        response = (values[graph.nodes[-1].name].flatten(1) * directions).sum()
        grads = torch.autograd.grad(response, [values[n.name] for n in layers])
    found: dict[str, _Block] = {}
    for node, gradient in zip(layers, grads, strict=True):
        for block in _layer_blocks(graph, node, values[node.inputs[0]].detach(), gradient, vector):
            earlier = found.get(block.name)
            found[block.name] = block if earlier is None else _merge(earlier, block)
    return _BlockSketch(vector, tuple(found.values()))


def _layer_blocks(
    graph: Graph, node: Node, x: Tensor, gradient: Tensor, vector: ParameterVector
) -> list[_Block]:
    blocks: list[_Block] = []
    for role, ref in node.params.items():
        if ref.name not in vector.names:
            continue
        shape = graph.parameters[ref.name].shape
        if node.op == "linear" and role == "weight" and x.dim() == 2:
            blocks.append(_OuterBlock(ref.name, ref, gradient, x, shape))
            continue
        if role == "weight":
            rows = _weight_rows(graph, node, x, gradient)
        else:
            along = {"linear": gradient.dim() - 1}.get(node.op, 1)
            axes = [a for a in range(1, gradient.dim()) if a != along]
            rows = gradient.sum(dim=axes) if axes else gradient
            if node.op == "scale":
                rows = _scale_rows(graph, ref, x if role == "scale" else None, gradient)
        blocks.append(_DenseBlock(ref.name, torch.stack([_unread(ref, r, shape) for r in rows])))
    return blocks


def _weight_rows(graph: Graph, node: Node, x: Tensor, gradient: Tensor) -> Tensor:
    """Per-sample gradients (k, *weight shape) of a layer's weight."""
    if node.op == "linear":
        return torch.einsum("k...o,k...i->koi", gradient, x)
    groups = int(node.attrs["groups"])  # type: ignore[arg-type]
    weight = node.params["weight"].read(graph.parameters)
    kernel, stride, dilation = (
        tuple(weight.shape[2:]),
        window(node, "stride"),
        window(node, "dilation"),
    )
    x = pad_values(x, window(node, "padding"))
    if len(kernel) == 1:
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(x, kernel, dilation=dilation, stride=stride)
    columns = columns.reshape(len(x), groups, -1, columns.shape[-1])
    by_group = gradient.reshape(len(x), groups, weight.shape[0] // groups, -1)
    return torch.einsum("kgop,kgip->kgoi", by_group, columns).reshape(len(x), *weight.shape)


def _scale_rows(graph: Graph, ref: ParameterRef, x: Tensor | None, gradient: Tensor) -> Tensor:
    """Per-sample gradients of a broadcast factor or shift."""
    made = gradient if x is None else gradient * x
    shape = ref.read(graph.parameters).shape
    return torch.stack([row.sum_to_size(shape) for row in made])


def _merge(a: _Block, b: _Block) -> _Block:
    """Rows of a parameter that two nodes read."""
    count = len(a.outer if isinstance(a, _OuterBlock) else a.rows)  # type: ignore[attr-defined]
    unit = torch.eye(count)
    return _DenseBlock(a.name, a.combine(unit) + b.combine(unit))


def row_scalars(graph: Graph, vector: ParameterVector) -> tuple[int, int]:
    """Scalars per row that are stored without factoring, and those of the factors."""
    factored = {
        node.params["weight"].name: node.size + graph.node(node.inputs[0]).size
        for node in graph.nodes
        if node.op == "linear" and len(node.shape) == 1 and "weight" in node.params
    }
    sizes = dict(zip(vector.names, vector.shapes, strict=True))
    dense = sum(shape.numel() for name, shape in sizes.items() if name not in factored)
    return dense, sum(size for name, size in factored.items() if name in sizes)


def _read(ref: ParameterRef, value: Tensor) -> Tensor:
    return ref.read({ref.name: value})


def _unread(ref: ParameterRef, value: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of ``ref.read``: back to the stored layout."""
    stored = torch.empty(shape).permute(ref.permute).shape if ref.permute else tuple(shape)
    back = value.reshape(stored)
    if ref.permute is not None:
        inverse = [0] * len(ref.permute)
        for position, axis in enumerate(ref.permute):
            inverse[axis] = position
        back = back.permute(inverse)
    return back
