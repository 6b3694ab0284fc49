"""What a command returns, and how it reaches the terminal."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import click
import numpy as np

__all__ = ["ExitCode", "Outcome", "finish", "to_plain"]


class ExitCode(enum.IntEnum):
    """Exit codes of every command."""

    PROVED = 0
    USAGE = 2
    REFUTED = 10
    UNKNOWN = 20
    INTERRUPTED = 130


@dataclass(frozen=True)
class Outcome:
    """Result of a command.

    Args:
        code: exit code.
        data: what ``--json`` prints.
        text: what people read otherwise.
    """

    code: ExitCode
    data: Mapping[str, object]
    text: str


def finish(outcome: Outcome, as_json: bool) -> NoReturn:
    """Print the outcome on standard output and leave with its exit code."""
    click.echo(json.dumps(to_plain(outcome.data)) if as_json else outcome.text)
    raise click.exceptions.Exit(int(outcome.code))


def to_plain(value: object) -> object:
    """Strict JSON data: NaN and infinity as null; data classes, arrays, enums and paths unfolded.

    Raises:
        TypeError: something else.
    """
    if isinstance(value, enum.Enum):
        return to_plain(value.value)
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (np.ndarray, np.generic)):
        return to_plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [to_plain(item) for item in value]
    raise TypeError(f"cannot print {type(value).__name__} as JSON")
