"""EditHook: what it does to weights, to optimizers, to randomness, and how it fails and resumes."""

from __future__ import annotations

import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_prepared.bounds import PropertyBatch, certified_margin
from torch_prepared.certify import Verdict
from torch_prepared.errors import (
    InfeasibleEditError,
    PreparedWarning,
    SpecError,
    UnsupportedOperationError,
)
from torch_prepared.hooks import (
    AtEnd,
    EditHook,
    EverySteps,
    HookRecord,
    Outcome,
    WhenMarginBelow,
    attach,
)
from torch_prepared.hooks._margins import LiveMargins
from torch_prepared.hooks._memory import RowMemory
from torch_prepared.specs import Box, LpBall, Property, SafeSet
from torch_prepared.testing.hook import flipped_corner, impossible, small_network, two_moons_like


def step_of(model, optimizer, data):
    optimizer.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def convolutional(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


class TestEdit:
    def test_margins_are_those_of_the_bound_engine_and_positive_after(self):
        import torch_prepared as tp

        model, hook = small_network(), EditHook(flipped_corner(), schedule=EverySteps(1))
        record = hook.after_step(model, 1)
        assert record.outcome is Outcome.EDITED
        assert record.margin_before < 0 < record.margin_after
        graph = tp.capture_module(model, torch.zeros(1, 2))
        batch = PropertyBatch.of([flipped_corner()], torch.float32)
        exact = float(certified_margin(graph, batch).margin.min())
        assert record.margin_after == pytest.approx(exact, abs=1e-6)
        region = flipped_corner().region.sample(500, torch.Generator().manual_seed(0))
        assert bool((model(region.float()).argmax(1) == 1).all())

    def test_distance_is_that_of_the_weights(self):
        model, hook = small_network(), EditHook(flipped_corner(), schedule=EverySteps(1))
        before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
        record = hook.after_step(model, 1)
        moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
        assert record.distance == pytest.approx(float(moved.norm()), rel=1e-4)
        assert record.relative_distance == pytest.approx(
            float(moved.norm() / before.norm()), rel=1e-4
        )

    def test_nothing_happens_where_margins_are_held(self):
        model, hook = small_network(), EditHook(flipped_corner(), schedule=EverySteps(1))
        hook.after_step(model, 1)
        before = weights(model)
        record = hook.after_step(model, 2)
        assert (record.outcome, record.distance, record.rounds) == (Outcome.HELD, 0.0, 0)
        assert same(before, weights(model))

    def test_frozen_parameters_stay_in_steps_and_at_the_end(self):
        model = small_network()
        model[0].requires_grad_(False)
        before = weights(model)
        hook = EditHook(flipped_corner(), schedule=EverySteps(1), time_limit=30)
        assert hook.after_step(model, 1).outcome is Outcome.EDITED
        result = hook.finish(model)
        assert result.status is Verdict.CERTIFIED
        assert torch.equal(model[0].weight, before["0.weight"])
        assert not torch.equal(model[2].weight, before["2.weight"])

    def test_convolutions_batch_norm_and_dropout_in_training_mode(self):
        model = convolutional().train()
        x = torch.rand(32, 1, 4, 4)
        center = x[:1].flatten().double()
        with torch.no_grad():
            label = int(model.eval()(x[:1]).argmin())
        model.train()
        prop = Property(Box(center - 0.02, center + 0.02), SafeSet.argmax(label, 3))
        hook = EditHook(prop, schedule=EverySteps(2), example_input=x[:1], time_limit=30)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        with attach(hook, model, optimizer) as loop:
            for _ in range(4):
                step_of(model, optimizer, (x, torch.full((32,), label)))
        assert model.training
        assert {r.outcome for r in hook.records} <= {Outcome.EDITED, Outcome.HELD}
        assert loop.result.status is Verdict.CERTIFIED
        assert model.eval()(x[:1]).argmax() == label

    def test_random_numbers_of_training_are_not_touched(self):
        model, hook = small_network(), EditHook(flipped_corner(), schedule=EverySteps(1))
        before = torch.get_rng_state()
        hook.after_step(model, 1)
        assert torch.equal(before, torch.get_rng_state())

    def test_autocast_does_not_reach_bounds(self):
        found = []
        for enabled in (False, True):
            model, hook = small_network(), EditHook(flipped_corner(), schedule=EverySteps(1))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                hook.after_step(model, 1)
            found.append(weights(model))
        assert same(*found)

    def test_lp_balls_take_rows_one_by_one(self):
        ball = LpBall([0.6, -0.8], 0.1, 2)
        model = small_network()
        hook = EditHook(Property(ball, SafeSet.argmax(1, 2)), schedule=EverySteps(1))
        assert hook.after_step(model, 1).outcome is Outcome.EDITED

    @pytest.mark.parametrize("seed", range(3))
    def test_vectorized_gradients_are_those_of_single_properties(self, seed, monkeypatch):
        import torch_prepared as tp

        generator = torch.Generator().manual_seed(seed)
        boxes = [torch.rand(2, generator=generator, dtype=torch.float64) for _ in range(5)]
        properties = [Property(Box(c - 0.1, c + 0.1), SafeSet.argmax(1, 2)) for c in boxes]
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
        )
        hook = EditHook(properties)
        live = hook._capture(model.double())
        margins, which = hook._margins(live), torch.tensor([4, 0, 2])
        together = margins.gradients(live.theta(), which)
        monkeypatch.setattr("torch_prepared.hooks._margins.SMALL_FLOPS", 0.0)
        single = margins.gradients(live.theta(), which)
        assert torch.allclose(together, single, rtol=1e-9, atol=1e-12)
        graph = tp.capture_module(model, torch.zeros(1, 2, dtype=torch.float64))
        step = 1e-7 * torch.randn(len(live.theta()), generator=generator, dtype=torch.float64)
        ends = [LiveMargins(graph, margins.batch, live.vector).value(live.theta() + s * step)
                for s in (1, -1)]  # fmt: skip
        assert torch.allclose((ends[0] - ends[1])[which] / 2, single @ step, rtol=1e-3, atol=1e-12)


class TestOptimizers:
    @pytest.mark.parametrize("policy", ["keep", "project", "reset"])
    @pytest.mark.parametrize(
        "make",
        [
            lambda p: torch.optim.AdamW(p, 1e-2),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
            lambda p: torch.optim.SGD(p, 0.1),
        ],
        ids=["adamw", "momentum", "sgd"],
    )
    def test_margins_hold_all_along_and_training_still_learns(self, make, policy):
        model, (x, y) = small_network(), two_moons_like()
        far = ((x - torch.tensor([0.6, -0.8])).abs() > 0.4).any(1)
        data = x[far], y[far]
        start = float(F.cross_entropy(model(data[0]), data[1]))
        hook = EditHook(flipped_corner(), schedule=EverySteps(5), optimizer_state=policy)
        optimizer = make(model.parameters())
        with attach(hook, model, optimizer, finish=False):
            for _ in range(150):
                step_of(model, optimizer, data)
        assert len(hook.records) == 30
        assert all(record.margin_after > 0 for record in hook.records)
        assert Outcome.FAILED not in {record.outcome for record in hook.records}
        assert float(F.cross_entropy(model(data[0]), data[1])) < start - 0.05
        assert all(record.relative_distance < 0.5 for record in hook.records)

    def test_accuracy_is_that_of_plain_training(self):
        nets, (x, y) = [small_network(), small_network()], two_moons_like()
        far = ((x - torch.tensor([0.6, -0.8])).abs() > 0.4).any(1)
        data = x[far], y[far]
        hook = EditHook(flipped_corner(), schedule=EverySteps(5), time_limit=30)
        for model, finish in zip(nets, (False, True), strict=True):
            optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            chosen = hook if finish else EditHook(flipped_corner(), schedule=AtEnd())
            with attach(chosen, model, optimizer, finish=finish) as loop:
                for _ in range(150):
                    step_of(model, optimizer, data)
        assert loop.result.status is Verdict.CERTIFIED
        right = [float((net(data[0]).argmax(1) == data[1]).float().mean()) for net in nets]
        assert right[1] >= right[0] - 0.02
        assert (
            float(hook.certified_margins(nets[0]).min())
            < 0
            < float(EditHook(flipped_corner()).certified_margins(nets[1]).min())
        )

    def test_keep_keeps_and_reset_drops_the_state(self):
        for policy, kept in (("keep", True), ("reset", False)):
            model = small_network()
            optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
            step_of(model, optimizer, two_moons_like())
            before = {p: dict(s) for p, s in optimizer.state.items()}
            hook = EditHook(flipped_corner(), schedule=EverySteps(1), optimizer_state=policy)
            assert hook.after_step(model, 1, optimizer=optimizer).outcome is Outcome.EDITED
            assert bool(optimizer.state) is kept
            if kept:
                assert all(
                    torch.equal(optimizer.state[p]["exp_avg"], s["exp_avg"])
                    for p, s in before.items()
                )

    def test_projected_momentum_does_not_lower_the_margin(self):
        model = small_network()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(3):
            step_of(model, optimizer, two_moons_like())
        hook = EditHook(flipped_corner(), schedule=EverySteps(1), optimizer_state="project")
        hook.after_step(model, 3, optimizer=optimizer)
        state = [optimizer.state[p] for p in model.parameters()]
        step = torch.cat([(s["exp_avg"] / s["exp_avg_sq"].sqrt().clamp_min(1e-8)).flatten()
                          for s in state])  # fmt: skip
        normal = hook._memory.rows[0]
        assert float(normal @ step) <= 1e-4 * float(normal.norm() * step.norm())

    def test_policies_but_keep_need_the_optimizer(self):
        hook = EditHook(flipped_corner(), schedule=EverySteps(1), optimizer_state="reset")
        with pytest.raises(SpecError, match="expected one, as optimizer_state is 'reset'"):
            hook.after_step(small_network(), 1)

    def test_a_gradient_scaler_s_skipped_steps_are_not_counted(self):
        model, data = small_network(), two_moons_like()
        hook = EditHook(flipped_corner(), schedule=EverySteps(1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        with attach(hook, model, optimizer, finish=False):
            for broken in (False, True, False):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(data[0]), data[1])
                scaler.scale(loss * (math.inf if broken else 1.0)).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
        assert [record.step for record in hook.records] == [1, 2]

    def test_an_average_of_edited_weights_can_be_finished(self):
        model, data = small_network(), two_moons_like()
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        hook = EditHook(flipped_corner(), schedule=EverySteps(2), time_limit=30)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with attach(hook, model, optimizer, finish=False):
            for _ in range(6):
                step_of(model, optimizer, data)
                average.update_parameters(model)
        before = weights(model)
        assert hook.finish(average).status is Verdict.CERTIFIED
        assert same(before, weights(model))
        assert float(EditHook(flipped_corner()).certified_margins(average).min()) > 0


class TestFailure:
    def test_weights_stay_bit_identical_and_it_warns(self):
        model = small_network()
        before = weights(model)
        hook = EditHook(impossible(), schedule=EverySteps(1))
        with pytest.warns(PreparedWarning, match="weights stay as they were"):
            record = hook.after_step(model, 1)
        assert record.outcome is Outcome.FAILED
        assert record.margin_after == record.margin_before
        assert record.message
        assert same(before, weights(model))

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_weights_that_are_not_finite_are_a_failure_not_a_proof(self, value):
        model = small_network()
        with torch.no_grad():
            model[0].weight[0, 0] = value
        good = small_network()
        hook = EditHook(flipped_corner(), schedule=EverySteps(1), on_failure="ignore")
        hook.certified_margins(good)
        hook._live = type(hook._live)(**{**vars(hook._live), "module": model})
        record = hook.after_step(model, 1)
        assert record.outcome is Outcome.FAILED
        assert "finite" in record.message

    def test_overflowing_bounds_are_a_failure(self):
        model = small_network()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1e30)
        hook = EditHook(flipped_corner(), schedule=EverySteps(1), on_failure="ignore")
        before = weights(model)
        assert hook.after_step(model, 1).outcome is Outcome.FAILED
        assert same(before, weights(model))

    def test_finish_without_a_certificate_leaves_weights_and_says_so(self):
        model = small_network()
        before = weights(model)
        with pytest.warns(PreparedWarning, match="finish"):
            result = EditHook(impossible(), time_limit=2).finish(model)
        assert result.status is Verdict.UNKNOWN
        assert result.certificate is None
        assert same(before, weights(model))
        with pytest.raises(InfeasibleEditError, match="finish"):
            EditHook(impossible(), time_limit=2, on_failure="raise").finish(model)

    def test_misuse_is_one_line(self):
        with pytest.raises(SpecError, match="got none"):
            EditHook([])
        with pytest.raises(SpecError, match="keep, project, reset"):
            EditHook(flipped_corner(), optimizer_state="forget")
        with pytest.raises(SpecError, match="warn, raise, ignore"):
            EditHook(flipped_corner(), on_failure="pray")
        with pytest.raises(SpecError, match="every >= 1"):
            EverySteps(0)
        with pytest.raises(SpecError, match="NaN"):
            WhenMarginBelow(math.nan)
        with pytest.raises(SpecError, match="margin"):
            EditHook(flipped_corner(), margin=math.nan)
        hook = EditHook(flipped_corner(), schedule=EverySteps(1))
        with pytest.raises(SpecError):
            hook.after_step(nn.Linear(2, 3), 1)
        with pytest.raises(SpecError, match="both trained and editable"):
            hook.certified_margins(small_network().requires_grad_(False))
        with pytest.raises(UnsupportedOperationError):
            hook.certified_margins(nn.Sequential(nn.Linear(2, 2), nn.Softsign()))


class TestSchedules:
    def test_when_margin_below_edits_to_above_its_value(self):
        model = small_network()
        hook = EditHook(flipped_corner(), schedule=WhenMarginBelow(0.2, every=1))
        assert hook.after_step(model, 1).margin_after >= 0.2
        assert hook.after_step(model, 2).outcome is Outcome.HELD

    def test_at_end_looks_only_when_finished(self):
        model = small_network()
        hook = EditHook(flipped_corner(), schedule=AtEnd(), time_limit=30)
        assert all(hook.after_step(model, step) is None for step in range(1, 300))
        assert hook.finish(model).status is Verdict.CERTIFIED

    def test_start_and_override(self):
        assert [s for s in range(1, 12) if EverySteps(2, start=7).due(s)] == [8, 10]

        class Custom(EditHook):
            def should_edit(self, step):
                return step == 3

        hook, model = Custom(flipped_corner()), small_network()
        assert [hook.after_step(model, step) is not None for step in (1, 2, 3, 4)] == [
            False, False, True, False,
        ]  # fmt: skip

    def test_the_same_step_is_looked_at_once(self):
        hook, model = EditHook(flipped_corner(), schedule=EverySteps(1)), small_network()
        assert hook.after_step(model, 1) is not None
        assert hook.after_step(model, 1) is None


class TestCheckpoint:
    def train(self, hook, model, optimizer, steps):
        with attach(hook, model, optimizer, finish=False):
            for _ in range(steps):
                step_of(model, optimizer, two_moons_like())

    def test_resumed_training_continues_bit_for_bit(self):
        def fresh():
            model = small_network()
            return model, torch.optim.AdamW(model.parameters(), 1e-3), EditHook(
                flipped_corner(), schedule=EverySteps(3)
            )  # fmt: skip

        whole = fresh()
        self.train(whole[2], whole[0], whole[1], 40)
        first = fresh()
        self.train(first[2], first[0], first[1], 20)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in first], file)
        file.seek(0)
        second = fresh()
        for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        self.train(second[2], second[0], second[1], 20)
        assert same(weights(whole[0]), weights(second[0]))
        plain = [
            [{k: v for k, v in r.to_json().items() if "seconds" not in k} for r in h.records]
            for h in (whole[2], second[2])
        ]
        assert plain[0] == plain[1]
        assert any(r.gradients == 0 and r.outcome is Outcome.EDITED for r in second[2].records)

    def test_foreign_states_are_refused(self):
        hook = EditHook(flipped_corner(), schedule=EverySteps(1))
        good = hook.state_dict()
        for change in (
            {"format": 99}, {"last_step": "3"}, {"records": 1}, {"records": [{"step": 1}]},
            {"rows": torch.zeros(3), "owner": torch.zeros(3), "age": torch.zeros(3)},
            {"rows": torch.zeros(1, 3), "owner": torch.tensor([0]), "age": None},
        ):  # fmt: skip
            with pytest.raises(SpecError):
                EditHook(flipped_corner()).load_state_dict({**good, **change})
        one = {"rows": torch.zeros(1, 3), "owner": torch.tensor([0]), "age": torch.tensor([0])}
        hook.load_state_dict({**good, **one})
        with pytest.raises(SpecError, match="3 weights for a model of"):
            hook.after_step(small_network(), 1)
        with pytest.raises(SpecError, match="malformed rows"):
            hook.load_state_dict({**good, **one, "owner": torch.tensor([7])})

    def test_records_survive_json(self):
        record = HookRecord(3, Outcome.FAILED, math.nan, -1.0, 0.0, 0.0, 2, 1, 0.1, 0.1, "why")
        again = HookRecord.from_json(record.to_json())
        assert math.isnan(again.margin_before)
        assert again.to_json() == record.to_json()
        with pytest.raises(SpecError):
            HookRecord.from_json({**record.to_json(), "outcome": "proved"})
        with pytest.raises(SpecError):
            HookRecord.from_json({**record.to_json(), "step": True})


def test_large_rows_are_forgotten(monkeypatch):
    monkeypatch.setattr("torch_prepared.hooks._memory.BYTES", 10)
    memory = RowMemory(torch.ones(1, 5), torch.tensor([0]), torch.tensor([0]))
    memory.fit(5)
    assert memory.rows is None
    assert len(memory.missing(torch.tensor([0]))) == 1


def test_a_compiled_model_is_seen_through():
    model = small_network()
    hook = EditHook(flipped_corner(), schedule=EverySteps(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager")
    before = compiled(torch.zeros(1, 2))
    hook.after_step(compiled, 1)
    assert not torch.equal(before, compiled(torch.zeros(1, 2)))
    assert float(hook.certified_margins(model).min()) > 0
