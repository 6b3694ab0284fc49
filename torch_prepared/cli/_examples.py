"""Reading examples: inputs with the class that each shall get."""

from __future__ import annotations

import csv
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torch_prepared.cli._inputs import _numbers as read_numbers
from torch_prepared.errors import SpecError

__all__ = ["ExampleFile", "load_examples"]

MAX_CSV_BYTES = 2**28
_MAX_FIELD = 2**20


@dataclass(frozen=True)
class ExampleFile:
    """Inputs (m, n) float64 and classes (m,) int64."""

    inputs: np.ndarray
    targets: np.ndarray


def load_examples(path: Path) -> ExampleFile:
    """Read ``.npz`` with ``inputs`` and ``targets`` (or ``labels``), or ``.csv``.

    A line of a CSV file is one example: its class, then the numbers of its input; a first line of
    names is skipped. The file is not trusted: no pickled objects, sizes are bounded.

    Raises:
        SpecError: missing, damaged or too large file, or other contents.
    """
    try:
        if path.suffix == ".csv":
            return _from_csv(path)
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            return _from_archive(archive, path)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise SpecError(
            f"{path}: cannot be read ({error}); expected .npz with arrays 'inputs' and 'targets', "
            "or .csv with a class and the numbers of an input in every line"
        ) from error


def _from_archive(archive: zipfile.ZipFile, path: Path) -> ExampleFile:
    names = {n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")}
    inputs = next((name for name in ("inputs", "x") if name in names), None)
    targets = next((name for name in ("targets", "labels") if name in names), None)
    if inputs is None or targets is None:
        raise SpecError(f"{path}: got arrays {sorted(names)[:8]}; expected 'inputs' and 'targets'")
    with archive.open(f"{inputs}.npy") as stream:
        x = read_numbers(stream, f"{path}, {inputs}")
    with archive.open(f"{targets}.npy") as stream:
        y = read_numbers(stream, f"{path}, {targets}")
    if y.dtype.kind not in "iu" or y.ndim != 1 or x.ndim < 2 or len(x) != len(y):
        raise SpecError(
            f"{path}: got inputs {x.shape} and targets {y.dtype} {y.shape}; expected (m, ...) and "
            "m whole numbers"
        )
    if not x.size:
        raise SpecError(f"{path}: got inputs {x.shape}; expected at least one example")
    return ExampleFile(x.reshape(len(x), -1).astype(np.float64), y.astype(np.int64))


def _from_csv(path: Path) -> ExampleFile:
    if path.stat().st_size > MAX_CSV_BYTES:
        raise SpecError(f"{path}: larger than {MAX_CSV_BYTES} bytes; use .npz")
    rows: list[list[float]] = []
    previous = csv.field_size_limit(_MAX_FIELD)
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            for number, fields in enumerate(csv.reader(stream), start=1):
                if not fields:
                    continue
                try:
                    rows.append([float(field) for field in fields])
                except ValueError:
                    if number > 1:
                        raise SpecError(
                            f"{path}, line {number}: got a field that is no number; expected a "
                            "class and the numbers of an input"
                        ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not a CSV file ({error})") from error
    finally:
        csv.field_size_limit(previous)
    if not rows or len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        raise SpecError(
            f"{path}: got lines of unequal length, or none; expected a class and inputs"
        )
    table = np.array(rows, dtype=np.float64)
    whole = np.isfinite(table).all() and bool((np.abs(table[:, 0]) < 2**31).all())
    if not whole or not bool((table[:, 0] == np.floor(table[:, 0])).all()):
        raise SpecError(
            f"{path}: got NaN, infinity or a class that is no whole number; expected finite "
            "numbers and the class first"
        )
    return ExampleFile(table[:, 1:], table[:, 0].astype(np.int64))
