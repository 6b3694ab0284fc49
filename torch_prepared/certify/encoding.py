"""Canonical JSON and bounded array encoding: the only parser of untrusted certificate text."""

from __future__ import annotations

import base64
import binascii
import functools
import gzip
import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from torch_prepared.errors import CertificateError

__all__ = [
    "ArrayReader",
    "canonical",
    "digest",
    "encode_array",
    "entries",
    "fields",
    "items",
    "number",
    "read_json",
    "text",
    "texts",
    "write_json",
]

MAX_FILE_BYTES = 2**28
MAX_ARRAY_BYTES = 2**30
MAX_DEPTH = 64
_DTYPES = {"bool", "int32", "int64", "float16", "float32", "float64"}
_MAX_AXES = 8
_MAX_ITEMS = 100_000


def canonical(value: object) -> bytes:
    """The one JSON text of ``value``: sorted keys, no spaces, ASCII, no NaN.

    Raises:
        CertificateError: something that is not plain JSON data.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CertificateError(f"certificate: not plain JSON data ({error})") from error
    return text.encode("ascii")


def digest(value: object) -> str:
    """SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def fields(value: object, names: tuple[str, ...], where: str) -> list[object]:
    """Values of exactly these keys of a JSON object, in this order.

    Raises:
        CertificateError: not an object, or keys are missing or unknown.
    """
    if not isinstance(value, Mapping):
        raise CertificateError(f"{where}: got {type(value).__name__}; expected an object")
    if set(value) != set(names):
        strange = sorted(set(value) ^ set(names))[0]
        raise CertificateError(f"{where}: field {strange!r} is missing or unknown")
    return [value[name] for name in names]


def text(value: object, where: str) -> str:
    """The value, which must be text."""
    if not isinstance(value, str):
        raise CertificateError(f"{where}: got {type(value).__name__}; expected text")
    return value


def number(value: object, where: str) -> float:
    """A finite number, or infinity written as ``"inf"``."""
    if value == "inf":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CertificateError(f"{where}: got {value!r}; expected a number")
    try:
        return float(value)
    except OverflowError as error:
        raise CertificateError(f"{where}: an integer beyond float64; expected less") from error


def items(value: object, where: str) -> list[object]:
    """The value, which must be a list of bounded length."""
    if not isinstance(value, list) or len(value) > _MAX_ITEMS:
        raise CertificateError(f"{where}: expected a list of at most {_MAX_ITEMS} items")
    return value


def entries(value: object, where: str) -> dict[str, object]:
    """The value, which must be an object of bounded size."""
    if not isinstance(value, dict) or len(value) > _MAX_ITEMS:
        raise CertificateError(f"{where}: expected an object of at most {_MAX_ITEMS} fields")
    return value


def texts(value: object, where: str) -> dict[str, str]:
    """An object of bounded size with nothing but text in it."""
    return {key: text(entry, where) for key, entry in entries(value, where).items()}


def encode_array(array: np.ndarray) -> dict[str, object]:
    """``{"dtype", "shape", "data"}`` with little-endian bytes, compressed, in base64.

    Raises:
        CertificateError: the dtype is not on the list of allowed ones.
    """
    name = _dtype_name(array.dtype)
    if name not in _DTYPES:
        raise CertificateError(f"array: dtype {array.dtype}; expected one of {sorted(_DTYPES)}")
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    data = base64.b64encode(zlib.compress(little.tobytes(), 6)).decode("ascii")
    return {"dtype": name, "shape": list(array.shape), "data": data}


@functools.cache
def _dtype_name(dtype: np.dtype) -> str:
    """NumPy computes names anew each time, for longer than a small array takes to encode."""
    return dtype.name


class ArrayReader:
    """Decodes arrays within one budget of decompressed bytes."""

    def __init__(self, budget: int = MAX_ARRAY_BYTES) -> None:
        self._left = budget

    def read(self, value: object, where: str) -> np.ndarray:
        """The array, read-only.

        Raises:
            CertificateError: unknown dtype, bad shape, wrong length, or budget exceeded.
        """
        dtype, shape, data = fields(value, ("dtype", "shape", "data"), where)
        if not isinstance(dtype, str) or dtype not in _DTYPES or not isinstance(data, str):
            raise CertificateError(f"{where}: dtype {dtype!r}; expected one of {sorted(_DTYPES)}")
        if not isinstance(shape, list) or len(shape) > _MAX_AXES:
            raise CertificateError(f"{where}: shape is no list of at most {_MAX_AXES} sizes")
        if any(isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**31 for s in shape):
            raise CertificateError(f"{where}: a size in shape is no integer from 0 to 2**31")
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > self._left:
            raise CertificateError(
                f"{where}: {size} more bytes than the {self._left} left of {MAX_ARRAY_BYTES}"
            )
        self._left -= size
        raw = _inflate(data, size, where)
        if dtype == "bool" and raw.strip(b"\x00\x01"):
            raise CertificateError(f"{where}: a boolean is neither 0 nor 1")
        array = np.frombuffer(raw, dtype=np.dtype(dtype).newbyteorder("<"))
        array = array.astype(dtype, copy=False).reshape(shape)
        array.setflags(write=False)
        return array


def _inflate(data: str, size: int, where: str) -> bytes:
    """Exactly ``size`` decompressed bytes, never holding more than one byte beyond."""
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(base64.b64decode(data, validate=True), size + 1)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise CertificateError(f"{where}: data cannot be decoded ({error})") from error
    if len(raw) != size or not stream.eof or stream.unused_data:
        raise CertificateError(f"{where}: data does not hold exactly {size} bytes")
    return raw


def read_json(path: str | os.PathLike[str]) -> object:
    """Parse a ``.json`` or ``.json.gz`` file of bounded size; NaN and repeated keys are refused.

    Raises:
        CertificateError: unreadable, too large or not strict JSON.
    """
    name = os.fspath(path)
    try:
        with gzip.open(name, "rb") if name.endswith(".gz") else Path(name).open("rb") as stream:
            text = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise CertificateError(f"{name}: cannot be read ({error})") from error
    if len(text) > MAX_FILE_BYTES:
        raise CertificateError(f"{name}: larger than {MAX_FILE_BYTES} bytes")
    if _depth(text) > MAX_DEPTH:
        raise CertificateError(f"{name}: nested deeper than {MAX_DEPTH} levels")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CertificateError):
            raise
        raise CertificateError(f"{name}: not strict JSON ({error})") from error


def _depth(text: bytes) -> int:
    """Most brackets open at once, those in strings included.

    The standard parser recurses; other packages may have raised Python's limit so far that deep
    nesting would end the process instead of raising.
    """
    codes = np.frombuffer(text, dtype=np.uint8)
    codes = codes[np.isin(codes, np.frombuffer(b"[]{}", dtype=np.uint8))]
    steps = np.where((codes == ord("[")) | (codes == ord("{")), 1, -1)
    return int(np.cumsum(steps).max(initial=0))


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise CertificateError("certificate: a key occurs twice in one object")
    return result


def _refuse_constant(text: str) -> object:
    raise CertificateError(f"certificate: got {text}; expected finite numbers")


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write canonical JSON, compressed when the name ends in ``.gz``; all or nothing."""
    target = Path(path)
    text = canonical(value)
    if target.name.endswith(".gz"):
        text = gzip.compress(text, 6, mtime=0)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
