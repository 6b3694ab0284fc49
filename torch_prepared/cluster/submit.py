"""Jobs through submitit: Slurm, or processes on this machine."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch_prepared.cluster.job import JobFolder, JobResult, JobSpec, JobState, Resources
from torch_prepared.errors import ClusterError, MissingDependencyError

__all__ = ["available_cluster", "run_job", "submit_job", "wait_for"]

_CODES = {"certified": 0, "proved": 0, "refuted": 10, "violated": 10, "error": 2}
_FIRST_PORT, _PORTS = 20_000, 20_000


def available_cluster() -> str:
    """``"slurm"`` where jobs can be given to it, else ``"local"``."""
    return "slurm" if shutil.which("sbatch") else "local"


def submit_job(folder: Path, spec: JobSpec, cluster: str, resources: Resources) -> JobFolder:
    """Submit a job unless it runs or has an answer; ask its ``state`` for which of them.

    Args:
        folder: of all jobs.
        spec: what to compute.
        cluster: ``"slurm"`` or ``"local"``.
        resources: what it needs.

    Raises:
        ClusterError: the scheduler refuses it.
        MissingDependencyError: submitit is not installed.
    """
    job = JobFolder(folder.resolve() / spec.digest)
    with _turn(job.path):
        if job.state() in (JobState.FINISHED, JobState.RUNNING):
            return job
        (job.path / "result.json").unlink(missing_ok=True)
        listed = {"command": list(spec.command), "outputs": list(spec.outputs)}
        listed = {"command": list(spec.command), "outputs": list(spec.outputs)}
        job.write("job", {**dataclasses.asdict(spec), **listed})
        number = _submit(job, cluster, resources)
        job.write(
            "submission",
            {"cluster": cluster, "id": number, "host": socket.gethostname(), "time": time.time()},
        )
    return job


def _submit(job: JobFolder, cluster: str, resources: Resources) -> str:
    """Hand it to submitit; the scheduler's number of it."""
    try:
        import submitit
    except ImportError as error:
        raise MissingDependencyError(
            "submit: submitit is not installed; pip install 'torch-prepared[cluster]'"
        ) from error
    executor = submitit.AutoExecutor(job.path / "log", cluster=cluster)
    executor.update_parameters(
        name=f"prepared-{job.digest[:8]}",
        timeout_min=resources.minutes,
        cpus_per_task=resources.cpus * resources.ranks,
        gpus_per_node=resources.gpus,
        nodes=resources.nodes,
        tasks_per_node=1,
    )
    if cluster == "slurm" and resources.partition is not None:
        executor.update_parameters(slurm_partition=resources.partition)
    try:
        number = executor.submit(run_job, str(job.path), resources).job_id
    except (submitit.core.utils.FailedJobError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise ClusterError(f"submit: {cluster} refuses the job ({text})") from error
    return str(number)


def run_job(path: str, resources: Resources) -> None:
    """Run a job's command here, on the first of several nodes with its result written."""
    job = JobFolder(Path(path))
    spec, first, clock = job.spec(), True, time.monotonic()
    command = [sys.executable, "-m", "torch_prepared", *spec.command]
    if resources.nodes * resources.ranks > 1:
        launcher, first = _torchrun(resources)
        command = [sys.executable, "-m", *launcher, "-m", "torch_prepared", *spec.command]
    environment = {**os.environ, "OMP_NUM_THREADS": str(resources.cpus)}
    if not first:
        subprocess.run(command, cwd=spec.folder, env=environment, check=False)
        return
    with job.running():
        done = subprocess.run(
            command, cwd=spec.folder, env=environment, capture_output=True, text=True, check=False
        )
        outcome, code = _outcome(done.stdout), done.returncode
        if code and len(command) > 3 + len(spec.command) and isinstance(outcome, dict):
            code = _CODES.get(str(outcome.get("status")), 20)  # torchrun's own code is always 1
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        tail = (errors or done.stderr.splitlines() or [""])[0 if errors else -1]
        seconds = time.monotonic() - clock
        result = JobResult(code, outcome, seconds, socket.gethostname(), tail if code else "")
        job.write("result", dataclasses.asdict(result))


def wait_for(job: JobFolder, interval: float = 1.0) -> Iterator[JobState]:
    """States of a job, every ``interval`` seconds until it no longer runs."""
    while (state := job.state()) is JobState.RUNNING:
        yield state
        time.sleep(interval)
    yield state


def _torchrun(resources: Resources) -> tuple[list[str], bool]:
    """Module and options of torchrun on this node, and whether it is the first one."""
    import submitit

    options = ["torch.distributed.run", f"--nproc-per-node={resources.ranks}"]
    if resources.nodes == 1:
        return [*options, "--standalone"], True
    here = submitit.JobEnvironment()
    port = _FIRST_PORT + int("".join(c for c in here.job_id if c.isdigit())[-6:]) % _PORTS
    options += [
        f"--nnodes={here.num_nodes}",
        f"--node-rank={here.node}",
        f"--master-addr={here.hostnames[0]}",
        f"--master-port={port}",
    ]
    return options, here.node == 0


def _outcome(text: str) -> object:
    """The last line of standard output, when it is JSON."""
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Let one process at a time decide whether to submit a job."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with (path / "submit.lock").open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise ClusterError(
            f"{path}: cannot be written ({error.strerror}); expected a writable folder"
        ) from error
