"""Clean-up of a freshly imported node list: drop dead nodes, fuse biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from torch_prepared.core.graph import Node, ParameterRef

__all__ = ["fuse_biases", "live_nodes"]

_LAYERS = ("linear", "conv")


def live_nodes(nodes: Sequence[Node], output: str) -> list[Node]:
    """The input and every node that ``output`` depends on, in order, ``output`` last."""
    wanted = {output}
    for node in reversed(nodes):
        if node.name in wanted:
            wanted.update(node.inputs)
    return [node for node in nodes if node.name in wanted or node.op == "input"]


def fuse_biases(
    nodes: Iterable[Node], parameters: Mapping[str, Tensor]
) -> tuple[list[Node], set[str]]:
    """Turn "layer without bias, then a constant added per output" into one layer with a bias.

    Exact: only where the layer's output has no other reader. Returns the nodes and the names of
    all parameters that some layer reads as its weight or bias.
    """
    kept = list(nodes)
    readers = Counter(name for node in kept for name in node.inputs)
    by_name = {node.name: node for node in kept}
    dropped: set[str] = set()
    for position, node in enumerate(kept):
        layer = by_name[node.inputs[0]] if node.op == "scale" else None
        if layer is None or readers[layer.name] != 1 or set(node.params) != {"shift"}:
            continue
        bias = _as_bias(layer, node, parameters)
        if bias is not None:
            fused = replace(layer, name=node.name, params={**layer.params, "bias": bias})
            kept[position] = by_name[node.name] = fused
            dropped.add(layer.name)
    kept = [node for node in kept if node.name not in dropped]
    editable = {
        node.params[role].name
        for node in kept
        if node.op in _LAYERS
        for role in ("weight", "bias")
        if role in node.params
    }
    return kept, editable


def _as_bias(layer: Node, node: Node, parameters: Mapping[str, Tensor]) -> ParameterRef | None:
    """How ``layer`` would read the shift of ``node`` as its bias (m,), if it can."""
    if layer.op not in _LAYERS or "bias" in layer.params or layer.shape != node.shape:
        return None
    ref = node.params["shift"]
    shape = ref.read(parameters).shape
    axis = 0 if layer.op == "conv" else len(layer.shape) - 1
    outputs = layer.shape[axis]
    expected = tuple(outputs if a == axis else 1 for a in range(len(layer.shape)))
    padded = (1,) * (len(expected) - len(shape)) + tuple(shape)
    if padded != expected:
        return None
    return ref if tuple(shape) == (outputs,) else replace(ref, reshape=(outputs,))
