"""Where an edit stood, so that a run that was cut short can go on."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import secrets
import time
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from torch_prepared._version import __version__
from torch_prepared.certify.certificate import property_digest, weights_digest
from torch_prepared.edit._base import EditProblem
from torch_prepared.errors import SpecError

__all__ = ["Checkpoint", "Progress"]

logger = logging.getLogger(__name__)

_ARRAYS = ("theta", "slopes", "size")


@dataclass(frozen=True)
class Progress:
    """A point of weight space on the way to an edit. A start, never a claim.

    Args:
        theta: (p,) float64, the editable parameters.
        slopes: (b, a) float64, relaxation slopes of all properties; None: the operators' own.
        size: of the regions that the edit has reached, up to 1.
    """

    theta: Tensor
    slopes: Tensor | None
    size: float


@dataclass
class Checkpoint:
    """Progress of one editor on one problem, in a file named after both.

    Another network, property, reference input, option or version makes another name.

    Args:
        path: of the file.
        every: seconds between two writings.
    """

    path: Path
    every: float = 10.0
    written: float = field(default=-math.inf, repr=False)

    @classmethod
    def of(cls, problem: EditProblem, name: str) -> Checkpoint | None:
        """The one called ``name`` for a problem; None when its options name no folder.

        Raises:
            SpecError: the folder cannot be made.
        """
        folder = problem.options.checkpoint
        if folder is None:
            return None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError(
                f"checkpoint: {folder} cannot be made ({error.strerror}); expected a folder"
            ) from error
        record, options = problem.graph.record(), problem.options
        known = hashlib.sha256(weights_digest(record.weights).encode())
        for prop in problem.properties:
            known.update(property_digest(prop.record()).encode())
        known.update(problem.reference.inputs.double().contiguous().numpy().tobytes())
        chosen = (options.norm, options.margin, options.layers, options.seed)
        known.update(repr((__version__, chosen)).encode())
        return cls(folder / f"{name}-{known.hexdigest()[:16]}.npz")

    def save(self, progress: Progress, *, now: bool = False) -> None:
        """Write it whole or not at all; not before ``every`` seconds have passed, unless ``now``.

        Where it cannot be written the edit goes on without, after a warning.
        """
        if progress.slopes is None or not (now or time.monotonic() > self.written + self.every):
            return
        theta, slopes = progress.theta.numpy(), progress.slopes.numpy()
        partial = self.path.with_name(f".{secrets.token_hex(8)}.{self.path.name}")
        try:
            with partial.open("xb") as stream:
                np.savez(stream, theta=theta, slopes=slopes, size=np.float64(progress.size))
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(self.path)
        except OSError as error:
            logger.warning("checkpoint: %s cannot be written (%s)", self.path, error.strerror)
        finally:
            partial.unlink(missing_ok=True)
        self.written = time.monotonic()

    def load(self, count: int, slopes: tuple[int, int]) -> Progress | None:
        """What was written last; None when nothing was.

        Args:
            count: p, the expected number of parameters.
            slopes: the expected (b, a).

        Raises:
            SpecError: a file that is damaged or of other sizes. No pickled objects are read, and
                sizes are judged before numbers are read.
        """
        shapes = {"theta": (count,), "slopes": slopes, "size": ()}
        try:
            with zipfile.ZipFile(self.path) as archive:
                found = {}
                for name in _ARRAYS:
                    with archive.open(f"{name}.npy") as stream:
                        found[name] = _read(stream, shapes[name])
        except FileNotFoundError:
            return None
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise SpecError(
                f"{self.path}: damaged checkpoint ({error}); remove it to start anew"
            ) from error
        return Progress(
            torch.from_numpy(found["theta"]),
            torch.from_numpy(found["slopes"]).clamp(0.0, 1.0),
            min(max(float(found["size"]), 0.0), 1.0),
        )


def _read(stream: IO[bytes], expected: tuple[int, ...]) -> np.ndarray:
    """One float64 array of the expected shape, all finite.

    Raises:
        ValueError: something else.
    """
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"got array format {version}; expected (1, 0)")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    if shape != expected or dtype != np.float64:
        raise ValueError(f"got {dtype} {shape}; expected float64 {expected}")
    size = math.prod(shape)
    array = np.frombuffer(stream.read(8 * size), dtype=np.float64).copy()
    if array.size != size or not np.isfinite(array).all():
        raise ValueError("got too few or not only finite numbers")
    return array.reshape(shape)
