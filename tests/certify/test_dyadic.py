"""Exact evaluation by split products against rational arithmetic, entry by entry."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import NETWORKS, mlp
from torch_prepared.certify import evaluate_exactly
from torch_prepared.certify.dyadic import Dyadic, evaluate_dyadic
from torch_prepared.relax import evaluate_graph


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_floats_are_kept_digit_for_digit(values: list[float]) -> None:
    got = Dyadic.of(values).fractions()
    assert got.tolist() == [Fraction(v) for v in values]


@pytest.mark.parametrize("op", ["relu", "leaky_relu", "abs"])
@pytest.mark.parametrize("name", ["mlp", "mixed", "branching"])
def test_values_equal_rational_arithmetic(name: str, op: str, rng) -> None:
    graph = NETWORKS[name](op)
    record = graph.record()
    points = rng.normal(size=(3, graph.input_size)) * 10.0 ** rng.integers(-8, 8, (3, 1))
    got = evaluate_dyadic(record, points)
    assert got is not None
    for i, x in enumerate(points):
        assert (got[i] == evaluate_exactly(record, x)).all()


def test_values_equal_the_float64_forward_to_rounding(rng) -> None:
    graph = mlp((20, 50, 50, 4))
    points = rng.normal(size=(16, 20))
    got = evaluate_dyadic(graph.record(), points).astype(np.float64)
    forward = evaluate_graph(graph, torch.from_numpy(points)).numpy()
    np.testing.assert_allclose(got, forward, atol=1e-12)


def test_operators_that_are_not_dyadic_are_left_to_others() -> None:
    graph = mlp((3, 4, 2), "tanh")
    assert evaluate_dyadic(graph.record(), np.zeros((1, 3))) is None


def test_numbers_far_apart_do_not_lose_digits() -> None:
    graph = mlp((2, 2), dtype=torch.float64)
    graph = graph.with_parameters(
        {"linear1.weight": torch.tensor([[1e300, 1e-300], [1.0, -1.0]], dtype=torch.float64)}
    )
    got = evaluate_dyadic(graph.record(), np.array([[1e-200, 1e200]]))
    assert (got[0] == evaluate_exactly(graph.record(), np.array([1e-200, 1e200]))).all()
