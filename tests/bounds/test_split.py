"""Split constraints against brute force: every activation pattern solved as a linear program."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import NETWORKS, mlp, random_boxes
from scipy.optimize import linprog
from torch import Tensor

from torch_prepared.bounds import AlphaOptions, RegionBatch, bound_nodes
from torch_prepared.bounds.alpha_crown import bound_rows_alpha
from torch_prepared.bounds.split import bound_rows_split
from torch_prepared.core.graph import Graph
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_all
from torch_prepared.specs import Box

SIZES = (3, 4, 3, 2)
OPTIONS = AlphaOptions(iterations=150, learning_rate=0.08, decay=0.975)


def layers(graph: Graph) -> list[tuple[np.ndarray, np.ndarray]]:
    table = graph.parameters
    nodes = [node for node in graph.nodes if node.op == "linear"]
    return [
        (n.params["weight"].read(table).numpy(), n.params["bias"].read(table).numpy())
        for n in nodes
    ]


def pattern_minimum(graph: Graph, box: Box, row: np.ndarray, pattern: np.ndarray) -> float:
    """Least ``row . f`` over the box where the signs of all pre-activations are ``pattern``."""
    maps, used = layers(graph), 0
    weight, bias = np.eye(graph.input_size), np.zeros(graph.input_size)
    rows, limits = [], []
    for w, b in maps[:-1]:
        weight, bias = w @ weight, w @ bias + b
        sign = pattern[used : used + len(b)]
        used += len(b)
        rows.append(-sign[:, None] * weight)
        limits.append(sign * bias)
        active = (sign > 0).astype(float)
        weight, bias = active[:, None] * weight, active * bias
    weight, bias = maps[-1][0] @ weight, maps[-1][0] @ bias + maps[-1][1]
    ends = list(zip(box.lower.tolist(), box.upper.tolist(), strict=True))
    found = linprog(row @ weight, np.concatenate(rows), np.concatenate(limits), bounds=ends)
    return float(found.fun + row @ bias) if found.status == 0 else np.inf


def split_minimum(graph: Graph, box: Box, row: np.ndarray, signs: np.ndarray) -> float:
    """The same where zeros in ``signs`` stand for either sign."""
    choices = [(s,) if s else (-1.0, 1.0) for s in signs.tolist()]
    patterns = itertools.product(*choices)
    return min(pattern_minimum(graph, box, row, np.array(p)) for p in patterns)


def by_node(graph: Graph, signs: Tensor) -> dict[str, Tensor]:
    nodes = [node for node in graph.nodes if node.op == "relu"]
    parts = signs.split([node.size for node in nodes], dim=1)
    return {node.name: part for node, part in zip(nodes, parts, strict=True)}


@pytest.mark.parametrize("seed", range(3))
def test_bounds_are_below_the_true_minimum_and_close_when_all_is_split(seed: int) -> None:
    graph = mlp(SIZES, "relu", seed)
    region = random_boxes(3, 1, seed, 0.8)[0]
    row = np.array([1.0, -1.0])
    hidden = sum(SIZES[1:-1])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-1, 2, (4, hidden), generator=generator).double()
    x = region.sample(3, generator)
    values = evaluate_all(graph, x)
    nodes = [node for node in graph.nodes if node.op == "relu"]
    real = torch.cat([values[node.inputs[0]] for node in nodes], dim=1).sign()
    signs = torch.cat([drawn, real])
    batch = RegionBatch.of([region] * len(signs))
    rows = torch.from_numpy(row).reshape(1, 1, 2)
    lower, _ = bound_rows_split(graph, batch, rows, by_node(graph, signs), options=OPTIONS)
    for i, sign in enumerate(signs.numpy()):
        truth = split_minimum(graph, region, row, sign)
        assert float(lower[i, 0]) <= truth + 1e-9
        if bool((sign != 0).all()) and np.isfinite(truth):
            # One linear program is left, and the multipliers are its dual.
            assert float(lower[i, 0]) >= truth - 0.02 * (1 + abs(truth))


@pytest.mark.parametrize("seed", [1, 2])
def test_both_halves_together_bound_the_whole_and_beat_it(seed: int) -> None:
    graph = mlp((4, 10, 8, 3), "relu", seed)
    region = random_boxes(4, 1, seed, 0.7)[0]
    rows = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(seed)).double()
    relu = next(node for node in graph.nodes if node.op == "relu")
    signs = torch.cat([torch.eye(relu.size), -torch.eye(relu.size), torch.zeros(1, relu.size)])
    batch = RegionBatch.of([region] * len(signs))
    options = AlphaOptions(iterations=60, learning_rate=0.05)
    lower, _ = bound_rows_split(graph, batch, rows, {relu.name: signs.double()}, options=options)
    none, halves = lower[-1], lower[:-1].reshape(2, relu.size, 3)
    together = halves.amin(dim=0)
    assert bool((together >= none - 0.02 * (1 + none.abs())).all())
    assert float((together - none).amax()) > 1e-3
    # Samples of each half are above its bound.
    x = batch.lower[:1] + batch.box.width[:1] * torch.rand(2000, 4, dtype=torch.float64)
    values = evaluate_all(graph, x)
    y = values[graph.nodes[-1].name] @ rows[0].T
    for half, sign in zip(halves, (1, -1), strict=True):
        for position in range(relu.size):
            mine = sign * values[relu.inputs[0]][:, position] >= 0
            assert bool((half[position] <= y[mine] + 1e-12).all())


@pytest.mark.parametrize("name", ["residual", "conv", "branching"])
def test_other_networks_and_gradients_of_leaky_relu(name: str) -> None:
    graph = NETWORKS[name]("leaky_relu", 1)
    regions = RegionBatch.of(random_boxes(graph.input_size, 1, 1, 0.4))
    rows = torch.eye(graph.output_size, dtype=torch.float64).unsqueeze(0)
    node = next(n for n in graph.nodes if n.op == "leaky_relu")
    x = regions.lower + regions.box.width * torch.rand(500, graph.input_size, dtype=torch.float64)
    values = evaluate_all(graph, x)
    z = values[node.inputs[0]].flatten(1)
    position = int((z.amax(0).clamp_min(0) * (-z.amin(0)).clamp_min(0)).argmax())
    for s in (1.0, -1.0):
        sign = torch.zeros(1, node.size, dtype=torch.float64)
        sign[0, position] = s
        lower, boxes = bound_rows_split(
            graph, regions, rows, {node.name: sign.reshape(1, *node.shape)}
        )
        mine = s * z[:, position] >= 0
        assert bool((lower <= values[graph.nodes[-1].name].flatten(1)[mine] + 1e-12).all())
        for key, box in boxes.items():
            inside = values[key][mine]
            assert bool((box.lower - 1e-12 <= inside).all() & (inside <= box.upper + 1e-12).all())


def test_without_splits_it_is_alpha_crown_with_fixed_intervals() -> None:
    graph = mlp((4, 10, 8, 3))
    regions = RegionBatch.of(random_boxes(4, 2, 0, 0.7))
    rows = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    lower, _ = bound_rows_split(graph, regions, rows, {})
    joint, _ = bound_rows_alpha(graph, regions, rows)
    crown, _ = bound_rows_alpha(graph, regions, rows, options=AlphaOptions(iterations=0))
    assert bool((lower >= crown - 1e-12).all())
    assert float((joint - lower).mean()) > -1e-6


def test_empty_parts_are_infinite_and_nan_stays() -> None:
    graph = mlp()
    region = random_boxes(4, 1, 0, 1e-3)
    batch = RegionBatch.of(region)
    rows = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    boxes = bound_nodes(graph, batch)
    stable = boxes["linear1"].lower[0] > 0
    assert bool(stable.any())
    sign = -stable.double().unsqueeze(0)
    lower, _ = bound_rows_split(graph, batch, rows, {"relu2": sign})
    assert bool((lower == torch.inf).all())
    nan = {"linear1.weight": torch.full_like(graph.parameters["linear1.weight"], torch.nan)}
    lower, _ = bound_rows_split(graph, batch, rows, {"relu2": sign}, parameters=nan)
    assert bool(lower.isnan().all())


def test_misfits_are_refused_by_name() -> None:
    graph, batch = mlp(), RegionBatch.of(random_boxes(4, 1))
    rows, sign = torch.eye(3, dtype=torch.float64).unsqueeze(0), torch.zeros(1, 8).double()
    for signs, message in (
        ({"nothing": sign}, "'nothing'; expected the name of a relu"),
        ({"linear1": sign}, "'linear1'; expected the name of a relu"),
        ({"relu2": sign[:, :3]}, r"got shape \(1, 3\); expected \(1, 8\)"),
        ({"relu2": sign + 0.5}, "got other numbers"),
    ):
        with pytest.raises(SpecError, match=message):
            bound_rows_split(graph, batch, rows, signs)
