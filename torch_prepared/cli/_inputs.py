"""Reading what commands are given: networks, properties, reference inputs."""

from __future__ import annotations

import dataclasses
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from torch_prepared.core.onnx import OnnxNetwork, load_onnx
from torch_prepared.errors import SpecError
from torch_prepared.specs import Property, load_vnnlib

__all__ = ["ReferenceInputs", "load_network", "load_properties", "load_reference"]

MAX_REFERENCE_BYTES = 2**31
_MAX_ARRAYS = 64


def load_network(path: Path, device: str = "cpu") -> OnnxNetwork:
    """An ONNX network whose graph lies on ``device``; see ``core.onnx.load_onnx``."""
    network = load_onnx(path)
    if device == "cpu":
        return network
    return dataclasses.replace(network, graph=network.graph.to(device=device))


def load_properties(paths: Sequence[Path], network: OnnxNetwork) -> tuple[Property, ...]:
    """The properties of all files, in order, checked against the network's sizes."""
    graph = network.graph
    sizes = {"input_size": graph.input_size, "output_size": graph.output_size}
    return tuple(prop for path in paths for prop in load_vnnlib(path, **sizes))


@dataclass(frozen=True)
class ReferenceInputs:
    """Inputs (q, ...) on which a network should stay as it is; ``labels`` (q,) or None."""

    inputs: np.ndarray
    labels: np.ndarray | None


def load_reference(path: Path) -> ReferenceInputs:
    """Read ``.npy``, or ``.npz`` with ``inputs`` (or ``x``, or one array) and perhaps ``labels``.

    The file is not trusted: no pickled objects, and at most 2 GiB of numbers, as the headers
    state them, are read.

    Raises:
        SpecError: missing, damaged or too large file; arrays that are no finite numbers.
    """
    try:
        with path.open("rb") as stream:
            if path.suffix != ".npz":
                return ReferenceInputs(_numbers(stream, f"{path}"), None)
            with zipfile.ZipFile(stream) as archive:
                return _from_archive(archive, path)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise SpecError(
            f"{path}: cannot be read ({error}); expected .npy, or .npz with an array 'inputs'"
        ) from error


def _from_archive(archive: zipfile.ZipFile, path: Path) -> ReferenceInputs:
    names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    others = [name for name in names if name != "labels"]
    key: str | None = next((name for name in ("inputs", "x") if name in names), None)
    if key is None and len(others) == 1:
        key = others[0]
    if key is None or len(names) > _MAX_ARRAYS:
        raise SpecError(f"{path}: got arrays {sorted(names)[:8]}; expected one called 'inputs'")
    with archive.open(f"{key}.npy") as stream:
        inputs = _numbers(stream, f"{path}, {key}")
    labels = None
    if "labels" in names:
        with archive.open("labels.npy") as stream:
            labels = _numbers(stream, f"{path}, labels")
        if labels.ndim != 1 or len(labels) != len(inputs) or labels.dtype.kind not in "iu":
            raise SpecError(
                f"{path}: got labels {labels.dtype} {labels.shape} for {len(inputs)} inputs; "
                "expected one integer each"
            )
        labels = labels.astype(np.int64)
    return ReferenceInputs(inputs, labels)


def _numbers(stream: IO[bytes], where: str) -> np.ndarray:
    """One array of finite numbers with at least two axes, or one for labels."""
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, _, dtype = read(stream)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "fiub" or size > MAX_REFERENCE_BYTES:
            raise SpecError(
                f"{where}: got {dtype} {shape}; expected numbers, at most {MAX_REFERENCE_BYTES} "
                "bytes of them"
            )
        stream.seek(0)
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    except SpecError:
        raise
    except (ValueError, KeyError, MemoryError) as error:
        raise SpecError(f"{where}: not a NumPy array, or truncated ({error})") from error
    if array.ndim == 0 or not np.isfinite(array).all():
        raise SpecError(
            f"{where}: got {'a scalar' if array.ndim == 0 else 'NaN or infinite entries'}; "
            "expected an array of finite numbers"
        )
    return array
