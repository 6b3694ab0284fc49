"""One measured call of ``fig_bounds`` in a process of its own: network, boxes, engine, JSON out.

A process per call makes peak memory and running out of it attributable to one engine. Every
finished call prints a line, so that a process that is stopped leaves what it measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks._bounds_networks import NETWORKS, load_case
from benchmarks._roofline import machine_rates, pass_work
from torch_prepared.bounds import AlphaOptions, compute_bounds
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds.crown import bound_nodes
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.relax.module import graph_to_module
from torch_prepared.specs import Box

__all__ = ["ITERATIONS", "LEARNING_RATE", "METHODS"]

METHODS = {
    "ibp": "IBP",
    "crown-ibp": "CROWN-IBP",
    "crown": "CROWN",
    "alpha-crown": "CROWN-Optimized",
}
ITERATIONS, LEARNING_RATE = 20, 0.25  # 0.1 and 0.5 (auto_LiRPA's own) leave both engines looser
ENOUGH_SECONDS = 10.0  # slow calls have warmed up long before their end


def _ours(graph: Graph, box: Interval, method: str, memory: int) -> Callable[[], Interval]:
    regions = [Box(low, high) for low, high in zip(box.lower, box.upper, strict=True)]
    options = AlphaOptions(ITERATIONS, LEARNING_RATE)

    def call() -> Interval:
        with torch.set_grad_enabled(method == "alpha-crown"):
            return compute_bounds(graph, regions, method=method, max_memory=memory, alpha=options)

    return call


def _theirs(graph: Graph, box: Interval, method: str, path: Path | None) -> Callable[[], Interval]:
    if path is None:
        from torch_prepared.bounds.lirpa import lirpa_bounds

        module = graph_to_module(graph)
        shaped = box.map(lambda end: end.reshape(-1, *graph.input_shape))
        name = "alpha-CROWN" if method == "alpha-crown" else METHODS[method]
        return lambda: lirpa_bounds(module, shaped, None, name, ITERATIONS)  # type: ignore[arg-type]
    sys.path.insert(0, str(path))
    if importlib.util.find_spec("graphviz") is None:  # imported for drawing only
        sys.modules["graphviz"] = types.ModuleType("graphviz")
        sys.modules["graphviz"].Digraph = object  # type: ignore[attr-defined]
    import auto_LiRPA

    center = box.center.reshape(-1, *graph.input_shape)
    options = {"iteration": ITERATIONS, "lr_alpha": LEARNING_RATE, "fix_interm_bounds": False}
    bounded = auto_LiRPA.BoundedModule(
        graph_to_module(graph).eval(), torch.zeros_like(center), device="cpu",
        bound_opts={"optimize_bound_args": options},
    )  # fmt: skip
    region = auto_LiRPA.PerturbationLpNorm(
        norm=np.inf, x_L=box.lower.reshape_as(center), x_U=box.upper.reshape_as(center)
    )
    point = auto_LiRPA.BoundedTensor(center, region)

    def call() -> Interval:
        with torch.set_grad_enabled(method == "alpha-crown"):
            lower, upper = bounded.compute_bounds(x=(point,), method=METHODS[method])
        return Interval(lower.detach(), upper.detach())

    return call


def _status(key: str) -> float:
    """A size in MB from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status: no line {key!r}")


def _watch_memory() -> Callable[[], float]:
    """Forget the peak; the function returned tells how far above now it has been since, in MB."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        start = _status("VmRSS:")
    except OSError:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - used
    return lambda: max(_status("VmHWM:") - start, 0.0)


def _measure(call: Callable[[], Interval], repeats: int) -> None:
    """Call once to warm up and then ``repeats`` times; print what is known after each."""
    peak = _watch_memory()
    wall: list[float] = []
    cpu: list[float] = []
    while len(wall) <= repeats and sum(wall) <= ENOUGH_SECONDS:
        start, cpu_start = time.perf_counter(), time.process_time()
        found = call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
        kept = slice(1, None) if len(wall) > 1 else slice(None)
        numbers = {
            "seconds": min(wall[kept]),
            "cpu_seconds": min(cpu[kept]),
            "width": float(found.width.double().mean()),
            "memory_mb": peak(),
            "repeats": len(wall) - 1,
        }
        print(json.dumps(numbers), flush=True)


def _roofline(graph: Graph, box: Interval, max_memory: int) -> dict[str, float]:
    with torch.no_grad():
        boxes = bound_nodes(graph, RegionBatch(box.lower, box.upper), max_memory=max_memory)
    return pass_work(graph, boxes, 2 * graph.output_size) | machine_rates()


def main() -> None:
    """Measure one case; print a JSON object after each call and one with the roofline."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["ours", "auto_lirpa"])
    parser.add_argument("network", choices=sorted(NETWORKS))
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("batch", type=int)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-memory", type=int, default=1 << 30)
    parser.add_argument("--auto-lirpa", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    graph, box = load_case(options.network, options.batch, options.data)
    if options.engine == "ours":
        call = _ours(graph, box, options.method, options.max_memory)
    else:
        call = _theirs(graph, box, options.method, options.auto_lirpa)
    _measure(call, options.repeats)
    if options.engine == "ours" and options.method == "crown":
        print(json.dumps(_roofline(graph, box, options.max_memory)))


if __name__ == "__main__":
    main()
