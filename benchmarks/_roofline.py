"""What backward passes must compute and move, against what the machine can.

Counted are operations that no exact CROWN pass over a region can leave out: for every scalar whose
interval crosses a kink two rows, each through the pixels that it reaches and the neurons that are
not constantly zero. Bytes are those that have to be read or written once: weights, lines of all
activations, boxes, results. What an implementation does beyond both is its own waste.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from torch_prepared.bounds.crown import needed_scalars, tightened_names
from torch_prepared.core.graph import Graph, Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import lookup
from torch_prepared.relax.conv import window

__all__ = ["machine_rates", "pass_work"]

Boxes = Mapping[str, Interval]
Spans = tuple[NDArray[np.int64], NDArray[np.int64]]  # begin and end on one axis, per start pixel
LINES = 4  # slope and offset below and above


def machine_rates(size: int = 1024, numbers: int = 1 << 24) -> dict[str, float]:
    """The machine's matrix product in FLOP/s and copy in bytes/s, float32, best of several."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    source = torch.randn(numbers)
    target = torch.empty_like(source)
    size_bytes = source.numel() * source.element_size()
    return {
        "matmul_flops": 2 * size**3 / _best(lambda: a @ b),
        "copy_bytes": 2 * size_bytes / _best(lambda: target.copy_(source)),
    }


def _best(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(7):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def pass_work(graph: Graph, boxes: Boxes, rows: int) -> dict[str, float]:
    """``needed_flops`` and ``needed_bytes`` of CROWN for all values and ``rows`` output rows.

    Args:
        graph: convolutions, linear layers, elementwise nodes.
        boxes: intervals of all values over b boxes, as CROWN ends with. Scalars that interval
            arithmetic on these leaves unstable are those that have to be bounded.
        rows: of the output, each bounded from below.
    """
    regions = len(boxes[graph.nodes[0].name].lower)
    alive = {node.name: _alive(graph, node, boxes) for node in graph.nodes}
    item = boxes[graph.nodes[0].name].lower.element_size()
    flops = moved = 0.0
    targets = [(graph.node(name), 2.0) for name in tightened_names(graph)]
    for node, signs in [*targets, (graph.nodes[-1], 0.0)]:
        counts = _starts(graph, node, boxes) if signs else np.full((1, 1), float(rows * regions))
        if not counts.sum():
            continue
        ancestors = _ancestors(graph, node)
        each = max(signs, 1.0)
        flops += each * _flops(graph, ancestors, counts, alive, dense=not signs)
        moved += item * (_moved(graph, ancestors, regions, alive) + each * float(counts.sum()))
    return {"needed_flops": flops, "needed_bytes": moved}


def _ancestors(graph: Graph, target: Node) -> list[Node]:
    wanted, found = {target.name}, []
    for node in reversed(graph.nodes):
        if node.name in wanted:
            found.append(node)
            wanted.update(node.inputs)
    return found


def _image(node: Node) -> tuple[int, int, int]:
    """Height, width, channels; a vector is one pixel."""
    if len(node.shape) == 3:
        return node.shape[1], node.shape[2], node.shape[0]
    return 1, 1, node.size


def _alive(graph: Graph, node: Node, boxes: Boxes) -> float:
    """The share of a value's scalars on which coefficients are not lost in a zero line."""
    if node.op != "relu":
        return 1.0
    return float((boxes[node.inputs[0]].upper > 0).double().mean())


def _starts(graph: Graph, node: Node, boxes: Boxes) -> NDArray[np.float64]:
    """How many scalars of each pixel are bounded, over all regions: (height, width)."""
    box = lookup(node.op).interval(node, [boxes[name] for name in node.inputs], graph.parameters)
    readers = tuple(n for n in graph.nodes[1:]
                    if node.name in n.inputs and not lookup(n.op).traits.affine)  # fmt: skip
    height, width, channels = _image(node)
    needed = needed_scalars(box, readers).sum(dim=0).double()
    return np.asarray(needed.reshape(channels, height, width).sum(dim=0))


def _flops(
    graph: Graph,
    ancestors: list[Node],
    counts: NDArray[np.float64],
    alive: Mapping[str, float],
    dense: bool,
) -> float:
    """Operations of one row from each start, a scalar or ``dense`` all of them, times counts."""
    spans = {ancestors[0].name: tuple(_own(n) for n in counts.shape)}
    after = {ancestors[0].name: 1.0}  # share of the rows' coefficients that are not zero
    total, start = 0.0, None if dense else ancestors[0]
    for node in ancestors[:-1]:
        mine = spans[node.name]
        area = np.outer(*(end - begin for begin, end in mine))
        parents = [graph.node(name) for name in node.inputs]
        work = 0.0
        if node.op == "linear":
            into = alive[parents[0].name]
            rows = 1.0 if node is start else node.size * after[node.name]
            work = 2.0 * rows * parents[0].size * into
            area = np.ones_like(area)
        elif node.op == "conv":
            weight = node.params["weight"].read(graph.parameters)
            rows = 1.0 if node is start else weight.shape[0] * after[node.name]
            work = 2.0 * rows * float(np.prod(weight.shape[1:])) * alive[parents[0].name]
        total += float((counts * area).sum()) * work
        share = alive[node.name] if node.op == "relu" else after[node.name]
        mixes = node.op in ("linear", "conv")
        for parent in parents:
            reach = tuple(_reach(graph, node, parent, axis, mine[axis]) for axis in (0, 1))
            old = spans.get(parent.name)
            spans[parent.name] = reach if old is None else tuple(map(_union, old, reach))
            after[parent.name] = max(after.get(parent.name, 0.0), 1.0 if mixes else share)
    return total


def _own(length: int) -> Spans:
    return np.arange(length), np.arange(1, length + 1)


def _union(a: Spans, b: Spans) -> Spans:
    return np.minimum(a[0], b[0]), np.maximum(a[1], b[1])


def _reach(graph: Graph, node: Node, parent: Node, axis: int, span: Spans) -> Spans:
    """The pixels of a parent that those of a span depend on."""
    length = _image(parent)[axis]
    if node.op == "linear" or _image(parent)[:2] == (1, 1) or len(node.shape) != len(parent.shape):
        return np.zeros_like(span[0]), np.full_like(span[1], length)
    if node.op not in ("conv", "avg_pool"):
        return span
    if node.op == "conv":
        weight = node.params["weight"].read(graph.parameters)
        kernel, dilation = tuple(weight.shape[2:]), window(node, "dilation")
    else:
        kernel, dilation = window(node, "kernel"), (1, 1)
    stride, padding = window(node, "stride"), window(node, "padding")
    size = (kernel[axis] - 1) * dilation[axis] + 1
    begin = span[0] * stride[axis] - padding[axis]
    end = (span[1] - 1) * stride[axis] - padding[axis] + size
    return begin.clip(0, length), end.clip(0, length)


def _moved(graph: Graph, ancestors: list[Node], regions: int, alive: Mapping[str, float]) -> float:
    """Numbers read once: weights, and for each region the lines and the input's box."""
    total = 2.0 * regions * graph.input_size
    for node in ancestors:
        for ref in node.params.values():
            total += ref.read(graph.parameters).numel()
        if node.op != "input" and not lookup(node.op).traits.affine:
            total += LINES * regions * node.size * alive[node.name]
    return total
