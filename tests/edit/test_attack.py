"""The attack finds what is there, stays inside regions, and never calls NaN a violation."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import load_onnx
from torch_prepared.edit.attack import Attack, confirm_with_onnx, find_counterexamples, is_violation
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, LpBall, Property, SafeSet, VPolytope, load_vnnlib

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "vnncomp2022"


def at_most(bound: float, outputs: int = 1, strict: bool = True) -> SafeSet:
    """Output 0 stays below ``bound``."""
    row = torch.zeros(1, outputs, dtype=torch.float64)
    row[0, 0] = -1.0
    return SafeSet(((row, torch.tensor([bound], dtype=torch.float64)),), strict=strict)


def linear(weight: list[list[float]]) -> Graph:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    return capture_module(layer, torch.zeros(1, len(weight[0])))


def random_net(n: int, m: int, seed: int = 0) -> Graph:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n, 24), nn.ReLU(), nn.Linear(24, m))
    return capture_module(model, torch.zeros(1, n))


class Bump(nn.Module):
    """1 - sharpness * |x - center|_1, cut off at zero: flat but for one small diamond."""

    def __init__(self, center: Tensor, sharpness: float) -> None:
        super().__init__()
        n = len(center)
        self.first = nn.Linear(n, 2 * n)
        self.second = nn.Linear(2 * n, 1)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([torch.eye(n), -torch.eye(n)]))
            self.first.bias.copy_(torch.cat([-center, center]))
            self.second.weight.fill_(-sharpness)
            self.second.bias.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))


def check(graph: Graph, properties: list[Property], attack: Attack) -> None:
    """Everything an Attack promises."""
    exact = graph.to(torch.float64)
    for i, prop in enumerate(properties):
        x = attack.inputs[i : i + 1]
        assert x.dtype == torch.float64
        assert bool(prop.region.contains(x)[0])
        margin = float(prop.safe.margin(evaluate_graph(exact, x).flatten(1))[0])
        assert margin == pytest.approx(float(attack.margins[i]), abs=1e-12)
        assert bool(attack.violated[i]) == is_violation(prop, float(attack.margins[i]))
        assert bool(attack.representable[i]) == bool((x.float().double() == x).all())


def test_the_worst_corner_of_a_linear_map_is_found_exactly() -> None:
    for n in (3, 40):
        weight = torch.linspace(-2, 3, n)
        graph = linear([weight.tolist()])
        prop = Property(Box([-1.0] * n, [1.0] * n), at_most(1.0))
        attack = find_counterexamples(graph, prop)
        check(graph, [prop], attack)
        exact = 1.0 - float(graph.parameters[next(iter(graph.editable))].double().abs().sum())
        assert float(attack.margins[0]) == pytest.approx(exact, abs=1e-12)


def test_a_violated_part_of_a_four_thousandth_of_a_flat_box_is_found() -> None:
    center = torch.tensor([0.3, -0.6, 0.1, 0.7, -0.2])
    graph = capture_module(Bump(center, 0.8), torch.zeros(1, 5))
    # The output exceeds 0.6 where |x - center|_1 < 0.5: 0.026 % of the box.
    prop = Property(Box([-1.0] * 5, [1.0] * 5), at_most(0.6))
    attack = find_counterexamples(graph, prop)
    check(graph, [prop], attack)
    assert bool(attack.violated[0])


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_balls_and_boxes_are_attacked_together(p: float) -> None:
    graph = random_net(6, 3)
    center = torch.full((6,), 0.4)
    safe = SafeSet.argmax(0, 3)
    properties = [
        Property(LpBall(center, 0.7, p, lower=torch.zeros(6), upper=torch.ones(6)), safe),
        Property(Box([0.1] * 6, [0.3] * 6), safe),
    ]
    attack = find_counterexamples(graph, properties, restarts=16, steps=30, samples=2000)
    check(graph, properties, attack)
    generator = torch.Generator().manual_seed(1)
    for i, prop in enumerate(properties):
        y = evaluate_graph(graph.to(torch.float64), prop.region.sample(2000, generator))
        assert float(attack.margins[i]) <= float(prop.safe.margin(y).min())


def test_the_worst_vertex_of_a_polytope_is_found() -> None:
    graph = linear([[1.0, 2.0]])
    region = VPolytope(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.25, 1.5]]))
    prop = Property(region, at_most(3.0))
    attack = find_counterexamples(graph, prop)
    check(graph, [prop], attack)
    assert float(attack.margins[0]) == pytest.approx(-0.25, abs=1e-6)


def test_flat_polytopes_keep_float64_points() -> None:
    graph = linear([[1.0, 0.0]])
    prop = Property(VPolytope(torch.tensor([[0.1, 0.1], [0.7, 0.7]]).double()), at_most(9.0))
    check(graph, [prop], find_counterexamples(graph, prop))


def test_inputs_are_float32_numbers_where_the_box_has_one() -> None:
    graph = random_net(4, 2)
    wide = Property(Box([0.1] * 4, [0.3] * 4), SafeSet.argmax(0, 2))
    thin = Property(Box([0.1] * 4, [0.1, 0.3, 0.3, 0.3]), SafeSet.argmax(0, 2))
    attack = find_counterexamples(graph, [wide, thin])
    check(graph, [wide, thin], attack)
    assert attack.representable.tolist() == [True, False]
    assert float(attack.inputs[1, 0]) == 0.1


def test_every_disjunct_of_the_unsafe_set_is_tried() -> None:
    graph = linear([[1.0, 0.0], [0.0, 1.0]])
    rows = torch.eye(2, dtype=torch.float64)
    offsets = torch.tensor([[1.5], [0.9]], dtype=torch.float64)
    safe = SafeSet(tuple((rows[k : k + 1], offsets[k]) for k in range(2)))
    attack = find_counterexamples(graph, Property(Box([-1.0, -1.0], [1.0, 1.0]), safe))
    assert float(attack.margins[0]) == pytest.approx(-0.1)


def test_the_same_seed_gives_the_same_points_and_starts_help() -> None:
    center = torch.tensor([0.3] * 30)
    graph = capture_module(Bump(center, 2.0), torch.zeros(1, 30))
    prop = Property(Box([-1.0] * 30, [1.0] * 30), at_most(0.5))
    blind = find_counterexamples(graph, prop)
    assert torch.equal(blind.inputs, find_counterexamples(graph, prop).inputs)
    assert not bool(blind.violated[0])
    told = find_counterexamples(graph, prop, starts=center[None] + 0.001)
    assert bool(told.violated[0])
    outside = find_counterexamples(graph, prop, starts=center[None] + 5.0)
    check(graph, [prop], outside)


def test_no_time_still_gives_points_of_the_regions() -> None:
    graph = random_net(20, 4)
    properties = [Property(Box([-1.0] * 20, [1.0] * 20), SafeSet.argmax(k, 4)) for k in range(4)]
    check(graph, properties, find_counterexamples(graph, properties, time_limit=0.0))


def test_a_margin_of_zero_violates_strict_properties_only_and_nan_none() -> None:
    box = Box([0.0], [1.0])
    strict, closed = Property(box, at_most(1.0)), Property(box, at_most(1.0, strict=False))
    assert is_violation(strict, 0.0)
    assert not is_violation(closed, 0.0)
    assert not is_violation(strict, math.nan)
    attack = find_counterexamples(linear([[1.0]]), [strict, closed])
    assert attack.violated.tolist() == [True, False]


def test_bad_arguments_are_refused() -> None:
    graph = random_net(4, 2)
    prop = Property(Box([0.0] * 4, [1.0] * 4), SafeSet.argmax(0, 2))
    with pytest.raises(SpecError, match="starts"):
        find_counterexamples(graph, prop, starts=torch.zeros(1, 5))
    with pytest.raises(SpecError, match="NaN"):
        find_counterexamples(graph, prop, starts=torch.full((1, 4), torch.nan))
    with pytest.raises(SpecError):
        find_counterexamples(graph, [])
    with pytest.raises(SpecError, match="inputs"):
        find_counterexamples(graph, Property(Box([0.0], [1.0]), SafeSet.argmax(0, 2)))


@pytest.mark.parametrize(
    ("benchmark", "network", "property_file"),
    [
        ("acasxu", "ACASXU_run2a_2_9_batch_2000", "prop_2"),
        ("mnist_fc", "mnist-net_256x2", "prop_0_0.05"),
    ],
)
def test_known_violations_are_found_and_onnxruntime_agrees(
    benchmark: str, network: str, property_file: str
) -> None:
    folder = DATA / benchmark
    if not folder.exists():
        pytest.skip(f"benchmark data are absent: {folder}")
    model = load_onnx(folder / "onnx" / f"{network}.onnx.gz")
    properties = load_vnnlib(folder / "vnnlib" / f"{property_file}.vnnlib.gz")
    attack = find_counterexamples(model.graph, properties)
    check(model.graph, list(properties), attack)
    worst = int(attack.margins.argmin())
    assert bool(attack.violated[worst])
    assert bool(attack.representable[worst])
    deployed = confirm_with_onnx(model, properties[worst], attack.inputs[worst])
    assert deployed <= 0
    assert np.isclose(deployed, float(attack.margins[worst]), atol=1e-4)
