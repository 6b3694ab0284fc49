"""Failure accounting, samples without a certified prediction, metric objects, envelopes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from torch_prepared.calibrate import (
    CalibrationBound,
    CalibrationMetric,
    CertifiedBrierScore,
    CertifiedCalibrationError,
    Outcome,
    brier_bound,
    calibration_error,
    certified_ece,
    extend_uncertified,
    failure_budget,
    reliability,
    reliability_envelope,
    with_failures,
)
from torch_prepared.errors import SpecError

from .oracles import bins_reachable, large_case, random_case


def test_the_failure_budget_is_the_binomial_quantile() -> None:
    assert failure_budget(2000, 1e-3, 1e-3) == 8
    for n, alpha, delta in ((10, 0.1, 0.01), (500, 1e-3, 1e-4), (1, 0.5, 0.4), (3, 0.9, 0.5)):
        k = failure_budget(n, alpha, delta)
        assert stats.binom.sf(k, n, alpha) <= delta
        assert k == 0 or stats.binom.sf(k - 1, n, alpha) > delta


def test_failures_cost_two_or_one_each() -> None:
    ece = CalibrationBound(CalibrationMetric.ECE, 0.25, Outcome.BOUND, 2000)
    brier = CalibrationBound(CalibrationMetric.BRIER, 0.25, Outcome.BOUND, 2000)
    assert with_failures(ece, 2000, 1e-3, 1e-3).value == pytest.approx(0.258, abs=1e-15)
    assert with_failures(brier, 2000, 1e-3, 1e-3).value == pytest.approx(0.254, abs=1e-15)
    assert with_failures(ece, 2000, 1e-3, 1e-3).failure == 1e-3
    half = CalibrationBound(CalibrationMetric.ECE, 0.25, Outcome.BOUND, 1000)
    assert with_failures(half, 2000, 1e-3, 1e-3).value == pytest.approx(0.266, abs=1e-15)
    with pytest.raises(SpecError):
        with_failures(ece, 1999, 1e-3, 1e-3)
    for levels in ((0.0, 0.5), (0.5, 1.0), (float("nan"), 0.5)):
        with pytest.raises(SpecError):
            with_failures(ece, 2000, *levels)


@pytest.mark.parametrize("seed", range(20))
def test_losing_k_intervals_costs_no_more_than_accounted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lower, upper, correct, _ = large_case(rng, 40)
    bounds = certified_ece(lower, upper, correct), brier_bound(lower, upper, correct)
    lost = rng.choice(40, 3, replace=False)
    z = lower + rng.random(40) * (upper - lower)
    z[lost], correct[lost] = rng.random(3), rng.random(3) < 0.5
    assert calibration_error(z, correct) <= bounds[0].value + 2 * 3 / 40
    assert np.mean((z - correct) ** 2) <= bounds[1].value + 3 / 40


@pytest.mark.parametrize("seed", range(20))
def test_the_extension_to_all_samples_holds_for_any_split(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lower, upper, correct, _ = large_case(rng, 40)
    keep = rng.random(40) < 0.7
    part = certified_ece(lower[keep], upper[keep], correct[keep])
    whole = extend_uncertified(part, int(keep.sum()), 40)
    lower[~keep], upper[~keep] = 0.0, 1.0
    assert whole.value >= certified_ece(lower, upper, correct).value - 1e-12
    exact = Fraction(part.value) * int(keep.sum()) / 40 + Fraction(int((~keep).sum()), 40)
    assert Fraction(whole.value) >= exact
    assert whole.samples == 40


def test_counts_that_do_not_fit_are_refused() -> None:
    bound = CalibrationBound(CalibrationMetric.ECE, 0.25, Outcome.BOUND, 10)
    for counts in ((9, 20), (10, 9), (0, 0)):
        with pytest.raises(SpecError):
            extend_uncertified(bound, *counts)
    with pytest.raises(SpecError):
        CalibrationBound(CalibrationMetric.ECE, float("nan"), Outcome.BOUND, 1)


@pytest.mark.parametrize("kind", [CertifiedBrierScore, CertifiedCalibrationError])
def test_metric_objects_gather_batches(kind) -> None:
    lower, upper, correct, _ = large_case(np.random.default_rng(0), 90)
    plain = {"brier": brier_bound, "ece": certified_ece}
    metric = kind()
    expected = plain[metric.metric.value](lower, upper, correct).value
    for part in np.split(np.arange(90), 3):
        metric.update(lower[part], upper[part], correct[part])
    assert metric.compute().value == expected
    first, second = kind(), kind()
    first.update(lower[:30], upper[:30], correct[:30])
    batch = second(lower[30:], upper[30:], correct[30:])
    assert batch.samples == 60
    first.merge_state(second)
    assert first.compute().value == expected
    metric.reset()
    with pytest.raises(SpecError, match="update"):
        metric.compute()


def test_metric_objects_count_uncertified_samples_as_one() -> None:
    lower, upper, correct, _ = large_case(np.random.default_rng(0), 40)
    keep = np.arange(40) < 30
    metric = CertifiedCalibrationError()
    metric.update(lower, upper, correct, keep)
    part = certified_ece(lower[:30], upper[:30], correct[:30])
    assert metric.compute().value == extend_uncertified(part, 30, 40).value
    metric.reset()
    metric.update(lower, upper, correct, np.zeros(40, bool))
    assert metric.compute().value == 1.0
    before = metric.compute().samples
    with pytest.raises(SpecError):
        metric(upper + 1, upper, correct)
    assert metric.compute().samples == before
    with pytest.raises(SpecError, match="same class"):
        metric.merge_state(CertifiedBrierScore())


def test_a_diagram_says_what_its_bins_hold() -> None:
    z = np.array([0.1, 0.15, 0.9, 1.0, 0.0])
    correct = np.array([False, True, True, True, False])
    found = reliability(z, correct, n_bins=5)
    assert found.count.tolist() == [3, 0, 0, 0, 2]
    assert found.accuracy[[0, 4]] == pytest.approx([1 / 3, 1.0])
    assert found.confidence[[0, 4]] == pytest.approx([0.25 / 3, 0.95])
    assert np.isnan(found.accuracy[1:4]).all()


@pytest.mark.parametrize("seed", range(60))
def test_the_envelope_is_the_range_over_all_assignments(seed: int) -> None:
    import itertools

    lower, upper, correct, edges = random_case(np.random.default_rng(seed), most=5, bins=4)
    envelope = reliability_envelope(lower, upper, correct, edges=edges)
    windows = [bins_reachable(a, b, edges) for a, b in zip(lower, upper, strict=True)]
    seen: dict[int, list[tuple[int, float, float, float]]] = {m: [] for m in range(1, len(edges))}
    for chosen in itertools.product(*windows):
        for m, rows in seen.items():
            inside = [n for n, b in enumerate(chosen) if b == m]
            share = np.mean(correct[inside]) if inside else np.nan
            high = sum(correct[n] - max(lower[n], edges[m - 1]) for n in inside) / len(lower)
            low = sum(correct[n] - min(upper[n], edges[m]) for n in inside) / len(lower)
            rows.append((len(inside), share, low, high))
    for m, rows in seen.items():
        counts, shares, lows, highs = map(np.array, zip(*rows, strict=True))
        at = m - 1
        assert envelope.count_lower[at] == counts.min()
        assert envelope.count_upper[at] == counts.max()
        assert envelope.gap_lower[at] == pytest.approx(lows.min(), abs=1e-12)
        assert envelope.gap_upper[at] == pytest.approx(highs.max(), abs=1e-12)
        if counts.max() == 0:
            assert np.isnan(envelope.accuracy_lower[at])
            assert np.isnan(envelope.accuracy_upper[at])
        else:
            assert envelope.accuracy_lower[at] == pytest.approx(np.nanmin(shares))
            assert envelope.accuracy_upper[at] == pytest.approx(np.nanmax(shares))
