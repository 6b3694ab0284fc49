"""Results of many jobs as one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch_prepared.cluster.job import JobFolder, JobResult, JobState
from torch_prepared.errors import ClusterError

__all__ = ["Collected", "collect_jobs"]


@dataclass(frozen=True)
class Collected:
    """One job as it stands.

    Args:
        digest: its name.
        command: words after ``torch-prepared``.
        state: where it stands.
        result: how it ended.
    """

    digest: str
    command: tuple[str, ...]
    state: JobState
    result: JobResult | None


def collect_jobs(folder: Path) -> tuple[Collected, ...]:
    """All jobs of a folder, by name.

    Raises:
        ClusterError: there is no such folder, no job in it, or a job's file is damaged.
    """
    found = sorted(path.parent for path in folder.glob("*/job.json"))
    if not found:
        raise ClusterError(f"{folder}: holds no jobs; expected the folder given to `submit`")
    jobs = [JobFolder(path) for path in found]
    return tuple(Collected(j.digest, j.spec().command, j.state(), j.result()) for j in jobs)
