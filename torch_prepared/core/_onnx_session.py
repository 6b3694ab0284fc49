"""Running ONNX networks through onnxruntime on flattened inputs."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto

from torch_prepared.core._onnx_file import MAX_BYTES, read_model
from torch_prepared.core._onnx_import import OnnxNetwork, single_input, single_output
from torch_prepared.errors import ModelFormatError, SpecError

__all__ = ["OnnxSession"]

_CHUNK_SCALARS = 2**24
_DTYPES: dict[int, type[np.floating]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.DOUBLE: np.float64,
}


class OnnxSession:
    """A network loaded once into onnxruntime; call it on inputs (b, n), get outputs (b, m).

    Inputs are cast to the network's float type. A network with a symbolic batch size gets whole
    batches, provided that the first batch shows that it treats them as independent inputs;
    any other network gets one input at a time.

    Args:
        source: a file (``.onnx``, ``.onnx.gz``), an imported network or a parsed model.
        threads: threads within one operator.

    Raises:
        ModelFormatError: the model cannot be read or onnxruntime rejects it.
    """

    def __init__(
        self, source: OnnxNetwork | ModelProto | str | os.PathLike[str], *, threads: int = 1
    ) -> None:
        where = Path("network")
        if isinstance(source, OnnxNetwork):
            model = source.model
        elif isinstance(source, ModelProto):
            model = source
        else:
            where = Path(source)
            model = read_model(where, MAX_BYTES)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        entry = single_input(model, where)
        self._where = where
        self._input, self._output = entry.name, single_output(model, where).name
        dims = entry.type.tensor_type.shape.dim
        sizes = [d.dim_value if d.dim_value > 0 else None for d in dims]
        self._symbolic = self._batched = len(sizes) > 1 and sizes[0] is None
        shape = sizes[1:] if self._symbolic else sizes
        dtype = _DTYPES.get(entry.type.tensor_type.elem_type)
        if dtype is None or any(size is None for size in shape):
            raise ModelFormatError(
                f"{where}: input {entry.name!r} must be float32 or float64 and of fixed size"
            )
        self._dtype = dtype
        self._shape = tuple(size for size in shape if size is not None)
        self._trusted = False
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise ModelFormatError(f"{where}: onnxruntime rejects the model ({text})") from error

    @property
    def input_size(self) -> int:
        """Number n of scalars in one input."""
        return math.prod(self._shape)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Outputs (b, m) for inputs (b, n), in the network's float type.

        Raises:
            SpecError: ``x`` has another shape.
        """
        x = np.asarray(x)
        if x.ndim != 2 or x.shape[1] != self.input_size:
            raise SpecError(
                f"{self._where}: got inputs of shape {x.shape}; expected (b, {self.input_size})"
            )
        x = x.astype(self._dtype, copy=False)
        if x.shape[0] == 0:
            return self._one(np.zeros(self.input_size, self._dtype))[None][:0]
        if self._batched and x.shape[0] > 1 and not self._trusted:
            self._batched = self._trusted = self._batch_is_independent(x[:2])
        if not self._batched:
            return np.stack([self._one(row) for row in x])
        rows = max(1, _CHUNK_SCALARS // max(1, self.input_size))
        parts = (x[i : i + rows] for i in range(0, len(x), rows))
        return np.concatenate([self._run(p, (len(p),)).reshape(len(p), -1) for p in parts])

    def _one(self, row: np.ndarray) -> np.ndarray:
        """Output (m,) for one input (n,)."""
        return self._run(row, (1,) if self._symbolic else ()).reshape(-1)

    def _run(self, x: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
        feeds = {self._input: x.reshape(*lead, *self._shape)}
        try:
            return np.asarray(self._session.run([self._output], feeds)[0])
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise ModelFormatError(f"{self._where}: onnxruntime failed ({text})") from error

    def _batch_is_independent(self, x: np.ndarray) -> bool:
        """Whether two inputs at once give what they give one by one, up to rounding."""
        alone = np.stack([self._one(row) for row in x])
        try:
            together = self._run(x, (2,))
        except ModelFormatError:  # a batch size fixed inside the model shows when it runs
            return False
        if together.shape[:1] != (2,) or together.size != alone.size:
            return False
        scale = float(np.abs(alone).max(initial=1.0))
        return bool(np.allclose(together.reshape(2, -1), alone, rtol=1e-3, atol=1e-3 * scale))
