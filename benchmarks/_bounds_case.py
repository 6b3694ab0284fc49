"""One measured call of ``fig_bounds`` in a process of its own: network, boxes, engine, JSON out.

A process per call makes peak memory and running out of it attributable to one engine.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torch_prepared.bounds import AlphaOptions, compute_bounds
from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.core.interval import Interval
from torch_prepared.core.onnx import load_onnx
from torch_prepared.relax.module import graph_to_module
from torch_prepared.specs import Box, load_vnnlib

__all__ = ["METHODS", "NETWORKS", "load_case"]

NETWORKS = {  # name -> file below vnncomp2022, or None for one with random weights
    "acasxu_1_1": "acasxu/onnx/ACASXU_run2a_1_1_batch_2000.onnx.gz",
    "mnist_256x4": "mnist_fc/onnx/mnist-net_256x4.onnx.gz",
    "mnist_256x6": "mnist_fc/onnx/mnist-net_256x6.onnx.gz",
    "oval21_base": "oval21/onnx/cifar_base_kw.onnx.gz",
    "oval21_deep": "oval21/onnx/cifar_deep_kw.onnx.gz",
    "oval21_wide": "oval21/onnx/cifar_wide_kw.onnx.gz",
    "sri_resnet_a": "sri_resnet_a/onnx/resnet_3b2_bn_mixup_adv_4.0_bs128_lr-1.onnx.gz",
    "resnet_16m": None,
    "tiny": None,
}
METHODS = {
    "ibp": "IBP",
    "crown-ibp": "CROWN-IBP",
    "crown": "CROWN",
    "alpha-crown": "CROWN-Optimized",
}
ITERATIONS, LEARNING_RATE = 20, 0.1
RADIUS = {"mnist": 0.03, "oval21": 0.02, "sri_resnet": 2 / 255 / 0.2, "resnet_16m": 1e-3}
IMAGE_STATISTICS = {
    "oval21": ((0.485, 0.456, 0.406), (0.225,) * 3),
    "sri_resnet": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "resnet_16m": ((0.5,) * 3, (0.25,) * 3),
}


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, outputs, 3, stride, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(channels, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths, rectified."""
        inner = self.second(torch.relu(self.first(x)))
        return torch.relu(inner + self.shortcut(x))


def _random_network(name: str) -> Graph:
    torch.manual_seed(0)
    if name == "tiny":
        layers = [nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
        return capture_module(nn.Sequential(*layers, nn.Linear(16, 3)), torch.zeros(1, 3, 2, 2))
    widths = (64, 128, 256, 512, 512, 512)
    blocks = [Block(a, b, 1 if a == b == 512 else 2) for a, b in itertools.pairwise(widths)]
    head = [nn.Flatten(), nn.Linear(512 * 16 // 4, 1000), nn.ReLU(), nn.Linear(1000, 10)]
    stem = [nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU()]
    return capture_module(nn.Sequential(*stem, *blocks, *head), torch.zeros(1, 3, 32, 32))


def _plain(graph: Graph) -> Graph:
    """The graph with parameters stored as its operators read them: neither engine transposes."""
    parameters, nodes = {}, []
    for node in graph.nodes:
        refs = {}
        for role, ref in node.params.items():
            key = f"{node.name}.{role}"
            parameters[key] = ref.read(graph.parameters).detach().clone().contiguous()
            refs[role] = ParameterRef(key)
        nodes.append(Node(node.name, node.op, node.inputs, node.shape, refs, node.attrs))
    return Graph(tuple(nodes), parameters, frozenset())


def _images(name: str, count: int, data: Path) -> Interval:
    """Real images with a radius around each pixel, clipped and normalized."""
    family = next(key for key in RADIUS if name.startswith(key))
    if family == "mnist":
        packed = next((data / "mnist").glob("t10k*images*")).read_bytes()
        pixels = np.frombuffer(gzip.decompress(packed), np.uint8, offset=16).reshape(-1, 784)
        x = torch.from_numpy(pixels[np.arange(count) % len(pixels)].copy()).float() / 255
        return Interval((x - RADIUS[family]).clamp(0, 1), (x + RADIUS[family]).clamp(0, 1))
    with np.load(data / "cifar10" / "cifar10_test_exact.npz") as archive:
        pixels = archive["images"]
    chosen = pixels[np.arange(count) % len(pixels)]
    x = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 255
    means, scales = IMAGE_STATISTICS[family]
    mean, scale = torch.tensor(means).view(3, 1, 1), torch.tensor(scales).view(3, 1, 1)
    low, high = torch.zeros(1) - mean, torch.ones(1) - mean
    middle, radius = (x - mean) / scale, RADIUS[family]
    ends = (middle - radius).maximum(low / scale), (middle + radius).minimum(high / scale)
    return Interval(ends[0].flatten(1), ends[1].flatten(1))


def load_case(name: str, count: int, data: Path) -> tuple[Graph, Interval]:
    """A network in float32 and ``count`` boxes (count, n)."""
    file = NETWORKS[name]
    folder = data / "vnncomp2022"
    graph = _plain(_random_network(name) if file is None else load_onnx(folder / file).graph)
    generator = torch.Generator().manual_seed(0)
    if name == "tiny":
        x = torch.rand(count, graph.input_size, generator=generator)
        return graph, Interval(x - 0.1, x + 0.1)
    if name.startswith("acasxu"):
        region = load_vnnlib(folder / "acasxu/vnnlib/prop_2.vnnlib.gz")[0].region
        width = (region.upper - region.lower) / 4
        share = torch.rand(count, region.size, generator=generator, dtype=torch.float64)
        start = region.lower + share * (region.upper - region.lower - width)
        return graph, Interval(start.float(), (start + width).float())
    return graph, _images(name, count, data)


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


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure one call and print a JSON object."""
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
    before = _peak()
    wall, cpu, found = [], [], None
    for _ in range(options.repeats + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        found = call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
        if sum(wall) > 10:  # slow calls have warmed up long before their end
            break
    width = float(found.width.double().mean()) if found is not None else float("nan")
    kept = slice(1, None) if len(wall) > 1 else slice(None)
    print(json.dumps({
        "seconds": min(wall[kept]), "cpu_seconds": min(cpu[kept]), "width": width,
        "memory_mb": max(_peak() - before, 0.0), "repeats": len(wall) - 1,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
