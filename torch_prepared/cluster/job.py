"""A job: one command line with the content of what it reads, in a folder named after both."""

from __future__ import annotations

import enum
import fcntl
import hashlib
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch_prepared._version import __version__
from torch_prepared.certify.encoding import canonical, read_json, write_json
from torch_prepared.errors import CertificateError, ClusterError, SpecError

__all__ = ["JobFolder", "JobResult", "JobSpec", "JobState", "Resources"]

SETTLED = (0, 10, 20)  #: exit codes of answers; others are failures
_PACKAGES = ("torch", "numpy")


@dataclass(frozen=True)
class Resources:
    """What a job needs; no part of its name.

    Args:
        minutes: wall time.
        cpus: per rank.
        gpus: per node.
        nodes: machines.
        ranks: processes per node that share one edit.
        partition: of the scheduler; None leaves it to it.
    """

    minutes: int = 60
    cpus: int = 1
    gpus: int = 0
    nodes: int = 1
    ranks: int = 1
    partition: str | None = None


@dataclass(frozen=True)
class JobSpec:
    """What is to be computed.

    Args:
        command: words after ``torch-prepared``.
        folder: in which it runs.
        inputs: SHA-256 of the files it reads, by the path given.
        outputs: paths of the files it writes.
        versions: of this package and of those that decide its numbers.
    """

    command: tuple[str, ...]
    folder: str
    inputs: Mapping[str, str]
    outputs: tuple[str, ...]
    versions: Mapping[str, str]

    @classmethod
    def of(
        cls,
        command: Sequence[str],
        inputs: Sequence[Path],
        outputs: Sequence[Path] = (),
        folder: Path | None = None,
    ) -> JobSpec:
        """The job of a command as it would run now.

        Raises:
            SpecError: an input cannot be read.
        """
        base = (Path.cwd() if folder is None else folder).resolve()
        versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
        versions |= {"torch_prepared": __version__, "python": platform.python_version()}
        return cls(
            tuple(command),
            str(base),
            {str(path): _file_digest(base / path) for path in inputs},
            tuple(str(path) for path in outputs),
            versions,
        )

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with command, inputs or versions."""
        known = [list(self.command), self.folder, dict(self.inputs), dict(self.versions)]
        return hashlib.sha256(canonical(known)).hexdigest()[:16]

    @property
    def complete(self) -> bool:
        """Whether every file it writes is there."""
        return all((Path(self.folder) / path).exists() for path in self.outputs)


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Args:
        code: exit code of the command.
        outcome: what it printed with ``--json``; None when that is no JSON.
        seconds: wall time.
        host: where it ran.
        error: last line on standard error, for failures.
    """

    code: int
    outcome: object
    seconds: float
    host: str
    error: str


class JobState(enum.Enum):
    """Where a job stands."""

    NEW = "new"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True)
class JobFolder:
    """All that is known of one job, on disk; every file is written whole or not at all.

    ``job.json`` says what it computes, ``submission.json`` who runs it, ``result.json`` what came
    of it; ``checkpoint`` is where an edit notes its progress, ``log`` the scheduler's own.
    """

    path: Path

    @property
    def digest(self) -> str:
        """Name of the job."""
        return self.path.name

    def spec(self) -> JobSpec:
        """What it computes.

        Raises:
            ClusterError: the file is missing, damaged or of another job.
        """
        data = _read(self.path / "job.json", ("command", "folder", "inputs", "outputs", "versions"))
        try:
            spec = JobSpec(
                tuple(map(str, cast("list[object]", data["command"]))),
                str(data["folder"]),
                dict(cast("dict[str, str]", data["inputs"])),
                tuple(map(str, cast("list[object]", data["outputs"]))),
                dict(cast("dict[str, str]", data["versions"])),
            )
            same = spec.digest == self.digest
        except (TypeError, ValueError) as error:
            raise ClusterError(f"{self.path / 'job.json'}: malformed ({error})") from error
        if not same:
            raise ClusterError(f"{self.path / 'job.json'}: describes another job; remove it")
        return spec

    def submission(self) -> dict[str, object]:
        """Scheduler and number of the last submission; empty when there was none."""
        path = self.path / "submission.json"
        return _read(path, ("cluster", "id", "host", "time")) if path.exists() else {}

    def result(self) -> JobResult | None:
        """How it ended; None when it has not.

        Raises:
            ClusterError: a damaged file.
        """
        path = self.path / "result.json"
        if not path.exists():
            return None
        data = _read(path, ("code", "outcome", "seconds", "host", "error"))
        code, seconds = data["code"], data["seconds"]
        if not isinstance(code, int) or not isinstance(seconds, (int, float)):
            raise ClusterError(f"{path}: malformed; remove it to run the job again")
        return JobResult(
            code, data["outcome"], float(seconds), str(data["host"]), str(data["error"])
        )

    def write(self, name: str, data: Mapping[str, object]) -> None:
        """Write one of its files, whole or not at all."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / f"{name}.json", dict(data))

    def state(self) -> JobState:
        """Where it stands; a job that vanished without a result has failed."""
        result = self.result()
        if result is not None:
            settled = result.code in SETTLED and (result.code != 0 or self.spec().complete)
            return JobState.FINISHED if settled else JobState.FAILED
        if not (known := self.submission()):
            return JobState.NEW
        return JobState.RUNNING if self._alive(known) else JobState.FAILED

    def _alive(self, known: Mapping[str, object]) -> bool:
        """Whether the scheduler still has it, or a local process holds its lock."""
        if known["cluster"] == "slurm":
            return slurm_has(str(known["id"]))
        starting = time.time() - float(cast("float", known["time"])) < STARTING
        return starting or self.locked()

    def locked(self) -> bool:
        """Whether a process on this file system runs it."""
        try:
            with self.running():
                return False
        except BlockingIOError:
            return True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold its lock, which the system takes back however the process ends.

        Raises:
            BlockingIOError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield


STARTING = 20.0  #: seconds within which a local job must have taken its lock


def slurm_has(number: str) -> bool:
    """Whether the queue of Slurm still holds a job.

    Raises:
        ClusterError: Slurm does not answer.
    """
    try:
        found = subprocess.run(
            ["squeue", "--noheader", "--format=%T", f"--jobs={number}"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"squeue: does not answer ({error}); expected Slurm here") from error
    if found.returncode and "Invalid job id" not in found.stderr:
        raise ClusterError(f"squeue: {' '.join(found.stderr.split())[:160]}")
    return bool(found.stdout.strip())


def _read(path: Path, names: Sequence[str]) -> dict[str, object]:
    """An object with the given fields, from a file that is not trusted."""
    try:
        data = read_json(path)
    except CertificateError as error:
        raise ClusterError(f"{error}; remove the job's folder to start anew") from error
    if not isinstance(data, dict) or set(data) != set(names):
        raise ClusterError(f"{path}: expected an object with {', '.join(names)}")
    return data


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from error
