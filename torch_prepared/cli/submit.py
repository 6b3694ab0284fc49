"""``torch-prepared submit``: the same command as a job of a scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
from tqdm import tqdm

from torch_prepared.cli._number import Number
from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish

if TYPE_CHECKING:
    from torch_prepared.cluster import JobFolder, JobSpec, Resources

__all__ = ["SubmitConfig", "command", "run_submit"]

_READ = {
    "edit": ("model", "properties", "preserve", "keep", "holdout"),
    "verify": ("model", "properties"),
    "check": ("certificate", "model", "properties"),
}
_WRITTEN = {"edit": ("output", "certificate", "report"), "verify": ("certificate",), "check": ()}
_SHARE = 0.9  #: of a job's time, for an edit that has no limit of its own


@dataclass(frozen=True)
class SubmitConfig:
    """What ``submit`` is asked to do; see the command's options."""

    words: tuple[str, ...]
    folder: Path
    cluster: str
    resources: Resources
    wait: bool = False
    settings: Settings = field(default_factory=Settings)


def run_submit(config: SubmitConfig) -> Outcome:
    """Check the command and its files, then submit it unless it runs or has an answer.

    Raises:
        click.UsageError: not a command, or options it does not have.
        PreparedError: a file that the command could not read, or a scheduler that refuses.
    """
    from torch_prepared.cluster import JobFolder, JobState, submit_job, wait_for

    spec = _checked(config)
    earlier = JobFolder(config.folder.resolve() / spec.digest).state()
    job = submit_job(config.folder, spec, config.cluster, config.resources)
    state = job.state()
    if config.wait and state is JobState.RUNNING:
        with tqdm(desc=job.digest, unit="s", disable=not config.settings.progress) as bar:
            for _ in wait_for(job):
                bar.update()
        state = job.state()
    return _told(job, state, earlier in (JobState.NEW, JobState.FAILED))


def _checked(config: SubmitConfig) -> JobSpec:
    """The job of a command, after reading all that the command will read.

    The job's name follows the command as given; what is added to it stays the same.
    """
    from torch_prepared.cli.main import command_line
    from torch_prepared.cluster import JobSpec

    words, context = list(config.words), click.get_current_context()
    found = command_line.get_command(context, words[0]) if words and words[0] in _READ else None
    if found is None:
        raise click.UsageError(
            f"got command {' '.join(words[:1]) or 'none'!r}; expected one of {', '.join(_READ)}, "
            "after --"
        )
    with found.make_context(words[0], list(words[1:])) as parsed:
        options = dict(parsed.params)
    inputs = _paths(options, _READ[words[0]])
    _read(words[0], options, inputs)
    words = [*words, *(["--json"] if not options.get("as_json") else [])]
    if options.get("threads") is None:
        words += ["--threads", str(config.resources.cpus)]
    if words[0] == "edit" and options.get("time_limit") is None:
        words += ["--time-limit", f"{_SHARE * 60 * config.resources.minutes:g}"]
    outputs = _paths(options, _WRITTEN[words[0]])
    plain = JobSpec.of(words, inputs, outputs)
    if words[0] != "edit" or options.get("checkpoint") is not None:
        return plain
    notes = config.folder.resolve() / "checkpoints" / plain.digest
    return JobSpec.of([*words, "--checkpoint", str(notes)], inputs, outputs)


def _paths(options: dict[str, object], names: Sequence[str]) -> list[Path]:
    """The files among a command's options."""
    found: list[Path] = []
    for name in names:
        value = options.get(name)
        found += [value] if isinstance(value, Path) else []
        found += [v for v in value if isinstance(v, Path)] if isinstance(value, tuple) else []
    return found


def _read(name: str, options: dict[str, object], inputs: Sequence[Path]) -> None:
    """Read what the command will read, so that a bad file is refused now and not in the queue."""
    from torch_prepared.certify import Certificate
    from torch_prepared.cli._inputs import load_network, load_properties, load_reference

    network = load_network(_paths(options, ("model",))[0])
    load_properties(_paths(options, ("properties", "keep", "holdout")), network)
    if isinstance(preserve := options.get("preserve"), Path):
        load_reference(preserve)
    if name == "check":
        Certificate.load(inputs[0])


def _told(job: JobFolder, state: object, submitted: bool) -> Outcome:
    """What is printed of a job, with the exit code of its answer when it has one."""
    result, known = job.result(), job.submission()
    name = getattr(state, "value", "unknown")
    data = {
        "status": name,
        "submitted": submitted,
        "job": job.digest,
        "folder": job.path,
        "cluster": known.get("cluster"),
        "id": known.get("id"),
        "result": result,
    }
    if result is None:
        where = f"{known.get('cluster')} job {known.get('id')}, {job.path}"
        if name == "failed":
            reason = f"FAILED without a result ({where}); submit it again to go on"
            return Outcome(ExitCode.UNKNOWN, data, reason)
        verb = "SUBMITTED" if submitted else "RUNNING"
        return Outcome(ExitCode.PROVED, data, f"{verb} {job.digest}: {where}")
    status = "no answer"
    if isinstance(result.outcome, dict):
        status = str(result.outcome.get("status", "no answer"))
    verb = "FINISHED" if name == "finished" else "FAILED"
    text = f"{verb} {job.digest} in {result.seconds:.1f} s on {result.host}: {status}"
    text += f" ({result.error})" if result.error else ""
    known_codes = {int(code) for code in ExitCode}
    code = ExitCode(result.code) if result.code in known_codes else ExitCode.UNKNOWN
    return Outcome(code, data, text)


@click.command("submit", context_settings={"ignore_unknown_options": False})
@click.option("--folder", type=FILE, default=Path("jobs"), show_default=True, help="Of all jobs.")
@click.option(
    "--cluster",
    type=click.Choice(["slurm", "local"]),
    help="Scheduler; by default Slurm where there is one, else processes on this machine.",
)
@click.option(
    "--time",
    "minutes",
    type=Number(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Minutes of wall time.",
)
@click.option("--cpus-per-task", type=click.IntRange(1, 4096), default=1, show_default=True)
@click.option("--gpus", type=click.IntRange(0, 64), default=0, show_default=True, help="Per node.")
@click.option("--nodes", type=click.IntRange(1, 4096), default=1, show_default=True)
@click.option(
    "--ranks",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Processes per node that share one edit, by torchrun.",
)
@click.option("--partition", help="Of Slurm.")
@click.option("--wait", is_flag=True, help="Wait for the result; interrupting leaves the job.")
@click.argument("words", metavar="-- COMMAND...", nargs=-1, type=click.UNPROCESSED)
@common_options
def command(
    settings: Settings,
    folder: Path,
    cluster: str | None,
    minutes: float,
    cpus_per_task: int,
    gpus: int,
    nodes: int,
    ranks: int,
    partition: str | None,
    wait: bool,
    words: tuple[str, ...],
) -> None:
    """Run COMMAND (edit, verify or check, with its options) as a job.

    Files are checked before. A job is named after its command, the content of its files and the
    versions: the same line reports a running job, prints the result of a finished one and submits
    a failed one again, whose edit goes on from its checkpoint. Exit code 0 after submitting; once
    there is a result, that of the command.
    """
    from torch_prepared.cluster import Resources, available_cluster

    resources = Resources(
        minutes=math.ceil(minutes),
        cpus=cpus_per_task,
        gpus=gpus,
        nodes=nodes,
        ranks=ranks,
        partition=partition,
    )
    if ranks * nodes > 1 and words[:1] != ("edit",):
        raise click.UsageError("--ranks, --nodes: only edit shares its work; expected 1")
    config = SubmitConfig(words, folder, cluster or available_cluster(), resources, wait, settings)
    finish(run_submit(config), settings.json)
