"""The certified calibration error: exact against oracles, sound, and nothing less certain."""

from __future__ import annotations

import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from torch_prepared.calibrate import (
    Outcome,
    calibration_error,
    certified_ece,
    certified_ece_uncertain,
    equal_count_edges,
)
from torch_prepared.errors import SpecError

from .oracles import ece_by_definition, large_case, random_case, worst_by_assignment


@pytest.mark.parametrize("seed", range(300))
def test_dynamic_programming_equals_signs_and_every_assignment(seed: int) -> None:
    lower, upper, correct, edges = random_case(np.random.default_rng(seed))
    exact = worst_by_assignment(lower, upper, correct, edges)
    found = certified_ece(lower, upper, correct, edges=edges)
    assert found.is_certificate
    assert found.value >= exact - 1e-16
    assert found.value == pytest.approx(exact, abs=1e-12)
    assert certified_ece(lower, upper, correct, edges=edges, method="signs").value == found.value


@pytest.mark.parametrize("seed", range(30))
def test_the_integer_program_agrees_and_is_no_certificate(seed: int) -> None:
    lower, upper, correct, edges = random_case(np.random.default_rng(seed))
    exact = certified_ece(lower, upper, correct, edges=edges).value
    found = certified_ece(lower, upper, correct, edges=edges, method="mip")
    assert found.outcome in (Outcome.CLAIM, Outcome.UNKNOWN)
    assert not found.is_certificate
    assert found.value >= exact - 1e-6
    if found.outcome is Outcome.CLAIM:
        assert found.value == pytest.approx(exact, abs=1e-6)


def test_an_integer_program_out_of_time_is_unknown_and_still_no_smaller() -> None:
    lower, upper, correct, edges = large_case(np.random.default_rng(0), 300)
    found = certified_ece(lower, upper, correct, edges=edges, method="mip", time_limit=0.05)
    assert found.outcome is Outcome.UNKNOWN
    assert found.value >= certified_ece(lower, upper, correct, edges=edges).value - 1e-6


@pytest.mark.parametrize("seed", range(50))
def test_the_worst_confidences_reproduce_the_value(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lower, upper, correct, edges = random_case(rng) if seed % 2 else large_case(rng, 60)
    found = certified_ece(lower, upper, correct, edges=edges)
    assert ((lower <= found.confidence) & (found.confidence <= upper)).all()
    gaps = np.zeros(len(edges) - 1)
    np.add.at(gaps, found.bin - 1, correct - found.confidence)
    assert np.abs(gaps).sum() / len(lower) == pytest.approx(found.value, abs=1e-12)
    # At the open edge of a bin the value is approached from inside.
    inside = np.where(
        (found.confidence == edges[found.bin - 1]) & (found.bin > 1),
        np.minimum(found.confidence + 1e-10, upper),
        found.confidence,
    )
    reached = calibration_error(inside, correct, edges=edges)
    assert reached == pytest.approx(found.value, abs=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_no_confidences_within_the_intervals_exceed_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lower, upper, correct, edges = random_case(rng) if seed % 2 else large_case(rng, 50)
    bound = Fraction(certified_ece(lower, upper, correct, edges=edges).value)
    for _ in range(40):
        share = rng.random(len(lower)) ** rng.choice([0.05, 1.0, 20.0])
        z = np.clip(lower + share * (upper - lower), lower, upper)
        gaps = {}
        for value, right in zip(z, correct, strict=True):
            m = int(np.searchsorted(edges[1:-1], value, side="left"))
            gaps[m] = gaps.get(m, Fraction(0)) + int(right) - Fraction(float(value))
        assert sum(map(abs, gaps.values())) / len(z) <= bound


@pytest.mark.parametrize("seed", range(30))
def test_known_confidences_give_the_error_itself(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.random(40) if seed % 2 else rng.integers(0, 16, 40) / 15
    correct, edges = rng.random(40) < z, np.arange(16) / 15
    clean = calibration_error(z, correct)
    assert clean == pytest.approx(ece_by_definition(z, correct, edges), abs=1e-12)
    assert certified_ece(z, z, correct).value == pytest.approx(clean, abs=1e-12)
    assert certified_ece(z, z, correct).value >= clean - 1e-15


@pytest.mark.parametrize("seed", range(20))
def test_wider_intervals_never_lower_it_and_order_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lower, upper, correct, edges = large_case(rng, 80)
    value = certified_ece(lower, upper, correct, edges=edges).value
    wide = certified_ece(lower * rng.random(80), upper + (1 - upper) * rng.random(80), correct)
    assert value <= wide.value <= 1.0
    order = rng.permutation(80)
    assert certified_ece(lower[order], upper[order], correct[order], edges=edges).value == value


def test_nothing_known_gives_one() -> None:
    for correct in ([True, False, True], [True] * 3, [False] * 3):
        assert certified_ece(np.zeros(3), np.ones(3), correct).value == 1.0


@pytest.mark.parametrize("method", ["ends", "alternating", "admm"])
def test_heuristics_are_attacks_that_never_exceed_the_exact_value(method: str) -> None:
    for seed in range(3):
        lower, upper, correct, _ = large_case(np.random.default_rng(seed), 120)
        exact = certified_ece(lower, upper, correct).value
        found = certified_ece(lower, upper, correct, method=method)
        assert not found.is_certificate
        assert found.outcome is Outcome.ATTACK
        assert found.value <= exact
        assert ((lower <= found.confidence) & (found.confidence <= upper)).all()
        gaps = np.zeros(15)
        np.add.at(gaps, found.bin - 1, correct - found.confidence)
        assert np.abs(gaps).sum() / 120 == pytest.approx(found.value, abs=1e-12)


def test_the_alternating_attack_improves_on_the_brier_ends() -> None:
    lower, upper, correct, _ = large_case(np.random.default_rng(0))
    values = [certified_ece(lower, upper, correct, method=m).value for m in ("ends", "alternating")]
    assert values[0] < values[1]


@pytest.mark.parametrize("seed", range(20))
def test_one_sample_moves_the_sum_by_at_most_two(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lower, upper, correct, edges = large_case(rng, 30)
    base = 30 * certified_ece(lower, upper, correct, edges=edges).value
    lower[0], upper[0], correct[0] = 0.0, 1.0, not correct[0]
    assert 30 * certified_ece(lower, upper, correct, edges=edges).value <= base + 2 + 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_uncertain_correctness_covers_both_cases(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lower, upper, correct, edges = random_case(rng, most=5, bins=4)
    count = len(lower)
    possible = np.stack([~correct, correct], axis=1)
    both = np.stack([lower, lower], 1), np.stack([upper, upper], 1)
    sure = certified_ece_uncertain(*both, possible, edges=edges)
    assert sure.value == certified_ece(lower, upper, correct, edges=edges).value
    possible[rng.integers(count)] = True
    open_ = certified_ece_uncertain(*both, possible, edges=edges)
    cases = [
        worst_by_assignment(lower, upper, np.array(c), edges)
        for c in np.ndindex(*[2] * count)
        if all(possible[n, c[n]] for n in range(count))
    ]
    assert open_.value == pytest.approx(max(cases), abs=1e-12)


def test_equal_count_edges_are_frozen_quantiles() -> None:
    rng = np.random.default_rng(0)
    z = rng.random(1000) ** 0.2
    edges = equal_count_edges(z, 10)
    counts = np.histogram(z, edges)[0]
    assert len(edges) == 11
    assert abs(counts - 100).max() <= 1
    assert len(equal_count_edges(np.full(10, 0.5), 10)) == 3  # one cut where all are equal


def test_a_million_samples_take_seconds() -> None:
    rng = np.random.default_rng(0)
    lower, upper = np.sort(rng.random((2, 1_000_000)), axis=0)
    correct = rng.random(1_000_000) < 0.5
    clock = time.process_time()
    certified_ece(lower, upper, correct)
    assert time.process_time() - clock < 60
    clock = time.process_time()
    certified_ece(lower[:10_000], upper[:10_000], correct[:10_000])
    assert time.process_time() - clock < 0.5


@pytest.mark.parametrize(
    ("lower", "upper", "correct", "message"),
    [
        ([], [], [], "N >= 1"),
        ([0.5], [0.4], [True], "lower <= upper"),
        ([float("nan")], [0.4], [True], "of sample 0"),
        ([0.1], [float("nan")], [True], "of sample 0"),
        ([-0.1], [0.4], [True], "of sample 0"),
        ([0.1], [1.1], [True], "of sample 0"),
        ([0.1, 0.2], [0.4], [True], "the same"),
        ([0.1], [0.4], [2], "bool, or 0 and 1"),
        ([[0.1]], [[0.4]], [[True]], "the same"),
        (["a"], ["b"], [True], "expected numbers"),
    ],
)
def test_bad_intervals_are_refused(lower, upper, correct, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        certified_ece(lower, upper, correct)


@pytest.mark.parametrize(
    "options",
    [
        {"n_bins": 0},
        {"n_bins": 5000},
        {"edges": [0.0, 0.6, 0.5, 1.0]},
        {"edges": [0.0, 0.5, 0.5, 1.0]},
        {"edges": [0.1, 1.0]},
        {"edges": [0.0, float("nan"), 1.0]},
        {"method": "magic"},
        {"method": "signs", "n_bins": 17},
    ],
)
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        certified_ece([0.5], [0.6], [True], **options)


def test_tensors_are_taken_and_nothing_is_changed() -> None:
    lower, upper = torch.tensor([0.2, 0.6]), torch.tensor([0.4, 0.9], requires_grad=True)
    correct = torch.tensor([True, False])
    kept = lower.clone(), upper.detach().clone()
    found = certified_ece(lower, upper, correct)
    expected = certified_ece(lower.tolist(), upper.tolist(), [1, 0])
    assert found.value == expected.value
    assert torch.equal(lower, kept[0])
    assert torch.equal(upper.detach(), kept[1])
