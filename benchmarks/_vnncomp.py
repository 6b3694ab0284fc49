"""Reads folders laid out like ``data/vnncomp2022``: networks, properties, violated instances."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from torch_prepared.specs import Property, load_vnnlib

__all__ = [
    "BENCHMARKS",
    "Case",
    "find_cases",
    "keep_the_rest",
    "merge_by_network",
    "read_instances",
]

BENCHMARKS = (
    "acasxu",
    "mnist_fc",
    "rl_benchmarks",
    "reach_prob_density",
    "collins_rul_cnn",
    "tllverifybench",
    "oval21",
    "sri_resnet_a",
    "sri_resnet_b",
    "cifar_biasfield",
)


@dataclass(frozen=True)
class Case:
    """One network and the violated property files it is to satisfy, all at once.

    Args:
        folder: the benchmark's folder.
        onnx: network, relative to the folder.
        vnnlib: property files, relative to the folder.
        keep: files of properties that hold and must still hold.
    """

    folder: Path
    onnx: str
    vnnlib: tuple[str, ...]
    keep: tuple[str, ...] = ()

    @property
    def benchmark(self) -> str:
        """Name of the benchmark."""
        return self.folder.name

    @property
    def name(self) -> str:
        """Name of the case, unique within a study."""
        properties = _stem(self.vnnlib[0]) if len(self.vnnlib) == 1 else f"{len(self.vnnlib)} files"
        return f"{self.benchmark}/{_stem(self.onnx)}/{properties}"

    @property
    def network(self) -> Path:
        """Path of the network file."""
        return self.folder / self.onnx

    @property
    def property_files(self) -> tuple[Path, ...]:
        """Paths of the property files."""
        return tuple(self.folder / name for name in self.vnnlib)

    @property
    def keep_files(self) -> tuple[Path, ...]:
        """Paths of the files of properties to keep."""
        return tuple(self.folder / name for name in self.keep)

    @cached_property
    def properties(self) -> tuple[Property, ...]:
        """All properties of all files."""
        return tuple(p for path in self.property_files for p in load_vnnlib(path))

    def counterexamples(self) -> np.ndarray:
        """Stored violating inputs (q, n), float32; empty when none are known."""
        path = self.folder / "counterexamples.npz"
        if not path.exists():
            return np.zeros((0, 0), np.float32)
        with np.load(path, allow_pickle=False) as stored:
            keys = [f"{_stem(self.onnx)}__{_stem(name)}" for name in self.vnnlib]
            found = [stored[key].reshape(-1) for key in keys if key in stored]
        return np.stack(found) if found else np.zeros((0, 0), np.float32)


def read_instances(folder: Path) -> list[dict[str, str]]:
    """Rows of ``instances.csv``.

    Raises:
        FileNotFoundError: the folder has none.
    """
    with (folder / "instances.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def find_cases(
    root: Path,
    benchmarks: Sequence[str] = BENCHMARKS,
    pattern: str = "",
    status: str = "sat",
) -> list[Case]:
    """Single-property cases of the given status, in file order.

    Args:
        root: folder of benchmark folders.
        benchmarks: names of those to read; absent folders are an error.
        pattern: regular expression searched in each case's name.
        status: wanted status.

    Raises:
        FileNotFoundError: a benchmark that is not there.
    """
    wanted = re.compile(pattern)
    found = []
    for benchmark in benchmarks:
        folder = root / benchmark
        for row in read_instances(folder):
            if row["status"] == status:
                found.append(Case(folder, row["onnx"], (row["vnnlib"],)))
    return [case for case in found if wanted.search(case.name)]


def merge_by_network(cases: Sequence[Case]) -> list[Case]:
    """One case per network with all its property files."""
    groups: dict[tuple[Path, str], list[str]] = {}
    for case in cases:
        groups.setdefault((case.folder, case.onnx), []).extend(case.vnnlib)
    return [
        Case(folder, onnx, tuple(dict.fromkeys(files))) for (folder, onnx), files in groups.items()
    ]


def keep_the_rest(cases: Sequence[Case]) -> list[Case]:
    """The same cases with every property of the network that is known to hold, to be kept."""
    return [
        replace(
            case,
            keep=tuple(
                row["vnnlib"]
                for row in read_instances(case.folder)
                if row["onnx"] == case.onnx and row["status"] == "unsat"
            ),
        )
        for case in cases
    ]


def _stem(name: str) -> str:
    base = Path(name).name
    for suffix in (".gz", ".onnx", ".vnnlib"):
        base = base.removesuffix(suffix)
    return base
