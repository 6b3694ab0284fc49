"""Proof features: bounds of the last hidden value, priorities, margins of pruned proofs."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import NETWORKS, mlp
from torch_prepared.core.graph import Graph
from torch_prepared.errors import SpecError, UnsupportedOperationError
from torch_prepared.interpret import proof_features
from torch_prepared.interpret._cut import cut_network
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, LpBall, Property, SafeSet

from .cases import METHODS, network, property_at_center, proved_cases

SUPPORTED = [(n, m) for n in NETWORKS for m in METHODS if (n, m) != ("pooling", "zonotope")]


@pytest.mark.parametrize("name", NETWORKS)
def test_tail_of_head_is_the_network(name: str) -> None:
    graph = network(name)
    cut = cut_network(graph)
    x = torch.randn(5, graph.input_size, dtype=torch.float64)
    z = evaluate_graph(cut.head(), x)
    torch.testing.assert_close(evaluate_graph(cut.tail(), z), evaluate_graph(graph, x))
    rows = torch.randn(3, graph.output_size, dtype=torch.float64)
    back, const = cut.pull_back(rows)
    torch.testing.assert_close(
        z.flatten(1) @ back.T + const, evaluate_graph(graph, x).flatten(1) @ rows.T
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_pruned_network_reads_kept_features_only(name: str) -> None:
    graph = network(name)
    cut = cut_network(graph)
    kept = torch.arange(0, cut.size, 2)
    x = torch.randn(5, graph.input_size, dtype=torch.float64)
    z = evaluate_graph(cut.head(), x)
    mask = torch.zeros(cut.size, dtype=z.dtype)
    mask[kept] = 1.0
    expected = evaluate_graph(cut.tail(), (z.flatten(1) * mask).reshape_as(z))
    torch.testing.assert_close(evaluate_graph(cut.pruned(kept), x), expected)
    assert set(graph.parameters) <= set(cut.pruned(kept).parameters)


@pytest.mark.parametrize(("name", "method"), SUPPORTED)
def test_features_hold_sampled_hidden_values(name: str, method: str) -> None:
    graph = network(name)
    prop = property_at_center(graph, radius=0.1)
    features = proof_features(graph, prop, method)
    head = features.cut.head()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(16, graph.input_size, generator=generator, dtype=torch.float64)
    x = torch.cat([prop.region.sample(16, generator), prop.region.corner(rows)])
    z = evaluate_graph(head, x).flatten(1)
    slack = 1e-12 * (1 + z.abs().max())
    assert bool((z >= features.lower - slack).all())
    assert bool((z <= features.upper + slack).all())
    margins = prop.safe.margin(evaluate_graph(graph, x).flatten(1))
    assert features.margin <= float(margins.min()) + 1e-12


@pytest.mark.parametrize(("name", "method"), SUPPORTED)
def test_contributions_and_offset_add_up_to_the_margin(name: str, method: str) -> None:
    graph = network(name)
    features = proof_features(graph, property_at_center(graph, radius=0.1), method)
    total = features.contributions.sum(dim=1) + features.offset
    torch.testing.assert_close(total, features.row_margins)


@pytest.mark.parametrize("method", ["ibp", "zonotope"])
def test_pruning_one_feature_moves_no_margin_by_more_than_its_priority(method: str) -> None:
    for features in proved_cases(5, method):
        masks = torch.rand(40, features.size) < 0.6
        before = features.pruned_margins(masks)
        for i in range(features.size):
            less = masks.clone()
            less[:, i] = False
            moved = (features.pruned_margins(less) - before).abs().max()
            assert float(moved) <= float(features.priority[i]) + 1e-12


def test_zonotope_margins_are_concave_in_the_kept_set() -> None:
    for features in proved_cases(3, "zonotope"):
        a, b = torch.rand(2, *features.rows.shape, dtype=torch.float64)
        rows = torch.stack([features.rows * a, features.rows * b])
        middle, _ = features.support(rows.mean(dim=0))
        ends = torch.stack([features.support(r)[0] for r in rows])
        assert bool((middle >= ends.mean(dim=0) - 1e-12).all())


def test_zonotope_of_one_hidden_layer_is_deepz() -> None:
    graph = mlp((3, 5, 2), seed=3)
    prop = property_at_center(graph, radius=0.2)
    features = proof_features(graph, prop, "zonotope")
    region, weights = prop.region, list(graph.parameters.values())
    w, b = weights[0], weights[1]
    center = w @ ((region.lower + region.upper) / 2) + b
    generators = w * ((region.upper - region.lower) / 2)
    low, high = center - generators.abs().sum(1), center + generators.abs().sum(1)
    unstable = (low < 0) & (high > 0)
    slope = torch.where(unstable, high / (high - low), (low >= 0).double())
    new = torch.where(unstable, -slope * low / 2, 0.0)
    radius = slope * generators.abs().sum(1) + new
    torch.testing.assert_close(features.lower, slope * center + new - radius)
    torch.testing.assert_close(features.upper, slope * center + new + radius)


def test_a_clause_with_several_rows_uses_its_best() -> None:
    graph = mlp(seed=1)
    prop = property_at_center(graph)
    rows = torch.cat([r for r, _ in prop.safe.clauses])
    either = SafeSet(((torch.cat([-rows[:1], rows[:1]]), torch.zeros(2)),), strict=True)
    features = proof_features(graph, Property(prop.region, either), "crown")
    assert features.chosen == (1,)
    assert features.proved


def test_other_regions_and_float32_networks_are_bounded() -> None:
    graph = mlp(seed=2, dtype=torch.float32)
    ball = LpBall(torch.zeros(4, dtype=torch.float64), 0.05, 2.0, None, None)
    for method in METHODS:
        features = proof_features(graph, Property(ball, SafeSet.argmax(0, 3)), method)
        assert features.lower.dtype == torch.float64
        assert bool((features.lower <= features.upper).all())


def test_refusals_name_what_is_wrong() -> None:
    graph = mlp()
    prop = property_at_center(graph)
    with pytest.raises(SpecError, match="expected one of ibp, zonotope, crown"):
        proof_features(graph, prop, "magic")
    with pytest.raises(SpecError, match="region of 3 inputs"):
        proof_features(graph, Property(Box([0.0] * 3, [1.0] * 3), prop.safe))
    with pytest.raises(UnsupportedOperationError, match="no nonlinear operator"):
        proof_features(mlp((4, 3)), Property(prop.region, prop.safe))
    with pytest.raises(UnsupportedOperationError, match="'tanh' has no parallel lines"):
        proof_features(mlp(op="tanh"), prop, "zonotope")


def test_overflowing_weights_prove_nothing() -> None:
    graph = mlp()
    huge: Graph = graph.with_parameters(
        {name: value * 1e160 for name, value in graph.parameters.items()}
    )
    for method in METHODS:
        assert not proof_features(huge, property_at_center(graph), method).proved
