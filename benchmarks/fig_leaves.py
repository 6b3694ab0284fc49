"""Leaves per second of branch and bound, and the volume they certify: general and chain engine.

``python -m benchmarks.fig_leaves run [--seconds 20] [--threads 2] [--smoke]`` writes
``benchmarks/results/leaves.json``; ``... plot`` draws it from the JSON alone. Without a command
it does both. Networks are ACAS Xu's 1_1, 2_9 and 5_9, the region is that of property 2 (which
the networks violate in part, so the whole volume cannot be certified), each in float32:

general   CROWN by the batched engine for any network
chain     CROWN by the native operator for fully connected ReLU networks
inherit   the same, with each leaf's intervals intersected with its parent's
slopes    the same, and optimized slopes, shared by all rows of a box, where ``SplitTree.grow``
          expects them to prove it
alpha     alpha-CROWN of every leaf, all inner values included

``throughput`` bounds one batch of random boxes whose sides are 3 to 10 % of the region's, over
and over (``slopes``: searches slopes for each); ``search`` halves the region breadth first until
the time is up.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import _figure
from benchmarks._common import SCHEMA, environment, measure, write_json
from benchmarks._leaf_engines import (
    CHUNKS,
    ENGINES,
    USUAL_CHUNK,
    Inheriting,
    make_engine,
    search_slopes,
)
from torch_prepared import ops
from torch_prepared.bounds import PropertyBatch
from torch_prepared.bounds.branch import SlopedEngine, SplitTree
from torch_prepared.bounds.chain import Chain
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.interval import Interval
from torch_prepared.core.onnx import load_onnx
from torch_prepared.specs import load_vnnlib

NETWORKS = ("1_1", "2_9", "5_9")
SIDES = (0.03, 0.10)
SLACK = 1e-4
MAX_LEAVES = 4_000_000
ITERATIONS = 20  # of alpha-CROWN
COLORS = ("tab:gray", "tab:blue", "tab:orange", "tab:green", "tab:red")
SAMPLES = 200  # of a curve, at most


@dataclass(frozen=True)
class Sample:
    """State of a search: wall seconds, leaves bounded, share of the volume certified."""

    seconds: float
    leaves: int
    volume: float


def _case(name: str, data: Path) -> tuple[Chain, PropertyBatch]:
    graph = load_onnx(data / f"onnx/ACASXU_run2a_{name}_batch_2000.onnx.gz").graph
    chain = Chain.of(graph)
    if chain is None:
        raise ValueError(f"{name}: got a network that is not a chain; expected ACAS Xu's")
    found = load_vnnlib(data / "vnnlib/prop_2.vnnlib.gz")
    return chain, PropertyBatch.of(list(found) if isinstance(found, (list, tuple)) else [found])


def _random_boxes(batch: PropertyBatch, count: int) -> Interval:
    generator = torch.Generator().manual_seed(0)
    low, width = batch.regions.lower, batch.regions.upper - batch.regions.lower
    share = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    side = (SIDES[0] + (SIDES[1] - SIDES[0]) * share) * width
    shift = torch.rand(count, low.shape[1], generator=generator, dtype=torch.float64)
    start = low + shift * (width - side)
    return Interval(start, start + side)


def _throughput(
    engine: str, chain: Chain, batch: PropertyBatch, smoke: bool
) -> list[tuple[str, float, str]]:
    count = 64 if smoke else 2 * CHUNKS.get(engine, USUAL_CHUNK)
    box = _random_boxes(batch, count)
    made = make_engine(engine, chain, batch, ITERATIONS)
    call: Callable[[Interval], object] = made
    if isinstance(made, Inheriting):
        twice = Interval(box.center - box.width, box.center + box.width)
        made.known = chain.bounds(twice, batch.rows[0]).hidden
    elif isinstance(made, SlopedEngine):
        call = partial(search_slopes, made, batch=batch, slack=SLACK)
    start = time.process_time()
    quick = smoke or engine == "alpha"
    timing = measure(lambda: call(box), repeats=2 if quick else 7, warmup=1)
    cpu = (time.process_time() - start) / (timing.repeats + 1)
    return [
        ("throughput", count / timing.median, "leaves/s"),
        ("throughput_spread", count * timing.spread / timing.median**2, "leaves/s"),
        ("throughput_per_cpu", count / cpu, "leaves/CPU s"),
    ]


def _search(name: str, chain: Chain, batch: PropertyBatch, seconds: float) -> Iterator[Sample]:
    tree, engine = SplitTree(batch, SLACK), make_engine(name, chain, batch, ITERATIONS)
    if isinstance(engine, SlopedEngine):
        yield from _grow(tree, engine, seconds)
        return
    inherit = engine if isinstance(engine, Inheriting) else None
    chunk = CHUNKS.get(name, USUAL_CHUNK)
    queue: list[tuple[NDArray[np.int64], Interval | None]] = [(np.zeros(1, np.int64), None)]
    start, leaves, volume = time.perf_counter(), 0, 0.0
    while queue and leaves < MAX_LEAVES and time.perf_counter() - start < seconds:
        part, known = queue.pop(0)
        if inherit is not None:
            inherit.known = known
        tree.bound(engine, part, chunk)
        leaves += len(part)
        proved = tree.margins(part) > SLACK
        volume += tree.volume(part[proved])
        yield Sample(time.perf_counter() - start, leaves, volume)
        children, known = tree.split(part[~proved]), None
        if inherit is not None and inherit.found is not None:
            one = inherit.found[torch.from_numpy(~proved)]
            known = one.map(lambda end: torch.cat([end, end]))
        _push(queue, children, known, chunk)


def _grow(tree: SplitTree, engine: SlopedEngine, seconds: float) -> Iterator[Sample]:
    """The library's own loop; the volume is looked at now and then, since that takes time."""
    start, leaves, seen = time.perf_counter(), 0, 0.0
    last = Sample(0.0, 0, 0.0)
    for count, _ in tree.grow(engine, Deadline(seconds), MAX_LEAVES, USUAL_CHUNK):
        leaves += count
        now = time.perf_counter() - start
        if now - seen > seconds / SAMPLES:
            last = Sample(now, leaves, 1.0 - tree.volume(tree.open))
            seen = time.perf_counter() - start
            yield last
    if leaves > last.leaves:
        yield Sample(time.perf_counter() - start, leaves, 1.0 - tree.volume(tree.open))


def _push(
    queue: list[tuple[NDArray[np.int64], Interval | None]],
    children: NDArray[np.int64],
    known: Interval | None,
    chunk: int,
) -> None:
    """Append children in pieces of at most a chunk, joined to the last piece while it is small."""
    if len(queue) > 1 and len(queue[-1][0]) + len(children) <= chunk:
        before, old = queue.pop()
        children = np.concatenate([before, children])
        if known is not None and old is not None:
            known = Interval(
                torch.cat([old.lower, known.lower]), torch.cat([old.upper, known.upper])
            )
    for first in range(0, len(children), chunk):
        piece = slice(first, first + chunk)
        queue.append((children[piece], None if known is None else known[piece]))


def run(seconds: float, threads: int, smoke: bool, data: Path, output: Path) -> None:
    """Measure every network with every engine and write the JSON."""
    torch.set_num_threads(threads)
    rows: list[dict[str, object]] = []
    curves: dict[str, list[tuple[float, int, float]]] = {}
    for name in NETWORKS[:1] if smoke else NETWORKS:
        chain, batch = _case(name, data / "vnncomp2022" / "acasxu")
        for engine in ENGINES:
            case = f"{name} {engine}"
            found = _throughput(engine, chain, batch, smoke)
            samples = list(_search(engine, chain, batch, seconds))
            last = samples[-1]
            found += [
                ("search_rate", last.leaves / last.seconds, "leaves/s"),
                ("search_leaves", float(last.leaves), "1"),
                ("search_seconds", last.seconds, "s"),
                ("volume_certified", last.volume, "1"),
                ("volume_per_second", _volume_rate(samples), "1/s"),
            ]
            rows += [{"case": case, "metric": m, "value": v, "unit": u} for m, v, u in found]
            step = max(1, len(samples) // SAMPLES)
            curves[case] = [(s.seconds, s.leaves, s.volume) for s in samples[::step]]
            print(case, *(f"{m} {v:.6g}" for m, v, _ in found), flush=True)
    record = {
        "schema": SCHEMA,
        **environment(),
        "build": str(ops.build_info()),
        "dtype": "float32",
        "seed": 0,
        "threads": threads,
        "load_average": os.getloadavg(),
        "parameters": {
            "seconds": seconds,
            "sides": SIDES,
            "slack": SLACK,
            "chunk": USUAL_CHUNK,
            "chunks": CHUNKS,
            "iterations": ITERATIONS,
        },
        "smoke": smoke,
        "rows": rows,
        "curves": curves,
    }
    write_json(output, record)
    print(f"wrote {output}")


def _volume_rate(samples: list[Sample]) -> float:
    """Volume over time when 90 % of the region, or of what was reached, is certified."""
    target = min(0.9, samples[-1].volume)
    first = next(s for s in samples if s.volume >= target)
    return first.volume / first.seconds


def plot(source: Path, figure: Path) -> None:
    """Draw throughput and the volume left open over time from the JSON."""
    record = json.loads(source.read_text())
    rates = {r["case"]: r["value"] for r in record["rows"] if r["metric"] == "throughput"}
    drawing, (bars, lines) = _figure.new(1, 2, (11, 4))
    colors = dict(zip(ENGINES, COLORS, strict=True))
    styles = dict(zip(NETWORKS, ("-", "--", ":"), strict=True))
    cases = list(rates)[::-1]
    bars.barh(cases, [rates[c] for c in cases], color=[colors[c.split()[1]] for c in cases])
    bars.set_xscale("log")
    bars.set_xlabel("leaves per second, boxes of 3 to 10 % of the region")
    for case, curve in record["curves"].items():
        name, engine = case.split()
        seconds, _, volume = zip(*curve, strict=True)
        open_share = [max(1 - v, 1e-9) for v in volume]
        lines.loglog(seconds, open_share, styles[name], color=colors[engine], label=case)
    lines.set_xlabel("seconds")
    lines.set_ylabel("share of the region's volume not certified")
    lines.legend(fontsize=7)
    load = record["load_average"][0]
    title = f"{record['device']}, {record['threads']} threads, load average {load:.1f}"
    drawing.suptitle(title, fontsize=9)
    _figure.save(drawing, figure)


def main() -> None:
    """Parse the command line."""
    parser = _figure.make_parser(__doc__, threads=2, data="vnncomp2022")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each search")
    options = _figure.parse(parser, "leaves")
    if options.command != "plot":
        seconds = min(options.seconds, 0.5) if options.smoke else options.seconds
        run(seconds, options.threads, options.smoke, options.data, options.output)
    if options.command != "run":
        plot(options.output, options.figure)


if __name__ == "__main__":
    main()
