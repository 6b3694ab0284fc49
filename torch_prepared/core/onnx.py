"""ONNX networks in and out: :func:`load_onnx`, :func:`with_parameters`, :func:`save_onnx`.

Reading never executes anything from the file: it is parsed, checked against the standard, and
translated operator by operator. Whatever has no translation is refused at once, by name.

Batch convention, decided once per network: an input of two or more axes whose first size is 1
or symbolic has a batch axis; any other input has none. A network whose batch size is fixed at 1
may treat that axis as it likes (``Reshape`` to ``[1, -1]`` included); where it is symbolic,
operators that would mix inputs of a batch are refused.

Real arithmetic of the imported graph equals that of the file with three stated exceptions, each
at most half a unit in the last place of a constant: ``Div`` by a constant becomes a product with
its reciprocal, and constants computed from several constants (or scaled by ``alpha`` and
``beta`` of ``Gemm``) are rounded to the network's dtype.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

from torch_prepared.core._onnx_file import MAX_BYTES, read_model, write_model
from torch_prepared.core._onnx_import import OnnxNetwork, import_model
from torch_prepared.core._onnx_session import OnnxSession
from torch_prepared.core.graph import Graph
from torch_prepared.errors import ModelFormatError

__all__ = ["OnnxNetwork", "OnnxSession", "load_onnx", "run_onnx", "save_onnx", "with_parameters"]


def load_onnx(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> OnnxNetwork:
    """Read an ``.onnx`` or gzip-compressed ``.onnx.gz`` network.

    Args:
        path: the file; compression is recognized by content.
        max_bytes: most bytes of the (unpacked) model.

    Returns:
        The imported network. Weights and biases of linear and convolution layers are editable
        unless another, computed constant also depends on them.

    Raises:
        ModelFormatError: missing, empty, truncated, oversized or invalid file; several inputs or
            outputs; NaN or infinite weights.
        UnsupportedOperationError: an operator, float type or external data, named.
    """
    where = Path(path)
    return import_model(read_model(where, max_bytes), where)


def with_parameters(
    network: OnnxNetwork, parameters: Mapping[str, Tensor | np.ndarray]
) -> OnnxNetwork:
    """A copy of ``network`` with other values of some editable parameters, graph and model alike.

    Everything else of the model (names, order, opset, metadata, all other tensors) stays.

    Args:
        network: as returned by :func:`load_onnx`; not changed.
        parameters: new values by name, in the shape and dtype of the file; a parameter that is
            not editable may be listed only with the value it has.

    Raises:
        ModelFormatError: unknown or not editable name, other shape or dtype, NaN or infinite
            values.
    """
    changed = {
        name: array
        for name, value in parameters.items()
        if (array := _checked(network.graph, name, value)) is not None
    }
    model = ModelProto()
    model.CopyFrom(network.model)
    stored = _stored_tensors(model)
    for name, array in changed.items():
        _replace_data(stored[name], array)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in changed.items()}
    return replace(network, model=model, graph=network.graph.with_parameters(tensors))


def save_onnx(
    network: OnnxNetwork,
    parameters: Mapping[str, Tensor | np.ndarray],
    path: str | os.PathLike[str],
) -> None:
    """Write the original file with other values of some editable parameters.

    The file appears at ``path`` complete or not at all. Arguments and errors are those of
    :func:`with_parameters`; further:

    Args:
        network: as returned by :func:`load_onnx`; not changed.
        parameters: new values by name; may be empty.
        path: ends in ``.onnx`` or ``.onnx.gz``.

    Raises:
        ModelFormatError: as above, or the file cannot be written.
    """
    write_model(with_parameters(network, parameters).model, Path(path))


def run_onnx(
    network: OnnxNetwork | str | os.PathLike[str], x: np.ndarray, threads: int = 1
) -> np.ndarray:
    """Outputs (b, m) of a network on flattened inputs (b, n), computed by onnxruntime.

    See :class:`OnnxSession`, which is faster for repeated calls.
    """
    return OnnxSession(network, threads=threads)(x)


def _checked(graph: Graph, name: str, value: Tensor | np.ndarray) -> np.ndarray | None:
    """``value`` as an array fit to be stored, or None if it is what is stored already."""
    if name not in graph.parameters:
        raise ModelFormatError(
            f"parameter {name!r} does not exist; expected one of {sorted(graph.editable)[:8]}"
        )
    old = graph.parameters[name].detach().cpu().numpy()
    tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value)
    new = tensor.numpy()
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ModelFormatError(
            f"parameter {name!r}: got {new.dtype} {new.shape}; expected {old.dtype} {old.shape}"
        )
    if not np.isfinite(new).all():
        raise ModelFormatError(
            f"parameter {name!r}: got NaN or infinite values; expected finite ones"
        )
    if new.tobytes() == old.tobytes():
        return None
    if name not in graph.editable:
        raise ModelFormatError(
            f"parameter {name!r} is not editable; expected the value it has, or leave it out"
        )
    return new


def _stored_tensors(model: ModelProto) -> dict[str, TensorProto]:
    """Initializers and tensors of Constant nodes by the name that the graph gives them."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = node.attribute[0].t
    return found


def _replace_data(tensor: TensorProto, values: np.ndarray) -> None:
    """Overwrite the data of ``tensor`` in the field that holds them now."""
    if tensor.HasField("raw_data"):
        little = values.astype(values.dtype.newbyteorder("<"), copy=False)
        tensor.raw_data = np.ascontiguousarray(little).tobytes()
        return
    held = tensor.float_data if tensor.data_type == TensorProto.FLOAT else tensor.double_data
    held[:] = values.reshape(-1).tolist()
