"""Run a Python program in several ranks as torchrun would, each with one thread."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Ranks:
    """Processes of one group."""

    processes: list[subprocess.Popen[str]]

    def finish(self, timeout: float = 120.0) -> list[tuple[int, str, str]]:
        """Exit code, standard output and error of each; none is left running."""
        try:
            told = [process.communicate(timeout=timeout) for process in self.processes]
        finally:
            self.kill()
        return [(p.returncode, *t) for p, t in zip(self.processes, told, strict=True)]

    def kill(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def start_ranks(size: int, arguments: list[str], cwd: Path = ROOT) -> Ranks:
    """Start ``python *arguments`` in ``size`` ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                env=environment,
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return Ranks(processes)
