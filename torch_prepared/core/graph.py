"""One small closed graph of operators: the only form in which this package sees a network.

A :class:`Graph` is data. It says which operators are applied to which values and which named
parameters they read; it does not know how an operator is evaluated or bounded (that is
``torch_prepared.relax``). Values carry one leading batch axis that is *not* part of any shape
stored here. Importers (``core.onnx``, ``core.capture``) refuse whatever cannot be expressed.

=============  =====================================================================================
operator       meaning; ``x`` is the input value without its batch axis
=============  =====================================================================================
input          the network's input
linear         ``x @ weight.T + bias`` over the last axis; weight (m, n), bias (m,) optional
conv           1-d or 2-d cross-correlation; weight (o, i/groups, k...), bias (o,) optional;
               attrs ``stride (d,)``, ``padding (2d,)`` = begins then ends, ``dilation (d,)``,
               ``groups``; x is (i, length...)
batch_norm     ``(x - mean) / sqrt(var + eps) * weight + bias`` along axis 0; weight, bias optional
scale          ``x * scale + shift``; both optional, broadcast against x
add            ``sum_i signs[i] * x_i``, equal shapes; attrs ``signs``
reduce_sum     ``scale * x.sum(axes)`` (axes removed); attrs ``axes``, ``scale``
avg_pool       attrs ``kernel, stride (d,)``, ``padding (2d,)``, ``count_include_pad``
max_pool       attrs ``kernel, stride, dilation (d,)``, ``padding (2d,)`` (pads with -inf)
reshape        the same values in row-major order, another shape
gather         ``x.flatten()[index]``; attrs ``index`` (int64 array of the output's shape)
concat         attrs ``axis``
relu tanh sigmoid softplus(beta = 1) elu(alpha) leaky_relu(alpha) ...   elementwise
silu gelu      elementwise; gelu has attrs ``approximate``: "none" (by erf) or "tanh"
=============  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from torch_prepared.certify import NetworkRecord
from torch_prepared.errors import ModelFormatError

__all__ = ["Attribute", "Graph", "Node", "ParameterRef"]

Attribute = int | float | bool | str | tuple[int, ...] | tuple[float, ...] | np.ndarray


@dataclass(frozen=True)
class ParameterRef:
    """How an operator reads a stored parameter: by name, then permuted, then reshaped.

    The stored tensor keeps the layout of the file or module it came from, so that writing an
    edited network back needs no inverse transformations.
    """

    name: str
    permute: tuple[int, ...] | None = None
    reshape: tuple[int, ...] | None = None

    def read(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The tensor as the operator wants it, a differentiable view of the stored one."""
        value = parameters[self.name]
        if self.permute is not None:
            value = value.permute(self.permute)
        if self.reshape is not None:
            value = value.reshape(self.reshape)
        return value


@dataclass(frozen=True)
class Node:
    """One operator application. ``shape`` is the output's shape without the batch axis."""

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    params: Mapping[str, ParameterRef] = field(default_factory=dict)
    attrs: Mapping[str, Attribute] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))
        object.__setattr__(self, "attrs", MappingProxyType(dict(self.attrs)))

    def __reduce__(self) -> tuple[object, ...]:
        parts = (self.name, self.op, self.inputs, self.shape, dict(self.params), dict(self.attrs))
        return Node, parts

    @property
    def size(self) -> int:
        """Number of scalars in the output value."""
        return int(np.prod(self.shape, dtype=np.int64))

    def read(self, role: str, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """Parameter ``role`` as the operator wants it, or None when the node has none."""
        ref = self.params.get(role)
        return None if ref is None else ref.read(parameters)


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order, the first being the input and the last the output.

    Args:
        nodes: topologically ordered; ``nodes[0].op == "input"``.
        parameters: stored tensors by name, in the layout and dtype of their origin.
        editable: names of parameters that an edit may change (weights and biases of linear and
            convolution layers, shifts and scales that play a bias's part).

    Raises:
        ModelFormatError: names that do not resolve, or a parameter that is not finite.
    """

    nodes: tuple[Node, ...]
    parameters: Mapping[str, Tensor]
    editable: frozenset[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        seen: set[str] = set()
        for position, node in enumerate(self.nodes):
            if (node.op == "input") != (position == 0):
                raise ModelFormatError(
                    f"{node.name}: got operator '{node.op}' at position {position}; expected the "
                    "network's single input first and nowhere else"
                )
            missing = [name for name in node.inputs if name not in seen]
            missing += [r.name for r in node.params.values() if r.name not in self.parameters]
            if missing:
                raise ModelFormatError(f"{node.name}: reads {missing[0]!r}, which nothing defines")
            if node.name in seen:
                raise ModelFormatError(f"{node.name}: the name is defined twice")
            seen.add(node.name)
        unknown = self.editable - set(self.parameters)
        if unknown:
            raise ModelFormatError(f"editable parameter {sorted(unknown)[0]!r} does not exist")
        for name, value in self.parameters.items():
            if value.is_floating_point() and not bool(torch.isfinite(value.detach()).all()):
                raise ModelFormatError(
                    f"parameter {name!r}: got NaN or infinite entries; expected finite weights; "
                    "repair or retrain the network before editing it"
                )

    def __reduce__(self) -> tuple[object, ...]:
        return Graph, (self.nodes, dict(self.parameters), self.editable)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch axis."""
        return self.nodes[0].shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one output, without the batch axis."""
        return self.nodes[-1].shape

    @property
    def input_size(self) -> int:
        """Number of scalars in one input."""
        return self.nodes[0].size

    @property
    def output_size(self) -> int:
        """Number of scalars in one output."""
        return self.nodes[-1].size

    @property
    def dtype(self) -> torch.dtype:
        """Common floating dtype of the parameters (float32 when there are none)."""
        for value in self.parameters.values():
            if value.is_floating_point():
                return value.dtype
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the parameters (cpu when there are none)."""
        for value in self.parameters.values():
            return value.device
        return torch.device("cpu")

    def node(self, name: str) -> Node:
        """The node called ``name``."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def readers(self, parameter: str) -> tuple[Node, ...]:
        """Nodes that read the stored parameter ``parameter``."""
        return tuple(n for n in self.nodes if any(r.name == parameter for r in n.params.values()))

    def with_parameters(self, changed: Mapping[str, Tensor]) -> Graph:
        """The same graph reading other tensors where ``changed`` names them."""
        strange = set(changed) - set(self.parameters)
        if strange:
            raise ModelFormatError(f"parameter {sorted(strange)[0]!r} does not exist")
        return replace(self, parameters={**self.parameters, **changed})

    def to(
        self, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Graph:
        """A copy whose floating parameters have another dtype and device."""
        moved = {
            name: value.to(device=device, dtype=dtype if value.is_floating_point() else None)
            for name, value in self.parameters.items()
        }
        return replace(self, parameters=moved)

    def describe(self) -> str:
        """One line per node: name, operator, output shape."""
        return "\n".join(f"{n.name}: {n.op} -> {'x'.join(map(str, n.shape))}" for n in self.nodes)

    def record(self) -> NetworkRecord:
        """What the independent checker sees: plain structure plus NumPy weights as stored."""
        return NetworkRecord(
            structure=structure_of(self.nodes),
            weights={
                name: value.detach().cpu().numpy().copy() for name, value in self.parameters.items()
            },
        )


def structure_of(nodes: Iterable[Node]) -> dict[str, object]:
    """The graph's structure as plain JSON data (no weights)."""

    def plain(value: Attribute) -> object:
        if isinstance(value, np.ndarray):
            return value.tolist()
        return list(value) if isinstance(value, tuple) else value

    def ref(r: ParameterRef) -> dict[str, object]:
        return {
            "name": r.name,
            "permute": None if r.permute is None else list(r.permute),
            "reshape": None if r.reshape is None else list(r.reshape),
        }

    return {
        "nodes": [
            {
                "name": n.name,
                "op": n.op,
                "inputs": list(n.inputs),
                "shape": list(n.shape),
                "params": {role: ref(r) for role, r in sorted(n.params.items())},
                "attrs": {key: plain(v) for key, v in sorted(n.attrs.items())},
            }
            for n in nodes
        ]
    }
