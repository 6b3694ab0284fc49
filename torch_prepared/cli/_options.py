"""Options that every command has."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import click

__all__ = ["FILE", "Settings", "common_options"]

FILE = click.Path(path_type=Path)
"""A path that the reader or writer itself checks, with its own message."""

P = ParamSpec("P")
R = TypeVar("R")
Function = TypeVar("Function", bound=Callable[..., object])


@dataclass(frozen=True)
class Settings:
    """Choices common to all commands.

    Args:
        json: print one JSON object instead of text.
        seed: of everything random.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads; None leaves the libraries' default.
        verbose: 1 logs progress on standard error, 2 details.
    """

    json: bool = False
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None
    verbose: int = 0

    @property
    def progress(self) -> bool:
        """Whether a bar on standard error would be seen."""
        return sys.stderr.isatty() and not self.verbose

    def apply(self) -> None:
        """Set up threads, logging and the device for this process.

        Raises:
            click.UsageError: ``cuda`` was asked for and there is none.
        """
        if self.threads is not None:  # read when the numerical libraries are first loaded
            for library in ("OMP", "OPENBLAS", "MKL"):
                os.environ.setdefault(f"{library}_NUM_THREADS", str(self.threads))
        import torch  # here, so that help and usage errors need not wait for it

        if self.device == "cuda" and not torch.cuda.is_available():
            raise click.UsageError(
                "--device: got cuda, but torch sees no CUDA device; expected cpu here"
            )
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        logger = logging.getLogger("torch_prepared")
        for handler in [h for h in logger.handlers if h.get_name() == "cli"]:
            logger.removeHandler(handler)
        if self.verbose:
            handler = logging.StreamHandler(sys.stderr)
            handler.set_name("cli")
            handler.setFormatter(logging.Formatter("%(relativeCreated)7.0f ms %(message)s"))
            logger.addHandler(handler)
            logger.setLevel(logging.INFO if self.verbose == 1 else logging.DEBUG)


def common_options(function: Callable[Concatenate[Settings, P], R]) -> Callable[..., R]:
    """Add the common options to a command; it receives them as one :class:`Settings` first."""

    @functools.wraps(function)
    def command(
        as_json: bool,
        seed: int,
        device: str,
        threads: int | None,
        verbose: int,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        settings = Settings(as_json, seed, device, threads, verbose)
        settings.apply()
        return function(settings, *args, **kwargs)

    options = (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu"),
        click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads."),
        click.option("-v", "--verbose", count=True, help="Log to standard error."),
    )
    decorated: Callable[..., R] = command
    for option in reversed(options):
        decorated = option(decorated)
    return decorated
