"""Edits measured by the optimizer's second moments, and the cheap way to finish."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_prepared.certify import Verdict
from torch_prepared.errors import SpecError
from torch_prepared.hooks import EditHook, EverySteps, Outcome
from torch_prepared.hooks._memory import RowMemory
from torch_prepared.hooks._optimizer import DAMPING, inverse_metric
from torch_prepared.testing.hook import flipped_corner, small_network, two_moons_like


def trained(hook: EditHook | None, optimizer_type: type, steps: int) -> nn.Module:
    model, (x, y) = small_network(), two_moons_like()
    optimizer = optimizer_type(model.parameters(), 0.02)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if hook is not None:
            hook.after_step(model, step, optimizer=optimizer)
    return model


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (torch.optim.AdamW, "exp_avg_sq"),
        (torch.optim.RMSprop, "square_avg"),
        (torch.optim.Adagrad, "sum"),
    ],
)
def test_metric_is_the_scaled_mean_of_squares(kind: type, key: str) -> None:
    model = small_network()
    optimizer = kind(model.parameters(), 0.01)
    model(two_moons_like()[0]).square().sum().backward()
    optimizer.step()
    squares = torch.cat([optimizer.state[p][key].flatten() for p in model.parameters()])
    found = inverse_metric(optimizer, list(model.parameters()))
    assert found is not None
    torch.testing.assert_close(1 / found, squares / squares.mean() + DAMPING)


def test_without_squares_the_metric_is_the_identity() -> None:
    model = small_network()
    plain = torch.optim.SGD(model.parameters(), 0.01)
    fresh = torch.optim.AdamW(model.parameters(), 0.01)  # has taken no step
    for optimizer in (None, plain, fresh):
        assert inverse_metric(optimizer, list(model.parameters())) is None


def test_steps_are_shortest_in_the_metric() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    inverse = torch.rand(7, generator=generator, dtype=torch.float64) + 0.1
    memory = RowMemory(rows, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    memory.measure(inverse)
    lack = torch.tensor([1.0, 0.5, -9.0], dtype=torch.float64)
    found = memory.step(lack)
    assert found is not None
    step, length = found
    assert bool((rows @ step >= lack - 1e-8).all())
    assert length == pytest.approx(float((step.square() / inverse).sum().sqrt()), rel=1e-8)
    assert memory.length(step) == pytest.approx(length, rel=1e-8)
    for _ in range(50):  # no feasible neighbor is shorter
        other = step + 0.1 * torch.randn(7, generator=generator, dtype=torch.float64)
        if bool((rows @ other >= lack).all()):
            assert float((other.square() / inverse).sum().sqrt()) >= length - 1e-8


def test_the_metric_survives_a_checkpoint() -> None:
    hook = EditHook(flipped_corner(), schedule=EverySteps(3))
    trained(hook, torch.optim.AdamW, 6)
    other = EditHook(flipped_corner(), schedule=EverySteps(3))
    other.load_state_dict(hook.state_dict())
    assert other._memory.inverse is not None
    assert torch.equal(other._memory.inverse, hook._memory.inverse)
    state = hook.state_dict()
    for bad in (torch.zeros(82), torch.ones(2, 2), torch.full((82,), float("nan")), "x"):
        with pytest.raises(SpecError, match="metric"):
            other.load_state_dict({**state, "inverse": bad})
    other.load_state_dict({**state, "inverse": torch.ones(5)})
    with pytest.raises(SpecError, match="over 5 weights"):
        other.after_step(small_network(), 9)


def test_finish_takes_the_cheap_way_and_reports_the_change_since_training() -> None:
    x, y = two_moons_like()
    hook = EditHook(flipped_corner(), schedule=EverySteps(7), preserve=x, labels=y, time_limit=20)
    model = trained(hook, torch.optim.AdamW, 40)
    left = copy.deepcopy(model)
    result = hook.finish(model)
    assert result.status is Verdict.CERTIFIED
    pairs = zip(model.parameters(), left.parameters(), strict=True)
    moved = sum((a - b).detach().square().sum() for a, b in pairs)
    assert result.report.delta.l2 == pytest.approx(float(moved) ** 0.5, rel=1e-5, abs=1e-9)
    assert float(hook.certified_margins(model).min()) > 0


def test_a_costly_cheap_way_is_compared_with_the_editor(monkeypatch) -> None:
    monkeypatch.setattr("torch_prepared.hooks.core.LOSS", -1.0)
    x, y = two_moons_like()
    hook = EditHook(flipped_corner(), schedule=EverySteps(100), preserve=x, labels=y, time_limit=5)
    model = trained(hook, torch.optim.AdamW, 30)
    assert not hook.records
    called = []
    plain = hook._certify
    monkeypatch.setattr(hook, "_certify", lambda *a: called.append(plain(*a)) or called[-1])
    start = copy.deepcopy(model)
    result = hook.finish(model)
    assert result.status is Verdict.CERTIFIED
    assert len(called) == 2

    def total(module: nn.Module) -> float:
        with torch.no_grad():
            old, new = start(x), module(x)
        lost = (old.argmax(1) != new.argmax(1)).double().mean()
        change = (new - old).double().square().sum(1).mean() / old.double().std(0).square().sum()
        return float(lost + change.sqrt())

    assert total(result.model) == pytest.approx(min(total(r.model) for r in called), rel=1e-6)
    assert result.report.drawdown is not None
    assert result.report.drawdown.total == pytest.approx(total(result.model), rel=1e-4)
    assert result.report.delta.l2 > 0


def test_held_looks_change_nothing() -> None:
    hook = EditHook(flipped_corner(), schedule=EverySteps(1))
    model = trained(hook, torch.optim.AdamW, 12)
    last = hook.records[-1]
    assert last.outcome in (Outcome.HELD, Outcome.EDITED)
    assert float(hook.certified_margins(model).min()) == pytest.approx(last.margin_after, rel=1e-5)
