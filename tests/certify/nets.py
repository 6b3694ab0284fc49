"""Small random networks and properties for the certificate tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from torch_prepared.certify import InputRecord, NetworkRecord, PropertyRecord


class NetBuilder:
    """Builds a NetworkRecord node by node."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.weights: dict[str, np.ndarray] = {}
        self.nodes: list[dict[str, Any]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.last = self.add("input", [], shape)

    def weight(self, name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
        value = (self.rng.normal(size=shape) * scale).astype(np.float32)
        self.weights[name] = value
        return value

    def add(
        self,
        op: str,
        inputs: list[str],
        shape: tuple[int, ...],
        params: dict[str, str] | None = None,
        **attrs: Any,
    ) -> str:
        name = f"{op}{len(self.nodes)}"
        refs = {
            role: {"name": stored, "permute": None, "reshape": None}
            for role, stored in (params or {}).items()
        }
        self.nodes.append(
            {
                "name": name,
                "op": op,
                "inputs": list(inputs),
                "shape": list(shape),
                "params": refs,
                "attrs": attrs,
            }
        )
        self.shapes[name] = tuple(shape)
        self.last = name
        return name

    def linear(self, out: int, source: str | None = None, *, bias: bool = True) -> str:
        source = source or self.last
        shape = self.shapes[source]
        tag = f"w{len(self.nodes)}"
        self.weight(f"{tag}.weight", (out, shape[-1]), 1.0 / np.sqrt(shape[-1]))
        params = {"weight": f"{tag}.weight"}
        if bias:
            self.weight(f"{tag}.bias", (out,), 0.3)
            params["bias"] = f"{tag}.bias"
        return self.add("linear", [source], (*shape[:-1], out), params)

    def elementwise(self, op: str, source: str | None = None, **attrs: Any) -> str:
        source = source or self.last
        return self.add(op, [source], self.shapes[source], **attrs)

    def conv(
        self,
        out: int,
        kernel: tuple[int, ...],
        *,
        stride: int = 1,
        padding: tuple[int, ...] | None = None,
        dilation: int = 1,
        groups: int = 1,
        source: str | None = None,
    ) -> str:
        source = source or self.last
        shape = self.shapes[source]
        d = len(kernel)
        padding = padding or (0,) * (2 * d)
        size = window_size(shape, kernel, stride, padding, dilation)
        tag = f"w{len(self.nodes)}"
        fan = shape[0] // groups * int(np.prod(kernel))
        self.weight(f"{tag}.weight", (out, shape[0] // groups, *kernel), np.sqrt(2 / fan))
        self.weight(f"{tag}.bias", (out,), 0.3)
        return self.add(
            "conv",
            [source],
            (out, *size),
            {"weight": f"{tag}.weight", "bias": f"{tag}.bias"},
            stride=[stride] * d,
            padding=list(padding),
            dilation=[dilation] * d,
            groups=groups,
        )

    def pool(
        self,
        op: str,
        kernel: tuple[int, ...],
        *,
        stride: int = 1,
        padding: tuple[int, ...] | None = None,
        source: str | None = None,
        count_include_pad: bool = True,
    ) -> str:
        source = source or self.last
        shape = self.shapes[source]
        d = len(kernel)
        padding = padding or (0,) * (2 * d)
        attrs: dict[str, Any] = {"kernel": list(kernel), "stride": [stride] * d}
        attrs["padding"] = list(padding)
        if op == "max_pool":
            attrs["dilation"] = [1] * d
        else:
            attrs["count_include_pad"] = count_include_pad
        size = window_size(shape, kernel, stride, padding, 1)
        return self.add(op, [source], (shape[0], *size), **attrs)

    def flatten(self, source: str | None = None) -> str:
        source = source or self.last
        return self.add("reshape", [source], (int(np.prod(self.shapes[source])),))

    def record(self) -> NetworkRecord:
        return NetworkRecord({"nodes": self.nodes}, self.weights)


def window_size(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: int,
    padding: tuple[int, ...],
    dilation: int,
) -> tuple[int, ...]:
    d = len(kernel)
    return tuple(
        (shape[1 + a] + padding[a] + padding[a + d] - dilation * (kernel[a] - 1) - 1) // stride + 1
        for a in range(d)
    )


def mlp(sizes: tuple[int, ...], seed: int = 0, op: str = "relu", **attrs: Any) -> NetBuilder:
    net = NetBuilder((sizes[0],), seed)
    for k, out in enumerate(sizes[1:]):
        net.linear(out)
        if k < len(sizes) - 2:
            net.elementwise(op, **attrs)
    return net


def nonlinear_inputs(net: NetworkRecord) -> tuple[str, ...]:
    """Names of the values to tighten: inputs of nonlinear operators."""
    affine = {"linear", "conv", "batch_norm", "scale", "add", "reduce_sum", "avg_pool"}
    affine |= {"reshape", "gather", "concat", "input"}
    names = [i for n in net.structure["nodes"] if n["op"] not in affine for i in n["inputs"]]
    return tuple(dict.fromkeys(names))


def box(lower: np.ndarray, upper: np.ndarray) -> InputRecord:
    return InputRecord("box", np.asarray(lower, np.float64), np.asarray(upper, np.float64))


def row_property(
    region: InputRecord, rows: np.ndarray, offset: np.ndarray | None = None
) -> PropertyRecord:
    rows = np.asarray(rows, dtype=np.float64)
    offset = np.zeros(len(rows)) if offset is None else offset
    return PropertyRecord(region, [(rows, offset)])
