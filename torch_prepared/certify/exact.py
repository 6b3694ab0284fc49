"""Exact rational evaluation of ReLU-family networks at single points.

Written with loops over Python fractions and sharing only the reading of nodes with the checker's
bounds, so that it can serve as their oracle; also decides finite sets of examples exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from torch_prepared.certify.nodes import NodeRecord, read_nodes
from torch_prepared.certify.records import NetworkRecord, PropertyRecord
from torch_prepared.errors import CertificateError, UnsupportedOperationError

__all__ = ["evaluate_exactly", "margin_exactly", "to_fractions", "values_exactly"]

Exact = npt.NDArray[np.object_]
"""Array of ``Fraction``."""


def to_fractions(values: npt.ArrayLike) -> Exact:
    """An array of fractions equal to the given finite floats (or fractions)."""
    array = np.asarray(values)
    out = np.empty(array.shape, dtype=object)
    for position in np.ndindex(array.shape):
        item: object = array[position]
        out[position] = item if isinstance(item, Fraction) else Fraction(float(array[position]))
    return out


def evaluate_exactly(network: NetworkRecord, point: npt.ArrayLike) -> Exact:
    """The flattened output (m,) at one input; arguments and errors as `values_exactly`."""
    values = values_exactly(network, point)
    return values[next(reversed(values))].reshape(-1)


def values_exactly(network: NetworkRecord, point: npt.ArrayLike) -> dict[str, Exact]:
    """Every node's value at one input, in order, in exact arithmetic on the stored weights.

    Args:
        network: whose operators are linear, convolutional, pooling, structural or piecewise
            linear; batch normalization (a square root) and smooth activations are not rational.
        point: n floats or fractions.

    Raises:
        UnsupportedOperationError: an operator whose value is not rational.
        CertificateError: the point does not fit, or the network is malformed.
    """
    nodes = read_nodes(network)
    x = to_fractions(point)
    if x.size != nodes[0].size:
        raise CertificateError(f"point: {x.size} entries; expected {nodes[0].size}")
    values: dict[str, Exact] = {nodes[0].name: x.reshape(nodes[0].shape)}
    for node in nodes[1:]:
        rule = _RULES.get(node.op)
        if rule is None:
            raise UnsupportedOperationError(
                f"{node.name}: operator {node.op!r} has no rational value; expected one of "
                f"{', '.join(sorted(_RULES))}"
            )
        value = rule(node, [values[name] for name in node.inputs])
        if value.shape != node.shape:
            raise node.error(f"shape {node.shape}", f"{value.shape}")
        values[node.name] = value
    return values


def margin_exactly(prop: PropertyRecord, output: Exact) -> Fraction:
    """Smallest over the clauses of the largest ``rows @ y + offset``; safe means positive."""
    margins = []
    for rows, offset in prop.clauses:
        scores = to_fractions(rows) @ output + to_fractions(offset)
        margins.append(max(scores.tolist()))
    smallest: Fraction = min(margins)
    return smallest


def _params(node: NodeRecord, role: str) -> Exact | None:
    value = node.param(role)
    return None if value is None else to_fractions(value)


def _linear(node: NodeRecord, inputs: Sequence[Exact]) -> Exact:
    weight, bias = to_fractions(node.required("weight")), _params(node, "bias")
    value = np.asarray(inputs[0] @ weight.T)
    return value if bias is None else np.asarray(value + bias)


def _spatial(node: NodeRecord, key: str, default: int) -> tuple[int, ...]:
    d = len(node.shape) - 1
    return node.ints(key, d) if key in node.attrs else (default,) * d


def _window(
    node: NodeRecord, x: Exact, kernel: Sequence[int], out: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(kernel tap, input position) of every tap that meets the input at output place ``out``."""
    d = len(kernel)
    stride, dilation = _spatial(node, "stride", 1), _spatial(node, "dilation", 1)
    padding = node.ints("padding", 2 * d)
    met = []
    for tap in itertools.product(*map(range, kernel)):
        place = tuple(out[a] * stride[a] + tap[a] * dilation[a] - padding[a] for a in range(d))
        if all(0 <= place[a] < x.shape[1 + a] for a in range(d)):
            met.append((tap, place))
    return met


def _conv(node: NodeRecord, inputs: Sequence[Exact]) -> Exact:
    (x,) = inputs
    weight, bias = to_fractions(node.required("weight")), _params(node, "bias")
    groups = node.attrs.get("groups", 1)
    if not isinstance(groups, int):
        raise node.error(f"groups={groups!r}", "an integer")
    per_group_in, per_group_out = x.shape[0] // groups, weight.shape[0] // groups
    value = np.empty(node.shape, dtype=object)
    for position in np.ndindex(node.shape):
        channel, out = position[0], position[1:]
        total = Fraction(0) if bias is None else bias[channel]
        first = channel // per_group_out * per_group_in
        for tap, place in _window(node, x, weight.shape[2:], out):
            for i in range(per_group_in):
                total += weight[(channel, i, *tap)] * x[(first + i, *place)]
        value[position] = total
    return value


def _pool(node: NodeRecord, inputs: Sequence[Exact]) -> Exact:
    (x,) = inputs
    kernel = node.ints("kernel", len(node.shape) - 1)
    value = np.empty(node.shape, dtype=object)
    for position in np.ndindex(node.shape):
        met = [x[(position[0], *place)] for _, place in _window(node, x, kernel, position[1:])]
        if node.op == "max_pool":
            value[position] = max(met)
        else:
            whole = node.attrs.get("count_include_pad") is not False
            value[position] = sum(met, Fraction(0)) / (math.prod(kernel) if whole else len(met))
    return value


def _scale(node: NodeRecord, inputs: Sequence[Exact]) -> Exact:
    value, scale, shift = inputs[0], _params(node, "scale"), _params(node, "shift")
    value = value if scale is None else np.asarray(value * scale)
    return value if shift is None else np.asarray(value + shift)


def _add(node: NodeRecord, inputs: Sequence[Exact]) -> Exact:
    signs = node.attrs.get("signs")
    if not isinstance(signs, Sequence):
        raise node.error(f"signs={signs!r}", "one sign per input")
    total = to_fractions(np.zeros(node.shape))
    for sign, x in zip(signs, inputs, strict=True):
        total = np.asarray(total + Fraction(int(sign)) * x)
    return total


def _reduce_sum(node: NodeRecord, inputs: Sequence[Exact]) -> Exact:
    axes = node.attrs.get("axes")
    if not isinstance(axes, Sequence):
        raise node.error(f"axes={axes!r}", "integers")
    total = np.asarray(np.sum(inputs[0], axis=tuple(axes)), dtype=object)
    return np.asarray(total * Fraction(node.number("scale")), dtype=object)


def _gather(node: NodeRecord, inputs: Sequence[Exact]) -> Exact:
    index = np.asarray(node.attrs.get("index"), dtype=np.int64)
    return np.asarray(inputs[0].reshape(-1)[index])


def _concat(node: NodeRecord, inputs: Sequence[Exact]) -> Exact:
    axis = node.attrs.get("axis")
    if not isinstance(axis, int):
        raise node.error(f"axis={axis!r}", "an integer")
    return np.concatenate(list(inputs), axis=axis)


def _elementwise(node: NodeRecord, inputs: Sequence[Exact]) -> Exact:
    zero = Fraction(0)
    if node.op == "relu":
        left = zero
    else:
        left = Fraction(-1) if node.op == "abs" else Fraction(node.number("alpha"))
    flat = [v if v > zero else left * v for v in inputs[0].reshape(-1)]
    value = np.empty(len(flat), dtype=object)
    value[:] = flat
    return value.reshape(node.shape)


_RULES: dict[str, Callable[[NodeRecord, Sequence[Exact]], Exact]] = {
    "linear": _linear,
    "conv": _conv,
    "max_pool": _pool,
    "avg_pool": _pool,
    "scale": _scale,
    "add": _add,
    "reduce_sum": _reduce_sum,
    "reshape": lambda node, inputs: inputs[0].reshape(node.shape),
    "gather": _gather,
    "concat": _concat,
    "relu": _elementwise,
    "leaky_relu": _elementwise,
    "abs": _elementwise,
}
