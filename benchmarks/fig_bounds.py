"""Bounds of real networks: seconds, memory and mean width beside auto_LiRPA, and a roofline.

``python -m benchmarks.fig_bounds run --data ../shared/data [--auto-lirpa PATH] [--smoke]`` writes
``benchmarks/results/bounds.json``, a row as soon as it is measured; ``... plot`` draws it from the
JSON alone. ``PATH`` is a source tree of auto_LiRPA; without it the installed release is used. Each
engine runs in a process of its own, one after the other, under the same limits of wall seconds and
address space; a time-out, a refusal or a lack of memory is a row with its reason.

``cpu_seconds`` is the least CPU time of the repeats after one warm-up: with one thread it is the
wall time of an idle machine. The roofline divides the operations that dense CROWN would take
(``bounds.cost.crown_flops``) by it; what is skipped as useless makes this exceed the machine's own
rate.
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

import torch

from benchmarks._bounds_case import METHODS, NETWORKS, load_case
from benchmarks._common import FIGURES, HERE, RESULTS, SCHEMA, environment, write_json
from torch_prepared.bounds.cost import crown_flops

DATA = HERE.parent.parent / "shared" / "data"
ENGINES = ("ours", "auto_lirpa")
BATCHES = {"acasxu_1_1": (1, 64, 512, 4096), "sri_resnet_a": (1, 8, 64), "resnet_16m": (1,)}
USUAL_BATCHES = (1, 64, 512)
Row = dict[str, object]


def _cases(options: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    if options.smoke:
        yield from (("tiny", method, 2) for method in METHODS)
        return
    for network in options.networks or [n for n in NETWORKS if n != "tiny"]:
        for method in options.methods:
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
    ]  # fmt: skip
    if options.auto_lirpa is not None:
        command += ["--auto-lirpa", str(options.auto_lirpa)]
    row: Row = {"network": network, "method": method, "batch": batch, "engine": engine}
    limit = int(options.memory_gb * 2**30)
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, capture_output=True, text=True, check=False,
            timeout=options.limit,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return row | {"failure": f"more than {options.limit:g} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return row | {"failure": lines[-1][:160] if lines else f"exit status {done.returncode}"}
    numbers: Row = json.loads(done.stdout.splitlines()[-1])
    return row | numbers


def _rates(threads: int) -> dict[str, float]:
    """Measured peaks of the machine: matrix product in FLOP/s, copy in bytes/s."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source = torch.randn(1 << 24)
    target = torch.empty_like(source)

    def best(call: object) -> float:
        seconds = []
        for _ in range(7):
            start = time.process_time()
            call()  # type: ignore[operator]
            seconds.append(time.process_time() - start)
        return min(seconds)

    product = best(lambda: a @ b)
    copied = best(lambda: target.copy_(source))
    return {
        "matmul_flops": 2 * 2048**3 / product,
        "copy_bytes": 2 * source.numel() * source.element_size() / copied,
    }


def run(options: argparse.Namespace, output: Path) -> None:
    """Measure all cases, writing the JSON after each."""
    rows: list[Row] = []
    head = {
        "schema": SCHEMA,
        **environment(),
        "threads": options.threads,
        "limit_seconds": options.limit,
        "memory_gb": options.memory_gb,
        "auto_lirpa": "source tree" if options.auto_lirpa else "installed",
        "rates": _rates(options.threads),
    }
    for network, method, batch in _cases(options):
        for engine in ENGINES:
            row = _measure(engine, network, method, batch, options)
            if method == "crown" and "failure" not in row:
                graph, _ = load_case(network, 1, options.data)
                dense = crown_flops(graph) * batch
                row["dense_flops_per_second"] = dense / float(str(row["cpu_seconds"]))
            rows.append(row)
            write_json(output, {**head, "rows": rows})
            print(_line(row), file=sys.stderr, flush=True)


def _line(row: Row) -> str:
    name = f"{row['network']:13s} {row['method']:12s} {row['batch']:5d} {row['engine']:11s}"
    if "failure" in row:
        return f"{name} {row['failure']}"
    return (
        f"{name} {row['cpu_seconds']:10.4f} s  {row['memory_mb']:8.0f} MB  width {row['width']:.6g}"
    )


def ratios(rows: list[Row]) -> list[tuple[str, float, float]]:
    """``(case, how much faster we are, our mean width over theirs)`` where both engines ended."""
    found: dict[tuple[object, ...], dict[object, Row]] = {}
    for row in rows:
        found.setdefault((row["network"], row["method"], row["batch"]), {})[row["engine"]] = row
    result = []
    for key, pair in found.items():
        ours, theirs = pair.get("ours"), pair.get("auto_lirpa")
        if not ours or not theirs or "failure" in ours or "failure" in theirs:
            continue
        seconds = float(str(theirs["cpu_seconds"])) / float(str(ours["cpu_seconds"]))
        width = float(str(ours["width"])) / float(str(theirs["width"]))
        result.append((f"{key[0]} {key[1]} {key[2]}", seconds, width))
    return result


def plot(source: Path, figure: Path) -> None:
    """Draw the ratios of time, and seconds per region, from the JSON alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    record = json.loads(source.read_text())
    bars = ratios(record["rows"])
    drawing, (left, right) = pyplot.subplots(1, 2, figsize=(13, 0.22 * len(bars) + 2.5))
    left.barh([name for name, _, _ in bars][::-1], [r for _, r, _ in bars][::-1])
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xscale("log")
    left.tick_params(axis="y", labelsize=6)
    left.set_xlabel("CPU seconds of auto_LiRPA / ours")
    for engine, style in (("ours", "o-"), ("auto_lirpa", "x--")):
        for network in sorted({r["network"] for r in record["rows"]}):
            points = [
                (r["batch"], r["cpu_seconds"] / r["batch"])
                for r in record["rows"]
                if r["network"] == network and r["method"] == "crown" and r["engine"] == engine
                and "failure" not in r
            ]  # fmt: skip
            if points:
                right.plot(*zip(*points, strict=True), style, label=f"{network} {engine}")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("regions in a batch")
    right.set_ylabel("CROWN: CPU seconds per region")
    right.legend(fontsize=5)
    drawing.suptitle(f"{record['device']}, {record['threads']} thread(s)", fontsize=8)
    drawing.tight_layout()
    figure.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(figure, dpi=150)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "plot", "all"], default="all")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--auto-lirpa", type=Path, help="source tree of auto_LiRPA")
    parser.add_argument("--networks", type=lambda text: text.split(","))
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--max-batch", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=120.0, help="wall seconds of a process")
    parser.add_argument("--memory-gb", type=float, default=10.0, help="address space of a process")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, to test the script")
    parser.add_argument("--output", type=Path, help="JSON file to write or read")
    options = parser.parse_args()
    output = options.output or RESULTS / ("bounds_smoke.json" if options.smoke else "bounds.json")
    if options.command != "plot":
        run(options, output)
    if options.command != "run":
        plot(output, FIGURES / f"{output.stem}.png")


if __name__ == "__main__":
    main()
