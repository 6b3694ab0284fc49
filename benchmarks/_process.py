"""Child processes under hard limits of memory and wall time."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Finished", "run_limited"]

_TAIL = 4000


@dataclass(frozen=True)
class Finished:
    """How a child ended.

    Args:
        code: exit status; negative signal number when killed.
        seconds: wall time from start to end.
        peak_bytes: largest resident memory of the child.
        stdout: all of standard output.
        stderr: the end of standard error.
        outcome: ``"done"``, ``"timeout"`` (killed at the wall limit) or ``"interrupted"``.
    """

    code: int
    seconds: float
    peak_bytes: int
    stdout: str
    stderr: str
    outcome: str


def run_limited(
    command: Sequence[str],
    *,
    seconds: float,
    memory: int,
    stop: threading.Event | None = None,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run a command in its own process group and wait for it.

    Args:
        command: program and arguments.
        seconds: wall limit; the group is killed when it is reached.
        memory: bytes of address space the child may map; allocations beyond fail inside it.
        stop: kills the group as soon as it is set.
        environment: variables added to this process's own.
    """

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    start = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            env={**os.environ, **(environment or {})}, start_new_session=True, preexec_fn=restrict,
        )  # fmt: skip
        outcome, status, usage = _wait(child.pid, start + seconds, stop)
        child.returncode = os.waitstatus_to_exitcode(status)
        elapsed = time.monotonic() - start
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
    return Finished(
        code=child.returncode,
        seconds=elapsed,
        peak_bytes=usage.ru_maxrss * 1024,
        stdout=texts[0],
        stderr=texts[1][-_TAIL:],
        outcome=outcome,
    )


def _wait(
    pid: int, deadline: float, stop: threading.Event | None
) -> tuple[str, int, resource.struct_rusage]:
    """Poll until the child ends; kill its group at the deadline, on ``stop`` or on Ctrl-C."""
    outcome = "done"
    pause = 0.01
    try:
        while True:
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if found:
                return outcome, status, usage
            stopped = stop is not None and stop.is_set()
            if stopped or time.monotonic() > deadline:
                outcome = "interrupted" if stopped else "timeout"
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
    except KeyboardInterrupt:
        _kill(pid)
        os.wait4(pid, 0)
        raise
    _kill(pid)
    _, status, usage = os.wait4(pid, 0)
    return outcome, status, usage


def _kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
