"""ATen operators, as ``torch.export`` writes them, in terms of the closed operator set."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from torch_prepared.core import _gates as gates
from torch_prepared.core import _layers as layers
from torch_prepared.core._aten_call import (
    RESHAPES,
    SAME,
    BatchSize,
    Call,
    arguments_by_name,
    compute_number,
    depends_on_input,
    fold,
)
from torch_prepared.core._builder import Constant, GraphBuilder, Value
from torch_prepared.core._layers import Window
from torch_prepared.core.graph import Attribute

__all__ = ["OPERATORS", "translate"]


Handler = Callable[[Call], "Value | list[Value]"]


def _linear(call: Call) -> Value:
    weight = call.constant("weight")
    y = layers.matmul(call.builder, call.value("input"), weight.permuted((1, 0)))
    bias = call["bias"]
    return y if bias is None else layers.affine(call.builder, y, None, call.constant("bias"))


def _matmul(call: Call) -> Value:
    other = "other" if "other" in call.arguments else "mat2" if call.op in ("mm", "bmm") else "vec"
    return layers.matmul(call.builder, call.operand("self"), call.operand(other))


def _addmm(call: Call) -> Value:
    builder = call.builder
    y = layers.matmul(builder, call.operand("mat1"), call.operand("mat2"))
    if call["alpha"] != 1:
        y = layers.affine(builder, y, builder.scalar(float(call["alpha"])), None)
    return _sum(builder, y, call.operand("self"), float(call["beta"]))


def _sum(builder: GraphBuilder, x: Value, y: Value | Constant, factor: float) -> Value:
    """``x + factor * y``."""
    if isinstance(y, Value):
        if factor in (1.0, -1.0):
            return layers.add_values(builder, x, y, (1, int(factor)))
        scaled = layers.affine(builder, y, builder.scalar(factor), None)
        return layers.add_values(builder, x, scaled, (1, 1))
    if factor != 1.0:
        y = Constant(y.value * builder.scalar(factor).value.to(y.value.device), None, y.sources)
    return layers.affine(builder, x, None, y)


def _add_or_sub(call: Call) -> Value:
    builder, a, b = call.builder, call.operand("self"), call.operand("other")
    factor = float(call["alpha"]) * (1.0 if call.op == "add" else -1.0)
    if call.op == "rsub":
        a, b = b, a
    if isinstance(a, Value):
        return _sum(builder, a, b, factor)
    if not isinstance(b, Value):
        builder.malformed("expected an operand that depends on the input")
    if factor != 1.0:
        return layers.affine(builder, b, builder.scalar(factor), a)
    return layers.affine(builder, b, None, a)


def _mul_or_div(call: Call) -> Value:
    builder, a, b = call.builder, call.operand("self"), call.operand("other")
    if isinstance(a, Value) and isinstance(b, Value):
        if call.op != "mul":
            builder.refuse("divides two values that depend on the input")
        return gates.multiply(builder, a, b)
    if call.op == "mul":
        x, c = (a, b) if isinstance(a, Value) else (b, a)
    else:
        if not isinstance(b, Constant) or call.arguments.get("rounding_mode"):
            builder.refuse("divides by a value that depends on the input, or rounds")
        x, c = a, Constant(b.value.reciprocal(), None, b.sources)
    if not isinstance(x, Value) or not isinstance(c, Constant):
        builder.malformed("expected one operand that depends on the input")
    return layers.affine(builder, x, c, None)


def _erf(call: Call) -> Value:
    return gates.error_function(call.builder, call.value())


def _pow(call: Call) -> Value:
    exponent = call["exponent"]
    if not isinstance(exponent, (int, float)):
        call.builder.refuse("raises to a power that is not a number")
    return gates.power(call.builder, call.value(), float(exponent))


def _neg(call: Call) -> Value:
    return layers.affine(call.builder, call.value(), call.builder.scalar(-1.0), None)


def _conv(call: Call) -> Value:
    builder, weight = call.builder, call.constant("weight")
    if call.arguments.get("transposed"):
        builder.refuse("transposed convolution has no support")
    dims = len(weight.shape) - 2
    dilation = call.spread("dilation", dims)
    padding = call["padding"]
    if isinstance(padding, str):
        kernel = zip(weight.shape[2:], dilation, strict=True)
        total = [(k - 1) * d if padding == "same" else 0 for k, d in kernel]
        begins = tuple(t // 2 for t in total)
        pads = (*begins, *(t - b for t, b in zip(total, begins, strict=True)))
    else:
        pads = call.spread("padding", dims) * 2
    window = Window(weight.shape[2:], call.spread("stride", dims), pads, dilation)
    bias = None if call["bias"] is None else call.constant("bias")
    return layers.conv(builder, call.value("input"), weight, bias, window, int(call["groups"]))


def _pool(call: Call) -> Value:
    builder, x = call.builder, call.builder.batched(call.value())
    dims = 1 if call.op.endswith("1d") else 2
    kernel = call.spread("kernel_size", dims)
    stride = call.spread("stride", dims) if call["stride"] else kernel
    dilation = call.spread("dilation", dims) if "dilation" in call.arguments else (1,) * dims
    window = Window(kernel, stride, call.spread("padding", dims) * 2, dilation)
    if len(x.shape) != dims + 2:
        builder.malformed(f"got an input of shape {x.shape}; expected {dims + 2} axes")
    if call["ceil_mode"]:
        window.check_ceil(builder, x.shape[2:])
    if call.op.startswith("max"):
        return layers.pool(builder, x, window, None)
    if call.arguments.get("divisor_override") is not None:
        builder.refuse("overrides the divisor of the average")
    return layers.pool(builder, x, window, bool(call["count_include_pad"]))


def _adaptive_average_pool(call: Call) -> Value:
    builder, x = call.builder, call.builder.batched(call.value())
    dims = 1 if call.op.endswith("1d") else 2
    lengths, wanted = x.shape[2:], call.spread("output_size", dims)
    if len(lengths) != dims or any(n % m for n, m in zip(lengths, wanted, strict=True)):
        builder.refuse(f"got lengths {lengths} and output size {wanted}, which must divide them")
    if set(wanted) == {1}:
        return layers.reduce_mean(builder, x, range(2, 2 + dims), keepdims=True)
    kernel = tuple(n // m for n, m in zip(lengths, wanted, strict=True))
    window = Window(kernel, kernel, (0,) * (2 * dims), (1,) * dims)
    return layers.pool(builder, x, window, count_include_pad=False)


def _batch_norm(call: Call) -> list[Value]:
    names = {"weight": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    statistics = {r: call.constant(n) for r, n in names.items() if call.arguments[n] is not None}
    if "mean" not in statistics or "var" not in statistics or call.arguments.get("training"):
        call.builder.refuse("normalizes by the statistics of the batch; track running statistics")
    y = layers.batch_norm(call.builder, call.value("input"), statistics, float(call["eps"]))
    return [y]


def _movement(call: Call) -> Value | list[Value]:
    x = call.value()
    others = {k: v for k, v in call.arguments.items() if k != "self"}
    if depends_on_input(list(others.values())):
        call.builder.refuse("picks positions that depend on the input")

    def plain(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [plain(item) for item in argument]
        if not isinstance(argument, Constant):
            return argument
        call.builder.freeze(argument)
        return argument.value.cpu()

    arguments = {name: plain(value) for name, value in others.items()}

    def apply(index: np.ndarray) -> list[np.ndarray]:
        result = call.target(torch.from_numpy(np.ascontiguousarray(index)), **arguments)
        parts = [result] if isinstance(result, Tensor) else list(result)
        return [part.contiguous().numpy() for part in parts]

    moved = call.builder.move(x, apply, shapes_only=False)
    several = str(call.target._schema.returns[0].type).startswith("List")
    return moved if several else moved[0]


def _join(call: Call) -> Value:
    parts = list(call["tensors"])
    if not all(isinstance(part, Value) for part in parts):
        call.builder.refuse("joins a constant with values")
    axis, rank = int(call["dim"]), len(parts[0].shape)
    if call.op == "cat":
        return layers.concat(call.builder, parts, axis)
    axis = axis + rank + 1 if axis < 0 else axis
    raised = []
    for x in parts:
        batch = x.batch + (axis <= x.batch)
        raised.append(call.builder.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]), batch))
    return layers.concat(call.builder, raised, axis)


def _reduce(call: Call) -> Value:
    x = call.value()
    if call.arguments.get("dtype") not in (None, call.builder.dtype):
        call.builder.refuse(f"converts to {call['dtype']}")
    axes = call.arguments.get("dim") or list(range(len(x.shape)))
    keepdims = bool(call.arguments.get("keepdim", False))
    reduce = layers.reduce_mean if call.op == "mean" else layers.reduce_sum
    return reduce(call.builder, x, axes, keepdims)


def _same(call: Call) -> Value:
    x = call.value("input" if "input" in call.arguments else "self")
    if call.op == "dropout" and call["train"] and float(call["p"]) > 0.0:
        call.builder.refuse("drops values at random (training mode)")
    if call.arguments.get("dtype") not in (None, call.builder.dtype):
        call.builder.refuse(f"converts from {call.builder.dtype} to {call['dtype']}")
    return x


def _softplus(call: Call) -> Value:
    """Softplus; PyTorch returns x itself beyond a threshold, which must be below rounding."""
    if float(call["beta"]) != 1.0:
        call.builder.refuse(f"got beta = {call['beta']}; expected 1")
    threshold, dtype = float(call["threshold"]), call.builder.dtype
    if math.exp(-threshold) > torch.finfo(dtype).eps * max(threshold, 0.0) / 2:
        call.builder.refuse(
            f"turns linear beyond threshold {threshold}, which differs from softplus by more than "
            f"a rounding error of {dtype}; set threshold=40"
        )
    return layers.elementwise(call.builder, call.value(), "softplus")


def _activation(call: Call) -> Value:
    attrs: dict[str, Attribute] = {}
    if call.op == "leaky_relu":
        attrs["alpha"] = float(call["negative_slope"])
    if call.op == "elu":
        attrs["alpha"] = float(call["alpha"])
        if call["scale"] != 1 or call["input_scale"] != 1:
            call.builder.refuse("scales its argument or result; expected plain ELU")
    if call.op == "gelu":
        attrs["approximate"] = str(call["approximate"])
    return layers.elementwise(call.builder, call.value(), call.op, attrs)


_MOVEMENTS = RESHAPES | {
    *("chunk", "expand", "expand_as", "flip", "index", "index_select", "narrow", "permute"),
    *("repeat", "select", "slice", "split", "split_with_sizes", "t", "transpose"),
}
OPERATORS: Mapping[str, Handler] = {
    **dict.fromkeys(sorted(_MOVEMENTS), _movement),
    **dict.fromkeys(sorted(SAME), _same),
    **dict.fromkeys(("relu", "leaky_relu", "tanh", "sigmoid", "elu", "gelu", "silu"), _activation),
    **dict.fromkeys(("matmul", "mm", "mv"), _matmul),
    **dict.fromkeys(("conv1d", "conv2d", "convolution"), _conv),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d"), _pool),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), _adaptive_average_pool),
    **dict.fromkeys(("add", "sub", "rsub"), _add_or_sub),
    **dict.fromkeys(("mul", "div"), _mul_or_div),
    **dict.fromkeys(("cat", "stack"), _join),
    **dict.fromkeys(("mean", "sum"), _reduce),
    "linear": _linear,
    "addmm": _addmm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "erf": _erf,
    "neg": _neg,
    "pow": _pow,
    "softplus": _softplus,
}
"""How each supported ATen operator is translated when it depends on the network's input."""


def translate(builder: GraphBuilder, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    """What ``node`` computes: a value, constant, number or list of these.

    The batch size counts as two here, since it is symbolic in the program and two shows where
    it goes; everything that is left of it afterwards is an axis position.
    """
    target = node.target
    args: Any = fx.map_arg(node.args, lambda n: known[n])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: known[n])
    if target is operator.getitem:
        return args[0][args[1]]
    if not isinstance(target, OpOverload):
        return compute_number(builder, target, args, kwargs)
    op = target._schema.name.removeprefix("aten::")
    if op.startswith("_assert") or op == "sym_constrain_range_for_size":
        return None
    call = Call(builder, op, target, arguments_by_name(target, args, kwargs))
    if op == "sym_size":
        x = call.value()
        axis = int(call["dim"]) % len(x.shape)
        return BatchSize(2) if axis == x.batch else x.shape[axis]
    if not depends_on_input(list(call.arguments.values())):
        return fold(call, args, kwargs)
    if op not in OPERATORS:
        builder.refuse("this operator has no support")
    return OPERATORS[op](call)
