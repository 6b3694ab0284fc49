"""The console script ``torch-prepared``: the tree of commands, and errors in one line."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from torch_prepared._version import __version__
from torch_prepared.cli._outcome import ExitCode
from torch_prepared.errors import InfeasibleEditError, PreparedError

__all__ = ["command_line", "main", "share_cores"]

_COMMANDS = (
    "edit",
    "verify",
    "check",
    "invert",
    "interpret",
    "report",
    "calibrate",
    "pointwise",
    "audit",
    "submit",
    "collect",
    "info",
    "demo",
)
_JSON = "torch_prepared.json"
_SPINS = "10000"  #: turns of a loop that an idle thread waits before it sleeps


class CommandError(click.ClickException):
    """A failure told in one line on standard error, and as JSON where that was asked for."""

    def __init__(self, message: str, code: ExitCode, as_json: bool) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = int(code)  # type: ignore[misc]  # click's own subclasses set it likewise
        self.as_json = as_json

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        click.echo(f"error: {self.message}", err=True)
        if self.as_json:
            status = "unknown" if self.exit_code == ExitCode.UNKNOWN else "error"
            click.echo(json.dumps({"status": status, "error": self.message}))


class CommandTree(click.Group):
    """Commands by the name of their module in this package, imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None when there is none of that name."""
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"torch_prepared.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Note whether JSON was asked for, as parsing the command's own options may fail."""
        ctx.meta[_JSON] = "--json" in args
        with _one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; every expected failure becomes one line."""
        with _one_line(ctx):
            result: object = super().invoke(ctx)
            return result


@contextmanager
def _one_line(ctx: click.Context) -> Iterator[None]:
    """Turn errors that people can act upon into :class:`CommandError`."""
    as_json = bool(ctx.meta.get(_JSON))
    try:
        yield
    except (CommandError, click.exceptions.NoArgsIsHelpError, BrokenPipeError):
        raise
    except click.ClickException as error:
        raise CommandError(
            _where(error) + error.format_message(), ExitCode.USAGE, as_json
        ) from error
    except InfeasibleEditError as error:
        raise CommandError(str(error), ExitCode.UNKNOWN, as_json) from error
    except PreparedError as error:
        raise CommandError(str(error), ExitCode.USAGE, as_json) from error
    except OSError as error:
        where = error.filename or "file system"
        message = f"{where}: {error.strerror or error}; nothing was written"
        raise CommandError(message, ExitCode.USAGE, as_json) from error
    except MemoryError as error:
        message = "out of memory; use a smaller network or fewer properties at once"
        raise CommandError(message, ExitCode.UNKNOWN, as_json) from error
    except KeyboardInterrupt as error:
        raise CommandError("interrupted", ExitCode.INTERRUPTED, as_json) from error


def _where(error: click.ClickException) -> str:
    """The command whose options were misread; nothing for errors that name their own place."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    return "" if context is None else f"{context.command_path}: "


@click.group(cls=CommandTree, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def command_line() -> None:
    """Change a neural network so that it provably satisfies properties.

    Exit codes: 0 proved or certified, 10 refuted (a violating input is printed),
    20 unknown or out of time, 2 bad input or usage, 130 interrupted.
    """


def share_cores() -> None:
    """Let idle threads of GNU OpenMP give up their core soon; to be called before torch is loaded.

    By default they spin much longer. Where two processes want the same cores, each then waits for
    threads that the other's spinning threads keep from running.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def main() -> None:
    """Entry point of the console script."""
    share_cores()
    try:
        command_line(prog_name="torch-prepared")
    except SystemExit as end:
        if end.code == ExitCode.INTERRUPTED:  # solvers' threads may still use what exit destroys
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ExitCode.INTERRUPTED)
        raise
