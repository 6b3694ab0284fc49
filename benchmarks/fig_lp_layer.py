"""Differentiable projections and 1-norm programs: ours against cvxpylayers' backends and qpth.

``python -m benchmarks.fig_lp_layer run [--limit 30] [--select REGEX] [--fresh] [--threads 1]``
writes ``benchmarks/results/lp_layer.json`` after every case and continues where it stopped;
``... plot`` draws it from the JSON alone. A case is a kind (``projection``: nearest point in the
2-norm; ``l1``: in the 1-norm), a size n x m with dense rows of their own for every sample, a batch
and a method; it runs in its own process under a limit of wall time, which its row states. A peer
that reached the limit, or failed, with no larger n, m and batch is not run again: such rows say
so, and a larger ``--limit`` runs them after all. ``--select`` takes only the cases in whose name,
as in ``projection 500x1000 batch 32 scs``, the expression is found; ``--fresh`` runs finished ones
again. Peers use their default accuracy and derivative and as many workers as ours has threads;
building their problem is not timed.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks import _figure
from benchmarks._common import SCHEMA, environment, settings_digest, write_json
from benchmarks._lp_layer_case import Case
from benchmarks._process import run_limited

KINDS = ("projection", "l1")
METHODS = ("ours", "scs", "ecos", "clarabel", "qpth")  #: SCS is the default of cvxpylayers
COLUMNS, ROWS = (50, 500, 2000, 20000), (20, 200, 1000)
BATCHES = (32, 1, 256)  #: the batch that matters most first
LARGEST_INPUT = 0.7e9  #: bytes of rows in float64
MEMORY = 24 * 2**30
_TOO_LATE = "not run: timeout"
Row = dict[str, object]


def cases(threads: int, smoke: bool) -> Iterator[Case]:
    """All cases, peers of a size right after ours."""
    grid = itertools.product(BATCHES, KINDS, COLUMNS, ROWS)
    if smoke:
        grid = itertools.product((2,), KINDS, (20,), (5,))
    for batch, kind, n, m in grid:
        for method in METHODS:
            if method != "qpth" or kind == "projection":
                yield Case(kind, method, n, m, batch, threads)


def name_of(case: Case) -> str:
    """What ``--select`` looks at."""
    return f"{case.kind} {case.n}x{case.m} batch {case.batch} {case.method}"


def _key(kind: object, method: object, n: object, m: object, batch: object) -> tuple[object, ...]:
    return kind, method, n, m, batch


def _number(row: Row, key: str) -> float:
    return float(str(row[key]))


def _late(row: Row) -> bool:
    """Whether a case reached its limit, or was not run because a smaller one did."""
    skipped = row["outcome"] == "skipped" and str(row["reason"]).startswith(_TOO_LATE)
    return row["outcome"] == "timeout" or skipped


def _hopeless(case: Case, rows: Iterable[Row], limit: float) -> str | None:
    """Why a case is not worth running, if so."""
    if 8.0 * case.n * case.m * case.batch > LARGEST_INPUT:
        return f"not run: rows of {8e-9 * case.n * case.m * case.batch:.1f} GB"
    if case.method == "qpth" and importlib.util.find_spec("qpth") is None:
        return "not installed"
    for row in rows:
        same = row["kind"] == case.kind and row["method"] == case.method
        late = row["outcome"] == "timeout" and _number(row, "limit") >= limit
        smaller = all(_number(row, key) <= getattr(case, key) for key in ("n", "m", "batch"))
        if same and (late or row["outcome"] == "failed") and smaller and case.method != "ours":
            size = f"{row['n']} x {row['m']}, batch {row['batch']}"
            return f"{_TOO_LATE if late else 'not run: failed'} at {size}"
    return None


def run_one(case: Case, limit: float, rows: Iterable[Row]) -> Row:
    """A row of results; failures are rows too."""
    head: Row = {**asdict(case), "limit": limit}
    reason = _hopeless(case, rows, limit)
    if reason is not None:
        return {**head, "outcome": "skipped", "reason": reason}
    command = [sys.executable, "-m", "benchmarks._lp_layer_case", json.dumps(asdict(case))]
    threads = {"OMP_NUM_THREADS": str(case.threads), "OPENBLAS_NUM_THREADS": str(case.threads)}
    # Ours is followed by two solves for the gradient check, so it gets more wall time.
    allowed = 4 * limit if case.method == "ours" else limit
    done = run_limited(command, seconds=allowed, memory=MEMORY, environment=threads)
    if done.outcome == "interrupted":
        raise KeyboardInterrupt
    if done.outcome == "timeout":
        return {**head, "outcome": "timeout", "reason": f"over {allowed:g} s of wall time"}
    if done.code != 0:
        return {**head, "outcome": "failed", "reason": done.stderr.strip().splitlines()[-1:]}
    return {**head, "outcome": "done", **json.loads(done.stdout.splitlines()[-1])}


def run(
    limit: float, threads: int, smoke: bool, output: Path, *, fresh: bool = False, select: str = ""
) -> None:
    """Run what is missing and write the file after every case."""
    settings = {"threads": threads, "seed": 0, "input_limit": LARGEST_INPUT}
    digest = settings_digest(settings)
    rows: dict[tuple[object, ...], Row] = {}
    if output.exists():
        before = json.loads(output.read_text())
        for row in before["rows"] if before.get("digest") == digest else []:
            rows[_key(*(row[k] for k in ("kind", "method", "n", "m", "batch")))] = row
    for case in cases(threads, smoke):
        key = _key(case.kind, case.method, case.n, case.m, case.batch)
        old = rows.get(key)
        done = old is not None and not (_late(old) and _number(old, "limit") < limit)
        if not re.search(select, name_of(case)) or (done and not fresh):
            continue
        others = [row for other, row in rows.items() if other != key]
        row = {**run_one(case, limit, others), "load": os.getloadavg()[0]}
        rows[key] = row
        record = {
            "schema": SCHEMA, **environment(), "dtype": "float64", "seed": 0, "digest": digest,
            "parameters": settings, "smoke": smoke, "rows": list(rows.values()),
        }  # fmt: skip
        write_json(output, record)
        shown = {k: row[k] for k in ("forward", "backward", "violation", "gradient_error", "reason")
                 if k in row}  # fmt: skip
        print(name_of(case), shown, flush=True)
    print(f"wrote {output}")


def speedups(rows: list[Row]) -> list[tuple[str, int, int, int, float, bool]]:
    """Kind, n, m, batch, time of the best peer over ours, and whether that is only a bound.

    A peer that reached its limit may need just that, so the ratio is then a lower bound.
    """
    found = []
    key = ("kind", "n", "m", "batch")
    for ours in rows:
        if ours["method"] != "ours" or ours["outcome"] != "done":
            continue
        peers = [r for r in rows if r["method"] != "ours" and all(r[k] == ours[k] for k in key)]
        times = [(_seconds(r), False) for r in peers if r["outcome"] == "done"]
        times += [(_number(r, "limit"), True) for r in peers if _late(r)]
        if times:
            best, bound = min(times)
            kind, n, m, batch = (ours[k] for k in key)
            ratio = best / _seconds(ours)
            found.append((str(kind), int(str(n)), int(str(m)), int(str(batch)), ratio, bound))
    return found


def _seconds(row: Row) -> float:
    return _number(row, "forward") + _number(row, "backward")


def plot(source: Path, figure: Path) -> None:
    """Draw seconds by size for batch 32 and the speed-up over the best peer."""
    record = json.loads(source.read_text())
    rows = record["rows"]
    batch = 32 if any(r["batch"] == 32 for r in rows) else rows[0]["batch"]
    drawing, panels = _figure.new(1, 2, (12, 4.5), sharey=True)
    for panel, kind in zip(panels, KINDS, strict=True):
        chosen = [r for r in rows if r["kind"] == kind and r["batch"] == batch]
        sizes = sorted({(r["n"], r["m"]) for r in chosen if r["outcome"] == "done"})
        for method in METHODS:
            points = [
                (sizes.index((r["n"], r["m"])), _seconds(r))
                for r in chosen
                if r["method"] == method and r["outcome"] == "done"
            ]
            if points:
                marker = "o-" if method == "ours" else "s"
                panel.semilogy(*zip(*sorted(points), strict=True), marker, label=method)
        for name, n, m, b, ratio, bound in speedups(rows):
            if name == kind and b == batch:
                text = f"{'>' if bound else ''}{ratio:.0f}x"
                panel.annotate(
                    text, (sizes.index((n, m)), 0.02), xycoords=panel.get_xaxis_transform(),
                    ha="center", fontsize=8,
                )  # fmt: skip
        for limit in {r["limit"] for r in chosen if r["method"] != "ours" and _late(r)}:
            panel.axhline(limit, color="gray", linestyle=":")
        panel.set_xticks(range(len(sizes)), [f"{n}x{m}" for n, m in sizes], rotation=45)
        panel.set_title(f"{kind}, batch {batch}; below: best peer / ours")
        panel.legend(fontsize=8)
    panels[0].set_ylabel("seconds, forward + backward")
    title = f"{record['device']}, {record['parameters']['threads']} thread(s); dotted: limits"
    drawing.suptitle(title, fontsize=9)
    _figure.save(drawing, figure)


def main() -> None:
    """Parse the command line."""
    parser = _figure.make_parser(__doc__, threads=1)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds per case")
    parser.add_argument("--fresh", action="store_true", help="run finished cases again")
    parser.add_argument("--select", default="", metavar="REGEX", help="cases, by their names")
    parser.add_argument("--figure", type=Path, help="picture to write")
    options = _figure.parse(parser, "lp_layer")
    try:
        re.compile(options.select)
    except re.error as error:
        parser.error(f"--select: got {options.select!r}: {error}; expected a regular expression")
    if options.command != "plot":
        run(
            options.limit, options.threads, options.smoke, options.output,
            fresh=options.fresh, select=options.select,
        )  # fmt: skip
    if options.command != "run":
        plot(options.output, options.figure)


if __name__ == "__main__":
    main()
