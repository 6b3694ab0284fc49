"""Provable edits of every violated VNN-COMP'22 instance.

``python -m benchmarks.fig_vnncomp run --data DATA --method auto [--limit 45] [--threads 2]
[--benchmarks a,b] [--instances REGEX] [--mode single|joint|keep] [--jobs 1] [--smoke]`` measures,
and writes ``results/vnncomp_<method>[_<mode>][_<limit>s].json`` after every case; running it again
continues, ``--fresh`` starts over. ``... plot`` draws what is in ``results``; ``... table``
rewrites the table in ``README.md`` between its markers.

Each case is what a user does: ``torch-prepared edit`` in a process of its own under hard limits of
time and memory, ``torch-prepared check`` in another, then a judge that reads the files only.
"""

from __future__ import annotations

import argparse
import json
import queue
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from benchmarks._common import DATA, FIGURES, HERE, RESULTS, SCHEMA, environment, write_json
from benchmarks._study import Settings, run_case
from benchmarks._vnncomp import (
    BENCHMARKS,
    Case,
    find_cases,
    keep_the_rest,
    merge_by_network,
)
from benchmarks._vnncomp_report import (
    LIMIT,
    draw,
    load_studies,
    markdown_table,
    replace_table,
)

__all__ = ["main", "run"]

README = HERE.parent / "README.md"
SMOKE = r"^(rl_benchmarks/cartpole|reach_prob_density/robot|tllverifybench/.*N=M=8.*_0)/"
SMOKE_CASES = 3
MODES = ("single", "joint", "keep")
SMOKE_LIMIT = 10.0


class _Study:
    """Result file of one method: rows by key, on disk after every case."""

    def __init__(self, path: Path, settings: Settings, jobs: int, fresh: bool) -> None:
        self.path, self.settings, self.jobs = path, settings, jobs
        self.rows: dict[str, dict[str, object]] = {}
        self._lock = threading.Lock()
        self._environment = environment()
        if path.exists() and not fresh:
            stored = json.loads(path.read_text())
            self.rows = {row["key"]: row for row in stored["rows"]}

    def done(self, case: Case) -> bool:
        """Whether this case, with just these property files, has a row under the same settings."""
        row = self.rows.get(self.settings.key(case))
        files = list(case.vnnlib)
        return (
            row is not None
            and row.get("properties", files) == files
            and row.get("keep", []) == list(case.keep)
        )

    def add(self, row: Mapping[str, object]) -> None:
        """Keep a row and write the file."""
        with self._lock:
            now = {"commit": self._environment["commit"], "jobs": self.jobs, "at": time.time()}
            mine = {**row, **now}
            self.rows[str(row["key"])] = mine
            write_json(
                self.path,
                {
                    "schema": SCHEMA,
                    "environment": self._environment,
                    "settings": asdict(self.settings),
                    "rows": sorted(self.rows.values(), key=lambda r: str(r["key"])),
                },
            )


def run(
    cases: Sequence[Case],
    root: Path,
    settings: Settings,
    output: Path,
    *,
    jobs: int = 1,
    fresh: bool = False,
    keep: Path | None = None,
) -> list[dict[str, object]]:
    """Measure the cases that have no row yet.

    Args:
        cases: what to measure.
        root: folder that holds the data sets.
        settings: method and limits.
        output: JSON file, rewritten after every case.
        jobs: cases at a time.
        fresh: forget the file's rows.
        keep: folder in which each case's files stay.

    Returns:
        The rows of ``cases``, those of an earlier run included. After Ctrl-C the children are
        ended, finished rows are on disk, and ``KeyboardInterrupt`` goes on.
    """
    study = _Study(output, settings, jobs, fresh)
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        if not study.done(case):
            waiting.put(case)
    stop = threading.Event()
    bar = tqdm(total=len(cases), initial=len(cases) - waiting.qsize(), unit="case")

    def work() -> None:
        while not stop.is_set():
            try:
                case = waiting.get_nowait()
            except queue.Empty:
                return
            row = _guarded(case, root, settings, stop, keep)
            if row.get("outcome") != "interrupted":
                study.add(row)
                bar.write(_line(row), file=sys.stderr)
                bar.update()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(timeout=0.2)
    except KeyboardInterrupt:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    finally:
        bar.close()
    return [study.rows[settings.key(case)] for case in cases if study.done(case)]


def _guarded(
    case: Case, root: Path, settings: Settings, stop: threading.Event, keep: Path | None
) -> dict[str, object]:
    """A row whatever happens: a fault of the harness is a failed row with its reason."""
    try:
        if keep is not None:
            folder = keep / settings.key(case)
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.iterdir():
                old.unlink()
            return run_case(case, root, settings, folder, stop)
        with tempfile.TemporaryDirectory(prefix="vnncomp-") as folder_name:
            return run_case(case, root, settings, Path(folder_name), stop)
    except Exception as error:  # noqa: BLE001 - recorded, and the study goes on
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "key": settings.key(case),
            "case": case.name,
            "benchmark": case.benchmark,
            "properties": list(case.vnnlib),
            "keep": list(case.keep),
            "certified": False,
            "outcome": "harness",
            "reason": f"harness: {type(error).__name__}: {error} ({where.name}:{where.lineno})",
        }


def _line(row: Mapping[str, object]) -> str:
    """One line for people."""
    drawdown = row.get("drawdown")
    lost = f"{drawdown['percent']:.2f} %" if isinstance(drawdown, dict) else ""
    seconds = row.get("edit_seconds")
    took = f"{seconds:.1f} s" if isinstance(seconds, float) else ""
    state = "certified" if row["certified"] else "failed"
    return f"{row['case']:70s} {state:9s} {took:>8s} lost {lost} {row.get('reason', '')}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "plot", "table"], default="run")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--method", default="auto")
    parser.add_argument("--benchmarks", default=",".join(BENCHMARKS))
    parser.add_argument("--instances", default="", help="regular expression on case names")
    parser.add_argument("--mode", choices=MODES, default="single")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for edit and check")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds until it is killed")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of address space")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--norm", default="")
    parser.add_argument("--arguments", default="", help="further options of the edit command")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--keep", type=Path, help="folder for each case's files")
    parser.add_argument("--smoke", action="store_true", help="three small cases, little data")
    return parser.parse_args()


def main() -> None:
    """Parse the command line."""
    options = _options()
    if options.command == "plot":
        draw(load_studies(options.results), options.figures)
        return
    if options.command == "table":
        replace_table(README, markdown_table(load_studies(options.results)))
        print(f"wrote the table in {README}")
        return
    cases = find_cases(
        options.data / "vnncomp2022", options.benchmarks.split(","),
        SMOKE if options.smoke and not options.instances else options.instances,
    )  # fmt: skip
    if options.mode == "joint":
        cases = merge_by_network(cases)
    elif options.mode == "keep":
        cases = keep_the_rest(cases)
    if options.smoke:
        cases = list({case.benchmark: case for case in cases}.values())[:SMOKE_CASES]
    settings = Settings(
        method=options.method,
        mode=options.mode,
        limit=min(options.limit, SMOKE_LIMIT) if options.smoke else options.limit,
        grace=options.grace,
        threads=options.threads,
        memory=int(options.memory * 2**30),
        seed=options.seed,
        norm=options.norm,
        fraction=0.02 if options.smoke else 1.0,
        arguments=tuple(shlex.split(options.arguments)),
    )
    stem = f"vnncomp_{options.method}" + ("" if options.mode == "single" else f"_{options.mode}")
    if options.limit != LIMIT:
        stem += f"_{options.limit:g}s"
    output = options.results / f"{stem}{'_smoke' if options.smoke else ''}.json"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        rows = run(
            cases, options.data, settings, output,
            jobs=options.jobs, fresh=options.fresh, keep=options.keep,
        )  # fmt: skip
    except KeyboardInterrupt:
        sys.exit(f"interrupted; run the same command again to continue {output}")
    certified = sum(bool(row["certified"]) for row in rows)
    print(f"{certified} of {len(cases)} certified; {output}")


if __name__ == "__main__":
    main()
