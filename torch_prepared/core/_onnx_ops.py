"""ONNX operators in terms of the closed operator set: one small function each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from torch_prepared.core import _gates as gates
from torch_prepared.core import _layers as layers
from torch_prepared.core._builder import Constant, GraphBuilder, Value
from torch_prepared.core._layers import Window
from torch_prepared.core._onnx_fold import MOVEMENTS, evaluate
from torch_prepared.core.graph import Attribute

__all__ = ["OPERATORS", "Call"]

Operand = Value | Constant | None


@dataclass(frozen=True)
class Call:
    """One ONNX node being imported: its operands (None where omitted) and attributes."""

    builder: GraphBuilder
    op: str
    opset: int
    operands: tuple[Operand, ...]
    attributes: Mapping[str, object]
    outputs: int

    def value(self, position: int = 0) -> Value:
        """Operand ``position``, which must depend on the input."""
        operand = self._given(position)
        if not isinstance(operand, Value):
            self.builder.refuse(f"operand {position} is constant; expected one from the input")
        return operand

    def constant(self, position: int) -> Constant:
        """Operand ``position``, which must not depend on the input."""
        operand = self._given(position)
        if not isinstance(operand, Constant):
            self.builder.refuse(f"operand {position} depends on the input; expected a constant")
        return operand

    def either(self, position: int) -> Value | Constant:
        """Operand ``position``, which must be present."""
        operand = self._given(position)
        if operand is None:
            self.builder.malformed(f"operand {position} is missing")
        return operand

    def has(self, position: int) -> bool:
        """Whether operand ``position`` is present."""
        return self._given(position) is not None

    def integer(self, name: str, default: int) -> int:
        """Integer attribute ``name``."""
        return int(self.number(name, default))

    def number(self, name: str, default: float) -> float:
        """Numeric attribute ``name``."""
        value = self.attributes.get(name, default)
        if not isinstance(value, (int, float)):
            self.builder.malformed(f"attribute {name!r} is not a number")
        return value

    def integers(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        """Attribute ``name``, a list of integers."""
        values = self.attributes.get(name, default)
        if not isinstance(values, (list, tuple)):
            self.builder.malformed(f"attribute {name!r} is not a list")
        return tuple(int(value) for value in values)

    def axes(self, position: int) -> tuple[int, ...] | None:
        """Axes from the attribute (older opsets) or operand ``position`` (newer), or None."""
        if self.has(position):
            return tuple(int(a) for a in self.constant(position).value.reshape(-1).tolist())
        return self.integers("axes", ()) if "axes" in self.attributes else None

    def _given(self, position: int) -> Operand:
        return self.operands[position] if position < len(self.operands) else None


Handler = Callable[[Call], Sequence[Value]]


def _gemm(call: Call) -> list[Value]:
    builder = call.builder
    a, b = call.either(0), call.either(1)
    a = layers.swap_last_axes(builder, a) if call.integer("transA", 0) else a
    b = layers.swap_last_axes(builder, b) if call.integer("transB", 0) else b
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    y = layers.matmul(builder, a, b)
    scale = None if alpha == 1.0 else builder.scalar(alpha)
    if not call.has(2) or beta == 0.0:
        return [layers.affine(builder, y, scale, None)]
    shift = call.constant(2)
    if beta != 1.0:
        shift = Constant(shift.value * builder.scalar(beta).value, None, shift.sources)
    return [layers.affine(builder, y, scale, shift)]


def _matmul(call: Call) -> list[Value]:
    return [layers.matmul(call.builder, call.either(0), call.either(1))]


def _add(call: Call) -> list[Value]:
    a, b = call.either(0), call.either(1)
    if isinstance(a, Value) and isinstance(b, Value):
        return [layers.add_values(call.builder, a, b, (1, 1))]
    x, c = (a, call.constant(1)) if isinstance(a, Value) else (call.value(1), call.constant(0))
    return [layers.affine(call.builder, x, None, c)]


def _sub(call: Call) -> list[Value]:
    builder, a, b = call.builder, call.either(0), call.either(1)
    if isinstance(a, Value) and isinstance(b, Value):
        return [layers.add_values(builder, a, b, (1, -1))]
    if isinstance(a, Value):
        subtracted = call.constant(1)
        shift = Constant(-subtracted.value, None, subtracted.sources)
        return [layers.affine(builder, a, None, shift)]
    return [layers.affine(builder, call.value(1), builder.scalar(-1.0), call.constant(0))]


def _mul(call: Call) -> list[Value]:
    a, b = call.either(0), call.either(1)
    if isinstance(a, Value) and isinstance(b, Value):
        return [gates.multiply(call.builder, a, b)]
    x, c = (a, call.constant(1)) if isinstance(a, Value) else (call.value(1), call.constant(0))
    return [layers.affine(call.builder, x, c, None)]


def _erf(call: Call) -> list[Value]:
    return [gates.error_function(call.builder, call.value())]


def _pow(call: Call) -> list[Value]:
    exponent = call.constant(1).value
    if exponent.numel() != 1:
        call.builder.refuse("raises to several powers")
    return [gates.power(call.builder, call.value(), float(exponent))]


def _div(call: Call) -> list[Value]:
    if isinstance(call.either(1), Value):
        call.builder.refuse("divides by a value that depends on the input")
    divisor = call.constant(1)
    scale = Constant(divisor.value.reciprocal(), None, divisor.sources)
    return [layers.affine(call.builder, call.value(), scale, None)]


def _neg(call: Call) -> list[Value]:
    return [layers.affine(call.builder, call.value(), call.builder.scalar(-1.0), None)]


def _window(call: Call, kernel: tuple[int, ...], lengths: Sequence[int]) -> Window:
    dims = len(kernel)
    stride = call.integers("strides", (1,) * dims)
    dilation = call.integers("dilations", (1,) * dims)
    mode = call.attributes.get("auto_pad", b"NOTSET")
    if mode in (b"SAME_UPPER", b"SAME_LOWER") and len(lengths) == len(stride) == len(dilation):
        total = [
            max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
            for n, s, k, d in zip(lengths, stride, kernel, dilation, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        padding = (*small, *large) if mode == b"SAME_UPPER" else (*large, *small)
    elif mode == b"VALID":
        padding = (0,) * (2 * dims)
    elif mode in (b"NOTSET", b""):
        padding = call.integers("pads", (0,) * (2 * dims))
    else:
        call.builder.refuse(f"got auto_pad {mode!r} for an input of size {tuple(lengths)}")
    return Window(kernel, stride, padding, dilation)


def _conv(call: Call) -> list[Value]:
    builder, weight = call.builder, call.constant(1)
    x = builder.batched(call.value())
    if len(weight.shape) != len(x.shape):
        builder.malformed(f"got input {x.shape} and weight {weight.shape}")
    window = _window(call, weight.shape[2:], x.shape[2:])
    bias = call.constant(2) if call.has(2) else None
    return [layers.conv(builder, x, weight, bias, window, call.integer("group", 1))]


def _pool(call: Call) -> list[Value]:
    builder, x = call.builder, call.builder.batched(call.value())
    window = _window(call, call.integers("kernel_shape", ()), x.shape[2:])
    if call.integer("ceil_mode", 0):
        window.check_ceil(builder, x.shape[2:])
    if call.op == "MaxPool":
        if call.outputs > 1:
            builder.refuse("also returns the indices of the maxima")
        return [layers.pool(builder, x, window, None)]
    return [layers.pool(builder, x, window, bool(call.integer("count_include_pad", 0)))]


def _global_average_pool(call: Call) -> list[Value]:
    x = call.builder.batched(call.value())
    return [layers.reduce_mean(call.builder, x, range(2, len(x.shape)), keepdims=True)]


def _batch_normalization(call: Call) -> list[Value]:
    if call.integer("training_mode", 0) or call.outputs > 1:
        call.builder.refuse("normalizes in training mode")
    if not call.integer("spatial", 1):
        call.builder.refuse("normalizes every position on its own (spatial = 0)")
    roles = ("weight", "bias", "mean", "var")
    statistics = {role: call.constant(i + 1) for i, role in enumerate(roles)}
    eps = call.number("epsilon", 1e-5)
    return [layers.batch_norm(call.builder, call.value(), statistics, eps)]


def _movement(call: Call) -> list[Value]:
    others = [None if o is None else call.constant(i + 1) for i, o in enumerate(call.operands[1:])]

    for other in filter(None, others):
        call.builder.freeze(other)

    def apply(index: np.ndarray) -> list[np.ndarray]:
        arrays = [None if other is None else other.value.numpy() for other in others]
        operands = [index, *arrays]
        return evaluate(call.builder, call.op, call.opset, operands, call.attributes, call.outputs)

    shapes_only = call.op in ("Reshape", "Expand")
    return call.builder.move(call.value(), apply, shapes_only)


def _concat(call: Call) -> list[Value]:
    parts = [call.value(i) for i in range(len(call.operands))]
    return [layers.concat(call.builder, parts, call.integer("axis", 1))]


def _reduce(call: Call) -> list[Value]:
    x, axes = call.value(), call.axes(1)
    keepdims = bool(call.integer("keepdims", 1))
    if not axes and call.integer("noop_with_empty_axes", 0):
        return [x]
    reduce = layers.reduce_mean if call.op == "ReduceMean" else layers.reduce_sum
    return [reduce(call.builder, x, axes or range(len(x.shape)), keepdims)]


def _identity(call: Call) -> list[Value]:
    if call.op == "Dropout":
        training = call.has(2) and bool(call.constant(2).value.any())
        if training or call.outputs > 1:
            call.builder.refuse("drops values at random (training mode) or returns its mask")
    return [call.value()]


def _cast(call: Call) -> list[Value]:
    target = call.integer("to", 0)
    if target != {"torch.float32": 1, "torch.float64": 11}[str(call.builder.dtype)]:
        call.builder.refuse(f"casts {call.builder.dtype} values to ONNX data type {target}")
    return [call.value()]


_ACTIVATIONS: dict[str, tuple[str, dict[str, float]]] = {
    "Relu": ("relu", {}),
    "LeakyRelu": ("leaky_relu", {"alpha": 0.01}),
    "Tanh": ("tanh", {}),
    "Sigmoid": ("sigmoid", {}),
    "Elu": ("elu", {"alpha": 1.0}),
    "Softplus": ("softplus", {}),
}


def _activation(call: Call) -> list[Value]:
    op, defaults = _ACTIVATIONS[call.op]
    attrs: dict[str, Attribute] = {k: float(call.number(k, v)) for k, v in defaults.items()}
    return [layers.elementwise(call.builder, call.value(), op, attrs)]


def _gelu(call: Call) -> list[Value]:
    form = call.attributes.get("approximate", b"none")
    if form not in (b"none", b"tanh"):
        call.builder.refuse(f"got approximate = {form!r}; expected 'none' or 'tanh'")
    attrs: dict[str, Attribute] = {"approximate": "tanh" if form == b"tanh" else "none"}
    return [layers.elementwise(call.builder, call.value(), "gelu", attrs)]


OPERATORS: Mapping[str, Handler] = {
    **dict.fromkeys(_ACTIVATIONS, _activation),
    **dict.fromkeys(MOVEMENTS, _movement),
    "Erf": _erf,
    "Pow": _pow,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _add,
    "Sub": _sub,
    "Mul": _mul,
    "Div": _div,
    "Neg": _neg,
    "Conv": _conv,
    "AveragePool": _pool,
    "MaxPool": _pool,
    "GlobalAveragePool": _global_average_pool,
    "BatchNormalization": _batch_normalization,
    "Concat": _concat,
    "ReduceSum": _reduce,
    "ReduceMean": _reduce,
    "Dropout": _identity,
    "Identity": _identity,
    "Cast": _cast,
}
"""How each supported operator is imported when it depends on the network's input."""
