"""The report file of an edit: written by ``edit --report``, read, without trust, by ``report``."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch_prepared._version import __version__
from torch_prepared.certify.encoding import read_json, write_json
from torch_prepared.cli._outcome import to_plain
from torch_prepared.errors import CertificateError, ReportError

if TYPE_CHECKING:
    from torch_prepared.cli._edit_config import EditConfig

__all__ = ["Fields", "FileStamp", "load_record", "write_record"]

FORMAT, VERSION = "torch_prepared.report", 1
MOST_FILE_BYTES = 2**31
MOST_TEXT = 2000
MOST_ITEMS = 20_000


@dataclass(frozen=True)
class FileStamp:
    """A file an edit read or wrote.

    Args:
        path: relative to the folder of the report.
        sha256: of its bytes.
    """

    path: Path
    sha256: str

    def verified(self, folder: Path) -> Path:
        """Where the file lies, its bytes being those of the edit.

        Raises:
            ReportError: it is missing, no ordinary file, or other than it was.
        """
        place = folder / self.path
        if _sha256(place) != self.sha256:
            raise ReportError(
                f"{place}: differs from the file that was edited or written (other SHA-256); "
                "put that file back, edit again, or leave the map out with --no-map"
            )
        return place


def write_record(
    path: Path, config: EditConfig, data: Mapping[str, object], edited: Path | None
) -> None:
    """Write what ``edit --json`` prints, with the names and digests of all files.

    Args:
        path: where to write; the names of other files are recorded relative to the folder of
            ``config.report``.
        config: what was asked.
        data: what ``--json`` prints.
        edited: the edited network as written, under its temporary name; None without one.
    """
    folder = (config.report or path).resolve().parent

    def stamp(file: Path, content: Path | None = None) -> dict[str, str]:
        name = os.path.relpath(file.resolve(), folder)
        return {"path": Path(name).as_posix(), "sha256": _sha256(content or file)}

    record = {
        "format": FORMAT,
        "version": VERSION,
        "generator": f"torch_prepared {__version__}",
        "files": {
            "model": stamp(config.model),
            "output": None if edited is None else stamp(config.output, edited),
            "properties": [stamp(file) for file in config.properties],
            "keep": [stamp(file) for file in config.keep],
            "holdout": [stamp(file) for file in config.holdout],
        },
        "result": to_plain(data),
    }
    write_json(path, record)


def _sha256(path: Path) -> str:
    """Digest of an ordinary file of bounded size.

    Raises:
        ReportError: there is none.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_FILE_BYTES:
            raise ReportError(
                f"{path}: expected an ordinary file of at most {MOST_FILE_BYTES} bytes; leave the "
                "map out with --no-map"
            )
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ReportError(
            f"{path}: cannot be read ({error.strerror or error}); expected the file that was "
            "edited or written; put it back, or leave the map out with --no-map"
        ) from error


def load_record(path: Path) -> tuple[Fields, Fields]:
    """The files and the result of a report file that is not trusted.

    Raises:
        ReportError: unreadable, too large, not strict JSON, or no report of this version.
    """
    try:
        data = read_json(path)
    except CertificateError as error:
        raise ReportError(str(error).replace("certificate:", f"{path}:")) from error
    record = Fields(data, str(path))
    form, version = record.text("format"), record.count("version")
    if form != FORMAT or version != VERSION:
        raise ReportError(
            f"{path}: got format {form!r} version {version}; expected {FORMAT!r} version "
            f"{VERSION}, as written by 'edit --report'"
        )
    return record.inner("files"), record.inner("result")


class Fields:
    """Typed, bounded access to one JSON object; every misfit is named with its place.

    Args:
        data: decoded JSON.
        where: its place, for messages.
    """

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, dict):
            raise ReportError(f"{where}: got {type(data).__name__}; expected an object")
        self.data: dict[str, object] = data
        self.where = where

    def _get(self, name: str, expected: str, *types: type) -> object:
        if name not in self.data:
            raise ReportError(f"{self.where}: field {name!r} is missing; expected {expected}")
        value = self.data[name]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            got = type(value).__name__
            raise ReportError(f"{self.where}: field {name!r}: got {got}; expected {expected}")
        return value

    def text(self, name: str) -> str:
        """A text, cut after 2,000 characters."""
        return str(self._get(name, "a text", str))[:MOST_TEXT]

    def flag(self, name: str) -> bool:
        """True or false."""
        return bool(self._get(name, "true or false", bool))

    def number(self, name: str) -> float:
        """A number; null is NaN."""
        value = self._get(name, "a number or null", int, float, type(None))
        try:
            number = math.nan if value is None else float(value)  # type: ignore[arg-type]
        except OverflowError:
            number = math.inf
        if math.isinf(number):
            raise ReportError(f"{self.where}: field {name!r}: got a number beyond float64")
        return number

    def count(self, name: str) -> int:
        """An integer from 0 to 2**63."""
        value = self._get(name, "a whole number", int)
        if not isinstance(value, int) or not 0 <= value < 2**63:
            raise ReportError(f"{self.where}: field {name!r}: expected a number from 0 to 2**63")
        return value

    def inner(self, name: str) -> Fields:
        """An object."""
        return Fields(self._get(name, "an object", dict), f"{self.where}: {name}")

    def optional(self, name: str) -> Fields | None:
        """An object, or None for null."""
        value = self._get(name, "an object or null", dict, type(None))
        return None if value is None else Fields(value, f"{self.where}: {name}")

    def items(self, name: str) -> list[Fields]:
        """A list of objects."""
        values = self._list(name)
        return [Fields(v, f"{self.where}: {name}[{i}]") for i, v in enumerate(values)]

    def texts(self, name: str) -> list[str]:
        """A list of texts."""
        values = self._list(name)
        return [
            Fields({"": v}, f"{self.where}: {name}[{i}]").text("") for i, v in enumerate(values)
        ]

    def numbers(self) -> dict[str, float]:
        """All fields, each a number."""
        if len(self.data) > MOST_ITEMS:
            raise ReportError(f"{self.where}: expected at most {MOST_ITEMS} fields")
        return {name[:MOST_TEXT]: self.number(name) for name in self.data}

    def stamp(self, name: str) -> FileStamp:
        """A file's path and digest."""
        return self.inner(name).as_stamp()

    def as_stamp(self) -> FileStamp:
        """This object as a file's path and digest."""
        text = self.text("path")
        if not text or "\0" in text:
            raise ReportError(f"{self.where}: expected the path of a file")
        return FileStamp(Path(text), self.text("sha256"))

    def _list(self, name: str) -> list[object]:
        value = self._get(name, "a list", list)
        if not isinstance(value, list) or len(value) > MOST_ITEMS:
            raise ReportError(f"{self.where}: {name}: expected at most {MOST_ITEMS} items")
        return value
