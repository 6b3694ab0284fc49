"""``torch-prepared collect``: the results of all jobs of a folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish, to_plain
from torch_prepared.cli._staging import staged_files

if TYPE_CHECKING:
    from torch_prepared.cluster import Collected

__all__ = ["command", "run_collect"]

_ORDER = (ExitCode.REFUTED, ExitCode.UNKNOWN, ExitCode.PROVED)  #: which code speaks for all


def run_collect(folder: Path, output: Path | None) -> Outcome:
    """Merge results, and report jobs without one.

    Raises:
        ClusterError: no jobs there, or a damaged file.
        click.UsageError: an output that cannot be written.
    """
    from torch_prepared.cluster import collect_jobs

    jobs = collect_jobs(folder)
    answers = [_answer(job) for job in jobs]
    counts = Counter(answers)
    code = next(c for c in _ORDER if c in {_code(job) for job in jobs})
    data = {
        "status": {ExitCode.PROVED: "proved", ExitCode.REFUTED: "refuted"}.get(code, "unknown"),
        "jobs": jobs,
        "counts": dict(sorted(counts.items())),
    }
    if output is not None:
        with staged_files([output], []) as staged:
            staged.paths[0].write_text(json.dumps(to_plain(data), indent=1) + "\n")
            staged.commit()
    return Outcome(code, data, _describe(jobs, answers, counts, output))


def _code(job: Collected) -> ExitCode:
    """What a job says: refuted, unknown (failed and unfinished ones too), or proved."""
    if job.state.value != "finished" or job.result is None:
        return ExitCode.UNKNOWN
    known = {int(code): code for code in _ORDER}
    return known.get(job.result.code, ExitCode.UNKNOWN)


def _answer(job: Collected) -> str:
    """One word for a job."""
    if job.state.value != "finished" or job.result is None:
        return job.state.value
    outcome = job.result.outcome
    return str(outcome.get("status", "unknown")) if isinstance(outcome, dict) else "unknown"


def _describe(
    jobs: Sequence[Collected], answers: Sequence[str], counts: Counter[str], output: Path | None
) -> str:
    lines = [", ".join(f"{count} {word}" for word, count in sorted(counts.items()))]
    for job, answer in zip(jobs, answers, strict=True):
        line = f"  {job.digest} {answer}"
        if job.result is not None:
            line += f" in {job.result.seconds:.1f} s"
            line += f" ({job.result.error})" if job.result.error else ""
        lines.append(f"{line}: {' '.join(job.command)}")
    if output is not None:
        lines.append(f"  written      {output}")
    return "\n".join(lines)


@click.command("collect")
@click.argument("folder", type=FILE)
@click.option("-o", "--output", type=FILE, help="Write all results here (.json).")
@common_options
def command(settings: Settings, folder: Path, output: Path | None) -> None:
    """Merge the results of all jobs of FOLDER; report failed and unfinished ones.

    Exit code 10 if one is refuted, else 20 if one is unknown, failed or unfinished, else 0.
    """
    finish(run_collect(folder, output), settings.json)
