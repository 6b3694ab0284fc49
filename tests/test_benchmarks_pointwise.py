"""What the pointwise study adds to a row: a radius between two bounds, distances."""

from __future__ import annotations

import pytest
import torch

from benchmarks._pointwise_radius import class_radius, nearest
from tests.helpers import mlp


def test_the_radius_of_a_linear_network_is_the_margin_over_the_1_norm() -> None:
    graph = mlp((4, 2), dtype=torch.float32)
    weight = graph.parameters["linear1.weight"].double()
    x = torch.full((4,), 0.5)
    y = weight @ x.double() + graph.parameters["linear1.bias"].double()
    label = int(y.argmax())
    radius = float((y[label] - y[1 - label]) / (weight[0] - weight[1]).abs().sum())
    assert 0 < radius < 0.5  # else the domain cuts the ball
    found = class_radius(graph, x, label)
    assert found["certified_radius"] <= radius <= found["attacked_radius"]
    assert found["certified_radius"] == pytest.approx(radius, abs=1e-4)
    assert found["attacked_radius"] == pytest.approx(radius, abs=2e-3)


def test_nearest_images_may_differ_between_the_norms() -> None:
    kept = torch.tensor([[0.5, 0.5], [0.6, 0.0]])
    found = nearest(torch.zeros(2), kept)
    assert found["nearest_kept_linf"] == pytest.approx(0.5)
    assert found["nearest_kept_l2"] == pytest.approx(0.6)
