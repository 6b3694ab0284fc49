"""From a :class:`NetworkRecord` to operators with interval rules and relaxations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from torch_prepared.certify.facts import ACTIVATIONS, activation_facts
from torch_prepared.certify.linear_maps import Conv, Dense, Diagonal, LinearMap, Sparse
from torch_prepared.certify.nodes import NodeRecord, read_nodes
from torch_prepared.certify.operators import Activation, Affine, MaxPool, Operator
from torch_prepared.certify.records import NetworkRecord
from torch_prepared.certify.rounding import FloatArray, IntArray
from torch_prepared.errors import CertificateError, UnsupportedOperationError

__all__ = ["CheckedNetwork", "pool_windows", "read_network"]


@dataclass(frozen=True)
class CheckedNetwork:
    """Operators in topological order; ``input_name`` and ``output_name`` are their ends."""

    input_name: str
    output_name: str
    input_size: int
    output_size: int
    operators: tuple[Operator, ...]
    stored_dtypes: frozenset[str]


def read_network(network: NetworkRecord) -> CheckedNetwork:
    """Operators of the whole network.

    Raises:
        CertificateError: malformed structure or weights.
        UnsupportedOperationError: an operator without facts here.
    """
    nodes = read_nodes(network)
    operators: list[Operator] = []
    for node in nodes[1:]:
        builder = _BUILDERS.get(node.op, _activation if node.op in ACTIVATIONS else None)
        if builder is None:
            known = ", ".join(sorted({*_BUILDERS, *ACTIVATIONS}))
            raise UnsupportedOperationError(
                f"{node.name}: got operator {node.op!r}; the checker knows {known}"
            )
        if len(node.inputs) != 1 and node.op not in ("add", "concat"):
            raise node.error(f"{len(node.inputs)} inputs", "one input")
        try:
            operators.append(builder(node))
        except (ValueError, IndexError) as error:
            if isinstance(error, CertificateError):
                raise
            raise node.error(f"parameters that do not fit ({error})", "matching shapes") from error
    return CheckedNetwork(
        input_name=nodes[0].name,
        output_name=nodes[-1].name,
        input_size=nodes[0].size,
        output_size=nodes[-1].size,
        operators=tuple(operators),
        stored_dtypes=frozenset(p.dtype.name for n in nodes for p in n.params.values()),
    )


def _affine(
    node: NodeRecord,
    maps: Sequence[LinearMap],
    terms: int,
    bias: FloatArray | None = None,
    offset_size: FloatArray | None = None,
) -> Affine:
    if bias is not None:
        bias = np.ascontiguousarray(bias).reshape(-1)
        if bias.size != node.size:
            raise node.error(f"a bias of {bias.size} entries", f"{node.size}")
        offset_size = np.abs(bias) if offset_size is None else offset_size
    return Affine(
        node.name,
        node.inputs,
        maps,
        bias=bias,
        offset_size=offset_size,
        terms=terms,
        size=node.size,
    )


def _same_shape(node: NodeRecord) -> None:
    if any(shape != node.shape for shape in node.input_shapes):
        raise node.error(f"shapes {node.input_shapes} -> {node.shape}", "equal shapes")


def _linear(node: NodeRecord) -> Affine:
    weight, bias = node.required("weight"), node.param("bias")
    shape = node.input_shapes[0]
    if weight.ndim != 2 or shape[-1] != weight.shape[1]:
        raise node.error(f"weight {weight.shape} on input {shape}", "matching sizes")
    if node.shape != (*shape[:-1], weight.shape[0]):
        raise node.error(f"output {node.shape}", f"{(*shape[:-1], weight.shape[0])}")
    if bias is not None:
        bias = np.broadcast_to(bias, node.shape)
    return _affine(node, [Dense(weight, math.prod(shape[:-1]))], weight.shape[1] + 1, bias)


def _grid(node: NodeRecord, *keys: str) -> tuple[tuple[int, ...], ...]:
    """The input's shape and the given spatial attributes, lifted from 1-d to 2-d."""
    shape = node.input_shapes[0]
    d = len(shape) - 1
    if d not in (1, 2) or len(node.shape) != d + 1:
        raise UnsupportedOperationError(f"{node.name}: got shape {shape}; expected 1-d or 2-d data")
    neutral = {"stride": 1, "dilation": 1, "kernel": 1, "padding": 0}
    lifted: list[tuple[int, ...]] = [shape if d == 2 else (shape[0], 1, shape[1])]
    for key in keys:
        values = node.ints(key, 2 * d if key == "padding" else d)
        if d == 1:
            ends = values[1:] if key == "padding" else ()
            values = (neutral[key], values[0], *((neutral[key], *ends) if ends else ()))
        if key != "padding" and min(values) < 1:
            raise node.error(f"{key}={values}", "positive integers")
        lifted.append(values)
    return tuple(lifted)


def _out_grid(
    node: NodeRecord,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, int]:
    """Spatial output size, which must be the one recorded."""
    out = [
        (shape[a + 1] + padding[a] + padding[a + 2] - dilation[a] * (kernel[a] - 1) - 1)
        // stride[a]
        + 1
        for a in (0, 1)
    ]
    recorded = node.shape[1:] if len(node.shape) == 3 else (1, *node.shape[1:])
    if tuple(out) != recorded:
        raise node.error(f"spatial size {recorded}", f"{tuple(out)}")
    return out[0], out[1]


def _conv(node: NodeRecord) -> Affine:
    weight, bias = node.required("weight"), node.param("bias")
    shape, stride, padding, dilation = _grid(node, "stride", "padding", "dilation")
    if weight.ndim != len(node.shape) + 1:
        raise node.error(f"weight {weight.shape}", f"{len(node.shape) + 1} axes")
    if weight.ndim == 3:
        weight = weight[:, :, None, :]
    groups = node.attrs.get("groups", 1)
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise node.error(f"groups={groups!r}", "a positive integer")
    fits = weight.ndim == 4 and weight.shape[1] * groups == shape[0]
    if not fits or weight.shape[0] % groups or weight.shape[0] != node.shape[0]:
        raise node.error(f"weight {weight.shape} on input {shape}", "matching channels")
    height, width = _out_grid(node, shape, weight.shape[2:], stride, padding, dilation)
    linear = Conv(
        weight,
        (shape[0], shape[1], shape[2]),
        (weight.shape[0], height, width),
        stride=(stride[0], stride[1]),
        padding=(padding[0], padding[1], padding[2], padding[3]),
        dilation=(dilation[0], dilation[1]),
        groups=groups,
    )
    if bias is not None:
        bias = np.repeat(bias, height * width)
    return _affine(node, [linear], linear.forward_terms + 1, bias)


def _batch_norm(node: NodeRecord) -> Affine:
    """``alpha x + beta`` with alpha = weight / sqrt(var + eps), off by at most 4 u each."""
    _same_shape(node)
    mean, var = node.required("mean"), node.required("var")
    weight, bias, eps = node.param("weight"), node.param("bias"), node.number("eps")
    if not np.all(var + eps > 0):
        raise node.error("var + eps <= 0", "positive variances")
    alpha = (np.ones_like(mean) if weight is None else weight) / np.sqrt(var + eps)
    shift = mean * alpha
    zero = np.zeros_like(mean) if bias is None else bias
    repeats = node.size // node.shape[0]
    return _affine(
        node,
        [Diagonal(np.repeat(alpha, repeats), node.size)],
        8,
        np.repeat(zero - shift, repeats),
        np.repeat(np.abs(zero) + np.abs(shift), repeats),
    )


def _scale(node: NodeRecord) -> Affine:
    _same_shape(node)
    scale, shift = node.param("scale"), node.param("shift")
    factor = np.ones(1) if scale is None else np.broadcast_to(scale, node.shape).reshape(-1)
    bias = None if shift is None else np.broadcast_to(shift, node.shape)
    return _affine(node, [Diagonal(factor, node.size)], 2, bias)


def _add(node: NodeRecord) -> Affine:
    _same_shape(node)
    signs = node.attrs.get("signs")
    if not isinstance(signs, Sequence) or len(signs) != len(node.inputs):
        raise node.error(f"signs={signs!r}", "one sign per input")
    if any(isinstance(s, bool) or s not in (1, -1) for s in signs):
        raise node.error(f"signs={signs!r}", "signs 1 or -1")
    maps = [Diagonal(np.array(float(s)), node.size) for s in signs]
    return _affine(node, maps, len(maps))


def _selection(index: IntArray, in_size: int, values: FloatArray | None = None) -> Sparse:
    """``y_j = values_j * x[index_j]``."""
    rows = np.arange(index.size)
    entries = np.ones(index.size) if values is None else values
    return Sparse(rows, index.reshape(-1), entries, (index.size, in_size))


def _reduce_sum(node: NodeRecord) -> Affine:
    shape, factor = node.input_shapes[0], node.number("scale")
    axes = node.attrs.get("axes")
    if not isinstance(axes, Sequence) or any(not isinstance(a, int) for a in axes):
        raise node.error(f"axes={axes!r}", "integers")
    if any(not -len(shape) <= a < len(shape) for a in axes):
        raise node.error(f"axes={axes!r}", f"axes of {shape}")
    drop = {a % len(shape) for a in axes}
    keep = tuple(a for a in range(len(shape)) if a not in drop)
    if tuple(shape[a] for a in keep) != node.shape:
        raise node.error(f"output {node.shape}", f"{tuple(shape[a] for a in keep)}")
    columns = np.arange(math.prod(shape)).reshape(shape)
    columns = columns.transpose(*keep, *sorted(drop)).reshape(node.size, -1)
    rows = np.repeat(np.arange(node.size), columns.shape[1])
    linear = Sparse(
        rows, columns.reshape(-1), np.full(rows.size, factor), (node.size, columns.size)
    )
    return _affine(node, [linear], columns.shape[1] + 1)


def pool_windows(
    shape: tuple[int, ...],
    out: tuple[int, int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> IntArray:
    """Flat input positions (channels * out, taps) met by each window; -1 is padding."""
    oy, ox, ky, kx = np.ogrid[: out[0], : out[1], : kernel[0], : kernel[1]]
    y = oy * stride[0] + ky * dilation[0] - padding[0]
    x = ox * stride[1] + kx * dilation[1] - padding[1]
    inside = (y >= 0) & (y < shape[1]) & (x >= 0) & (x < shape[2])
    plane = (y * shape[2] + x).reshape(1, out[0] * out[1], -1)
    channel = np.arange(shape[0])[:, None, None] * (shape[1] * shape[2])
    flat = np.where(inside.reshape(plane.shape), plane + channel, -1)
    return flat.reshape(-1, kernel[0] * kernel[1]).astype(np.int64)


def _avg_pool(node: NodeRecord) -> Affine:
    shape, kernel, stride, padding = _grid(node, "kernel", "stride", "padding")
    ones = (1, 1)
    out = _out_grid(node, shape, kernel, stride, padding, ones)
    windows = pool_windows(shape, out, kernel, stride, padding, ones)
    inside = windows >= 0
    counts = inside.sum(axis=1)
    if node.attrs.get("count_include_pad") is not False:
        counts = np.full(len(windows), windows.shape[1])
    if node.shape[0] != shape[0] or not counts.all():
        raise node.error(f"{shape} -> {node.shape}", "equal channels, non-empty windows")
    rows, taps = np.nonzero(inside)
    linear = Sparse(rows, windows[rows, taps], 1.0 / counts[rows], (len(windows), math.prod(shape)))
    return _affine(node, [linear], windows.shape[1] + 1)


def _max_pool(node: NodeRecord) -> MaxPool:
    shape, kernel, stride, padding, dilation = _grid(
        node, "kernel", "stride", "padding", "dilation"
    )
    out = _out_grid(node, shape, kernel, stride, padding, dilation)
    windows = pool_windows(shape, out, kernel, stride, padding, dilation)
    if node.shape[0] != shape[0] or not (windows >= 0).any(axis=1).all():
        raise node.error(f"{shape} -> {node.shape}", "equal channels, non-empty windows")
    return MaxPool(node.name, node.inputs[0], windows, math.prod(shape))


def _reshape(node: NodeRecord) -> Affine:
    if math.prod(node.input_shapes[0]) != node.size:
        raise node.error(f"{node.input_shapes[0]} -> {node.shape}", "equal sizes")
    return _affine(node, [Diagonal(np.array(1.0), node.size)], 0)


def _gather(node: NodeRecord) -> Affine:
    in_size = math.prod(node.input_shapes[0])
    try:
        index = np.asarray(node.attrs.get("index"), dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise node.error("an index that is no array of integers", "int64 positions") from error
    if index.shape != node.shape or index.min() < 0 or index.max() >= in_size:
        raise node.error(f"index of shape {index.shape}", f"{node.shape} within {in_size}")
    return _affine(node, [_selection(index, in_size)], 0)


def _concat(node: NodeRecord) -> Affine:
    axis = node.attrs.get("axis")
    dims = len(node.shape)
    if isinstance(axis, bool) or not isinstance(axis, int) or not -dims <= axis < dims:
        raise node.error(f"axis={axis!r}", f"an axis of {node.shape}")
    positions = np.arange(node.size).reshape(node.shape)
    maps: list[LinearMap] = []
    start = 0
    for shape in node.input_shapes:
        if len(shape) != dims:
            raise node.error(f"{node.input_shapes}", f"{dims} axes each")
        part = np.take(
            positions, range(start, min(start + shape[axis], node.shape[axis])), axis=axis
        )
        if part.shape != shape:
            raise node.error(f"{node.input_shapes} -> {node.shape}", "matching shapes")
        rows = part.reshape(-1)
        maps.append(Sparse(rows, np.arange(rows.size), np.ones(rows.size), (node.size, rows.size)))
        start += shape[axis]
    if start != node.shape[axis]:
        raise node.error(f"{node.input_shapes} -> {node.shape}", "matching shapes")
    return _affine(node, maps, 0)


def _activation(node: NodeRecord) -> Activation:
    _same_shape(node)
    facts = activation_facts(node.op, node.attrs, node.name)
    return Activation(node.name, node.inputs[0], node.op, facts, node.size)


_BUILDERS: dict[str, Callable[[NodeRecord], Operator]] = {
    "linear": _linear,
    "conv": _conv,
    "batch_norm": _batch_norm,
    "scale": _scale,
    "add": _add,
    "reduce_sum": _reduce_sum,
    "avg_pool": _avg_pool,
    "max_pool": _max_pool,
    "reshape": _reshape,
    "gather": _gather,
    "concat": _concat,
}
