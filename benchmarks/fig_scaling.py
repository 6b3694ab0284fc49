"""Seconds and bytes against the number of weights, of properties, and of ranks.

``python -m benchmarks.fig_scaling run [--threads 1] [--smoke]`` writes
``benchmarks/results/scaling.json`` after every case and continues where it stopped; ``... plot``
draws it from the JSON alone. Every case runs in processes of its own.

project  one projection of n float32 weights onto 100 rows whose columns are streamed (dual of
         size 100); the rows are shifted views of one random block, so no generator is timed
edit     ``edit_network(method="sequential")`` of a network of 9,733 weights for b properties, one
         in twenty violated, with at most 10 shrinking steps, to the checked certificate, by 1, 2 or
         4 ranks

Ranks are processes on this one machine, usually with fewer cores than ranks. So besides the real
wall time there is ``critical``: CPU seconds of the leader outside of shared operations, plus in
each shared operation those of its slowest rank. That simulates one core per rank; it counts the
processor's part of communication, and not the time on a wire. For one rank it is its CPU time.
Bytes are the leader's, over those of the interpreter with everything imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import _figure
from benchmarks._common import SCHEMA, environment, settings_digest, write_json
from benchmarks._process import run_limited

WEIGHTS, ROWS = (10**4, 10**5, 10**6, 10**7, 5 * 10**7), 100
PROPERTIES, RANKS = (1, 10, 100, 1000), (1, 2, 4)
SMOKE = ((1000, 20_000), 5, (3,), (1, 2))
LIMIT, MEMORY = 1800.0, 64 * 2**30
Row = dict[str, object]


@dataclass(frozen=True)
class Case:
    """One measurement: ``size`` weights or properties, by ``ranks`` processes."""

    kind: str
    size: int
    rows: int
    ranks: int
    threads: int

    @property
    def command(self) -> list[str]:
        """What to run."""
        module = ["-m", "benchmarks._scaling_case", self.kind, str(self.size)]
        module += [str(self.rows), str(self.threads)] if self.rows else [str(self.threads)]
        if self.ranks == 1:
            return [sys.executable, *module]
        launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        return [sys.executable, "-m", *launch, *module]


def cases(threads: int, smoke: bool) -> Iterator[Case]:
    """All cases, small ones first."""
    weights, rows, properties, ranks = SMOKE if smoke else (WEIGHTS, ROWS, PROPERTIES, RANKS)
    for n in weights:
        yield Case("project", n, rows, 1, threads)
    for b in properties:
        for r in ranks:
            yield Case("edit", b, 0, r, threads)


def run(threads: int, smoke: bool, output: Path, fresh: bool) -> None:
    """Measure what the file does not hold yet, and write it after every case."""
    parameters = {"threads": threads, "smoke": smoke, "rows": ROWS, "limit": LIMIT}
    record: dict[str, object] = {
        "schema": SCHEMA,
        **environment(),
        "dtype": "float32 weights",
        "seed": 0,
        "parameters": parameters,
        "digest": settings_digest(parameters),
    }
    rows: list[Row] = []
    if output.exists() and not fresh:
        old = json.loads(output.read_text())
        rows = old["rows"] if old.get("digest") == record["digest"] else []
    for case in cases(threads, smoke):
        known = asdict(case)
        if any(all(row[key] == value for key, value in known.items()) for row in rows):
            continue
        serial = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "OPENBLAS", "MKL")}
        done = run_limited(case.command, seconds=LIMIT, memory=MEMORY, environment=serial)
        row: Row = {**known, "outcome": done.outcome if done.code in (0, -9) else "failed"}
        if done.code == 0:
            row |= json.loads(done.stdout.strip().splitlines()[-1])
        else:
            row["error"] = done.stderr.strip()[-300:]
        rows.append(row)
        write_json(output, {**record, "rows": rows})
        print(_line(row), flush=True)


def _line(row: Row) -> str:
    """A measurement for people."""
    what = f"{row['kind']:8} {row['size']:>9} x {row['ranks']} rank(s): {row['outcome']}"
    if "seconds" not in row:
        return what
    peak, baseline = (1e-6 * float(str(row[key])) for key in ("peak", "baseline"))
    return (
        f"{what}, wall {row['seconds']:.2f} s, critical path {row['critical']:.2f} s, "
        f"peak {peak:.0f} MB over {baseline:.0f}"
    )


def plot(source: Path, figure: Path) -> None:
    """Draw seconds and bytes by weights, seconds by properties and ranks, and the speed-up."""
    record = json.loads(source.read_text())
    rows = [row for row in record["rows"] if "seconds" in row]
    projected = [row for row in rows if row["kind"] == "project"]
    edited = [row for row in rows if row["kind"] == "edit"]
    drawing, panels = _figure.new(1, 3, (15, 4.5))
    sizes = [row["size"] for row in projected]
    panels[0].loglog(sizes, [row["cpu"] for row in projected], "o-", label="CPU seconds")
    walls = [row["seconds"] for row in projected]
    panels[0].loglog(sizes, walls, "x:", color="gray", label="wall seconds, machine shared")
    memory = [row["peak"] / row["detail"]["weights_bytes"] for row in projected]
    panels[0].loglog(sizes, memory, "s--", label="peak memory / the weights'")
    panels[0].axhline(4.0, color="gray", linestyle=":", label="4 times the weights")
    panels[0].set(xlabel="weights", title=f"streamed projection onto {projected[0]['rows']} rows")
    for ranks in sorted({row["ranks"] for row in edited}):
        mine = [row for row in edited if row["ranks"] == ranks]
        label = f"{ranks} rank{'s' if ranks > 1 else ''}"
        counts = [row["size"] for row in mine]
        panels[1].loglog(counts, [row["critical"] for row in mine], "o-", label=label)
        panels[1].loglog(counts, [row["seconds"] for row in mine], "x:", color="gray")
        alone = {row["size"]: row["critical"] for row in edited if row["ranks"] == 1}
        ratio = [alone[row["size"]] / row["critical"] for row in mine]
        panels[2].semilogx(counts, ratio, "o-", label=label)
    panels[1].set(xlabel="properties", ylabel="seconds")
    panels[1].set_title("one edit: simulated, one core per rank (gray: real wall)")
    panels[2].set(xlabel="properties", title="speed-up, simulated: one core per rank")
    panels[2].axhline(2.5, color="gray", linestyle=":")
    for panel in panels:
        panel.legend(fontsize=8)
    threads, cores = record["parameters"]["threads"], record["cores"]
    drawing.suptitle(f"{record['device']}, {cores} cores, {threads} thread(s) a rank", fontsize=9)
    _figure.save(drawing, figure)


def main() -> None:
    """Parse the command line."""
    parser = _figure.make_parser(__doc__, threads=1)
    parser.add_argument("--fresh", action="store_true", help="run finished cases again")
    parser.add_argument("--figure", type=Path, help="picture to write")
    options = _figure.parse(parser, "scaling")
    if options.command != "plot":
        run(options.threads, options.smoke, options.output, options.fresh)
    if options.command != "run":
        plot(options.output, options.figure)


if __name__ == "__main__":
    main()
