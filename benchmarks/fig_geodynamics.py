"""Provable training of a network for buoyant Stokes flow, beside plain and penalty training.

    python -m benchmarks.fig_geodynamics run --seeds 0,1
    python -m benchmarks.fig_geodynamics plot
    python -m benchmarks.fig_geodynamics table

``run`` writes each row as it ends and goes on where it stopped; rows of other settings are redone.
The case and the methods are described in ``benchmarks.examples.stokes_flow``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import _figure
from benchmarks._common import SCHEMA, environment, settings_digest, write_text
from benchmarks.examples._stokes_case import Settings
from benchmarks.examples._stokes_plot import TITLES, draw
from benchmarks.examples._stokes_training import METHODS
from benchmarks.examples.stokes_flow import center_velocity, run_method, table

__all__ = ["run", "summary"]

Record = dict[str, Any]
PICTURED = 0  #: the seed whose maps are kept


def run(settings: Settings, seeds: list[int], threads: int, output: Path) -> None:
    """Measure what is missing in ``output``; rows of other processes in it are kept."""
    torch.set_num_threads(threads)
    plain = dataclasses.asdict(settings) | {"seed": None, "threads": threads}
    digest = settings_digest(plain)
    u, v = (part.numpy().round(4).tolist() for part in center_velocity(settings))
    for seed in seeds:
        for method in METHODS:
            known = _rows(output, digest)
            if any(row["seed"] == seed and row["method"] == method for row in known):
                continue
            row, _ = run_method(
                dataclasses.replace(settings, seed=seed),
                method,
                maps=seed == PICTURED and method in TITLES,
            )
            row["load_average"] = list(os.getloadavg())
            rows = sorted(
                [*_rows(output, digest), row],
                key=lambda r: (r["seed"], METHODS.index(r["method"])),
            )
            record = {
                "schema": SCHEMA, **environment(), "dtype": "float32", "digest": digest,
                "settings": plain, "reference": {"u": u, "v": v}, "rows": rows,
            }  # fmt: skip
            write_text(output, json.dumps(_compact(record), separators=(",", ":")) + "\n")
            print(table([row]).splitlines()[-1], flush=True)


def _compact(value: Any) -> Any:
    """Plain data with null for numbers that are not finite."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _compact(item) for key, item in value.items()}
    return [_compact(item) for item in value] if isinstance(value, (list, tuple)) else value


def _rows(path: Path, digest: str) -> list[Record]:
    """Rows of the same settings in a result file."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    rows: list[Record] = record["rows"] if record.get("digest") == digest else []
    return rows


def summary(rows: list[Record]) -> list[Record]:
    """One row per method: medians over the seeds; certified only where every seed is."""
    found = []
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        numbers = {
            key: _middle([row[key] for row in mine])
            for key, value in mine[0].items()
            if (isinstance(value, float) or value is None)
        }
        proved = sum(row["certified"] for row in mine)
        found.append(
            {"method": f"{method} ({proved} of {len(mine)})"}
            | numbers
            | {"certified": proved == len(mine)}
        )
    return found


def _middle(values: list[float | None]) -> float:
    """Median; NaN when some value is missing."""
    known = [v for v in values if v is not None]
    return median(known) if len(known) == len(values) else float("nan")


def main() -> None:
    """Parse the command line."""
    parser = _figure.make_parser(
        __doc__, commands=("run", "plot", "table"), default="run", threads=1
    )
    parser.add_argument("--seeds", default="0,1", help="comma-separated")
    parser.add_argument("--figure", type=Path, help="picture to write")
    options = _figure.parse(parser, "geodynamics")
    if options.command == "run":
        settings = Settings.smoke() if options.smoke else Settings()
        seeds = [int(seed) for seed in options.seeds.split(",")]
        run(settings, seeds, options.threads, options.output)
        return
    if not options.output.exists():
        parser.error(f"{options.output}: does not exist; make it with 'run'")
    record = json.loads(options.output.read_text())
    if options.command == "plot":
        draw(record, options.figure)
    else:
        print(table(summary(record["rows"])))


if __name__ == "__main__":
    main()
