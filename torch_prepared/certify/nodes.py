"""The structure of a :class:`NetworkRecord` read into nodes; weights are judged as stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from torch_prepared.certify.records import NetworkRecord
from torch_prepared.certify.rounding import FloatArray
from torch_prepared.errors import CertificateError

__all__ = ["NodeRecord", "read_nodes"]

_STORED = ("float16", "float32", "float64")


@dataclass(frozen=True)
class NodeRecord:
    """One node of the structure with its parameters read; shapes exclude the batch axis."""

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    params: Mapping[str, np.ndarray]
    attrs: Mapping[str, object]

    @property
    def size(self) -> int:
        """Number of scalars in the output."""
        return math.prod(self.shape)

    def param(self, role: str) -> FloatArray | None:
        """Parameter ``role`` in float64 (an exact conversion), or None when absent."""
        value = self.params.get(role)
        return None if value is None else value.astype(np.float64)

    def required(self, role: str) -> FloatArray:
        """Parameter ``role``, which must be there."""
        value = self.param(role)
        if value is None:
            raise self.error(f"no parameter {role!r}", f"{self.op} with {role}")
        return value

    def ints(self, key: str, count: int) -> tuple[int, ...]:
        """Attribute ``key`` as exactly ``count`` non-negative integers."""
        value = self.attrs.get(key)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
            raise self.error(f"{key}={value!r}", f"{count} integers")
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in value):
            raise self.error(f"{key}={value!r}", "non-negative integers")
        return tuple(value)

    def number(self, key: str) -> float:
        """Attribute ``key`` as a finite float."""
        value = self.attrs.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{key}={value!r}", "a number")
        if not math.isfinite(value):
            raise self.error(f"{key}={value!r}", "a finite number")
        return float(value)

    def error(self, got: str, expected: str) -> CertificateError:
        """The error to raise about this node."""
        return CertificateError(
            f"{self.name}: got {got}; expected {expected}; record the network again"
        )


def read_nodes(network: NetworkRecord) -> list[NodeRecord]:
    """The structure's nodes with parameters resolved, checked for order and shapes.

    Raises:
        CertificateError: the structure is malformed or the weights are missing or not finite.
    """
    listed = network.structure.get("nodes")
    if not isinstance(listed, Sequence) or not listed:
        raise CertificateError("structure: got no list of nodes; expected Graph.record()'s output")
    nodes: list[NodeRecord] = []
    shapes: dict[str, tuple[int, ...]] = {}
    for position, raw in enumerate(listed):
        try:
            name, op, inputs = str(raw["name"]), str(raw["op"]), tuple(map(str, raw["inputs"]))
            shape = tuple(int(s) for s in raw["shape"])
            params = {role: _read(network, ref) for role, ref in raw["params"].items()}
            input_shapes = tuple(shapes[i] for i in inputs)
            attrs = dict(raw["attrs"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CertificateError(
                f"structure: node {position} is malformed ({type(error).__name__}: {error}); "
                "expected Graph.record()'s output"
            ) from error
        node = NodeRecord(name, op, inputs, shape, input_shapes, params, attrs)
        if name in shapes or (op == "input") != (position == 0) or (op != "input" and not inputs):
            raise node.error(f"operator {op!r} at position {position}", "one input, first")
        if min(shape, default=1) < 1 or node.size > 2**31:
            raise node.error(f"shape {shape}", "positive sizes below 2**31")
        shapes[name] = shape
        nodes.append(node)
    return nodes


def _read(network: NetworkRecord, ref: Mapping[str, object]) -> np.ndarray:
    """A stored parameter, permuted, then reshaped."""
    stored = network.weights[str(ref["name"])]
    if stored.dtype.name not in _STORED:
        raise ValueError(f"{ref['name']} has dtype {stored.dtype}, not one of {_STORED}")
    if not np.isfinite(stored).all():
        raise ValueError(f"{ref['name']} is not finite")
    permute, reshape = ref["permute"], ref["reshape"]
    value = stored if permute is None else np.transpose(stored, permute)  # type: ignore[call-overload]
    return np.asarray(value if reshape is None else np.reshape(value, reshape))  # type: ignore[call-overload]
