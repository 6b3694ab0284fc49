"""One or more nodes of every registered operator, with references written in plain NumPy loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch

from torch_prepared.core.graph import Attribute, Node, ParameterRef
from torch_prepared.testing.relaxation import OperatorCase
from torch_prepared.testing.strategies import dyadic

GENERATOR = torch.Generator().manual_seed(20)


def node(op: str, shape: tuple[int, ...], roles: tuple[str, ...] = (), **attrs: Attribute) -> Node:
    params = {role: ParameterRef(role) for role in roles}
    return Node("y", op, ("x",), shape, params, attrs)


def drawn(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: dyadic(shape, GENERATOR, largest=16) for name, shape in shapes.items()}


# ---- affine layers -------------------------------------------------------------------------------


def linear(name: str, shape: tuple[int, ...], outputs: int, bias: bool = True) -> OperatorCase:
    table = drawn(weight=(outputs, shape[-1])) | (drawn(bias=(outputs,)) if bias else {})
    weight, shift = table["weight"].numpy(), table["bias"].numpy() if bias else 0.0

    def reference(x: np.ndarray) -> np.ndarray:
        return np.einsum("...n,mn->...m", x, weight) + shift

    return OperatorCase(
        name, node("linear", (*shape[:-1], outputs), tuple(table)), (shape,), table, reference
    )


def windows(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, ...], Callable[[tuple[int, ...]], list[tuple[int, ...] | None]]]:
    """Output lengths, and for an output place the input place of every tap (None in padding)."""
    d = len(kernel)
    lengths = shape[1:]
    out = tuple(
        (lengths[a] + padding[a] + padding[a + d] - dilation[a] * (kernel[a] - 1) - 1) // stride[a]
        + 1
        for a in range(d)
    )

    def taps(place: tuple[int, ...]) -> list[tuple[int, ...] | None]:
        found: list[tuple[int, ...] | None] = []
        for offset in itertools.product(*(range(k) for k in kernel)):
            at = tuple(
                place[a] * stride[a] + offset[a] * dilation[a] - padding[a] for a in range(d)
            )
            inside = all(0 <= at[a] < lengths[a] for a in range(d))
            found.append(at if inside else None)
        return found

    return out, taps


def conv(
    name: str,
    shape: tuple[int, ...],
    outputs: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int = 1,
    bias: bool = True,
) -> OperatorCase:
    per = shape[0] // groups
    table = drawn(weight=(outputs, per, *kernel)) | (drawn(bias=(outputs,)) if bias else {})
    weight = table["weight"].numpy().reshape(outputs, per, -1)
    out, taps = windows(shape, kernel, stride, padding, dilation)

    def reference(x: np.ndarray) -> np.ndarray:
        y = np.zeros((len(x), outputs, *out))
        for o in range(outputs):
            group = o // (outputs // groups)
            for place in np.ndindex(*out):
                for k, at in enumerate(taps(place)):
                    for i in range(per):
                        if at is not None:
                            y[(slice(None), o, *place)] += (
                                weight[o, i, k] * x[(slice(None), group * per + i, *at)]
                            )
            y[:, o] += float(table["bias"][o]) if bias else 0.0
        return y

    attrs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return OperatorCase(
        name, node("conv", (outputs, *out), tuple(table), **attrs), (shape,), table, reference
    )


def pool(
    op: str,
    name: str,
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...] | None = None,
    include: bool = True,
    exact: bool = True,
) -> OperatorCase:
    spread = dilation or (1,) * len(kernel)
    out, taps = windows(shape, kernel, stride, padding, spread)

    def reference(x: np.ndarray) -> np.ndarray:
        y = np.zeros((len(x), shape[0], *out))
        for c in range(shape[0]):
            for place in np.ndindex(*out):
                found = [x[(slice(None), c, *at)] for at in taps(place) if at is not None]
                count = len(taps(place)) if include else len(found)
                total = np.max(found, axis=0) if op == "max_pool" else np.sum(found, axis=0) / count
                y[(slice(None), c, *place)] = total
        return y

    attrs: dict[str, Attribute] = {"kernel": kernel, "stride": stride, "padding": padding}
    attrs |= {"dilation": spread} if op == "max_pool" else {"count_include_pad": include}
    return OperatorCase(name, node(op, (shape[0], *out), **attrs), (shape,), {}, reference, exact)


def batch_norm(name: str, shape: tuple[int, ...], affine: bool) -> OperatorCase:
    c = shape[0]
    table = drawn(mean=(c,)) | (drawn(weight=(c,), bias=(c,)) if affine else {})
    table["var"] = torch.linspace(0.1, 2.0, c, dtype=torch.float64)
    along = (-1,) + (1,) * (len(shape) - 1)
    t = {key: value.numpy().reshape(along) for key, value in table.items()}

    def reference(x: np.ndarray) -> np.ndarray:
        y = (x - t["mean"]) / np.sqrt(t["var"] + 1e-3)
        return y * t["weight"] + t["bias"] if affine else y

    case = node("batch_norm", shape, tuple(table), eps=1e-3)
    return OperatorCase(name, case, (shape,), table, reference, exact=False)


def scale(
    name: str, shape: tuple[int, ...], factor: tuple[int, ...] | None, shift: tuple[int, ...] | None
) -> OperatorCase:
    table = drawn(scale=factor) if factor is not None else {}
    table |= drawn(shift=shift) if shift is not None else {}

    def reference(x: np.ndarray) -> np.ndarray:
        y = x if factor is None else x * table["scale"].numpy()
        return y if shift is None else y + table["shift"].numpy()

    return OperatorCase(name, node("scale", shape, tuple(table)), (shape,), table, reference)


AFFINE = [
    linear("vector", (5,), 4),
    linear("no-bias", (3,), 6, bias=False),
    linear("last-axis", (2, 3, 4), 3),
    conv("1d", (2, 7), 3, (3,), (2,), (1, 2), (1,)),
    conv("1d-dilated", (2, 9), 2, (3,), (1,), (0, 0), (3,), bias=False),
    conv("2d", (2, 5, 6), 3, (3, 2), (2, 1), (1, 0, 1, 1), (1, 1)),
    conv("2d-unread-rim", (1, 6, 7), 2, (2, 2), (3, 4), (0, 0, 0, 0), (1, 1)),
    conv("2d-dilated", (1, 7, 6), 2, (2, 3), (2, 1), (2, 0, 1, 0), (3, 2)),
    conv("2d-grouped", (4, 4, 4), 6, (2, 2), (1, 2), (0, 1, 0, 1), (1, 1), groups=2),
    conv("2d-depthwise", (3, 4, 4), 3, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), groups=3),
    pool("avg_pool", "1d", (2, 8), (2,), (2,), (0, 0)),
    pool("avg_pool", "2d", (2, 5, 6), (2, 2), (1, 2), (0, 0, 0, 0)),
    pool("avg_pool", "2d-pad", (1, 5, 4), (2, 4), (2, 2), (1, 1, 1, 1)),
    pool(
        "avg_pool", "2d-pad-excluded", (2, 5, 4), (3, 3), (2, 2), (1, 1, 1, 1), None, False, False
    ),
    batch_norm("flat", (4,), affine=True),
    batch_norm("image", (3, 2, 2), affine=True),
    batch_norm("plain", (3, 4), affine=False),
    scale("both", (2, 3), (2, 3), (3,)),
    scale("factor", (4,), (1,), None),
    scale("shift", (2, 2, 2), None, (2, 1, 1)),
    OperatorCase(
        "signed",
        node("add", (2, 3), signs=(1, -1, -1)),
        ((2, 3),) * 3,
        {},
        lambda a, b, c: a - b - c,
    ),
    OperatorCase(
        "all",
        node("reduce_sum", (1,), axes=(0, 1), scale=0.25),
        ((4, 2),),
        {},
        lambda x: 0.25 * x.sum((1, 2)).reshape(-1, 1),
    ),
    OperatorCase(
        "negative",
        node("reduce_sum", (2, 3), axes=(1,), scale=-2.0),
        ((2, 4, 3),),
        {},
        lambda x: -2.0 * x.sum(2),
    ),
    OperatorCase("flatten", node("reshape", (12,)), ((3, 2, 2),), {}, lambda x: x.reshape(-1, 12)),
    OperatorCase(
        "transpose",
        node("gather", (3, 2), index=np.arange(6).reshape(2, 3).T.copy()),
        ((2, 3),),
        {},
        lambda x: x.transpose(0, 2, 1),
    ),
    OperatorCase(
        "repeats",
        node("gather", (5,), index=np.array([0, 3, 3, 1, 0])),
        ((2, 2),),
        {},
        lambda x: x.reshape(-1, 4)[:, [0, 3, 3, 1, 0]],
    ),
    OperatorCase(
        "middle-axis",
        node("concat", (2, 6), axis=1),
        ((2, 3), (2, 1), (2, 2)),
        {},
        lambda a, b, c: np.concatenate([a, b, c], axis=2),
    ),
]

POOLS = [
    pool("max_pool", "1d", (2, 8), (3,), (2,), (1, 1), (1,)),
    pool("max_pool", "2d", (2, 4, 6), (2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
    pool("max_pool", "2d-overlapping", (1, 5, 5), (3, 2), (1, 2), (1, 0, 1, 1), (1, 2)),
]

# ---- activations ---------------------------------------------------------------------------------


def elementwise(
    op: str, name: str, function: Callable[[float], float], exact: bool = True, **attrs: Attribute
) -> OperatorCase:
    def reference(x: np.ndarray) -> np.ndarray:
        return np.vectorize(function, otypes=[np.float64])(x)

    return OperatorCase(name, node(op, (2, 3), **attrs), ((2, 3),), {}, reference, exact)


def elu(alpha: float) -> Callable[[float], float]:
    return lambda x: x if x > 0 else alpha * math.expm1(x)


def gelu(x: float) -> float:
    return x * math.erfc(-x / math.sqrt(2)) / 2


def gelu_tanh(x: float) -> float:
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = [
    elementwise("relu", "plain", lambda x: max(x, 0.0)),
    elementwise("leaky_relu", "quarter", lambda x: x if x > 0 else x / 4, alpha=0.25),
    elementwise("leaky_relu", "zero", lambda x: max(x, 0.0), alpha=0.0),
    elementwise("leaky_relu", "one", lambda x: x, alpha=1.0),
    elementwise("tanh", "plain", math.tanh, False),
    elementwise("sigmoid", "plain", lambda x: 1 / (1 + math.exp(-x)), False),
    elementwise("softplus", "plain", lambda x: math.log1p(math.exp(x)), False),
    elementwise("elu", "one", elu(1.0), False, alpha=1.0),
    elementwise("elu", "half", elu(0.5), False, alpha=0.5),
    elementwise("gelu", "erf", gelu, False, approximate="none"),
    elementwise("gelu", "tanh", gelu_tanh, False, approximate="tanh"),
    elementwise("silu", "plain", lambda x: x / (1 + math.exp(-x)), False),
]
