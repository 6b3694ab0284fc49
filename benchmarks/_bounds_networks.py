"""Networks and boxes of ``fig_bounds``: real ones, and a residual network of 17 M weights."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.core.interval import Interval
from torch_prepared.core.onnx import load_onnx
from torch_prepared.specs import load_vnnlib

__all__ = ["NETWORKS", "load_case"]

NETWORKS = {  # name -> file below vnncomp2022, or None for one with random weights
    "acasxu_1_1": "acasxu/onnx/ACASXU_run2a_1_1_batch_2000.onnx.gz",
    "mnist_256x4": "mnist_fc/onnx/mnist-net_256x4.onnx.gz",
    "mnist_256x6": "mnist_fc/onnx/mnist-net_256x6.onnx.gz",
    "oval21_base": "oval21/onnx/cifar_base_kw.onnx.gz",
    "oval21_deep": "oval21/onnx/cifar_deep_kw.onnx.gz",
    "oval21_wide": "oval21/onnx/cifar_wide_kw.onnx.gz",
    "sri_resnet_a": "sri_resnet_a/onnx/resnet_3b2_bn_mixup_adv_4.0_bs128_lr-1.onnx.gz",
    "resnet_17m": None,
    "tiny": None,
}
RADIUS = {"mnist": 0.03, "oval21": 0.02, "sri_resnet": 2 / 255 / 0.2, "resnet_17m": 1e-3}
IMAGE_STATISTICS = {
    "oval21": ((0.485, 0.456, 0.406), (0.225,) * 3),
    "sri_resnet": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "resnet_17m": ((0.5,) * 3, (0.25,) * 3),
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


def _residual_network() -> nn.Sequential:
    """16.8 M random weights that keep the size of activations (He et al., 2015)."""
    widths = (64, 128, 256, 512, 512, 512)
    blocks = [Block(a, b, 1 if a == b == 512 else 2) for a, b in itertools.pairwise(widths)]
    head = [nn.Flatten(), nn.Linear(512 * 2 * 2, 1000), nn.ReLU(), nn.Linear(1000, 10)]
    net = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), *blocks, *head)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for block in blocks:  # both paths together have the size of one
            block.second.weight.mul_(0.5**0.5)
            block.shortcut.weight.mul_(0.5)
    return net


def _random_network(name: str) -> Graph:
    torch.manual_seed(0)
    if name == "tiny":
        layers = [nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()]
        return capture_module(nn.Sequential(*layers, nn.Linear(16, 3)), torch.zeros(1, 3, 2, 2))
    return capture_module(_residual_network(), torch.zeros(1, 3, 32, 32))


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
