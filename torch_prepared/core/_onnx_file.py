"""Bytes of ONNX files: bounded reading, parsing without execution, atomic writing."""

from __future__ import annotations

import gzip
import os
import secrets
import zlib
from pathlib import Path

import onnx
from google.protobuf.message import (  # type: ignore[import-untyped]  # ships no types
    DecodeError,
    EncodeError,
)
from onnx import AttributeProto, ModelProto, TensorProto

from torch_prepared.errors import ModelFormatError, UnsupportedOperationError

__all__ = ["MAX_BYTES", "read_model", "write_model"]

MAX_BYTES = 2**31 - 1
"""Largest model read by default; the format itself cannot hold more in one file."""

_GZIP_MAGIC = b"\x1f\x8b"


def read_model(path: Path, max_bytes: int) -> ModelProto:
    """Parse an ``.onnx`` or ``.onnx.gz`` file of at most ``max_bytes`` bytes once unpacked.

    Raises:
        ModelFormatError: the file is missing, empty, truncated, too large or not ONNX.
        UnsupportedOperationError: weights lie in other files, or in sparse form.
    """
    data = _read_bytes(path, max_bytes)
    if not data:
        raise ModelFormatError(f"{path}: the file is empty; expected an ONNX model")
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError) as error:
        raise ModelFormatError(
            f"{path}: not an ONNX model, or truncated; export the network again"
        ) from error
    if not model.ir_version or not model.graph.output:
        raise ModelFormatError(f"{path}: not an ONNX model (it holds no network)")
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise UnsupportedOperationError(
                f"{path}: tensor {tensor.name!r} is stored in another file; save the model with "
                "its weights inside (onnx.save with save_as_external_data=False)"
            )
    if model.graph.sparse_initializer:
        name = model.graph.sparse_initializer[0].values.name
        raise UnsupportedOperationError(f"{path}: tensor {name!r} is sparse; store it dense")
    return model


def write_model(model: ModelProto, path: Path) -> None:
    """Write ``.onnx`` or ``.onnx.gz`` (by suffix) so that ``path`` is never half-written.

    Raises:
        ModelFormatError: the suffix is neither, or the file cannot be written.
    """
    if not path.name.endswith((".onnx", ".onnx.gz")):
        raise ModelFormatError(f"{path}: got suffix {path.suffix!r}; expected .onnx or .onnx.gz")
    try:
        data = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ModelFormatError(f"{path}: the model cannot be serialized ({error})") from error
    if path.name.endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ModelFormatError(
            f"{path}: cannot write the network ({error.strerror or error}); "
            "the file there, if any, is unchanged"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _read_bytes(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not packed:
                data = raw.read(max_bytes + 1)
            else:
                with gzip.GzipFile(fileobj=raw) as stream:
                    data = stream.read(max_bytes + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ModelFormatError(f"{path}: the gzip data are truncated or damaged") from error
    except OSError as error:
        raise ModelFormatError(
            f"{path}: cannot be read ({error.strerror or error}); expected an ONNX file"
        ) from error
    if len(data) > max_bytes:
        raise ModelFormatError(
            f"{path}: more than {max_bytes} bytes (unpacked); raise max_bytes if you trust it"
        )
    return data


def _tensors(model: ModelProto) -> list[TensorProto]:
    """Every dense tensor of the main graph, including those held by attributes."""
    found = list(model.graph.initializer)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                found.append(attribute.t)
            found.extend(attribute.tensors)
    return found
