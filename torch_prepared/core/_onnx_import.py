"""Walks an ONNX graph once and builds the closed operator graph from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from torch_prepared.core._builder import Constant, GraphBuilder, Value
from torch_prepared.core._onnx_fold import FOLDABLE, RESHAPES, evaluate
from torch_prepared.core._onnx_ops import OPERATORS, Call
from torch_prepared.core.graph import Graph
from torch_prepared.errors import ModelFormatError, UnsupportedOperationError

__all__ = ["OnnxNetwork", "import_model", "single_input", "single_output"]

_FLOATS: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
}
_DOMAINS = ("", "ai.onnx")
_SUPPORTED = tuple(sorted({*OPERATORS, *FOLDABLE, "Constant", "Shape", "Size"}))


@dataclass(frozen=True)
class OnnxNetwork:
    """A network read from a file: its graph, and the file's own model to write back.

    ``batch_axis`` says whether the file's input has a leading batch axis; the graph's shapes
    never have one. Parameters of ``graph`` carry the names and layouts of the file.
    """

    graph: Graph
    model: ModelProto
    input_name: str
    output_name: str
    batch_axis: bool


def single_input(model: ModelProto, where: Path) -> ValueInfoProto:
    """The one graph input that is not a weight.

    Raises:
        ModelFormatError: there are several, or none.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs: list[ValueInfoProto] = [
        value for value in model.graph.input if value.name not in weights
    ]
    if len(inputs) != 1:
        names = [value.name for value in inputs]
        raise ModelFormatError(f"{where}: got inputs {names}; expected exactly one input")
    return inputs[0]


def single_output(model: ModelProto, where: Path) -> ValueInfoProto:
    """The one graph output.

    Raises:
        ModelFormatError: there are several.
    """
    if len(model.graph.output) != 1:
        names = [value.name for value in model.graph.output]
        raise ModelFormatError(f"{where}: got outputs {names}; expected exactly one output")
    output: ValueInfoProto = model.graph.output[0]
    return output


def import_model(model: ModelProto, where: Path) -> OnnxNetwork:
    """Translate ``model``; ``where`` names it in messages.

    Raises:
        ModelFormatError: malformed model, several inputs or outputs, non-finite weights.
        UnsupportedOperationError: an operator or float type without support, by name.
    """
    source, target = single_input(model, where), single_output(model, where)
    _check_operators(model, where)
    _validate(model, where)
    walk = _Walk(model, source, where)
    for node in model.graph.node:
        walk.step(node)
    return OnnxNetwork(
        graph=walk.finish(target.name),
        model=model,
        input_name=source.name,
        output_name=target.name,
        batch_axis=walk.input.batch is not None,
    )


def _check_operators(model: ModelProto, where: Path) -> None:
    """Refuse every operator without support before looking at anything else."""
    for position, node in enumerate(model.graph.node):
        if node.domain not in _DOMAINS or node.op_type not in _SUPPORTED:
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise UnsupportedOperationError(
                f"{where}: node {node.name or position!r}: operator {name!r} has no support; "
                f"supported operators: {', '.join(_SUPPORTED)}"
            )


def _validate(model: ModelProto, where: Path) -> None:
    """Check the model against the standard, except that its output needs no declared shape."""
    if not model.graph.output[0].type.tensor_type.HasField("shape"):
        completed = ModelProto()
        completed.CopyFrom(model)
        completed.graph.output[0].type.tensor_type.shape.SetInParent()
        model = completed
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split())[:200]
        raise ModelFormatError(f"{where}: invalid ONNX model ({text})") from error


class _Walk:
    """State of one import: every tensor name so far, as a value or a constant."""

    def __init__(self, model: ModelProto, source: ValueInfoProto, where: Path) -> None:
        self._where = where
        self._opset = max(o.version for o in model.opset_import if o.domain in _DOMAINS)
        tensor_type = source.type.tensor_type
        dtype = _FLOATS.get(tensor_type.elem_type)
        if dtype is None:
            raise UnsupportedOperationError(
                f"{where}: input {source.name!r} has type {_type_name(tensor_type.elem_type)}; "
                "expected float32 or float64"
            )
        shape, batch, symbolic = _input_shape(source, where)
        stored = {t.name: _to_tensor(t, where) for t in model.graph.initializer}
        self._known: dict[str, Value | Constant] = {
            name: Constant.stored(name, value) for name, value in stored.items()
        }
        for node in model.graph.node:
            if node.op_type == "Constant":
                constant = _constant_node(node, where)
                stored[node.output[0]] = constant.value
                self._known[node.output[0]] = constant
        trainable = {
            name
            for name, c in self._known.items()
            if isinstance(c, Constant) and c.ref is not None and c.value.dtype == dtype
        }
        self._builder = GraphBuilder(
            dtype,
            torch.device("cpu"),
            stored,
            frozenset(trainable),
            symbolic=symbolic,
            supported=_SUPPORTED,
        )
        self._builder.where = str(where)
        self.input = self._builder.start(source.name, shape, batch)
        self._known[source.name] = self.input

    def step(self, node: NodeProto) -> None:
        """Import one node."""
        if node.op_type == "Constant":
            return
        label = node.name or (node.output[0] if node.output else "")
        builder = self._builder
        builder.where = f"{self._where}: node {label!r} ({node.op_type})"
        builder.label = node.output[0] if node.output else label
        missing = [name for name in node.input if name and name not in self._known]
        if missing:
            builder.malformed(f"reads {missing[0]!r}, which nothing before it defines")
        operands = tuple(self._known[name] if name else None for name in node.input)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        outputs = [name for name in node.output if name]
        results = self._results(node, operands, attributes, len(outputs))
        self._known.update(zip(outputs, results, strict=False))

    def finish(self, output: str) -> Graph:
        """The finished graph, its output in the same batch convention as its input."""
        value = self._known.get(output)
        builder = self._builder
        builder.where = builder.label = output
        if not isinstance(value, Value):
            raise ModelFormatError(f"{self._where}: output {output!r} does not depend on the input")
        leading_one = bool(value.shape) and value.shape[0] == 1
        if self.input.batch is not None and value.batch != 0 and leading_one:
            value = builder.batched(value)
        elif value.batch is not None and value.batch != 0:
            value = builder.explicit(value)
        return builder.finish(value)

    def _results(
        self,
        node: NodeProto,
        operands: tuple[Value | Constant | None, ...],
        attributes: Mapping[str, object],
        outputs: int,
    ) -> list[Value | Constant]:
        builder, op = self._builder, node.op_type
        first = operands[0] if operands else None
        if op in ("Shape", "Size") and first is not None:
            return [_shape_of(first, op, attributes)]
        constants = [o for o in operands if isinstance(o, Constant)]
        if len(constants) == sum(o is not None for o in operands) and op in FOLDABLE:
            return self._fold(op, operands, constants, attributes, outputs)
        if op not in OPERATORS:
            builder.refuse("this operator is only supported on constants")
        call = Call(builder, op, self._opset, operands, attributes, outputs)
        return list(OPERATORS[op](call))

    def _fold(
        self,
        op: str,
        operands: tuple[Value | Constant | None, ...],
        constants: list[Constant],
        attributes: Mapping[str, object],
        outputs: int,
    ) -> list[Value | Constant]:
        first = constants[0]
        if op in ("Identity", "Dropout"):
            return [first]
        arrays = [o.value.numpy() if isinstance(o, Constant) else None for o in operands]
        results = evaluate(self._builder, op, self._opset, arrays, attributes, outputs)
        if op == "Transpose":
            perm = attributes.get("perm")
            order = perm if isinstance(perm, (list, tuple)) else range(len(first.shape))[::-1]
            return [first.permuted(tuple(order))]
        if op in RESHAPES:
            return [first.reshaped(results[0].shape)]
        sources = frozenset[str]().union(*(c.sources for c in constants))
        return [Constant(_from_numpy(r, self._builder.where), None, sources) for r in results]


def _shape_of(operand: Value | Constant, op: str, attributes: Mapping[str, object]) -> Constant:
    """Shape or Size at batch size one."""
    if op == "Size":
        return Constant(torch.tensor(int(np.prod(operand.shape)), dtype=torch.int64))
    start, end = attributes.get("start", 0), attributes.get("end")
    begin = start if isinstance(start, int) else 0
    stop = end if isinstance(end, int) else len(operand.shape)
    return Constant(torch.tensor(operand.shape[begin:stop], dtype=torch.int64))


def _input_shape(source: ValueInfoProto, where: Path) -> tuple[tuple[int, ...], int | None, bool]:
    """Full shape at batch size one, the batch axis if any, and whether its size is open."""
    if not source.type.tensor_type.HasField("shape"):
        raise ModelFormatError(f"{where}: input {source.name!r} has no shape; export it with one")
    dims = [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else 0
        for d in source.type.tensor_type.shape.dim
    ]
    batch = 0 if len(dims) > 1 and dims[0] <= 1 else None
    symbolic = batch == 0 and dims[0] == 0
    if any(size == 0 for size in (dims if batch is None else dims[1:])):
        raise ModelFormatError(
            f"{where}: input {source.name!r} has a symbolic size besides its first (batch) axis; "
            "export the network with fixed feature sizes"
        )
    return tuple(max(1, size) for size in dims), batch, symbolic


def _constant_node(node: NodeProto, where: Path) -> Constant:
    """The output of a Constant node; only one held as a dense tensor can be edited."""
    attribute = node.attribute[0]
    name = node.output[0]
    if attribute.name == "value":
        return Constant.stored(name, _to_tensor(attribute.t, where))
    types = {"value_float": "f", "value_floats": "f", "value_int": "i", "value_ints": "i"}
    if attribute.name not in types:
        raise UnsupportedOperationError(
            f"{where}: node {node.name or name!r}: Constant with {attribute.name} has no support; "
            "expected a dense numeric tensor"
        )
    dtype = np.float32 if types[attribute.name] == "f" else np.int64
    return Constant(torch.from_numpy(np.array(helper.get_attribute_value(attribute), dtype)))


def _to_tensor(tensor: TensorProto, where: Path) -> torch.Tensor:
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ModelFormatError(
            f"{where}: tensor {tensor.name!r} is damaged (its data do not fill its shape)"
        ) from error
    if array.dtype.kind not in "fiub" or tensor.data_type in (
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
    ):
        raise UnsupportedOperationError(
            f"{where}: tensor {tensor.name!r} has type {_type_name(tensor.data_type)}; "
            "expected float32, float64 or integers"
        )
    return _from_numpy(array, f"{where}: tensor {tensor.name!r}")


def _from_numpy(array: np.ndarray, where: str) -> torch.Tensor:
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise UnsupportedOperationError(
            f"{where}: type {array.dtype} has no support; expected float32, float64 or integers"
        ) from error


def _type_name(code: int) -> str:
    known = TensorProto.DataType.DESCRIPTOR.values_by_number.get(code)
    return known.name if known else str(code)
