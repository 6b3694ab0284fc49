"""Tiny networks and regions that tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from torch_prepared.core.graph import Attribute, Graph, Node, ParameterRef
from torch_prepared.specs import Box, InputSet

__all__ = [
    "NETWORKS",
    "Net",
    "attack",
    "branching_net",
    "conv_net",
    "mixed_net",
    "mlp",
    "pooling_net",
    "random_boxes",
    "residual_net",
    "sequence_net",
]


class Net:
    """Builds a graph node by node; every method appends one and returns its name."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._parameters: dict[str, Tensor] = {}
        self._editable: set[str] = set()
        self._nodes = [Node("x", "input", (), shape)]

    @property
    def last(self) -> str:
        """Name of the last node."""
        return self._nodes[-1].name

    def shape(self, name: str) -> tuple[int, ...]:
        """Output shape of a node."""
        return next(n.shape for n in self._nodes if n.name == name)

    def parameter(self, name: str, shape: tuple[int, ...], spread: float = 1.0) -> ParameterRef:
        """A new normally distributed parameter."""
        noise = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        self._parameters[name] = spread * noise
        return ParameterRef(name)

    def add(
        self,
        op: str,
        shape: tuple[int, ...],
        inputs: Sequence[str] | None = None,
        params: dict[str, ParameterRef] | None = None,
        **attrs: Attribute,
    ) -> str:
        """Any operator."""
        name = f"{op}{len(self._nodes)}"
        sources = (self.last,) if inputs is None else tuple(inputs)
        self._nodes.append(Node(name, op, sources, shape, params or {}, attrs))
        return name

    def act(self, op: str = "relu", source: str | None = None, **attrs: Attribute) -> str:
        """An elementwise operator."""
        source = source or self.last
        if op in ("leaky_relu", "elu"):
            attrs = {"alpha": 0.25, **attrs}
        return self.add(op, self.shape(source), [source], **attrs)

    def linear(self, outputs: int, source: str | None = None, bias: bool = True) -> str:
        """A linear layer over the last axis."""
        source = source or self.last
        shape, tag = self.shape(source), f"linear{len(self._nodes)}"
        params = {
            "weight": self.parameter(f"{tag}.weight", (outputs, shape[-1]), shape[-1] ** -0.5)
        }
        if bias:
            params["bias"] = self.parameter(f"{tag}.bias", (outputs,), 0.3)
        self._editable |= {ref.name for ref in params.values()}
        return self.add("linear", (*shape[:-1], outputs), [source], params)

    def conv(
        self,
        outputs: int,
        kernel: Sequence[int],
        stride: int = 1,
        padding: int | Sequence[int] = 0,
        dilation: int = 1,
        groups: int = 1,
        source: str | None = None,
    ) -> str:
        """A convolution; its dimension is the kernel's."""
        source = source or self.last
        (channels, *lengths), d = self.shape(source), len(kernel)
        pads = (padding,) * (2 * d) if isinstance(padding, int) else tuple(padding)
        out = [
            (n + pads[a] + pads[a + d] - dilation * (kernel[a] - 1) - 1) // stride + 1
            for a, n in enumerate(lengths)
        ]
        tag, per = f"conv{len(self._nodes)}", channels // groups
        fan = per * int(np.prod(kernel))
        params = {
            "weight": self.parameter(f"{tag}.weight", (outputs, per, *kernel), fan**-0.5),
            "bias": self.parameter(f"{tag}.bias", (outputs,), 0.3),
        }
        self._editable |= {ref.name for ref in params.values()}
        return self.add(
            "conv", (outputs, *out), [source], params,
            stride=(stride,) * d, padding=pads, dilation=(dilation,) * d, groups=groups,
        )  # fmt: skip

    def pool(self, op: str, kernel: int = 2, stride: int = 2, padding: int = 0) -> str:
        """Max or average pooling."""
        channels, *lengths = self.shape(self.last)
        d = len(lengths)
        out = [(n + 2 * padding - kernel) // stride + 1 for n in lengths]
        attrs: dict[str, Attribute] = {"kernel": (kernel,) * d, "stride": (stride,) * d}
        attrs["padding"] = (padding,) * (2 * d)
        attrs |= {"dilation": (1,) * d} if op == "max_pool" else {"count_include_pad": False}
        return self.add(op, (channels, *out), **attrs)

    def batch_norm(self) -> str:
        """Batch normalization with random statistics."""
        shape, tag = self.shape(self.last), f"bn{len(self._nodes)}"
        params = {r: self.parameter(f"{tag}.{r}", shape[:1]) for r in ("weight", "bias", "mean")}
        params["var"] = self.parameter(f"{tag}.var", shape[:1])
        self._parameters[f"{tag}.var"] = self._parameters[f"{tag}.var"].abs() + 0.5
        return self.add("batch_norm", shape, None, params, eps=1e-5)

    def flatten(self) -> str:
        """To one axis."""
        return self.add("reshape", (int(np.prod(self.shape(self.last))),))

    def join(self, *names: str, signs: tuple[int, ...] | None = None) -> str:
        """Signed sum of nodes."""
        return self.add("add", self.shape(names[0]), names, signs=signs or (1,) * len(names))

    def graph(self, dtype: torch.dtype = torch.float64) -> Graph:
        """The finished graph."""
        table = {name: value.to(dtype) for name, value in self._parameters.items()}
        return Graph(tuple(self._nodes), table, frozenset(self._editable))


def mlp(
    sizes: Sequence[int] = (4, 8, 6, 3), op: str = "relu", seed: int = 0, dtype=torch.float64
) -> Graph:
    """Linear layers with an activation after all but the last."""
    net = Net((sizes[0],), seed)
    for position, size in enumerate(sizes[1:]):
        if position:
            net.act(op)
        net.linear(size)
    return net.graph(dtype)


def conv_net(op: str = "relu", seed: int = 0, dtype=torch.float64) -> Graph:
    """2-d convolutions with stride, uneven padding, groups and dilation, then linear layers."""
    net = Net((2, 6, 6), seed)
    net.conv(4, (3, 3), stride=2, padding=(1, 0, 0, 1))
    net.act(op)
    net.conv(4, (2, 2), padding=1, groups=2, dilation=2)
    net.act(op)
    net.flatten()
    net.linear(5)
    net.act(op)
    net.linear(3)
    return net.graph(dtype)


def residual_net(op: str = "relu", seed: int = 0, dtype=torch.float64) -> Graph:
    """A convolution, a block with a shortcut through batch norm, a linear layer."""
    net = Net((2, 4, 4), seed)
    net.conv(3, (3, 3), padding=1)
    skip = net.act(op)
    net.conv(3, (3, 3), padding=1)
    net.batch_norm()
    net.act(op)
    net.conv(3, (1, 1))
    net.join(net.last, skip)
    net.act(op)
    net.flatten()
    net.linear(3)
    return net.graph(dtype)


def pooling_net(op: str = "relu", seed: int = 0, dtype=torch.float64) -> Graph:
    """Convolutions, each with an activation, then max and average pooling."""
    net = Net((1, 8, 8), seed)
    net.conv(2, (3, 3), padding=1)
    net.act(op)
    net.pool("max_pool", 3, 2, 1)
    net.conv(3, (2, 2))
    net.act(op)
    net.pool("max_pool", 2, 1)
    net.pool("avg_pool", 2, 2, 1)
    net.flatten()
    net.linear(3)
    return net.graph(dtype)


def sequence_net(op: str = "relu", seed: int = 0, dtype=torch.float64) -> Graph:
    """1-d convolution and pooling, a linear layer along the last axis, a mean."""
    net = Net((2, 9), seed)
    net.conv(3, (3,), stride=2, padding=1)
    net.act(op)
    net.pool("avg_pool", 2, 1)
    net.linear(4)
    net.act(op)
    net.linear(5)
    net.add("reduce_sum", (5,), axes=(0,), scale=1 / 3)
    return net.graph(dtype)


def mixed_net(op: str = "relu", seed: int = 0, dtype=torch.float64) -> Graph:
    """Gather with repeats, scale, concatenation and signed sums around linear layers."""
    net = Net((2, 3), seed)
    net.add("gather", (5,), index=np.array([0, 3, 3, 5, 1]))
    params = {"scale": net.parameter("scale", (5,)), "shift": net.parameter("shift", (1,))}
    start = net.add("scale", (5,), None, params)
    net.linear(4)
    a = net.act(op)
    net.linear(4, start)
    b = net.act(op)
    net.join(a, b, signs=(1, -1))
    net.add("concat", (9,), [net.last, start], axis=0)
    net.linear(4)
    net.act(op)
    net.linear(3)
    return net.graph(dtype)


def branching_net(op: str = "relu", seed: int = 0, dtype=torch.float64) -> Graph:
    """Branches of unequal depth that meet in the output; an activation is the output itself."""
    net = Net((4,), seed)
    first = net.linear(5)
    net.act(op)
    net.linear(5)
    deep = net.act(op)
    shallow = net.act(op, first)
    net.join(deep, shallow, first, signs=(1, -1, 1))
    net.linear(3)
    net.act(op)
    return net.graph(dtype)


NETWORKS: dict[str, Callable[..., Graph]] = {
    "mlp": lambda op="relu", seed=0, dtype=torch.float64: mlp((4, 8, 6, 3), op, seed, dtype),
    "conv": conv_net,
    "residual": residual_net,
    "pooling": pooling_net,
    "sequence": sequence_net,
    "mixed": mixed_net,
    "branching": branching_net,
}


def random_boxes(size: int, count: int, seed: int = 0, radius: float = 0.3) -> list[Box]:
    """Boxes of various widths, some coordinates fixed."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        center = torch.randn(size, generator=generator, dtype=torch.float64)
        wide = radius * torch.rand(size, generator=generator, dtype=torch.float64)
        wide = wide * (torch.rand(size, generator=generator) < 0.8)
        found.append(Box(center - wide, center + wide))
    return found


def attack(
    objective: Callable[[Tensor], Tensor], region: InputSet, seed: int = 0, count: int = 32
) -> Tensor:
    """Points (q, n) of a region: samples, corners, and corners that gradients of objectives choose.

    ``objective`` maps points (q, n) to values (q, s); all of them are attacked both ways.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randn(count, region.size, generator=generator, dtype=torch.float64)
    points = torch.cat([region.sample(count, generator), region.corner(signs)])
    found = [points]
    for _ in range(2):
        for column in range(objective(points[:1]).shape[1]):
            for sign in (1.0, -1.0):
                at = points[-8:].clone().requires_grad_(True)
                (slope,) = torch.autograd.grad(sign * objective(at)[:, column].sum(), at)
                found.append(region.corner(slope))
        points = torch.cat(found)[-32:]
    return torch.cat(found)
