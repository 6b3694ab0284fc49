"""The behavior metric against per-sample gradients and dense linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from tests.helpers import NETWORKS
from torch_prepared.edit import _metric
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._importance import Importance
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.relax import evaluate_graph


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("flat", [True, False])
def test_metric_equals_the_dense_gauss_newton_sketch(
    name: str, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_metric, "FLAT_ENTRIES", 10**9 if flat else 0)
    monkeypatch.setattr(_metric, "NEGLIGIBLE", 0.0)
    graph = NETWORKS[name]().to(torch.float32)
    vector = ParameterVector.of(graph)
    inputs = torch.randn(12, graph.input_size, generator=torch.Generator().manual_seed(0))
    outputs = evaluate_graph(graph, inputs).flatten(1)
    reference = Reference(inputs, outputs, None, "preserve")
    metric = _metric.behavior_metric(graph, vector, reference, seed=3, damping=0.5)

    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(12, generator=generator)
    directions = Importance.of(reference, order).directions(graph.output_size, 12, generator)
    theta = vector.flatten(graph.parameters).double()
    exact = graph.to(torch.float64)

    def response(t: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return evaluate_graph(exact, x[None], vector.split(t)).flatten() @ g

    rows = vmap(grad(response), (None, 0, 0))(theta, inputs[order].double(), directions.double())
    rows = rows / 12**0.5
    dense = rows.T @ rows + metric.damping * torch.eye(vector.count, dtype=torch.float64)
    assert metric.damping == pytest.approx(
        0.5 * float(rows.square().sum()) / vector.count, rel=1e-4
    )
    delta = torch.randn(2, vector.count, generator=generator, dtype=torch.float64)
    assert metric.norm_squared(delta[0]) == pytest.approx(
        float(delta[0] @ dense @ delta[0]), rel=1e-4
    )
    assert (metric.spectrum is not None) is flat
    for factor in (1.0, 0.1, 30.0):
        other = metric.damped(factor * metric.damping)
        more = (factor - 1.0) * metric.damping * torch.eye(vector.count, dtype=torch.float64)
        solved = torch.linalg.solve(dense + more, delta.T).T
        close = {"rtol": 1e-3, "atol": 1e-3 * float(solved.abs().max())}
        torch.testing.assert_close(other.solve(delta), solved, **close)
        products, image = delta @ delta.T, metric.image(delta)
        torch.testing.assert_close(other.gram(products, image), solved @ delta.T, **close)


def test_the_largest_eigenpairs_are_those_of_the_full_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    k, rank = 2 * _metric.SUBSPACE + 100, 60
    factor = torch.randn(k, rank, generator=generator, dtype=torch.float64)
    gram = factor @ factor.T
    values, vectors = _metric._largest_eigenpairs(gram, least=1.0)
    assert len(values) == _metric.SUBSPACE  # found by subspace iteration
    full = torch.linalg.eigvalsh(gram)
    torch.testing.assert_close(values[-rank:], full[-rank:], rtol=1e-5, atol=0)
    kept = vectors[:, -rank:]
    rebuilt = kept @ torch.diag(values[-rank:]) @ kept.T
    assert float((rebuilt - gram).norm() / gram.norm()) < 1e-5
    values, _ = _metric._largest_eigenpairs(gram + 5 * torch.eye(k, dtype=torch.float64), 1.0)
    assert len(values) == k  # too many are large
