"""PyTorch modules in and out: :func:`capture_module` and :func:`apply_parameters`.

A module is read through ``torch.export`` rather than ``torch.fx``: export resolves every shape
and every parameter, functionalizes in-place operators, and reduces modules and functional
spellings alike to one ATen vocabulary, which is then translated operator by operator. The batch
size stays symbolic during export, so a network that mixes the inputs of a batch, or works for
one batch size only, is refused. Control flow that depends on shapes is specialized on the
example's feature shape, which is exact because the graph is only ever used at that shape; control
flow that depends on data is refused.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from torch_prepared.core._aten_ops import OPERATORS, translate
from torch_prepared.core._builder import Constant, GraphBuilder, Value
from torch_prepared.core.graph import Graph
from torch_prepared.errors import ModelFormatError, UnsupportedOperationError

__all__ = ["apply_parameters", "capture_module"]


def capture_module(model: nn.Module, example_input: Tensor) -> Graph:
    """The graph that ``model`` computes in evaluation mode.

    Args:
        model: float32 or float64 network of one tensor argument and one tensor result; never
            changed (export works on a deep copy).
        example_input: (b, ...) with b >= 1; only its shape, dtype and device matter.

    Returns:
        Graph whose parameters are copies of the module's tensors, named as in ``state_dict()``
        (tied tensors under their first name), in their own dtype. Weights and biases of linear
        and convolution layers that are ``nn.Parameter`` are editable, unless some computed
        constant also depends on them.

    Raises:
        UnsupportedOperationError: an operator without support (its name, module path and source
            line, and what is supported), or a model that cannot be exported, such as one with
            data-dependent control flow or a fixed batch size.
        ModelFormatError: not a single-tensor network, or non-finite weights.

    Source:
        Departures from the module's own arithmetic: division by a constant becomes a product
        with its reciprocal, rounded to the network's dtype.
    """
    if not isinstance(example_input, Tensor) or example_input.dim() < 1 or not len(example_input):
        raise ModelFormatError("example input: expected a tensor (b, ...) with b >= 1")
    if example_input.dtype not in (torch.float32, torch.float64):
        raise UnsupportedOperationError(
            f"example input: got dtype {example_input.dtype}; expected float32 or float64"
        )
    program = _export(copy.deepcopy(model).eval(), example_input)
    return _Walk(program, example_input).run()


def apply_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A deep copy of ``model`` with some entries of its ``state_dict()`` replaced.

    Dtype, device, training mode and sharing of tied tensors are kept; ``model`` is not changed.

    Args:
        model: any module.
        parameters: new values by ``state_dict()`` name, of the same shapes.

    Raises:
        ModelFormatError: unknown name, other shape, NaN or infinite values (also after rounding
            to the module's dtype), or two different values for tied entries.
    """
    edited = copy.deepcopy(model)
    state = edited.state_dict()
    done: dict[tuple[object, ...], tuple[str, Tensor]] = {}
    for name, value in parameters.items():
        if name not in state:
            raise ModelFormatError(f"parameter {name!r} does not exist in the module's state_dict")
        target = state[name]
        if value.shape != target.shape:
            raise ModelFormatError(
                f"parameter {name!r}: got shape {tuple(value.shape)}; expected "
                f"{tuple(target.shape)}"
            )
        rounded = value.detach().to(device=target.device, dtype=target.dtype)
        if rounded.is_floating_point() and not bool(torch.isfinite(rounded).all()):
            raise ModelFormatError(
                f"parameter {name!r}: got NaN or infinite values in {target.dtype}; expected "
                "finite ones"
            )
        first, earlier = done.setdefault(_identity(target), (name, rounded))
        if not torch.equal(earlier, rounded):
            raise ModelFormatError(
                f"parameters {first!r} and {name!r} are tied but got different values"
            )
        with torch.no_grad():
            target.copy_(rounded)
    return edited


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors exactly when they are the same view of the same memory."""
    if tensor.numel() == 0:
        return (id(tensor),)
    layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return (tensor.device, tensor.untyped_storage().data_ptr(), *layout)


def _export(model: nn.Module, example_input: Tensor) -> ExportedProgram:
    """The functional ATen program of ``model`` with a symbolic batch size."""
    example = example_input[:1].detach().expand(2, *example_input.shape[1:]).clone()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: ExportedProgram = torch.export.export(
                model, (example,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False
            )
            functional: ExportedProgram = program.run_decompositions({})
            return functional
    except Exception as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if reason.startswith("Constraints violated") and len(lines) > 1:
            reason = lines[1]
        raise UnsupportedOperationError(
            f"{type(model).__name__}: cannot be exported: {reason}; expected control flow and "
            "shapes that depend neither on data nor on the batch size"
        ) from error


class _Walk:
    """State of one capture: every node of the program so far, as value, constant or number."""

    def __init__(self, program: ExportedProgram, example_input: Tensor) -> None:
        self._program = program
        stored, trainable = _stored_tensors(program)
        self._builder = GraphBuilder(
            example_input.dtype,
            example_input.device,
            stored,
            trainable,
            symbolic=True,
            supported=tuple(OPERATORS),
        )
        self._shape = (1, *example_input.shape[1:])
        self._known: dict[torch.fx.Node, Any] = {}

    def run(self) -> Graph:
        """Translate every node in order."""
        signature = self._program.graph_signature
        inputs = {spec.arg.name: spec for spec in signature.input_specs}
        names = _canonical_names(self._program)
        for node in self._program.graph.nodes:
            if node.op == "placeholder":
                spec = inputs[node.name]
                if spec.kind is InputKind.USER_INPUT:
                    self._known[node] = self._builder.start(node.name, self._shape, 0)
                elif spec.target in names:
                    name = names[spec.target]
                    self._known[node] = Constant.stored(name, self._builder.stored[name])
            elif node.op == "call_function":
                self._builder.where, self._builder.label = _location(node), node.name
                self._known[node] = translate(self._builder, node, self._known)
            elif node.op == "output":
                return self._finish(node)
            else:
                self._builder.refuse(f"got a node of kind {node.op!r}")
        raise ModelFormatError("the exported program has no output")

    def _finish(self, node: torch.fx.Node) -> Graph:
        results = node.args[0]
        self._builder.where = self._builder.label = "output"
        if not isinstance(results, (tuple, list)) or len(results) != 1:
            count = len(results) if isinstance(results, (tuple, list)) else 0
            raise ModelFormatError(f"the module returns {count} values; expected one tensor")
        value = self._known.get(results[0]) if isinstance(results[0], torch.fx.Node) else None
        if not isinstance(value, Value):
            raise ModelFormatError("the module's result does not depend on its input")
        return self._builder.finish(self._builder.batched(value))


def _stored_tensors(program: ExportedProgram) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Copies of all tensors of the program by canonical name, and which are parameters."""
    names = _canonical_names(program)
    tensors: dict[str, Tensor] = {**program.constants, **program.state_dict}
    stored = {name: tensors[name].detach().clone() for name in set(names.values())}
    signature = program.graph_signature
    return stored, frozenset(names[name] for name in signature.parameters if name in names)


def _canonical_names(program: ExportedProgram) -> dict[str, str]:
    """For each tensor of the program the first name under which the same tensor is known."""
    first: dict[tuple[object, ...], str] = {}
    tensors: dict[str, Any] = {**program.state_dict, **program.constants}
    return {
        name: first.setdefault(_identity(tensor), name)
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


def _location(node: torch.fx.Node) -> str:
    """Operator, module path and source line of a node, for messages."""
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    path = modules[-1][0] if modules and modules[-1][0] else "the module itself"
    frames = [
        line.strip()
        for line in (node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith("File ") and "torch/nn/modules" not in line
    ]
    line = f", {frames[-1]}" if frames else ""
    return f"{node.target} in {path}{line}"
