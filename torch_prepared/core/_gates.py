"""GELU and SiLU written out as products: recognized while a network is imported.

The graph has no product of two values. A product is one of these, or it is refused:

- ``c v sigmoid(g v)``, which is ``(c / g) silu(g v)`` for any numbers c and g;
- ``c x (1 + erf(x / sqrt 2))``, which is ``2 c gelu(x)``;
- ``c x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``, which is ``2 c`` times the other GELU.

Powers and erf exist on the way only; the builder refuses what is left of them. A constant counts
as the number above that it is a rounding of, to a few units in the last place of the network's
dtype: such files mean the function, and evaluating it rounds no less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from torch_prepared.core import _layers as layers
from torch_prepared.core._builder import GraphBuilder, Value
from torch_prepared.core.graph import Attribute, Node

__all__ = ["error_function", "multiply", "power"]

Scaled = tuple[str, float, float]


def error_function(builder: GraphBuilder, x: Value) -> Value:
    """``erf(x)``, good inside a GELU only."""
    return layers.elementwise(builder, x, "erf")


def power(builder: GraphBuilder, x: Value, exponent: float) -> Value:
    """``x ** exponent`` for 1, 2 or 3; higher than 1 good inside a GELU only."""
    if exponent == 1:
        return x
    if exponent not in (2, 3):
        builder.refuse(f"raises to the power {exponent}, which has support as a part of GELU only")
    return layers.elementwise(builder, x, "power", {"exponent": int(exponent)})


def multiply(builder: GraphBuilder, a: Value, b: Value) -> Value:
    """``a * b``, where it is one of the products above."""
    same = a.shape == b.shape and a.batch == b.batch
    if same and a.name == b.name:
        return power(builder, a, 2)
    if same:
        for x, gate in ((a, b), (b, a)):
            found = _raised(builder, x, gate) or _gated(builder, x, gate)
            if found is not None:
                return found
    builder.refuse(
        "multiplies two values that depend on the input, which has support as a part of GELU "
        "and SiLU only"
    )


def _raised(builder: GraphBuilder, x: Value, other: Value) -> Value | None:
    """``x * other`` where the other is a multiple of x or of its square."""
    for name, factor, shift in _scaled(builder, other.name):
        node = builder.producer(name)
        square = node.op == "power" and node.attrs["exponent"] == 2 and node.inputs[0] == x.name
        if shift == 0 and (name == x.name or square):
            _freeze(builder, (other.name,), x.name)
            raised = power(builder, x, 3 if square else 2)
            return layers.affine(builder, raised, builder.scalar(factor), None)
    return None


def _gated(builder: GraphBuilder, x: Value, gate: Value) -> Value | None:
    """``x * gate`` when it is a SiLU or GELU."""
    for name, factor, shift in _scaled(builder, gate.name):
        node = builder.producer(name)
        if node.op == "sigmoid" and shift == 0:
            return _silu(builder, x, gate, node.inputs[0], factor)
        if node.op in ("erf", "tanh") and shift == factor:
            return _gelu(builder, x, gate, node, factor)
    return None


def _silu(builder: GraphBuilder, x: Value, gate: Value, inner: str, factor: float) -> Value | None:
    """``factor * x * sigmoid(inner)`` where x is a multiple of what is inside."""
    within = {name: (scale, shift) for name, scale, shift in _scaled(builder, inner)}
    for name, outer, shift in _scaled(builder, x.name):
        scale, offset = within.get(name, (0.0, 0.0))
        if scale and shift == 0 and (offset == 0 or name == inner):
            _freeze(builder, (x.name, gate.name), name)
            return _emit(builder, x, inner, "silu", {}, factor * outer / scale)
    return None


def _gelu(builder: GraphBuilder, x: Value, gate: Value, node: Node, factor: float) -> Value | None:
    """``factor * x * (1 + node)`` where ``node`` is the erf or tanh of a GELU."""
    for name, outer, shift in _scaled(builder, x.name):
        linear, cubic = _odd_terms(builder, node.inputs[0], name)
        if shift != 0 or linear == 0:
            continue
        if node.op == "erf":
            fits, form = cubic == 0 and _is(builder, linear, math.sqrt(0.5)), "none"
        else:
            fits = _is(builder, linear, math.sqrt(2 / math.pi))
            fits, form = fits and _is(builder, cubic / linear, 0.044715), "tanh"
        if fits:
            _freeze(builder, (x.name, gate.name), name)
            return _emit(builder, x, name, "gelu", {"approximate": form}, 2 * factor * outer)
    return None


def _freeze(builder: GraphBuilder, names: tuple[str, ...], source: str) -> None:
    """Keep edits away from the numbers met between ``source`` and the values called ``names``."""
    pending = set(names)
    while pending:
        name = pending.pop()
        if name != source:
            node = builder.producer(name)
            builder.freeze_stored(ref.name for ref in node.params.values())
            pending.update(node.inputs)


def _odd_terms(builder: GraphBuilder, value: str, x: str) -> tuple[float, float]:
    """``(p, q)`` with ``value = p x + q x^3``; zeros when it is anything else."""
    for name, factor, shift in _scaled(builder, value):
        if shift != 0:
            continue
        if name == x:
            return factor, 0.0
        node = builder.producer(name)
        if node.op == "power" and node.attrs["exponent"] == 3 and node.inputs[0] == x:
            return 0.0, factor
        if node.op == "add" and tuple(node.attrs["signs"]) == (1, 1):  # type: ignore[arg-type]
            parts = [_odd_terms(builder, part, x) for part in node.inputs]
            if all(part != (0.0, 0.0) for part in parts):
                return factor * sum(p for p, _ in parts), factor * sum(q for _, q in parts)
    return 0.0, 0.0


def _scaled(builder: GraphBuilder, name: str) -> Iterator[Scaled]:
    """All ``(source, factor, shift)`` with ``value = factor * source + shift``, itself first."""
    factor, shift = 1.0, 0.0
    while True:
        yield name, factor, shift
        node = builder.producer(name)
        if node.op != "scale":
            return
        numbers = [builder.uniform(node, role, fallback) for role, fallback in _ROLES]
        if numbers[0] is None or numbers[1] is None:
            return
        factor, shift = factor * numbers[0], shift + factor * numbers[1]
        name = node.inputs[0]


_ROLES = (("scale", 1.0), ("shift", 0.0))


def _is(builder: GraphBuilder, number: float, expected: float) -> bool:
    """Whether ``number`` is ``expected`` up to roundings of the network's dtype."""
    return abs(number - expected) <= 4 * torch.finfo(builder.dtype).eps * expected


def _emit(
    builder: GraphBuilder,
    like: Value,
    source: str,
    op: str,
    attrs: dict[str, Attribute],
    factor: float,
) -> Value:
    """``factor * op(source)``."""
    y = layers.elementwise(builder, Value(source, like.shape, like.batch), op, attrs)
    if abs(factor - 1) <= 4 * torch.finfo(builder.dtype).eps:
        return y
    return layers.affine(builder, y, builder.scalar(factor), None)
