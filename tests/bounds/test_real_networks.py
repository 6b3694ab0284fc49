"""Bounds of VNN-COMP 2022 networks enclose what onnxruntime computes, counterexamples included."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from torch_prepared.bounds import certified_margin, compute_bounds
from torch_prepared.bounds.lirpa import lirpa_available, lirpa_bounds
from torch_prepared.core.interval import Interval
from torch_prepared.core.onnx import OnnxNetwork, OnnxSession, load_onnx
from torch_prepared.relax.module import graph_to_module
from torch_prepared.specs import Box, Property, load_vnnlib

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "vnncomp2022"
pytestmark = [
    pytest.mark.optional,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark data in {DATA}"),
]
RESNET = "resnet_3b2_bn_mixup_adv_4.0_bs128_lr-1"
CASES = [
    ("acasxu", "ACASXU_run2a_1_1_batch_2000", 1e-3),
    ("mnist_fc", "mnist-net_256x2", 1e-4),
    ("oval21", "cifar_base_kw", 1e-4),
    pytest.param("sri_resnet_a", RESNET, 1e-3, marks=pytest.mark.slow),
]


def instances(benchmark: str, network: str, status: str, count: int) -> list[Path]:
    """Property files of a network with a given verdict."""
    with (DATA / benchmark / "instances.csv").open(newline="") as table:
        rows = [r for r in csv.DictReader(table) if network in r["onnx"] and r["status"] == status]
    return [DATA / benchmark / r["vnnlib"] for r in rows[:count]]


def read(benchmark: str, network: str, path: Path) -> tuple[OnnxNetwork, Property]:
    net = load_onnx(DATA / benchmark / "onnx" / f"{network}.onnx.gz")
    return net, load_vnnlib(path)[0]


def float32_box(prop: Property) -> Box:
    """The float32 inputs of a region: deployed networks see no others."""
    lower, upper = prop.region.lower.float(), prop.region.upper.float()
    lower = torch.where(lower.double() < prop.region.lower, lower.nextafter(lower + 1), lower)
    upper = torch.where(upper.double() > prop.region.upper, upper.nextafter(upper - 1), upper)
    return Box(lower, torch.maximum(lower, upper))


@pytest.mark.parametrize(("benchmark", "network", "rounding"), CASES)
def test_bounds_enclose_what_onnxruntime_computes(
    benchmark: str, network: str, rounding: float
) -> None:
    """``rounding`` covers float32 sums in the session and in the bounds, relative to outputs."""
    path = instances(benchmark, network, "unsat" if benchmark != "sri_resnet_a" else "unknown", 1)
    net, prop = read(benchmark, network, path[0])
    region = float32_box(prop)
    generator = torch.Generator().manual_seed(0)
    x = region.sample(300, generator)
    x = torch.cat([x, region.corner(torch.randn(300, region.size, generator=generator).double())])
    y = torch.from_numpy(OnnxSession(net)(x.float().numpy()))
    slack = rounding * (1 + y.abs().max())
    previous: Interval | None = None
    for method in ("ibp", "crown-ibp", "crown"):
        with torch.no_grad():
            bound = compute_bounds(net.graph, region, method=method)
        assert bool((bound.lower[0] - slack <= y.amin(0)).all())
        assert bool((y.amax(0) <= bound.upper[0] + slack).all())
        if previous is not None:
            assert float(bound.width.mean()) <= float(previous.width.mean())
        previous = bound


@pytest.mark.parametrize(
    ("benchmark", "network"),
    [("acasxu", "ACASXU_run2a_2_9_batch_2000"), ("mnist_fc", "mnist-net_256x2")],
)
def test_margins_stay_below_stored_counterexamples(benchmark: str, network: str) -> None:
    """A violated property is never certified: its margin is at most the counterexample's."""
    stored = np.load(DATA / benchmark / "counterexamples.npz")
    for path in instances(benchmark, network, "sat", 3):
        net, prop = read(benchmark, network, path)
        key = f"{network}__{path.name.removesuffix('.vnnlib.gz')}"
        assert key in stored.files
        x = torch.from_numpy(stored[key]).reshape(1, -1)
        y = torch.from_numpy(OnnxSession(net)(x.numpy())).double()
        inside = torch.minimum(torch.maximum(x.double(), prop.region.lower), prop.region.upper)
        assert float((inside - x).abs().max()) <= 1e-4
        for method in ("ibp", "crown-ibp", "crown"):
            with torch.no_grad():
                margin = certified_margin(net.graph, prop, method=method).margin
            assert float(margin) <= float(prop.safe.margin(y)) + 1e-4
            assert float(margin) <= 0


@pytest.mark.slow
@pytest.mark.skipif(not lirpa_available(), reason="auto_LiRPA is not installed")
@pytest.mark.parametrize(("benchmark", "network", "rounding"), CASES)
def test_bounds_are_as_tight_as_auto_lirpa(benchmark: str, network: str, rounding: float) -> None:
    """Mean widths, float32, for every method both tools have."""
    path = instances(benchmark, network, "unsat" if benchmark != "sri_resnet_a" else "unknown", 1)
    net, prop = read(benchmark, network, path[0])
    region = float32_box(prop)

    def shaped(end: Tensor) -> Tensor:
        return end.float().reshape(1, *net.graph.input_shape)

    box = Interval(shaped(region.lower), shaped(region.upper))
    for ours, theirs in (("ibp", "IBP"), ("crown-ibp", "CROWN-IBP"), ("crown", "CROWN")):
        with torch.no_grad():
            mine = float(compute_bounds(net.graph, region, method=ours).width.mean())
        other = float(lirpa_bounds(graph_to_module(net.graph), box, method=theirs).width.mean())
        assert mine <= other * (1 + 1e-5)
