"""How values of a graph lie in the slots of a row program: pixels outside, channels inside.

A program (:func:`torch_prepared.ops.row_program`) wants all channels of a pixel side by side, while
a graph flattens channels first. Whatever is connected with a convolution through elementwise
nodes, sums and reshapes is an image of one shape; everything else is a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.core.graph import Graph, Node
from torch_prepared.relax import ElementwiseOperator, lookup
from torch_prepared.relax.conv import window

__all__ = ["Layout", "is_elementwise"]

Shape = tuple[int, int, int]  # height, width, channels
WINDOWED = ("conv", "avg_pool")
SCALING = ("scale", "batch_norm")


def is_elementwise(node: Node) -> bool:
    """Whether each scalar of the output depends on the same scalar of each input."""
    known = ("reshape", "add", *SCALING)
    return node.op in known or isinstance(lookup(node.op), ElementwiseOperator)


@dataclass(frozen=True)
class Layout:
    """Slot shape (height, width, channels) of every value."""

    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, graph: Graph) -> Layout | None:
        """The layout, or None for operators that row programs do not know."""
        root = {node.name: node.name for node in graph.nodes}

        def find(name: str) -> str:
            while root[name] != name:
                name = root[name]
            return name

        images: dict[str, set[Shape]] = {}
        for node in graph.nodes[1:]:
            if is_elementwise(node):
                for name in node.inputs:
                    root[find(name)] = find(node.name)
            elif node.op not in WINDOWED and node.op != "linear":
                return None
            elif node.op == "linear" and node.size != node.shape[-1]:
                return None
            elif node.op == "avg_pool" and not _divides_alike(node):
                return None
        for node in graph.nodes[1:]:
            if node.op in WINDOWED:
                for name in (node.name, *node.inputs):
                    images.setdefault(find(name), set()).add(_image(graph.node(name)))
        if any(len(found) > 1 for found in images.values()):
            return None
        shapes = {}
        for node in graph.nodes:
            found = images.get(find(node.name))
            shapes[node.name] = next(iter(found)) if found else (1, 1, node.size)
        return cls(shapes)

    def order(self, name: str) -> Tensor | None:
        """Flat position of every slot entry; None when both orders are equal."""
        height, width, channels = self.shapes[name]
        if channels == 1 or height * width == 1:
            return None
        flat = torch.arange(height * width * channels).reshape(channels, height * width)
        return flat.T.reshape(-1)

    def enter(self, name: str, value: Tensor) -> Tensor:
        """A value (..., n) in flat order to slot order."""
        height, width, channels = self.shapes[name]
        if channels == 1 or height * width == 1:
            return value
        parts = value.reshape(*value.shape[:-1], channels, height * width)
        return parts.transpose(-1, -2).reshape(value.shape)

    def leave(self, name: str, value: Tensor) -> Tensor:
        """A value (..., n) in slot order to flat order."""
        height, width, channels = self.shapes[name]
        if channels == 1 or height * width == 1:
            return value
        parts = value.reshape(*value.shape[:-1], height * width, channels)
        return parts.transpose(-1, -2).reshape(value.shape)


def _divides_alike(node: Node) -> bool:
    """Whether an average pooling divides by the same number everywhere."""
    return bool(node.attrs["count_include_pad"]) or not any(window(node, "padding"))


def _image(node: Node) -> Shape:
    channels, *lengths = node.shape
    return (1, lengths[0], channels) if len(lengths) == 1 else (lengths[0], lengths[1], channels)
