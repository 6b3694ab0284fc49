"""Commands that ``torchrun`` starts in several ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from torch_prepared.cli._outcome import ExitCode
from torch_prepared.errors import ClusterError, InfeasibleEditError, PreparedError

if TYPE_CHECKING:
    from torch_prepared.cluster import RankTeam

__all__ = ["command_team"]


@contextmanager
def command_team() -> Iterator[RankTeam | None]:
    """The ranks that were started with this one; None when it is alone.

    What the leader raised is reported by the leader; its helpers only leave with the same code.

    Raises:
        ClusterError: a rank is gone or silent, or this one was told to stop.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    # Imported here so that commands in one process need not wait for it.
    from torch_prepared.cluster import TOLD, join_team

    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        with join_team() as team:
            yield team
    except PreparedError as error:
        previous = signal.SIG_IGN  # a launcher's signal must not hide our own exit code
        if TOLD not in getattr(error, "__notes__", ()):
            raise
        unknown = isinstance(error, InfeasibleEditError)
        code = ExitCode.UNKNOWN if unknown else ExitCode.USAGE
        raise click.exceptions.Exit(int(code)) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(number: int, frame: FrameType | None) -> None:
    """Launchers end the other ranks by this signal when one has failed."""
    raise ClusterError(
        "stopped by the launcher: another rank failed, or the job was canceled; see that rank's "
        "own message"
    )
