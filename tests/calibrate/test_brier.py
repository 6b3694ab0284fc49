"""Certified Brier scores against enumeration and sampling."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch

from torch_prepared.calibrate import (
    brier_bound,
    brier_score,
    certified_brier,
    certified_brier_multiclass,
)
from torch_prepared.errors import SpecError

from .oracles import large_case, random_case


@pytest.mark.parametrize("seed", range(100))
def test_it_equals_the_best_of_all_endpoints(seed: int) -> None:
    lower, upper, correct, _ = random_case(np.random.default_rng(seed))
    ends = itertools.product(*zip(lower, upper, strict=True))
    best = max(float(np.mean((np.array(z) - correct) ** 2)) for z in ends)
    tensors = torch.from_numpy(lower), torch.from_numpy(upper), torch.from_numpy(correct)
    assert float(certified_brier(*tensors)) == pytest.approx(best, abs=1e-15)
    assert brier_bound(lower, upper, correct).value == pytest.approx(best, abs=1e-11)


@pytest.mark.parametrize("seed", range(30))
def test_the_bound_holds_in_rational_arithmetic(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lower, upper, correct, _ = large_case(rng, 50)
    bound = brier_bound(lower, upper, correct)
    assert bound.is_certificate
    exact = sum(
        (1 - Fraction(float(a))) ** 2 if c else Fraction(float(b)) ** 2
        for a, b, c in zip(lower, upper, correct, strict=True)
    )
    assert exact / 50 <= Fraction(bound.value) <= exact / 50 + Fraction(1, 10**11)
    assert brier_score(bound.confidence, correct) == pytest.approx(bound.value, abs=1e-11)


def test_block_sums_are_exact_for_many_samples() -> None:
    count = (1 << 20) + 7
    bound = brier_bound(np.full(count, 0.5), np.full(count, 0.75), np.zeros(count, bool))
    assert bound.value == 0.5625


def test_gradients_agree_with_differences() -> None:
    rng = np.random.default_rng(0)
    lower, upper, correct, _ = large_case(rng, 12)
    inputs = [torch.from_numpy(v).requires_grad_(True) for v in (lower * 0.9, upper * 0.9)]

    def score(low, high):
        return certified_brier(low, high, torch.from_numpy(correct))

    assert torch.autograd.gradcheck(score, inputs)


def _boxes(rng: np.random.Generator, classes: int, width: float):
    center = rng.dirichlet(np.ones(classes))
    lower = np.maximum(center - width * rng.random(classes), 0)
    return lower, np.minimum(center + width * rng.random(classes), 1)


def _vertices(lower, upper):
    """All points of the box on the simplex with at most one class between its ends."""
    classes = len(lower)
    for free in range(classes):
        others = [k for k in range(classes) if k != free]
        for pick in itertools.product((0, 1), repeat=classes - 1):
            p = np.empty(classes)
            p[others] = np.where(pick, upper[others], lower[others])
            p[free] = 1 - p[others].sum()
            if lower[free] - 1e-12 <= p[free] <= upper[free] + 1e-12:
                yield p


@pytest.mark.parametrize("seed", range(60))
def test_the_multiclass_bound_holds_and_its_gap_is_as_stated(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lower, upper = _boxes(rng, 4, rng.choice([0.05, 0.3, 1.0]))
    label = int(rng.integers(4))
    hot = np.eye(4)[label]
    exact = max(float(((p - hot) ** 2).sum()) for p in _vertices(lower, upper))
    tensors = torch.from_numpy(lower)[None], torch.from_numpy(upper)[None], torch.tensor([label])
    bound = float(certified_brier_multiclass(*tensors))
    assert exact <= bound <= exact + float((upper - lower).max()) ** 2 / 4 + 1e-12


def test_multiclass_point_intervals_give_the_score_itself() -> None:
    p = torch.softmax(torch.randn(9, 5, dtype=torch.float64), 1)
    y = torch.randint(5, (9,))
    exact = (p - torch.nn.functional.one_hot(y, 5)).square().sum(1)
    assert torch.allclose(certified_brier_multiclass(p, p, y, reduction="none"), exact, atol=1e-12)


def test_bad_input_is_refused() -> None:
    half = torch.tensor([0.5])
    with pytest.raises(SpecError, match="reduction"):
        certified_brier(half, half, torch.tensor([True]), reduction="sum")
    with pytest.raises(SpecError):
        certified_brier(half, half - 0.1, torch.tensor([True]))
    box = torch.full((1, 3), 0.2), torch.full((1, 3), 0.3)
    with pytest.raises(SpecError, match="sum upper"):
        certified_brier_multiclass(*box, torch.tensor([0]))
    with pytest.raises(SpecError, match="labels"):
        certified_brier_multiclass(box[0], box[1] + 0.5, torch.tensor([3]))
    with pytest.raises(SpecError, match="sum lower"):
        certified_brier_multiclass(box[0] * torch.nan, box[1] + 0.5, torch.tensor([0]))
