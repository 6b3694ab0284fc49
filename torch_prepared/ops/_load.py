"""Find the native library and say what was found."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["BuildInfo", "build_info", "load_native"]

_log = logging.getLogger(__name__)
_LARGEST_RAISE = (1 << 25) - (1 << 16)  # bytes; blocks of 32 MiB and more leave thresholds alone


@dataclass(frozen=True)
class BuildInfo:
    """What runs behind :mod:`torch_prepared.ops`.

    Attributes:
        native: whether the compiled library ``torch_prepared._C`` is loaded.
        cuda: whether it holds CUDA kernels.
        torch_version: version of the running torch.
        reason: why the native library is absent; empty when it is loaded.
    """

    native: bool
    cuda: bool
    torch_version: str
    reason: str = ""

    def __str__(self) -> str:
        if not self.native:
            return f"torch {self.torch_version}, reference operators: {self.reason}"
        backends = "CPU and CUDA" if self.cuda else "CPU"
        return f"torch {self.torch_version}, native operators for {backends}"


@cache
def load_native() -> BuildInfo:
    """Import the native library once, if it is there.

    Returns:
        What was found. A library that is absent or cannot be loaded is not an error: the
        reference operators, which round no less carefully, take its place.
    """
    version = str(torch.__version__)
    _keep_freed_memory()
    try:
        native = importlib.import_module("torch_prepared._C")
    except ModuleNotFoundError:
        reason = "torch_prepared._C was not built; use 'pip install --no-build-isolation .'"
    except (ImportError, OSError, RuntimeError) as error:
        reason = f"torch_prepared._C cannot be loaded: {error}"
    else:
        return BuildInfo(native=True, cuda=bool(native.with_cuda), torch_version=version)
    _log.info("native operators are absent: %s", reason)
    return BuildInfo(native=False, cuda=False, torch_version=version, reason=reason)


def _keep_freed_memory() -> None:
    """Let the C library keep what tensors free, up to 64 MiB, instead of giving it back each time.

    The GNU C library trims its heap to a threshold that it raises for good when a block beyond it
    is freed. Until a program has freed a large tensor, operators of a few MiB pay for page faults
    at each call, by which products and convolutions may take three times as long. The block here
    is never written to, so it costs no memory; other C libraries ignore it.
    """
    torch.empty(_LARGEST_RAISE, dtype=torch.uint8)  # freed at once


def build_info() -> BuildInfo:
    """The version of torch, and whether native CPU and CUDA operators are present or why not."""
    return load_native()
