"""Maps: gradients of interval midpoints, in three styles."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers import mlp
from torch_prepared.errors import SpecError
from torch_prepared.interpret import feature_maps, foreground_share, proof_features, total_map
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import LpBall, Property

from .cases import METHODS, network, property_at_center

STYLES = ("frozen", "moving", "alpha")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("style", STYLES)
def test_maps_of_a_point_are_the_network_s_gradients(method: str, style: str) -> None:
    graph = mlp((4, 8, 6, 3), seed=2)
    prop = property_at_center(graph, radius=0.0)
    features = proof_features(graph, prop, method)
    x = prop.region.lower.clone().requires_grad_(True)
    z = evaluate_graph(features.cut.head(), x[None])[0]
    expected = torch.stack([torch.autograd.grad(v, x, retain_graph=True)[0] for v in z])
    torch.testing.assert_close(feature_maps(features, torch.arange(6), style=style), expected)


@pytest.mark.parametrize("method", ["crown", "zonotope"])
def test_frozen_maps_are_the_mean_of_the_input_coefficients(method: str) -> None:
    graph = network("conv", 3)
    features = proof_features(graph, property_at_center(graph, radius=0.2), method)
    maps = feature_maps(features, torch.arange(features.size))
    assert maps.shape == (features.size, 2, 6, 6)
    units = torch.eye(features.size, dtype=torch.float64)
    low = features.relaxed.bound(features.cut.hidden, units)
    high = features.relaxed.bound(features.cut.hidden, -units)
    center = (features.prop.region.lower + features.prop.region.upper) / 2
    middle = (low.inputs - high.inputs) / 2
    alive = features.upper > 0
    torch.testing.assert_close(maps.flatten(1)[alive], middle[alive])
    assert not maps[~alive].any()
    radius = (features.prop.region.upper - features.prop.region.lower) / 2
    ends = low.inputs @ center - low.inputs.abs() @ radius + low.const
    assert bool((ends <= features.upper + 1e-9).all())


@pytest.mark.parametrize("method", METHODS)
def test_moving_maps_are_finite_differences_of_the_midpoint(method: str) -> None:
    graph = mlp((3, 6, 5, 3), seed=5)
    prop = property_at_center(graph, radius=0.1)
    features = proof_features(graph, prop, method)
    maps = feature_maps(features, torch.arange(5), style="moving")
    step, alive = 1e-6, features.upper > 0
    for j in range(3):
        ends = []
        for sign in (1.0, -1.0):
            shift = torch.zeros(3, dtype=torch.float64)
            shift[j] = sign * step
            box = type(prop.region)(prop.region.lower + shift, prop.region.upper + shift)
            moved = proof_features(graph, Property(box, prop.safe), method)
            ends.append((moved.lower + moved.upper) / 2)
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(maps[alive, j], slope[alive], atol=1e-5, rtol=1e-5)


def test_alpha_maps_belong_to_bounds_at_least_as_tight() -> None:
    from torch_prepared.interpret.maps import _optimized

    graph = mlp((4, 12, 12, 6, 3), seed=1)
    features = proof_features(graph, property_at_center(graph, radius=0.3), "crown")
    units = torch.eye(6, dtype=torch.float64)
    rows = torch.cat([units, -units])
    region = features.relaxed.regions
    plain = features.relaxed.bound(features.cut.hidden, rows)
    best = _optimized(features, rows)
    assert best.shape == plain.inputs.shape
    assert not torch.equal(best, plain.inputs)
    assert torch.isfinite(best).all()
    assert region.is_box


def test_total_map_weighs_maps_by_the_binding_row() -> None:
    graph = mlp(seed=1)
    features = proof_features(graph, property_at_center(graph))
    kept = torch.tensor([4, 1])
    maps = feature_maps(features, kept)
    row = features.rows[features.binding]
    torch.testing.assert_close(total_map(features, kept, maps), row[4] * maps[0] + row[1] * maps[1])


def test_foreground_share_is_a_share() -> None:
    maps = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    share = foreground_share(maps, torch.tensor([True, False]))
    assert float(share[0]) == 0.25
    assert math.isnan(float(share[1]))


def test_no_features_give_no_maps_and_bad_ones_an_error() -> None:
    graph = mlp(seed=1)
    features = proof_features(graph, property_at_center(graph))
    assert feature_maps(features, torch.zeros(0, dtype=torch.int64)).shape == (0, 4)
    with pytest.raises(SpecError, match="out of range"):
        feature_maps(features, torch.tensor([6]))
    with pytest.raises(SpecError, match="expected one of frozen, moving, alpha"):
        feature_maps(features, torch.tensor([0]), style="loud")
    ball = LpBall(features.prop.region.lower, 0.01, 2.0, None, None)
    round_features = proof_features(graph, Property(ball, features.prop.safe))
    with pytest.raises(SpecError, match="not a box"):
        feature_maps(round_features, torch.tensor([0]), style="moving")
    assert feature_maps(round_features, torch.tensor([0])).shape == (1, 4)
