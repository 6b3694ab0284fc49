"""What every benchmark shares: environment, repeats, atomic files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = [
    "DATA",
    "FIGURES",
    "HERE",
    "RESULTS",
    "SCHEMA",
    "Timing",
    "environment",
    "measure",
    "settings_digest",
    "write_json",
    "write_text",
]

SCHEMA = 1
HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIGURES = HERE / "figures"
DATA = HERE.parent.parent / "shared" / "data"
_PACKAGES = ("torch", "numpy", "scipy", "highspy", "clarabel", "onnx", "onnxruntime", "cvxpylayers")


@dataclass(frozen=True)
class Timing:
    """Wall seconds of warmed repeats: median and interquartile range."""

    median: float
    spread: float
    repeats: int


def measure(
    call: Callable[[], object],
    *,
    repeats: int = 7,
    warmup: int = 2,
    synchronize: Callable[[], object] | None = None,
) -> Timing:
    """Time ``call``; ``synchronize`` (of an accelerator) runs before each clock is read.

    Raises:
        ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}; expected at least 1")
    wait = synchronize or (lambda: None)
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    quartiles = statistics.quantiles(seconds, n=4) if repeats > 1 else [seconds[0]] * 3
    return Timing(statistics.median(seconds), quartiles[2] - quartiles[0], repeats)


def environment(device: str = "cpu") -> dict[str, object]:
    """Commit, versions and machine, as plain data for the head of a result file."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": name,
        "cores": os.cpu_count(),
        "versions": versions,
    }


def settings_digest(settings: Mapping[str, object]) -> str:
    """Twelve hexadecimal digits that change when a setting does."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Mapping[str, object]) -> None:
    """Write JSON whole or not at all; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(data), indent=1, allow_nan=False) + "\n")


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "cpu"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
