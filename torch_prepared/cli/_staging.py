"""Output files that appear together and complete, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from torch_prepared.errors import PreparedError

__all__ = ["StagedFiles", "staged_files"]


@dataclass(frozen=True)
class StagedFiles:
    """Files under temporary names beside their targets.

    Args:
        targets: where the files shall appear.
        paths: where to write them, with the targets' suffixes; they exist, empty.
        modes: permissions of new files here, whatever the files' writers choose.
    """

    targets: tuple[Path, ...]
    paths: tuple[Path, ...]
    modes: tuple[int, ...]

    def commit(self) -> None:
        """Move all files to their targets.

        Raises:
            OSError: one cannot be moved; those moved before it are removed again.
        """
        done: list[Path] = []
        try:
            for path, target, mode in zip(self.paths, self.targets, self.modes, strict=True):
                path.chmod(mode)
                path.replace(target)
                done.append(target)
        except OSError:
            for target in done:
                target.unlink(missing_ok=True)
            raise


@contextmanager
def staged_files(targets: Sequence[Path], inputs: Sequence[Path]) -> Iterator[StagedFiles]:
    """Claim the places of output files before any work is done; nothing stays uncommitted.

    Errors that name a temporary file leave here with the name of its target instead.

    Raises:
        click.UsageError: a target cannot be written, is named twice, or is one of ``inputs``.
        OSError: writing failed; ``filename`` is that of the target.
    """
    taken = {path.resolve(): "an input" for path in inputs}
    paths: list[Path] = []
    modes: list[int] = []
    try:
        for target in targets:
            reason = taken.get(target.resolve())
            if reason is not None:
                raise click.UsageError(f"{target}: is {reason} as well; expected another file")
            taken[target.resolve()] = "another output"
            paths.append(_claim(target))
            modes.append(paths[-1].stat().st_mode & 0o777)
        yield StagedFiles(tuple(targets), tuple(paths), tuple(modes))
    except OSError as error:
        name = _target_of(error, targets, paths)
        if name is None:
            raise
        raise OSError(error.errno, error.strerror or str(error), name) from error
    except PreparedError as error:
        told = str(error)
        for path, target in zip(paths, targets, strict=False):
            told = told.replace(str(path), str(target))
        if told == str(error):
            raise
        raise type(error)(told) from error
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _target_of(error: OSError, targets: Sequence[Path], paths: Sequence[Path]) -> str | None:
    """The file that was asked for where writing it failed; None for errors about other files.

    A failed write names no file at all (a full disk, say); then it is one that is still empty.
    """
    pairs = list(zip(paths, targets, strict=False))
    if error.errno is None:
        return None
    if error.filename is not None:
        where = os.fsdecode(error.filename)
        return next((str(t) for p, t in pairs if p.name in where), None)
    left = [str(t) for p, t in pairs if len(pairs) == 1 or not p.exists() or not p.stat().st_size]
    return " or ".join(left) or None


def _claim(target: Path) -> Path:
    """Create an empty file beside the target."""
    if target.is_dir():
        raise click.UsageError(f"{target}: got a folder; expected the name of a file to write")
    if target.exists() and not target.is_file():
        raise click.UsageError(
            f"{target}: got a device or pipe, which a file would replace; expected the name of a "
            "file to write"
        )
    path = target.with_name(f".{secrets.token_hex(8)}.{target.name}")
    try:
        path.open("xb").close()
    except OSError as error:
        raise click.UsageError(
            f"{target}: cannot be written ({error.strerror or error}); expected a file in an "
            "existing, writable folder"
        ) from error
    return path
