"""Bounds of real networks: seconds, memory and mean width beside auto_LiRPA, and a roofline.

``python -m benchmarks.fig_bounds run --data ../shared/data [--auto-lirpa PATH] [--smoke]`` writes
``benchmarks/results/bounds.json``, a row as soon as it is measured; ``... plot`` draws it from the
JSON alone, and ``... table`` prints ratios and the roofline. ``PATH`` is a source tree of
auto_LiRPA; without it the installed release is used. Each engine runs in a process of its own, one
after the other, under the same limits of wall seconds and address space. A time-out, a refusal or
a lack of memory is a row with its reason; an engine that failed at one batch size is not tried at
larger ones. The same command continues an interrupted run (``--fresh`` starts over), and stops
after ``--minutes`` with what it has.

Times are the least of the repeats after one warm-up, or of the only call where that took long:
CPU time with one thread, which is the wall time of an idle machine, else wall time. The roofline
(``_roofline``) divides operations and bytes that CROWN cannot avoid by the seconds it took, beside
a matrix product and a copy measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import _figure
from benchmarks._bounds_case import ITERATIONS, LEARNING_RATE, METHODS
from benchmarks._bounds_networks import NETWORKS
from benchmarks._bounds_report import plot, table, times
from benchmarks._common import HERE, SCHEMA, environment, settings_digest, write_json

ENGINES = ("ours", "auto_lirpa")
BATCHES = {"acasxu_1_1": (1, 64, 512, 4096), "resnet_17m": (1, 2)}
USUAL_BATCHES = (1, 8, 64, 512)
MAX_MEMORY = 1 << 30  # bytes that one backward pass of ours may take
NOT_RUN = "not run: failed at batch"
Row = dict[str, object]


def _cases(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    if options.smoke:
        yield from (("tiny", method, 2) for method in METHODS)
        return
    for method in options.methods:
        for network in options.networks or [n for n in NETWORKS if n != "tiny"]:
            for batch in BATCHES.get(network, USUAL_BATCHES):
                if batch <= options.max_batch:
                    yield network, method, batch


def _measure(
    engine: str, network: str, method: str, batch: int, options: argparse.Namespace
) -> Row:
    """One process; ``failure`` tells why there are no numbers."""
    command = [
        sys.executable, "-m", "benchmarks._bounds_case", engine, network, method, str(batch),
        "--data", str(options.data), "--threads", str(options.threads),
        "--max-memory", str(MAX_MEMORY),
    ]  # fmt: skip
    if options.auto_lirpa is not None:
        command += ["--auto-lirpa", str(options.auto_lirpa)]
    row: Row = {"network": network, "method": method, "batch": batch, "engine": engine}
    limit = int(options.memory_gb * 2**30)
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, capture_output=True, check=False, timeout=options.limit,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )  # fmt: skip
    except subprocess.TimeoutExpired as stopped:
        found = _numbers(stopped.stdout)
        return row | (found or {"failure": f"more than {options.limit:g} s"})
    found = _numbers(done.stdout)
    if done.returncode and not found:
        lines = [line for line in done.stderr.decode().splitlines() if line.strip()]
        return row | {"failure": lines[-1][:160] if lines else f"exit status {done.returncode}"}
    return row | found


def _numbers(output: bytes | None) -> Row:
    """What a case printed, all complete lines together; later ones replace earlier ones."""
    found: Row = {}
    for line in (output or b"").decode().splitlines(keepends=True):
        if line.startswith("{") and line.endswith("\n"):
            found |= json.loads(line)
    return found


def _head(options: argparse.Namespace) -> Row:
    settings: Row = {
        "threads": options.threads,
        "limit_seconds": options.limit,
        "memory_gb": options.memory_gb,
        "max_memory": MAX_MEMORY,
        "iterations": ITERATIONS,
        "learning_rate": LEARNING_RATE,
        "auto_lirpa": "source tree" if options.auto_lirpa else "installed",
    }
    return {"schema": SCHEMA, **environment(), **settings, "digest": settings_digest(settings)}


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in ("network", "method", "batch", "engine"))


def _earlier(output: Path, digest: object) -> list[Row]:
    """Rows of an interrupted run with the same settings."""
    try:
        record = json.loads(output.read_text())
    except (OSError, ValueError):
        return []
    return list(record["rows"]) if record.get("digest") == digest else []


def run(options: argparse.Namespace, output: Path) -> None:
    """Measure all cases that have no row yet, writing the JSON after each."""
    head, end = _head(options), time.monotonic() + 60 * options.minutes
    rows = [] if options.fresh else _earlier(output, head["digest"])
    known = {_key(row) for row in rows}
    for network, method, batch in _cases(options):
        for engine in ENGINES:
            key = (network, method, batch, engine)
            if key in known:
                continue
            if time.monotonic() > end:
                print("time is over; the same command continues", file=sys.stderr)
                return
            failed = [r["batch"] for r in rows if (*_key(r)[:2], r["engine"]) == (*key[:2], engine)
                      and "failure" in r and int(str(r["batch"])) < batch]  # fmt: skip
            if failed:
                row = {"network": network, "method": method, "batch": batch, "engine": engine,
                       "failure": f"{NOT_RUN} {failed[0]}"}  # fmt: skip
            else:
                row = _measure(engine, network, method, batch, options)
            rows.append(row)
            write_json(output, {**head, "rows": rows})
            print(_line(row, options.threads), file=sys.stderr, flush=True)


def _line(row: Row, threads: int) -> str:
    name = f"{row['network']:12s} {row['method']:11s} {row['batch']:5d} {row['engine']:10s}"
    if "failure" in row:
        return f"{name} {row['failure']}"
    seconds = float(str(row[times(threads)]))
    return f"{name} {seconds:10.4f} s  {row['memory_mb']:8.0f} MB  width {row['width']:.6g}"


def main() -> None:
    """Parse the command line."""
    commands = ("run", "plot", "table", "all")
    parser = _figure.make_parser(__doc__, commands=commands, threads=1, data="vnncomp2022")
    parser.add_argument("--auto-lirpa", type=Path, help="source tree of auto_LiRPA")
    parser.add_argument("--networks", type=lambda text: text.split(","))
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--max-batch", type=int, default=4096)
    parser.add_argument("--limit", type=float, default=60.0, help="wall seconds of a process")
    parser.add_argument("--minutes", type=float, default=45.0, help="of the whole run")
    parser.add_argument("--memory-gb", type=float, default=10.0, help="address space of a process")
    parser.add_argument("--fresh", action="store_true", help="measure again what has a row")
    options = _figure.parse(parser, "bounds")
    if options.command in ("run", "all"):
        run(options, options.output)
    if options.command in ("plot", "all"):
        plot(options.output, options.figure)
    if options.command in ("table", "all"):
        print(table(options.output))


if __name__ == "__main__":
    main()
