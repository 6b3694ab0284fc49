"""Builds a :class:`Graph` operator by operator; shared by the ONNX and the PyTorch importer.

An importer walks its own format in topological order. Whatever does not depend on the network's
input is a :class:`Constant`; everything else is a :class:`Value`, whose shape is the *full* shape
at batch size one, with the position of the batch axis remembered. Importers speak in full
shapes, as their formats do; the builder strips the batch axis when it emits nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from torch_prepared.core._peephole import fuse_biases, live_nodes
from torch_prepared.core.graph import Attribute, Graph, Node, ParameterRef
from torch_prepared.errors import ModelFormatError, UnsupportedOperationError

__all__ = ["MAX_ELEMENTS", "Constant", "GraphBuilder", "Value"]

MAX_ELEMENTS = 2**27
"""Most scalars one intermediate value or folded constant may have (a guard, not a target)."""


_UNFINISHED = {"erf": "erf", "power": "a power of a value"}


@dataclass(frozen=True)
class Value:
    """A node's output. ``shape`` is full, with size 1 at ``batch`` (None: no batch axis)."""

    name: str
    shape: tuple[int, ...]
    batch: int | None

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape without the batch axis: the node's shape in the graph."""
        return tuple(size for axis, size in enumerate(self.shape) if axis != self.batch)

    @property
    def size(self) -> int:
        """Number of scalars at batch size one."""
        return math.prod(self.shape)

    def inner_axis(self, axis: int) -> int:
        """Position of full axis ``axis`` (not the batch axis) in the graph's shape."""
        return axis - (self.batch is not None and axis > self.batch)


@dataclass(frozen=True)
class Constant:
    """A tensor known at import, with its provenance.

    ``ref`` says how to read it from one stored tensor (None once it was computed from stored
    tensors), ``sources`` which stored tensors it depends on.
    """

    value: Tensor
    ref: ParameterRef | None = None
    sources: frozenset[str] = frozenset()

    @classmethod
    def stored(cls, name: str, value: Tensor) -> Constant:
        """The stored tensor ``name`` itself."""
        return cls(value, ParameterRef(name), frozenset({name}))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.value.shape)

    def permuted(self, order: Sequence[int]) -> Constant:
        """Axes reordered as by ``Tensor.permute``; provenance kept where it can be."""
        ref = self.ref
        if ref is not None:
            before = ref.permute or tuple(range(len(order)))
            kept = ParameterRef(ref.name, tuple(before[axis] for axis in order))
            ref = None if ref.reshape is not None else kept
        return replace(self, value=self.value.permute(tuple(order)), ref=ref)

    def reshaped(self, shape: Sequence[int]) -> Constant:
        """The same values in row-major order under another shape; provenance kept."""
        ref = self.ref
        if ref is not None and tuple(shape) != self.shape:
            ref = replace(ref, reshape=tuple(shape))
        return replace(self, value=self.value.reshape(tuple(shape)), ref=ref)


class GraphBuilder:
    """Collects nodes and parameters, and knows what an operator means for shapes.

    Args:
        dtype: floating dtype that every parameter must have.
        device: where new parameters go.
        stored: the tensors of the file or module by name, in their own layout.
        trainable: names among ``stored`` that an edit may change at all.
        symbolic: the batch size is not fixed, so nothing may act on the batch axis. Otherwise
            it is fixed at one, and the axis may be treated as any other axis of size one.
        supported: names of the importer's operators, for messages.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        stored: Mapping[str, Tensor],
        trainable: frozenset[str],
        symbolic: bool,
        supported: Sequence[str],
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.symbolic = symbolic
        self.where = "network"
        self.label = "value"
        self.stored = stored
        self._trainable = trainable
        self._supported = supported
        self._nodes: list[Node] = []
        self._labels: dict[str, str] = {}
        self._places: dict[str, str] = {}
        self._parameters: dict[str, Tensor] = {}
        self._frozen: set[str] = set()

    def refuse(self, reason: str) -> NoReturn:
        """Raise the error for something that has no treatment here."""
        raise UnsupportedOperationError(
            f"{self.where}: {reason}; supported operators: {', '.join(sorted(self._supported))}"
        )

    def malformed(self, reason: str) -> NoReturn:
        """Raise the error for operands that do not fit each other."""
        raise ModelFormatError(f"{self.where}: {reason}")

    def start(self, name: str, shape: tuple[int, ...], batch: int | None) -> Value:
        """The network's input, of full shape ``shape``."""
        self._guard(shape)
        value = self.emit("input", (), shape, batch)
        self._labels[value.name] = name
        return value

    def emit(
        self,
        op: str,
        inputs: Sequence[Value],
        shape: Sequence[int],
        batch: int | None,
        params: Mapping[str, ParameterRef] | None = None,
        attrs: Mapping[str, Attribute] | None = None,
    ) -> Value:
        """Append a node whose output has the full shape ``shape``."""
        value = Value(f"#{len(self._nodes)}", tuple(int(size) for size in shape), batch)
        self._labels[value.name] = self.label
        self._places[value.name] = self.where
        names = tuple(x.name for x in inputs)
        self._nodes.append(Node(value.name, op, names, value.inner, params or {}, attrs or {}))
        return value

    def parameter(self, constant: Constant, role: str) -> ParameterRef:
        """How a node reads ``constant``: in place where it is stored, else as a new parameter.

        A stored tensor that a new parameter was computed from is frozen: changing it would
        change the original network in a second place that the graph does not see.
        """
        if constant.value.dtype != self.dtype:
            self.refuse(f"got a {constant.value.dtype} {role} in a {self.dtype} network")
        if constant.ref is not None:
            self._parameters[constant.ref.name] = self.stored[constant.ref.name]
            return constant.ref
        self.freeze(constant)
        name = self._fresh(f"{self.label}.{role}", {*self.stored, *self._parameters})
        self._parameters[name] = constant.value.detach().to(self.device, copy=True).contiguous()
        return ParameterRef(name)

    def freeze(self, constant: Constant) -> None:
        """Keep edits away from all that ``constant`` was computed from: the graph depends on it."""
        self._frozen |= constant.sources

    def freeze_stored(self, names: Iterable[str]) -> None:
        """Keep edits away from stored tensors by name."""
        self._frozen.update(names)

    def scalar(self, value: float) -> Constant:
        """A number rounded to the network's dtype, as the network computes with it."""
        return Constant(torch.tensor(value, dtype=self.dtype, device=self.device))

    def producer(self, name: str) -> Node:
        """The node that computes the value called ``name``."""
        return self._nodes[int(name.removeprefix("#"))]

    def uniform(self, node: Node, role: str, fallback: float) -> float | None:
        """Parameter ``role`` of a node when it is one number, ``fallback`` when it is absent."""
        value = node.read(role, self._parameters)
        if value is None:
            return fallback
        first = value.detach().reshape(-1)[0]
        return float(first) if bool((value == first).all()) else None

    def finish(self, output: Value) -> Graph:
        """The graph of everything that ``output`` depends on, biases fused, names resolved.

        A single number per input comes out with shape (1,), so that outputs always have an axis.
        """
        if not output.inner:
            output = self.emit("reshape", (output,), (1, 1), 0)
        if output.name == self._nodes[0].name:
            output = self.emit("reshape", (output,), output.shape, output.batch)
        live = live_nodes(self._nodes, output.name)
        for node in live:
            if node.op in _UNFINISHED:
                self.where = self._places[node.name]
                self.refuse(f"computes {_UNFINISHED[node.op]}, which has support inside GELU only")
        nodes, editable = fuse_biases(live, self._parameters)
        names: dict[str, str] = {}
        for node in nodes:
            names[node.name] = self._fresh(self._labels[node.name], set(names.values()))
        named = tuple(
            replace(n, name=names[n.name], inputs=tuple(names[i] for i in n.inputs)) for n in nodes
        )
        read = {ref.name for node in nodes for ref in node.params.values()}
        kept = {name: value for name, value in self._parameters.items() if name in read}
        return Graph(named, kept, frozenset((editable & self._trainable) - self._frozen))

    def explicit(self, x: Value) -> Value:
        """``x`` with its batch axis (of size one) turned into an ordinary axis."""
        if x.batch is None:
            return x
        if self.symbolic:
            self.refuse("acts on the batch axis, so it mixes independent inputs")
        return self.emit("reshape", (x,), x.shape, None)

    def batched(self, x: Value) -> Value:
        """``x`` with its batch axis first, as convolutions and pools expect it."""
        if x.batch == 0:
            return x
        if self.symbolic or not x.shape or x.shape[0] != 1:
            self.refuse(f"got a value of shape {x.shape} whose first axis is not the batch axis")
        return self.emit("reshape", (x,), x.shape, 0)

    def move(
        self, x: Value, apply: Callable[[np.ndarray], Sequence[np.ndarray]], shapes_only: bool
    ) -> list[Value]:
        """Results of an operator that only moves scalars, found by applying it to their indices.

        ``apply`` is run on the indices of two inputs at once, which shows where the batch axis
        goes and that no scalar crosses from one input to the other. ``shapes_only`` says that
        its arguments may hold shapes folded at batch size one; then (and when the batch size is
        fixed) it may also be run on a single input.
        """
        moved = None if x.batch is None else self._track_two(x, apply)
        if moved is None and x.batch is not None and self.symbolic and not shapes_only:
            self.refuse("acts on the batch axis, so it mixes independent inputs")
        if moved is None:
            single = apply(np.arange(x.size, dtype=np.int64).reshape(x.shape))
            moved = [(index, self._batch_after(x, index.shape)) for index in single]
        return [self._pick(x, index, batch) for index, batch in moved]

    def reshape(self, x: Value, shape: Sequence[int], batch: int | None) -> Value:
        """``x`` under another full shape (nothing is emitted where the graph sees none)."""
        target = Value(x.name, tuple(shape), batch)
        if target.inner == x.inner:
            return target
        return self.emit("reshape", (x,), shape, batch)

    def expand(self, x: Value, shape: tuple[int, ...]) -> Value:
        """``x`` broadcast to the full shape ``shape``."""
        if x.shape == shape:
            return x
        self._guard(shape)
        batch = None if x.batch is None else x.batch + len(shape) - len(x.shape)
        if batch is not None and shape[batch] != 1:
            x, batch = self.explicit(x), None
        index = np.broadcast_to(np.arange(x.size, dtype=np.int64).reshape(x.shape), shape)
        return self._pick(x, index, batch)

    def common_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that ``shapes`` broadcast to."""
        try:
            shape = tuple(int(size) for size in np.broadcast_shapes(*shapes))
        except ValueError:
            self.malformed(f"got shapes {shapes}, which do not broadcast against each other")
        self._guard(shape)
        return shape

    def _track_two(
        self, x: Value, apply: Callable[[np.ndarray], Sequence[np.ndarray]]
    ) -> list[tuple[np.ndarray, int | None]] | None:
        """Single-input indices and batch axis of each result, or None if inputs are mixed."""
        batch = 0 if x.batch is None else x.batch
        both = np.arange(2 * x.size, dtype=np.int64).reshape(2, *x.inner)
        try:
            results = apply(np.moveaxis(both, 0, batch))
        except (ModelFormatError, ValueError, RuntimeError, IndexError):
            return None
        found: list[tuple[np.ndarray, int | None]] = []
        for result in results:
            for axis in (a for a, size in enumerate(result.shape) if size == 2):
                first, second = np.take(result, [0], axis), np.take(result, [1], axis)
                if bool(((first < x.size) & (second == first + x.size)).all()):
                    found.append((first, axis))
                    break
            else:
                return None
        return found

    def _batch_after(self, x: Value, shape: tuple[int, ...]) -> int | None:
        """Where a reshape at batch size one may put the batch axis."""
        if x.batch is None:
            return None
        before = math.prod(x.shape[: x.batch])
        for axis, size in enumerate(shape):
            if size == 1 and math.prod(shape[:axis]) == before:
                return axis
        if self.symbolic:
            self.refuse(f"merges the batch axis with others (result of shape {tuple(shape)})")
        return None

    def _pick(self, x: Value, index: np.ndarray, batch: int | None) -> Value:
        self._guard(index.shape)
        if index.size == x.size and bool((index.reshape(-1) == np.arange(x.size)).all()):
            return self.reshape(x, index.shape, batch)
        inner = index if batch is None else np.squeeze(index, batch)
        return self.emit(
            "gather", (x,), index.shape, batch, attrs={"index": np.ascontiguousarray(inner)}
        )

    def _guard(self, shape: Sequence[int]) -> None:
        if not 0 < math.prod(shape) <= MAX_ELEMENTS:
            self.refuse(
                f"got a value of shape {tuple(shape)}, empty or over {MAX_ELEMENTS} numbers"
            )

    @staticmethod
    def _fresh(name: str, taken: set[str]) -> str:
        candidate, count = name, 0
        while candidate in taken:
            count += 1
            candidate = f"{name}/{count}"
        return candidate
