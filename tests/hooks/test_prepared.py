"""PreparedModule: a drop-in module whose forward weights are provable."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_prepared.certify import Verdict
from torch_prepared.errors import PreparedWarning, SpecError
from torch_prepared.hooks import EditHook, PreparedModule
from torch_prepared.testing.hook import flipped_corner, impossible, small_network, two_moons_like


@pytest.fixture
def prepared():
    return PreparedModule(small_network(), flipped_corner())


def projected(module):
    return torch.cat([value.flatten() for value in module.projected_weights().values()])


class TestForward:
    def test_weights_in_use_are_provable_and_the_model_is_not_touched(self):
        model = small_network()
        before = copy.deepcopy(model.state_dict())
        prepared = PreparedModule(model, flipped_corner())
        region = flipped_corner().region.sample(500, torch.Generator().manual_seed(0)).float()
        assert bool((prepared(region).argmax(1) == 1).all())
        assert not bool((model(region).argmax(1) == 1).all())
        assert float(prepared.certified_margins().min()) > 0
        state = prepared.state_dict()
        assert all(torch.equal(value, before[name]) for name, value in state.items())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_nothing_is_projected_where_the_properties_hold(self):
        model = small_network()
        hook = EditHook(flipped_corner(), margin=1.0)
        hook.last_step = 0
        hook.should_edit = lambda step: True
        hook.after_step(model, 1)
        prepared = PreparedModule(model, flipped_corner(), margin=0.1)
        x = two_moons_like()[0]
        assert torch.equal(prepared(x), model(x))
        prepared(x).sum().backward()
        assert all(parameter.grad is not None for parameter in prepared.parameters())

    def test_gradient_is_that_of_the_projection(self, prepared):
        """Tangential: with raw weights moved, the projection moves as the gradient says."""
        prepared = prepared.double()
        prepared(torch.zeros(1, 2, dtype=torch.float64))
        spaces = prepared._settled[1]
        raw = nn.utils.parameters_to_vector(prepared.parameters()).detach().requires_grad_()
        direction = torch.randn(len(raw), dtype=torch.float64)
        (slope,) = torch.autograd.grad(spaces.project(raw) @ direction, raw)
        step = 1e-6 * torch.randn(len(raw), dtype=torch.float64)
        with torch.no_grad():
            change = (spaces.project(raw + step) - spaces.project(raw - step)) @ direction / 2
        assert float(slope @ step) == pytest.approx(float(change), rel=1e-5)
        normals = spaces.normals[spaces.active[0]]
        assert len(normals)
        assert float((normals @ slope).abs().max()) < 1e-8 * float(normals.norm() * slope.norm())

    def test_training_learns_and_stays_provable(self, prepared):
        (x, y), optimizer = two_moons_like(), torch.optim.AdamW(prepared.parameters(), 1e-2)
        far = ((x - torch.tensor([0.6, -0.8])).abs() > 0.4).any(1)
        losses = []
        for _ in range(120):
            optimizer.zero_grad()
            loss = F.cross_entropy(prepared(x[far]), y[far])
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
            assert float(prepared.certified_margins().min()) > 0
        assert losses[-1] < losses[0] - 0.1

    def test_projection_is_kept_until_weights_change(self, prepared, monkeypatch):
        from torch_prepared.hooks._halfspaces import HalfSpaces

        calls, settle = [], HalfSpaces.settle
        monkeypatch.setattr(
            HalfSpaces, "settle", lambda self, *a: calls.append(1) or settle(self, *a)
        )
        x = torch.zeros(1, 2)
        first = prepared(x)
        assert torch.equal(prepared(x), first)
        first.sum().backward()
        prepared(x).sum().backward()  # a second graph over the same rows: accumulation
        with torch.no_grad():
            assert torch.allclose(prepared(x), first)
        assert len(calls) == 1
        with torch.no_grad():
            prepared.inner[0].bias.add_(0.01)
        prepared(x)
        assert len(calls) == 2
        prepared.invalidate()
        prepared(x)
        assert len(calls) == 3

    def test_impossible_properties_warn_and_prove_nothing(self):
        prepared = PreparedModule(small_network(), impossible(), rounds=2)
        with pytest.warns(PreparedWarning, match="lowest certified margin"):
            out = prepared(torch.zeros(1, 2))
        assert bool(torch.isfinite(out).all())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert prepared.bake(time_limit=2, raise_on_failure=False).status is Verdict.UNKNOWN

    def test_autocast_changes_the_forward_pass_only(self, prepared):
        plain = projected(copy.deepcopy(prepared))
        with torch.autocast("cpu", torch.bfloat16):
            assert prepared(torch.zeros(1, 2)).dtype is torch.bfloat16
            assert torch.equal(projected(prepared), plain)


class TestModule:
    def test_state_dicts_load_both_ways(self, prepared):
        model = small_network()
        assert list(prepared.state_dict()) == list(model.state_dict())
        model.load_state_dict(prepared.state_dict())
        torch.manual_seed(9)
        other = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
        prepared.load_state_dict(other.state_dict())
        assert torch.equal(prepared.inner[0].weight, other[0].weight)
        assert float(prepared.certified_margins().min()) > 0
        with pytest.raises(RuntimeError, match="Missing key"):
            prepared.load_state_dict({})

    def test_names_stay_inside_of_another_module(self, prepared):
        outer = nn.Sequential(prepared, nn.Linear(2, 2))
        plain = nn.Sequential(small_network(), nn.Linear(2, 2))
        assert list(outer.state_dict()) == list(plain.state_dict())
        outer.load_state_dict(plain.state_dict())
        plain.load_state_dict(outer.state_dict())

    def test_copies_and_pickles_compute_the_same(self, prepared):
        x = two_moons_like()[0]
        wanted = prepared(x)
        for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
            assert torch.equal(twin(x), wanted)
            with torch.no_grad():
                twin.inner[2].bias.add_(1.0)
            assert not torch.equal(twin(x), wanted)
            assert torch.equal(prepared(x), wanted)
            twin.load_state_dict(prepared.state_dict())
        file = io.BytesIO()
        torch.save(prepared.state_dict(), file)
        file.seek(0)
        small_network().load_state_dict(torch.load(file, weights_only=True))

    def test_dtype_mode_and_buffers_follow(self):
        model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        prepared = PreparedModule(model.eval(), flipped_corner())
        assert not prepared.training
        prepared.train()
        assert prepared.inner[1].training
        prepared(torch.rand(16, 2))
        assert int(prepared.state_dict()["1.num_batches_tracked"]) == 1
        assert int(model.state_dict()["1.num_batches_tracked"]) == 0
        assert prepared.double().eval()(torch.zeros(1, 2).double()).dtype is torch.float64
        assert float(prepared.certified_margins().min()) > 0

    def test_torch_compile(self, prepared):
        x = two_moons_like()[0]
        compiled = torch.compile(prepared, backend="eager")
        assert torch.equal(compiled(x), prepared(x))
        compiled(x).sum().backward()
        assert prepared.inner[0].weight.grad is not None

    def test_bake_is_a_plain_certified_copy(self, prepared):
        result = prepared.bake(time_limit=30)
        assert result.status is Verdict.CERTIFIED
        assert result.certificate is not None
        assert type(result.model) is nn.Sequential
        x = two_moons_like()[0]
        assert torch.allclose(result.model(x), prepared(x), atol=0.05)

    def test_misuse_is_one_line(self):
        for options in ({"margin": math.nan}, {"margin": -1.0}, {"rounds": 0}):
            with pytest.raises(SpecError, match="PreparedModule"):
                PreparedModule(small_network(), flipped_corner(), **options)
        with pytest.raises(SpecError, match="got none"):
            PreparedModule(small_network(), [])
        with pytest.raises(SpecError):
            PreparedModule(nn.Linear(2, 3), flipped_corner())
