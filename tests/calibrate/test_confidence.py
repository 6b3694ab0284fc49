"""Confidence intervals: softmax of margins, regions of networks, smoothing by noise."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from scipy.special import expit

from tests.helpers import attack, conv_net, mlp, residual_net
from torch_prepared.calibrate import (
    SmoothingBound,
    certified_temperature,
    certify_calibration,
    certify_confidence,
    certify_smoothed_calibration,
    confidence_bounds,
    smoothed_confidence_bounds,
)
from torch_prepared.calibrate.smoothing import shifted_mean_bounds
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import local_robustness


@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0, 2000.0])
def test_softmax_of_margins_within_their_bounds_stays_inside(scale: float) -> None:
    torch.manual_seed(0)
    logits = scale * torch.randn(50, 6, dtype=torch.float64)
    prediction = logits.argmax(1)
    margins = logits.gather(1, prediction[:, None]) - logits
    width = scale * torch.rand(50, 6, dtype=torch.float64)
    found = confidence_bounds(margins - width, margins + width, prediction)
    own = torch.nn.functional.one_hot(prediction, 6).bool()
    assert torch.equal(found.certified, ((margins - width) > 0).masked_fill(own, True).all(1))
    for _ in range(20):
        moved = margins + (2 * torch.rand(50, 6, dtype=torch.float64) - 1) * width
        p = 1 / (1 + torch.exp(-moved).masked_fill(own, 0.0).sum(1))
        assert bool(((found.lower <= p) & (p <= found.upper)).all())


def test_point_margins_give_softmax_up_to_outward_rounding() -> None:
    logits = torch.randn(30, 4, dtype=torch.float64) * 10
    k = logits.argmax(1)
    margins = logits.gather(1, k[:, None]) - logits
    found, exact = confidence_bounds(margins, margins, k), torch.softmax(logits, 1).amax(1)
    assert bool(((found.lower < exact) & (exact <= found.upper)).all())
    assert torch.allclose(found.lower, exact, rtol=1e-12)
    assert torch.allclose(found.upper, exact, rtol=1e-12)


def test_margins_that_are_not_numbers_prove_nothing() -> None:
    low = torch.tensor([[0.0, math.nan], [0.0, -math.inf], [math.nan, 2.0]], dtype=torch.float64)
    high = torch.tensor([[0.0, 1.0], [0.0, math.inf], [math.nan, 3.0]], dtype=torch.float64)
    found = confidence_bounds(low, high, torch.zeros(3, dtype=torch.int64))
    assert found.certified.tolist() == [False, False, True]  # the own column is never read
    assert found.lower[:2].tolist() == [0.0, 0.0]
    assert found.upper[:2].tolist() == [1.0, 1.0]
    with pytest.raises(SpecError, match="order"):
        confidence_bounds(high[1:2], low[1:2], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(SpecError, match="classes"):
        confidence_bounds(low, high, torch.full((3,), 2))


@pytest.mark.parametrize("checked", [False, True])
@pytest.mark.parametrize("build", [mlp, conv_net, residual_net])
@pytest.mark.parametrize("p", [2, math.inf])
def test_attacked_confidences_stay_inside(build, p: float, checked: bool) -> None:
    graph = build()
    torch.manual_seed(1)
    x = torch.randn(2, *graph.input_shape, dtype=torch.float64)
    found = certify_confidence(graph, x, 0.02, p=p, checked=checked)
    assert found.checked == checked
    assert found.lower.dtype == found.upper.dtype == torch.float64
    assert bool(found.certified.any())
    assert bool(((found.lower <= found.confidence) & (found.confidence <= found.upper)).all())
    for i in range(2):
        region = local_robustness(x[i], 0, 0.02, graph.output_size, p).region
        k = int(found.prediction[i])

        def score(points, k=k):
            return torch.softmax(evaluate_graph(graph, points).flatten(1), 1)[:, k : k + 1]

        values = score(attack(score, region))[:, 0]
        if bool(found.certified[i]) or not checked:
            assert float(found.lower[i]) <= float(values.min())
            assert float(values.max()) <= float(found.upper[i])


def test_the_checked_intervals_contain_no_less_than_rounding_allows() -> None:
    graph = mlp((6, 20, 20, 4), seed=3)
    x = torch.randn(6, 6, dtype=torch.float64)
    fast, slow = (certify_confidence(graph, x, 0.01, checked=c) for c in (False, True))
    keep = fast.certified & slow.certified
    assert torch.equal(fast.certified, slow.certified)
    assert torch.allclose(fast.lower[keep], slow.lower[keep], rtol=1e-9)
    assert torch.allclose(fast.upper[keep], slow.upper[keep], rtol=1e-9)


def test_tighter_methods_give_tighter_intervals() -> None:
    graph, x = mlp((6, 20, 20, 4), seed=3), torch.randn(6, 6, dtype=torch.float64)
    widths = []
    for method in ("ibp", "crown-ibp", "crown"):
        found = certify_confidence(graph, x, 0.05, method=method, checked=False)
        widths.append(found.upper - found.lower)
    assert bool((widths[0] >= widths[1] - 1e-12).all())
    assert bool((widths[1] >= widths[2] - 1e-12).all())


def test_a_radius_of_zero_and_an_ended_deadline() -> None:
    graph, x = mlp(), torch.randn(3, 4, dtype=torch.float64)
    point = certify_confidence(graph, x, 0.0)
    assert torch.allclose(point.lower, point.confidence, rtol=1e-9)
    assert torch.allclose(point.upper, point.confidence, rtol=1e-9)
    late = certify_confidence(graph, x, 0.0, time_limit=1e-9)
    assert not late.complete
    assert not bool(late.certified.any())
    assert late.lower.tolist() == [0.0] * 3
    report = certify_calibration(
        graph, x, torch.zeros(3, dtype=torch.int64), [0.1], time_limit=1e-9
    )
    assert report.radii[0].ece_all.value == 1.0


def test_a_module_is_judged_as_it_is_and_not_changed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(5, 3)
    found = certify_confidence(model, x, 1e-3)
    assert torch.allclose(found.confidence.float(), torch.softmax(model(x), 1).amax(1), atol=1e-6)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(
    ("x", "eps"),
    [
        (torch.zeros(2, 5), 0.1),
        (torch.zeros(0, 4), 0.1),
        (torch.zeros(4), 0.1),
        (torch.zeros(2, 4, dtype=torch.int64), 0.1),
        (torch.full((2, 4), math.nan), 0.1),
        (torch.zeros(2, 4), -0.1),
        (torch.zeros(2, 4), math.nan),
    ],
)
def test_bad_inputs_are_refused(x, eps: float) -> None:
    with pytest.raises(SpecError):
        certify_confidence(mlp(), x, eps)


def test_temperature_divides_margins_and_never_makes_the_bound_worse() -> None:
    graph = mlp((6, 20, 4), seed=5)
    torch.manual_seed(0)
    x = torch.randn(40, 6, dtype=torch.float64)
    plain = certify_confidence(graph, x, 0.01, checked=False)
    labels = plain.prediction.clone()
    labels[::7] = (labels[::7] + 1) % 4
    margins = plain.margins
    found = certified_temperature(margins.lower, margins.upper, plain.prediction, labels)
    assert found.after.value <= found.before.value
    again = certify_confidence(graph, x, 0.01, temperature=found.temperature, checked=False)
    expected = confidence_bounds(
        margins.lower / found.temperature, margins.upper / found.temperature, plain.prediction
    )
    assert torch.equal(again.lower, expected.lower)
    assert torch.equal(again.certified, plain.certified)


def _shifted_truth(weight: float, bias: float, shift: float) -> float:
    """Mean of a logistic score of a unit Gaussian moved by ``shift``."""
    nodes, weights = hermegauss(120)
    return float((weights * expit(weight * (nodes + shift) + bias)).sum() / weights.sum())


@pytest.mark.parametrize("method", list(SmoothingBound))
def test_noise_bounds_cover_the_true_shifted_mean(method: SmoothingBound) -> None:
    rng, alpha, shift, failures = np.random.default_rng(0), 0.05, 0.4, 0
    truth = _shifted_truth(2.0, 0.5, -shift), _shifted_truth(2.0, 0.5, shift)
    for _ in range(200):
        scores = expit(2.0 * rng.standard_normal(300) + 0.5)
        low, high = shifted_mean_bounds(scores, shift, alpha, method)
        failures += low > truth[0] or high < truth[1]
    assert failures <= 200 * 2 * alpha


def test_the_distribution_bound_lies_within_the_standard_one() -> None:
    scores = expit(2.0 * np.random.default_rng(0).standard_normal(20_000) + 0.5)
    for shift in (0.0, 0.3, 1.0):
        plain = shifted_mean_bounds(scores, shift, 1e-3, SmoothingBound.STANDARD)
        whole = shifted_mean_bounds(scores, shift, 1e-3, SmoothingBound.CDF)
        assert plain[0] - 0.02 <= whole[0] <= whole[1] <= plain[1] + 0.02
        if shift:
            assert whole[1] - whole[0] < plain[1] - plain[0]
        coarse = shifted_mean_bounds(scores, shift, 1e-3, SmoothingBound.CDF, thresholds=50)
        assert coarse[0] <= whole[0]
        assert whole[1] <= coarse[1]


def test_a_smoothed_linear_classifier_is_bounded_at_every_radius() -> None:
    weight = torch.tensor([[1.5, 0.0], [0.0, 0.0]])

    def model(x):
        return x @ weight.T

    x = torch.tensor([[1.0, 0.3], [-0.8, 0.1], [0.02, 0.0]])
    radii = (0.0, 0.25, 0.5)
    found = smoothed_confidence_bounds(model, x, radii, 0.5, n=4000, alpha=1e-3, compare_all=True)
    assert found[0].failure == pytest.approx(3e-3)
    previous = None
    for radius, interval in zip(radii, found, strict=True):
        for i in range(3):
            sign = 1.0 if interval.prediction[i] == 0 else -1.0
            for move in (-radius, radius):
                truth = _shifted_truth(0.75, float(1.5 * x[i, 0]), 0.0)
                truth = _shifted_truth(0.75 * sign, float(1.5 * sign * (x[i, 0] + move)), 0.0)
                assert float(interval.lower[i]) <= truth <= float(interval.upper[i])
        if previous is not None:
            assert bool((interval.lower <= previous.lower).all())
            assert bool((interval.certified <= previous.certified).all())
        previous = interval
    again = smoothed_confidence_bounds(model, x, radii, 0.5, n=4000, alpha=1e-3, compare_all=True)
    assert torch.equal(again[1].lower, found[1].lower)


def test_smoothed_calibration_accounts_for_failures() -> None:
    graph = mlp((4, 8, 3), seed=1)
    x = torch.randn(30, 4, dtype=torch.float64)
    labels = evaluate_graph(graph, x).argmax(1)
    report = certify_smoothed_calibration(
        graph, x, labels, [0.0, 0.05], 0.1, n=500, temperature=0.2
    )
    for one in report.radii:
        assert int(one.interval.certified.sum()) > 10
        assert one.ece_all.failure == 1e-3
        assert 0 <= report.ece <= one.ece_all.value <= 1
        assert one.interval.failure == pytest.approx(2e-3)


@pytest.mark.parametrize(
    "options",
    [{"sigma": 0.0}, {"radii": []}, {"radii": [-1.0]}, {"alpha": 0.0}, {"n": 0}, {"method": "x"}],
)
def test_bad_smoothing_options_are_refused(options: dict[str, object]) -> None:
    given = {"radii": [0.1], "sigma": 0.5, **options}
    with pytest.raises(SpecError):
        smoothed_confidence_bounds(lambda v: v, torch.zeros(1, 3), **given)


def test_scores_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(SpecError, match="finite"):
        smoothed_confidence_bounds(lambda v: v * math.nan, torch.zeros(1, 3), [0.1], 0.5, n=10)


def test_a_time_limit_is_kept() -> None:
    graph, clock = mlp((20, 60, 60, 60, 5)), time.monotonic()
    x = torch.randn(600, 20, dtype=torch.float64)
    labels = torch.zeros(600, dtype=torch.int64)
    report = certify_calibration(graph, x, labels, [0.01, 0.05], time_limit=1.0)
    assert time.monotonic() - clock < 20
    assert not all(one.interval.complete for one in report.radii)
