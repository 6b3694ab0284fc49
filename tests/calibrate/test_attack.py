"""Calibration attacks keep predictions and the ball, and never beat a certificate."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tests.helpers import mlp
from torch_prepared.calibrate import (
    AttackBudget,
    ace_attack,
    attack_calibration,
    brier_score,
    calibration_adversary,
    calibration_error,
    calibration_training_step,
    certified_calibration_loss,
    certify_calibration,
    confidences,
    smoothed_logits,
)
from torch_prepared.core.capture import capture_module
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph


def _toy(seed: int = 0):
    graph = mlp((6, 24, 24, 4), seed=seed)
    torch.manual_seed(seed)
    x = torch.randn(40, 6, dtype=torch.float64)
    labels = evaluate_graph(graph, x).argmax(1)
    labels[::5] = (labels[::5] + 1) % 4
    return graph, lambda v: evaluate_graph(graph, v).flatten(1), x, labels


@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize(
    ("direction", "reference"), [(-1, "prediction"), (1, "prediction"), (1, "label")]
)
def test_ace_attacks_move_confidence_at_unchanged_accuracy(
    p: float, direction: int, reference: str
) -> None:
    _, model, x, y = _toy()
    budget = AttackBudget(0.2, p, clip=(-2.0, 2.0))
    inside = x.clamp(-2, 2)
    moved = ace_attack(model, inside, y, budget, direction=direction, reference=reference)
    clean, other = confidences(model, inside), confidences(model, moved)
    assert torch.equal(clean[1], other[1])
    distance = (moved - inside).norm(dim=1) if p == 2 else (moved - inside).abs().amax(1)
    assert float(distance.max()) <= 0.2 + 1e-12
    assert float(moved.abs().max()) <= 2.0
    if reference == "prediction":
        change = other[0] - clean[0]
        assert bool((direction * change <= 1e-12).all())
        assert float(change.abs().mean()) > 0.005
    else:
        worse = torch.nn.functional.cross_entropy(model(moved), y)
        assert float(worse) > float(torch.nn.functional.cross_entropy(model(inside), y))


@pytest.mark.parametrize(("seed", "p"), [(0, math.inf), (1, math.inf), (2, 2)])
def test_attacks_never_exceed_the_certified_values(seed: int, p: float) -> None:
    graph, model, x, y = _toy(seed)
    report = certify_calibration(graph, x, y, [0.01, 0.05], p=p)
    for one in report.radii:
        keep = one.interval.certified
        assert int(keep.sum()) > 20
        ece, brier = one.attacked_ece, one.attacked_brier
        assert report.ece <= ece.value <= one.ece_all.value
        assert report.brier <= brier.value <= one.brier_all.value
        own = ece.confidence[keep.numpy()]
        assert calibration_error(own, report.correct[keep]) <= one.ece.value
        own = brier.confidence[keep.numpy()]
        assert brier_score(own, report.correct[keep]) <= one.brier.value
        assert torch.equal(confidences(model, ece.x)[1], one.interval.prediction)


def test_the_attack_on_the_error_beats_plain_over_and_under_confidence() -> None:
    _, model, x, y = _toy()
    budget = AttackBudget(0.2)
    found, _ = attack_calibration(model, x, y, budget)
    right = confidences(model, x)[1] == y
    for direction in (1, -1):
        z, _ = confidences(model, ace_attack(model, x, y, budget, direction=direction))
        assert calibration_error(z, right) <= found.value + 1e-12
    assert found.value > calibration_error(confidences(model, x)[0], right) + 0.005


def test_bad_budgets_and_options_are_refused() -> None:
    _, model, x, y = _toy()
    for options in (
        {"eps": -0.1},
        {"eps": 0.1, "p": 1},
        {"eps": math.nan},
        {"eps": 0.1, "steps": -1},
    ):
        with pytest.raises(SpecError):
            AttackBudget(**options)
    with pytest.raises(SpecError):
        AttackBudget(torch.ones(6), p=2)
    with pytest.raises(SpecError):
        ace_attack(model, x, y, AttackBudget(0.1), direction=2)
    with pytest.raises(SpecError):
        ace_attack(model, x, y, AttackBudget(0.1), direction=1, reference="nobody")
    with pytest.raises(SpecError):
        attack_calibration(model, x, y[:3], AttackBudget(0.1))
    with pytest.raises(SpecError):
        confidences(lambda v: v * math.nan, x)


def _problem(seed: int = 0):
    torch.manual_seed(seed)
    x = torch.randn(200, 4)
    y = (x[:, 0] + 0.5 * torch.randn(200) > 0).long()
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    return model, x, y


@pytest.mark.parametrize("metric", ["brier", "ece"])
def test_the_adversary_of_a_batch_hurts_what_it_aims_at(metric: str) -> None:
    model, x, y = _problem()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    budget = AttackBudget(0.2, steps=5)
    moved = calibration_adversary(model, x, y, budget, metric=metric)
    clean, other = confidences(model, x), confidences(model, moved)
    assert torch.equal(clean[1], other[1])
    assert float((moved - x).abs().max()) <= 0.2 + 1e-6
    measure = brier_score if metric == "brier" else calibration_error
    right = clean[1] == y
    assert measure(other[0], right) > measure(clean[0], right) + 0.02


@pytest.mark.parametrize("metric", ["brier", "ece"])
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_training_steps_lower_the_attacked_metric(metric: str, sigma: float) -> None:
    model, x, y = _problem()
    budget = AttackBudget(0.1, steps=3)
    generator = torch.Generator().manual_seed(0)

    def attacked() -> float:
        return attack_calibration(model, x, y, budget)[1].value

    before = attacked()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(15):
        step = calibration_training_step(
            model, optimizer, x, y, budget, metric=metric, sigma=sigma, generator=generator
        )
        assert math.isfinite(step.loss)
        assert step.loss == pytest.approx(step.cross_entropy + step.calibration, rel=1e-5)
    assert attacked() < before - 0.02
    with pytest.raises(SpecError):
        calibration_training_step(model, optimizer, x, y, budget, weight=-1.0)


def test_smoothed_logits_are_the_log_of_the_mean_score() -> None:
    model, x, _ = _problem()
    noise = torch.randn(3, *x.shape)
    scores = torch.stack([torch.softmax(model(x + n), 1) for n in noise]).mean(0)
    assert torch.allclose(torch.softmax(smoothed_logits(model, noise)(x), 1), scores, atol=1e-6)


def test_certified_training_lowers_the_certified_score_and_certifies_more() -> None:
    model, x, y = _problem()
    graph = capture_module(model, x[:1])
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def judge():
        report = certify_calibration(model, x[:30], y[:30], [0.1], attack=False, checked=False)
        return report.radii[0]

    before = judge()
    for _ in range(20):
        optimizer.zero_grad()
        loss = certified_calibration_loss(graph, dict(model.named_parameters()), x, y, 0.1)
        loss.loss.backward()
        optimizer.step()
    after = judge()
    assert after.brier_all.value < before.brier_all.value
    assert float(loss.certified_brier.detach()) <= 1.0
    assert not any(torch.equal(start[k], v) for k, v in model.state_dict().items())
    with pytest.raises(SpecError):
        certified_calibration_loss(graph, {}, x, y, 0.1, robust_weight=2.0)


def test_the_certified_loss_has_right_gradients() -> None:
    graph = mlp((3, 4, 3), seed=2)
    x, y = torch.randn(3, 3, dtype=torch.float64), torch.tensor([0, 1, 2])
    names = sorted(graph.editable)
    tensors = [graph.parameters[n].clone().requires_grad_(True) for n in names]

    def loss(*values):
        return certified_calibration_loss(
            graph, dict(zip(names, values, strict=True)), x, y, 0.01
        ).loss

    assert torch.autograd.gradcheck(loss, tensors, eps=1e-7, atol=1e-5)
