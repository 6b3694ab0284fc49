"""Ratios, roofline and figure of ``fig_bounds``, from its JSON alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _figure

__all__ = ["Pair", "pairs", "plot", "table", "times"]

Row = dict[str, object]


def times(threads: int) -> str:
    """The column that counts: with one thread, CPU time does not feel other programs."""
    return "cpu_seconds" if threads == 1 else "seconds"


@dataclass(frozen=True)
class Pair:
    """One case of both engines.

    Args:
        case: network, method, batch.
        ours: seconds.
        theirs: seconds; None where there is no number, of which ``reason`` tells.
        faster: their seconds over ours; at least so much where they met the limit of time.
        width: our mean width over theirs.
        memory: our peak over theirs.
        reason: why the other engine has no numbers.
    """

    case: tuple[str, str, int]
    ours: float
    theirs: float | None
    faster: float | None
    width: float | None
    memory: tuple[float, float | None]
    reason: str = ""


def _number(row: Row, name: str) -> float:
    return float(str(row[name]))


def pairs(record: Row) -> list[Pair]:
    """Cases in which our engine ended."""
    rows: list[Row] = record["rows"]  # type: ignore[assignment]
    clock, limit = times(int(str(record["threads"]))), float(str(record["limit_seconds"]))
    found: dict[tuple[str, str, int], dict[object, Row]] = {}
    for row in rows:
        key = (str(row["network"]), str(row["method"]), int(str(row["batch"])))
        found.setdefault(key, {})[row["engine"]] = row
    result = []
    for key, pair in found.items():
        ours, theirs = pair.get("ours"), pair.get("auto_lirpa")
        if ours is None or theirs is None or "failure" in ours:
            continue
        mine, memory = _number(ours, clock), _number(ours, "memory_mb")
        if "failure" in theirs:
            reason = str(theirs["failure"])
            least = limit / mine if reason.startswith("more than") else None
            result.append(Pair(key, mine, None, least, None, (memory, None), reason))
            continue
        seconds = _number(theirs, clock)
        width = _number(ours, "width") / _number(theirs, "width")
        both = memory, _number(theirs, "memory_mb")
        result.append(Pair(key, mine, seconds, seconds / mine, width, both))
    return result


def table(source: Path) -> str:
    """Both engines side by side, then the roofline, as Markdown."""
    record = json.loads(source.read_text())
    lines = [
        "| network | method | batch | ours, s | auto_LiRPA, s | faster | width ratio | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for pair in pairs(record):
        theirs = pair.reason if pair.theirs is None else f"{pair.theirs:.4g}"
        least = "" if pair.faster is None else f"{pair.faster:.1f}x"
        faster = f"at least {least}" if least and pair.theirs is None else least
        width = "" if pair.width is None else f"{pair.width:.6f}"
        mine, other = pair.memory
        memory = f"{mine:.0f}" if other is None else f"{mine:.0f} / {other:.0f}"
        cells = [*map(str, pair.case), f"{pair.ours:.4g}", theirs, faster, width, memory]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| CROWN | batch | GFLOP/s | of a matrix product | GB/s | of a copy | time per region "
        "against batch 64 |",
        "|---|---|---|---|---|---|---|",
    ]
    clock = times(record["threads"])
    ours = [r for r in record["rows"] if "needed_flops" in r]
    for row in ours:
        flops, moved = row["needed_flops"] / row[clock], row["needed_bytes"] / row[clock]
        base = [r for r in ours if r["network"] == row["network"] and r["batch"] == 64]
        each = row[clock] / row["batch"] / (base[0][clock] / 64) if base else None
        lines.append(
            f"| {row['network']} | {row['batch']} | {flops / 1e9:.1f} "
            f"| {flops / row['matmul_flops']:.0%} | {moved / 1e9:.3f} "
            f"| {moved / row['copy_bytes']:.1%} | {'' if each is None else f'{each:.2f}'} |"
        )
    return "\n".join([*lines, "", *_growth(record)])


def _growth(record: Row) -> list[str]:
    """Time per region of our engine in large batches, over that in smaller ones."""
    rows: list[Row] = record["rows"]  # type: ignore[assignment]
    clock = times(int(str(record["threads"])))
    each = {
        (str(r["method"]), str(r["network"]), int(str(r["batch"]))): _number(r, clock)
        / int(str(r["batch"]))
        for r in rows
        if r["engine"] == "ours" and "failure" not in r
    }
    lines = ["| method | network | time per region, batch 512 over 64 |", "|---|---|---|"]
    for method, network, batch in each:
        if batch == 512 and (method, network, 64) in each:
            growth = each[method, network, 512] / each[method, network, 64]
            lines.append(f"| {method} | {network} | {growth:.2f} |")
    return lines


def plot(source: Path, figure: Path) -> None:
    """Draw the ratios of time, and seconds per region, from the JSON alone."""
    record = json.loads(source.read_text())
    clock = times(record["threads"])
    bars = [pair for pair in pairs(record) if pair.faster is not None][::-1]
    drawing, (left, right) = _figure.new(1, 2, (13, 0.16 * len(bars) + 3))
    left.barh(
        [" ".join(map(str, pair.case)) for pair in bars],
        [pair.faster for pair in bars],
        color=["tab:blue" if pair.theirs is not None else "lightsteelblue" for pair in bars],
    )
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xscale("log")
    left.tick_params(axis="y", labelsize=5)
    left.set_xlabel("seconds of auto_LiRPA / ours (light: at least, it met the limit)")
    for engine, style in (("ours", "o-"), ("auto_lirpa", "x--")):
        for network in sorted({r["network"] for r in record["rows"]}):
            points = [
                (r["batch"], r[clock] / r["batch"])
                for r in record["rows"]
                if r["network"] == network and r["method"] == "crown" and r["engine"] == engine
                and "failure" not in r
            ]  # fmt: skip
            if points:
                right.plot(*zip(*points, strict=True), style, label=f"{network} {engine}")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("regions in a batch")
    right.set_ylabel("CROWN: seconds per region")
    right.legend(fontsize=5)
    drawing.suptitle(f"{record['device']}, {record['threads']} thread(s)", fontsize=8)
    _figure.save(drawing, figure)
