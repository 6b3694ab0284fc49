"""What both importers emit: each function appends one operator's nodes to a builder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, overload

import numpy as np

from torch_prepared.core._builder import Constant, GraphBuilder, Value
from torch_prepared.core.graph import Attribute

__all__ = [
    "Window",
    "add_values",
    "affine",
    "batch_norm",
    "concat",
    "conv",
    "elementwise",
    "matmul",
    "pool",
    "reduce_mean",
    "reduce_sum",
    "swap_last_axes",
]


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution or pool over d axes; ``padding`` = d begins, then d ends."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def output(self, builder: GraphBuilder, lengths: Sequence[int]) -> tuple[int, ...]:
        """Output lengths for input ``lengths``, rounding down."""
        dims = len(lengths)
        sizes = (len(self.kernel), len(self.stride), len(self.dilation), len(self.padding) // 2)
        if dims not in (1, 2) or any(size != dims for size in sizes):
            builder.refuse(f"got {dims} spatial axes and window {self}; 1 or 2 axes have support")
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            builder.refuse(f"got window {self}; sizes must be positive, padding not negative")
        spans = self.spans()
        result = tuple(
            (lengths[i] + self.padding[i] + self.padding[dims + i] - spans[i]) // self.stride[i] + 1
            for i in range(dims)
        )
        if min(result) < 1:
            builder.malformed(f"window {self} does not fit an input of size {tuple(lengths)}")
        return result

    def spans(self) -> tuple[int, ...]:
        """Extent of the dilated kernel along each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))

    def check_ceil(self, builder: GraphBuilder, lengths: Sequence[int]) -> None:
        """Refuse rounding up of output lengths where it would add partial windows."""
        self.output(builder, lengths)
        for i, (length, span) in enumerate(zip(lengths, self.spans(), strict=True)):
            room = length + self.padding[i] + self.padding[len(lengths) + i] - span
            if room % self.stride[i]:
                builder.refuse("rounds its output size up (ceil_mode), which adds partial windows")


@overload
def swap_last_axes(builder: GraphBuilder, x: Value) -> Value: ...


@overload
def swap_last_axes(builder: GraphBuilder, x: Constant) -> Constant: ...


def swap_last_axes(builder: GraphBuilder, x: Value | Constant) -> Value | Constant:
    """``x`` with its last two axes exchanged."""
    rank = len(x.shape)
    if rank < 2:
        builder.malformed(f"got an operand of shape {x.shape}; expected at least two axes")
    order = (*range(rank - 2), rank - 1, rank - 2)
    if isinstance(x, Constant):
        return x.permuted(order)
    return builder.move(x, lambda index: [index.transpose(order)], shapes_only=False)[0]


def matmul(builder: GraphBuilder, a: Value | Constant, b: Value | Constant) -> Value:
    """``a @ b`` with NumPy's rules, one operand being constant."""
    if isinstance(a, Value) and isinstance(b, Value):
        builder.refuse("multiplies two values that depend on the input")
    if isinstance(b, Constant) and isinstance(a, Value):
        one = len(b.shape) == 1
        weight = b.reshaped((1, *b.shape)) if one else _matrix(builder, b, swap=True)
        return _linear(builder, a, weight, b.shape)
    if not isinstance(a, Constant) or not isinstance(b, Value):
        builder.malformed("multiplies two constants where a value was expected")
    if len(b.shape) == 1:
        row = a.reshaped((1, *a.shape)) if len(a.shape) == 1 else a
        return _linear(builder, b, _matrix(builder, row, swap=False), a.shape)
    if len(a.shape) == 1:
        row = a.reshaped((1, *a.shape))
        y = _left(builder, row, b)
        return _drop_axis(builder, y, len(y.shape) - 2)
    return _left(builder, a, b)


def _left(builder: GraphBuilder, a: Constant, b: Value) -> Value:
    weight = _matrix(builder, a, swap=False)
    y = _linear(builder, swap_last_axes(builder, b), weight, weight.shape)
    return _lead(builder, swap_last_axes(builder, y), len(a.shape))


def _matrix(builder: GraphBuilder, w: Constant, swap: bool) -> Constant:
    """``w`` (1, ..., 1, n, m) as a matrix, transposed if ``swap``."""
    if any(size != 1 for size in w.shape[:-2]):
        builder.refuse(f"multiplies by a stack of matrices of shape {w.shape}")
    turned = swap_last_axes(builder, w) if swap else w
    return turned if len(turned.shape) == 2 else turned.reshaped(turned.shape[-2:])


def _linear(builder: GraphBuilder, x: Value, weight: Constant, operand: tuple[int, ...]) -> Value:
    """``x @ weight.T``, weight (m, n); ``operand`` is the matrix's shape as it was given."""
    if not x.shape or x.shape[-1] != weight.shape[1]:
        builder.malformed(f"got operands of shapes {x.shape} and {operand}, which do not fit")
    if x.batch == len(x.shape) - 1:
        x = builder.explicit(x)
    y = builder.emit(
        "linear",
        (x,),
        (*x.shape[:-1], weight.shape[0]),
        x.batch,
        {"weight": builder.parameter(weight, "weight")},
    )
    if len(operand) == 1:
        return _drop_axis(builder, y, len(y.shape) - 1)
    return _lead(builder, y, len(operand) - (len(x.shape) == 1))


def _drop_axis(builder: GraphBuilder, x: Value, axis: int) -> Value:
    if x.batch == axis:
        x = builder.explicit(x)
    shape = tuple(size for a, size in enumerate(x.shape) if a != axis)
    batch = x.batch if x.batch is None or x.batch < axis else x.batch - 1
    return builder.reshape(x, shape, batch)


def _lead(builder: GraphBuilder, x: Value, rank: int) -> Value:
    """``x`` with axes of size one put in front until it has ``rank`` axes."""
    extra = max(0, rank - len(x.shape))
    batch = None if x.batch is None else x.batch + extra
    return builder.reshape(x, (1,) * extra + x.shape, batch)


def affine(
    builder: GraphBuilder, x: Value, scale: Constant | None, shift: Constant | None
) -> Value:
    """``x * scale + shift`` with broadcasting in both directions."""
    constants = {"scale": scale, "shift": shift}
    shape = builder.common_shape(x.shape, *(c.shape for c in constants.values() if c is not None))
    x = builder.expand(x, shape)
    params = {
        role: builder.parameter(_against(x, constant), role)
        for role, constant in constants.items()
        if constant is not None
    }
    return builder.emit("scale", (x,), x.shape, x.batch, params) if params else x


def _against(x: Value, constant: Constant) -> Constant:
    """``constant`` reshaped to broadcast against ``x.inner`` (its batch axis has size one)."""
    padded = (1,) * (len(x.shape) - len(constant.shape)) + constant.shape
    inner = tuple(size for axis, size in enumerate(padded) if axis != x.batch)
    return constant.reshaped(inner)


def add_values(builder: GraphBuilder, x: Value, y: Value, signs: tuple[int, int]) -> Value:
    """``signs[0] * x + signs[1] * y`` with broadcasting."""
    shape = builder.common_shape(x.shape, y.shape)
    x, y = builder.expand(x, shape), builder.expand(y, shape)
    if x.batch != y.batch:
        x, y = builder.explicit(x), builder.explicit(y)
    return builder.emit("add", (x, y), x.shape, x.batch, attrs={"signs": signs})


def concat(builder: GraphBuilder, parts: Sequence[Value], axis: int) -> Value:
    """``parts`` joined along the full axis ``axis``."""
    rank = len(parts[0].shape)
    axis = axis + rank if axis < 0 else axis
    if not 0 <= axis < rank or any(len(part.shape) != rank for part in parts):
        builder.malformed(f"cannot join shapes {[p.shape for p in parts]} along axis {axis}")
    if len({part.batch for part in parts}) > 1 or parts[0].batch == axis:
        parts = [builder.explicit(part) for part in parts]
    rest = {part.shape[:axis] + part.shape[axis + 1 :] for part in parts}
    if len(rest) > 1:
        builder.malformed(f"cannot join shapes {[p.shape for p in parts]} along axis {axis}")
    joined = sum(part.shape[axis] for part in parts)
    shape = (*parts[0].shape[:axis], joined, *parts[0].shape[axis + 1 :])
    inner = parts[0].inner_axis(axis)
    return builder.emit("concat", parts, shape, parts[0].batch, attrs={"axis": inner})


def reduce_sum(
    builder: GraphBuilder, x: Value, axes: Sequence[int], keepdims: bool, scale: float = 1.0
) -> Value:
    """``scale * x.sum(axes)`` over full axes."""
    rank = len(x.shape)
    wanted = sorted({axis + rank if axis < 0 else axis for axis in axes})
    if any(not 0 <= axis < rank for axis in wanted):
        builder.malformed(f"got axes {tuple(axes)} for a value of shape {x.shape}")
    if x.batch in wanted:
        x = builder.explicit(x)
    if not wanted:
        return affine(builder, x, builder.scalar(scale) if scale != 1.0 else None, None)
    left = [axis for axis in range(rank) if axis not in wanted]
    batch = None if x.batch is None else left.index(x.batch)
    inner = tuple(x.inner_axis(axis) for axis in wanted)
    shape = tuple(x.shape[axis] for axis in left)
    y = builder.emit("reduce_sum", (x,), shape, batch, attrs={"axes": inner, "scale": scale})
    if not keepdims:
        return y
    kept = tuple(1 if axis in wanted else size for axis, size in enumerate(x.shape))
    return builder.reshape(y, kept, x.batch)


def reduce_mean(builder: GraphBuilder, x: Value, axes: Sequence[int], keepdims: bool) -> Value:
    """Mean over full axes, written as a scaled sum."""
    count = int(np.prod([x.shape[axis] for axis in {a % len(x.shape) for a in axes}]))
    return reduce_sum(builder, x, axes, keepdims, 1.0 / count)


def conv(
    builder: GraphBuilder,
    x: Value,
    weight: Constant,
    bias: Constant | None,
    window: Window,
    groups: int,
) -> Value:
    """Cross-correlation over one or two axes; x (1, i, length...)."""
    x = builder.batched(x)
    if len(weight.shape) != len(x.shape) or len(x.shape) < 3:
        builder.refuse(f"got input {x.shape} and weight {weight.shape}; 1 or 2 axes have support")
    lengths = window.output(builder, x.shape[2:])
    outputs, inputs = weight.shape[:2]
    if groups < 1 or inputs * groups != x.shape[1] or outputs % groups:
        builder.malformed(f"got input {x.shape}, weight {weight.shape} and {groups} groups")
    if bias is not None and bias.shape != (outputs,):
        builder.malformed(f"got a bias of shape {bias.shape}; expected ({outputs},)")
    params = {"weight": builder.parameter(weight, "weight")}
    if bias is not None:
        params["bias"] = builder.parameter(bias, "bias")
    attrs: dict[str, Attribute] = {
        "stride": window.stride,
        "padding": window.padding,
        "dilation": window.dilation,
        "groups": groups,
    }
    return builder.emit("conv", (x,), (1, outputs, *lengths), 0, params, attrs)


def pool(builder: GraphBuilder, x: Value, window: Window, count_include_pad: bool | None) -> Value:
    """Average pool (``count_include_pad`` given) or max pool (None) of x (1, i, length...)."""
    x = builder.batched(x)
    lengths = window.output(builder, x.shape[2:])
    dims = len(lengths)
    for pad, kernel in zip(window.padding, window.kernel * 2, strict=True):
        if pad >= kernel:
            builder.refuse(f"got padding {window.padding} not smaller than kernel {window.kernel}")
    attrs: dict[str, Attribute] = {
        "kernel": window.kernel,
        "stride": window.stride,
        "padding": window.padding,
    }
    if count_include_pad is None:
        attrs["dilation"] = window.dilation
    elif window.dilation != (1,) * dims:
        builder.refuse(f"got an average pool with dilation {window.dilation}")
    else:
        attrs["count_include_pad"] = count_include_pad
    op = "max_pool" if count_include_pad is None else "avg_pool"
    return builder.emit(op, (x,), (*x.shape[:2], *lengths), 0, attrs=attrs)


def batch_norm(
    builder: GraphBuilder, x: Value, statistics: dict[str, Constant], eps: float
) -> Value:
    """Evaluation-mode normalization along axis 1 of x (1, c, ...)."""
    x = builder.batched(x)
    if len(x.shape) < 2 or any(c.shape != (x.shape[1],) for c in statistics.values()):
        shapes = {role: c.shape for role, c in statistics.items()}
        builder.malformed(f"got input {x.shape} and statistics of shapes {shapes}")
    if not eps >= 0 or not bool((statistics["var"].value + eps > 0).all()):
        builder.malformed("got a variance that is not positive; expected var + eps > 0")
    params = {role: builder.parameter(c, role) for role, c in statistics.items()}
    return builder.emit("batch_norm", (x,), x.shape, 0, params, {"eps": eps})


def elementwise(
    builder: GraphBuilder, x: Value, op: str, attrs: dict[str, Attribute] | None = None
) -> Value:
    """An activation; ``alpha`` is rounded to the network's dtype, as it computes with it."""
    given = dict(attrs or {})
    if "alpha" in given:
        alpha = float(builder.scalar(float(cast("float", given["alpha"]))).value)
        if not 0.0 <= alpha <= 1.0:
            builder.refuse(f"got alpha = {alpha}; expected a number from 0 to 1")
        given["alpha"] = alpha
    return builder.emit(op, (x,), x.shape, x.batch, attrs=given)
