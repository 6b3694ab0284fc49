"""Table and pictures of the VNN-COMP study, from its result files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _figure
from benchmarks._common import SCHEMA, write_text
from benchmarks._vnncomp import BENCHMARKS

__all__ = ["LIMIT", "Study", "draw", "load_studies", "markdown_table", "replace_table"]

START, END = "<!-- table:vnncomp -->", "<!-- /table -->"
LIMIT = 45.0  #: seconds, of the usual study
MUCH = 10.0  #: percent of output change that properties demand, worth telling
Row = Mapping[str, object]


@dataclass(frozen=True)
class Study:
    """One result file."""

    method: str
    mode: str
    limit: float
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """For tables and legends."""
        name = self.method if self.mode == "single" else f"{self.method}, {self.mode}"
        return name if self.limit == LIMIT else f"{name}, {self.limit:g} s"


def load_studies(folder: Path) -> list[Study]:
    """All studies of a folder, smoke runs left out, by label.

    Only rows of a file's present settings count. An unfinished study shows as fewer cases.

    Raises:
        ValueError: a file of another schema.
    """
    found = []
    for path in sorted(folder.glob("vnncomp_*.json")):
        if path.stem.endswith("_smoke"):
            continue
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(
                f"{path}: schema {data.get('schema')}; expected {SCHEMA}; run it again"
            )
        settings = data["settings"]
        digests = [row["key"].rsplit("/", 1)[1] for row in data["rows"]]
        latest = max(zip([row.get("at", 0) for row in data["rows"]], digests, strict=True))[1]
        rows = [r for r, digest in zip(data["rows"], digests, strict=True) if digest == latest]
        found.append(Study(settings["method"], settings["mode"], settings["limit"], tuple(rows)))
    return sorted(found, key=lambda s: (s.mode != "single", s.method, s.limit))


def markdown_table(studies: Sequence[Study]) -> str:
    """One line per benchmark and method: certified, seconds, change and drawdown as medians.

    Empty when there are no studies.
    """
    if not studies:
        return ""
    lines = [
        "| benchmark | method | certified | in time | seconds | rel. 2-norm | drawdown (worst) |",
        "|---|---|---|---|---|---|---|",
    ]
    names = [*BENCHMARKS, *sorted({str(r["benchmark"]) for s in studies for r in s.rows})]
    for benchmark in dict.fromkeys(names):
        for study in studies:
            rows = [row for row in study.rows if row["benchmark"] == benchmark]
            if rows:
                lines.append(_table_line(benchmark, study, rows))
    for study in studies:
        lines.append(_table_line("**all**", study, study.rows, drawdown=False))
    return "\n".join(lines)


def _table_line(benchmark: str, study: Study, rows: Sequence[Row], *, drawdown: bool = True) -> str:
    good = [row for row in rows if row["certified"]]
    seconds = [_number(row, "total_seconds") for row in good]
    in_time = sum(s <= study.limit for s in seconds)
    changes = [_number(row, "relative_l2") for row in good]
    lost = sorted(_percents(good))
    unit = {"accuracy": "points", "relative": "% of output change"}
    kinds = {row["drawdown"]["kind"] for row in good if isinstance(row.get("drawdown"), dict)}  # type: ignore[index]
    name = unit.get(next(iter(kinds), ""), "% of decisions")
    loss = f"{statistics.median(lost):.3g} ({lost[-1]:.3g}) {name}" if lost and drawdown else "-"
    if drawdown and kinds == {"ranking"}:
        advice = sorted(_advice(good))
        loss += f"; of advice alone {statistics.median(advice):.3g} ({advice[-1]:.3g}) %"
    if drawdown and kinds == {"relative"}:
        loss += _inside(good)
    return (
        f"| {benchmark} | {study.label} | {len(good)} / {len(rows)}{_properties(rows)} | "
        f"{in_time} | "
        f"{_median(seconds)} | {_median(changes)} | {loss} |"
    )


def _properties(rows: Sequence[Row]) -> str:
    """Properties certified, of all, where cases have more than one."""
    every = [p for row in rows for p in row.get("per_property") or ()]  # type: ignore[attr-defined]
    if len(every) <= len(rows):
        return ""
    return f" ({sum(bool(p['certified']) for p in every)} / {len(every)} properties)"


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g}" if values else "-"


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _percents(rows: Sequence[Row]) -> list[float]:
    found = []
    for row in rows:
        drawdown = row.get("drawdown")
        if isinstance(drawdown, dict) and isinstance(drawdown["percent"], (int, float)):
            found.append(float(drawdown["percent"]))
    return found


def _advice(rows: Sequence[Row]) -> list[float]:
    """Percent of inputs whose smallest output changed, which is what ACAS Xu networks advise."""
    return [100.0 * (1.0 - float(row["drawdown"]["agreement_argmin"])) for row in rows]  # type: ignore[index, call-overload]


def _inside(rows: Sequence[Row]) -> str:
    """What the properties demand inside their regions, where that is known of all and much."""
    found = [row["drawdown"].get("demanded") for row in rows]  # type: ignore[attr-defined]
    known = [float(value) for value in found if value is not None]
    demanded = statistics.median(known) if len(known) == len(rows) else 0.0
    return f"; its properties demand {demanded:.3g} % inside" if demanded > MUCH else ""


def replace_table(readme: Path, table: str) -> None:
    """Write a table between the markers of a Markdown file.

    Raises:
        ValueError: the file lacks the markers.
    """
    text = readme.read_text()
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{readme}: no {START} ... {END}; add the two markers")
    body = f"{table}\n" if table else ""
    write_text(readme, f"{head}{START}\n{body}{END}{tail}")


def draw(studies: Sequence[Study], folder: Path) -> list[Path]:
    """Cactus plot (certified against seconds) and sorted drawdown of every method.

    Only of studies with the usual limit.
    """
    written = []
    studies = [study for study in studies if study.limit == LIMIT]
    for mode in sorted({study.mode for study in studies}):
        mine = [study for study in studies if study.mode == mode]
        suffix = "" if mode == "single" else f"_{mode}"
        figures = (
            ("cactus", "certified cases", "seconds (edit and check)", _cactus),
            ("drawdown", "certified cases", "drawdown in percent", _drawdown),
        )
        for name, x_label, y_label, values in figures:
            drawing, axes = _figure.new(1, 1, (6, 4))
            for study in mine:
                y = values(study)
                axes.step(range(1, len(y) + 1), y, where="mid", label=f"{study.label} ({len(y)})")
            axes.set_yscale("log" if name == "cactus" else "symlog", **_linear(name))
            axes.set_xlabel(f"{x_label}, of {max((len(s.rows) for s in mine), default=0)}")
            axes.set_ylabel(y_label)
            if name == "cactus" and mine:
                axes.axhline(mine[0].limit, color="black", linewidth=0.8, linestyle=":")
            axes.legend(fontsize=8)
            written.append(folder / f"vnncomp_{name}{suffix}.png")
            _figure.save(drawing, written[-1])
    return written


def _linear(name: str) -> dict[str, float]:
    return {} if name == "cactus" else {"linthresh": 0.1}


def _cactus(study: Study) -> list[float]:
    return sorted(_number(row, "total_seconds") for row in study.rows if row["certified"])


def _drawdown(study: Study) -> list[float]:
    return sorted(_percents([row for row in study.rows if row["certified"]]))
