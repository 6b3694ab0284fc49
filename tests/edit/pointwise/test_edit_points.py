"""``edit_points`` end to end: options, refusals, rounding, conflicts, keeps, balls."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import conv_net, mlp
from torch_prepared.certify import PointCertificate, PointClaims, Verdict, check_points
from torch_prepared.edit.pointwise import Outcome, PointStatus, edit_points, lift_to_balls
from torch_prepared.errors import (
    CertificateError,
    InfeasibleEditError,
    MissingDependencyError,
    SpecError,
)
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import SafeSet


def _wrong(graph, count: int, seed: int = 0):
    size = graph.input_size
    x = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double()
    labels = evaluate_graph(graph, x.to(graph.dtype)).flatten(1).argmax(1)
    return x, (labels + 1) % graph.output_size


@pytest.fixture
def graph():
    return mlp((5, 16, 12, 3), dtype=torch.float32)


@pytest.mark.parametrize("norm", ["inf", "1", "2"])
def test_the_network_as_stored_decides_as_wanted(graph, norm: str) -> None:
    x, labels = _wrong(graph, 3)
    result = edit_points(graph, x, labels, norm=norm)
    assert result.outcome is Outcome.EDITED
    assert result.status in (PointStatus.VERIFIED_EXACT, PointStatus.VERIFIED_FLOAT)
    decided = evaluate_graph(result.model, x.float()).argmax(1)
    assert torch.equal(decided, labels)
    names = {n for n in graph.parameters if result.model.parameters[n] is not graph.parameters[n]}
    assert names <= {"linear5.weight", "linear5.bias"}
    assert result.stale_layers == ("linear5",)
    assert result.manifest["weights_before"] != result.manifest["weights_after"]
    again = check_points(result.certificate, result.model.record(), result.certificate.claims)
    assert again.status is Verdict.CERTIFIED
    np.testing.assert_array_equal(again.margins, result.margins)


def test_a_float_verdict_is_reached_by_a_larger_margin(graph) -> None:
    x, labels = _wrong(graph, 2)
    low = edit_points(graph, x, labels, norm="inf", margin=1e-9)
    high = edit_points(graph, x, labels, norm="inf", margin=1e-9, verify="float")
    assert low.status is not PointStatus.VERIFIED_FLOAT
    assert high.status is PointStatus.VERIFIED_FLOAT
    assert (high.margins_float > 0).all()
    assert (high.margins >= high.margins_float).all()


def test_rounding_to_bfloat16_with_too_small_a_margin_is_not_verified(graph, monkeypatch) -> None:
    from torch_prepared.edit.pointwise import _run

    x, labels = _wrong(graph, 3)
    monkeypatch.setattr(_run, "ROUNDS", 1)
    small = edit_points(graph, x, labels, norm="inf", margin=1e-7, round_to=torch.bfloat16)
    assert small.outcome is Outcome.UNKNOWN
    assert small.status is PointStatus.UNVERIFIED
    assert small.certificate is None
    monkeypatch.setattr(_run, "ROUNDS", 40)
    large = edit_points(graph, x, labels, norm="inf", margin=1e-7, round_to=torch.bfloat16)
    assert large.status is not PointStatus.UNVERIFIED
    moved = large.model.parameters["linear5.weight"]
    changed = moved != graph.parameters["linear5.weight"]
    assert torch.equal(moved[changed].bfloat16().float(), moved[changed])


def test_equal_inputs_with_different_classes_name_each_other(graph) -> None:
    x = torch.randn(3, 5)
    x[2] = x[0]
    result = edit_points(graph, x, [0, 1, 2], norm="inf")
    assert result.outcome is Outcome.INFEASIBLE
    assert result.conflicting == (0, 2)
    with pytest.raises(InfeasibleEditError, match="0, 2"):
        edit_points(graph, x, [0, 1, 2], norm="inf", raise_on_failure=True)


@pytest.mark.parametrize("solver", ["highs", "z3"])
def test_contradictory_features_are_named_by_ray_and_core(solver: str) -> None:
    if solver == "z3":
        pytest.importorskip("z3")
    dead = mlp((3, 4, 3)).with_parameters(
        {"linear1.bias": torch.full((4,), -100.0, dtype=torch.float64)}
    )
    x = torch.randn(3, 3, dtype=torch.float64)
    y = evaluate_graph(dead, x[:1]).argmax(1)
    labels = torch.cat([(y + 1) % 3, y, (y + 2) % 3])
    result = edit_points(dead, x, labels, norm="inf", solver=solver, margin=0.01)
    assert result.outcome is Outcome.INFEASIBLE
    assert len(result.conflicting) >= 2
    two = list(result.conflicting)
    assert (
        edit_points(dead, x[two], labels[two], norm="inf", margin=0.01).outcome
        is Outcome.INFEASIBLE
    )


def test_hard_keeps_hold_and_soft_keeps_bend(graph) -> None:
    x, labels = _wrong(graph, 2)
    keep = torch.randn(200, 5, generator=torch.Generator().manual_seed(7))
    before = evaluate_graph(graph, keep).argmax(1)
    hard = edit_points(graph, x, labels, keep=keep, norm="inf")
    if hard.outcome is Outcome.EDITED:
        assert torch.equal(evaluate_graph(hard.model, keep).argmax(1), before)
    soft = edit_points(graph, x, labels, keep=keep, keep_weight=100.0, norm="1")
    assert soft.outcome is Outcome.EDITED
    free = edit_points(graph, x, labels, norm="1")
    kept = [int((evaluate_graph(r.model, keep).argmax(1) == before).sum()) for r in (soft, free)]
    assert kept[0] >= kept[1]
    # the edited input itself as a kept one contradicts a hard keep
    clash = edit_points(graph, x[:1], labels[:1], keep=x[:1].float(), norm="inf")
    assert clash.outcome is Outcome.INFEASIBLE
    assert clash.conflicting == (0,)


def test_behavior_keeps_more_decisions_than_the_least_weight_change(graph) -> None:
    x, labels = _wrong(graph, 2)
    stay = torch.randn(2000, 5, generator=torch.Generator().manual_seed(3))
    other = torch.randn(2000, 5, generator=torch.Generator().manual_seed(4))
    before = evaluate_graph(graph, other).argmax(1)
    kept = {}
    for norm in ("behavior", "inf"):
        result = edit_points(graph, x, labels, norm=norm, preserve=stay, time_limit=6)
        assert result.status is not PointStatus.UNVERIFIED
        kept[norm] = float((evaluate_graph(result.model, other).argmax(1) == before).float().mean())
    assert kept["behavior"] > kept["inf"]


def test_a_mask_fixes_the_other_weights(graph) -> None:
    x, labels = _wrong(graph, 1)
    free = torch.zeros(3, 12, dtype=torch.bool)
    free[int(labels[0])] = True
    result = edit_points(graph, x, labels, norm="1", free=free)
    assert result.outcome is Outcome.EDITED
    moved = result.model.parameters["linear5.weight"] != graph.parameters["linear5.weight"]
    assert not bool((moved & ~free).any())
    assert torch.equal(result.model.parameters["linear5.bias"], graph.parameters["linear5.bias"])
    empty = edit_points(graph, x, labels, norm="1", free=torch.zeros(3, 12, dtype=torch.bool))
    assert empty.outcome is Outcome.INFEASIBLE


def test_counting_changes_few_weights(graph) -> None:
    x, labels = _wrong(graph, 1)
    result = edit_points(graph, x, labels, norm="0", budget=1.0, time_limit=20)
    assert result.outcome is Outcome.EDITED
    assert result.delta.changed == int(result.size) <= 4
    with pytest.raises(Exception, match="budget"):
        edit_points(graph, x, labels, norm="0")


@pytest.mark.parametrize("op", ["tanh", "relu"])
def test_any_operator_may_come_before_a_last_layer(op: str) -> None:
    graph = conv_net(op, dtype=torch.float32)
    x, labels = _wrong(graph, 2)
    result = edit_points(graph, x, labels, norm="inf")
    assert result.status is not PointStatus.UNVERIFIED
    assert torch.equal(evaluate_graph(result.model, x.float()).flatten(1).argmax(1), labels)


def test_a_hidden_convolution_is_edited() -> None:
    graph = conv_net(dtype=torch.float32)
    x, labels = _wrong(graph, 1)
    first = next(n.name for n in graph.nodes if n.op == "conv")
    result = edit_points(graph, x, labels, layer=first, norm="inf", time_limit=20)
    assert result.status is not PointStatus.UNVERIFIED
    assert result.stale_layers[0] == first


def test_safe_sets_as_targets(graph) -> None:
    x = torch.randn(2, 5)
    safe = SafeSet.interval([-math.inf, 0.5, -math.inf], [math.inf, 0.75, math.inf])
    result = edit_points(graph, x, [safe, safe], norm="1", margin=1e-4)
    assert result.status is not PointStatus.UNVERIFIED
    y = evaluate_graph(result.model, x)[:, 1]
    assert bool(((y >= 0.5) & (y <= 0.75)).all())


def test_modules_come_back_as_modules() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 4)
    labels = (model(x).argmax(1) + 1) % 3
    result = edit_points(model, x, labels)
    assert torch.equal(result.model(x).argmax(1), labels)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_no_examples_change_nothing(graph) -> None:
    result = edit_points(graph, torch.zeros(0, 5), [])
    assert result.outcome is Outcome.EDITED
    assert result.certificate is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "3"}, "norm"),
        ({"solver": "gurobi"}, "solver"),
        ({"solver": "z3", "norm": "0"}, "z3"),
        ({"verify": "maybe"}, "verify"),
        ({"margin": -1.0}, "margin"),
        ({"margin": math.nan}, "margin"),
        ({"margin": 0.0, "verify": "float"}, "margin"),
        ({"budget": 0.0}, "budget"),
        ({"layer": "nowhere"}, "layer"),
        ({"free": torch.ones(2, 2, dtype=torch.bool)}, "free"),
        ({"keep": torch.zeros(2, 3)}, "keep"),
        ({"norm": "2", "layer": "linear1"}, "last"),
    ],
)
def test_bad_options_are_refused_by_name(graph, arguments, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        edit_points(graph, torch.randn(1, 5), [0], **arguments)


@pytest.mark.parametrize(
    ("x", "targets"),
    [
        (torch.zeros(1, 4), [0]),
        (torch.zeros(2, 5), [0]),
        (torch.zeros(1, 5), [3]),
        (torch.zeros(1, 5), [0.5]),
        (torch.full((1, 5), math.nan), [0]),
        (torch.zeros(1, 5), [SafeSet.argmax(0, 2)]),
    ],
)
def test_bad_examples_are_refused(graph, x, targets) -> None:
    with pytest.raises(SpecError):
        edit_points(graph, x, targets, norm="inf")


def test_a_single_output_has_no_classes() -> None:
    with pytest.raises(SpecError, match="class"):
        edit_points(mlp((3, 4, 1)), torch.zeros(1, 3), [0])


def test_z3_missing_is_said_with_the_extra(graph, monkeypatch) -> None:
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name == "z3":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    x, labels = _wrong(graph, 1)
    with pytest.raises(MissingDependencyError, match=r"torch-prepared\[smt\]"):
        edit_points(graph, x, labels, norm="inf", solver="z3")


def test_time_over_is_an_outcome(graph) -> None:
    x, labels = _wrong(graph, 3)
    result = edit_points(graph, x, labels, norm="inf", time_limit=1e-9)
    assert result.outcome in (Outcome.TIME_LIMIT, Outcome.EDITED)
    if result.outcome is Outcome.TIME_LIMIT:
        assert result.certificate is None


def test_one_shot_balls_of_radius_zero_are_the_points(graph) -> None:
    x, labels = _wrong(graph, 2)
    lifted = lift_to_balls(graph, x, labels, 0.0, method="one_shot")
    assert lifted.status is Verdict.CERTIFIED
    assert torch.equal(evaluate_graph(lifted.model, x.float()).argmax(1), labels)


@pytest.mark.parametrize("method", ["one_shot", pytest.param("sequential", marks=pytest.mark.slow)])
def test_an_edited_point_is_lifted_to_a_ball(graph, method: str) -> None:
    x, labels = _wrong(graph, 1)
    point = edit_points(graph, x, labels)
    lifted = lift_to_balls(point.model, x, labels, 0.01, method=method, time_limit=60)
    assert lifted.status is Verdict.CERTIFIED
    near = x.float() + 0.01 * (2 * torch.rand(500, 5) - 1)
    assert bool((evaluate_graph(lifted.model, near).argmax(1) == labels[0]).all())


class TestCertificate:
    @pytest.fixture
    def made(self, graph):
        x, labels = _wrong(graph, 2)
        return edit_points(graph, x, labels, norm="inf")

    def test_a_file_comes_back_the_same(self, made, tmp_path) -> None:
        made.certificate.save(tmp_path / "c.json.gz")
        read = PointCertificate.load(tmp_path / "c.json.gz")
        assert read.to_json() == made.certificate.to_json()

    def test_altered_files_other_weights_and_other_claims_are_refused(self, made, graph) -> None:
        data = made.certificate.to_json()
        for key in data:
            changed = {**data, key: "x" if key != "version" else 2}
            with pytest.raises(CertificateError):
                PointCertificate.from_json(changed)
        claims = made.certificate.claims
        with pytest.raises(CertificateError, match="weights"):
            check_points(made.certificate, graph.record(), claims)
        other = PointClaims.labels(claims.inputs + 1.0, [0, 0], 3)
        with pytest.raises(CertificateError, match="other claims"):
            check_points(made.certificate, made.model.record(), other)

    def test_false_claims_are_not_certified(self, graph) -> None:
        x, wrong = _wrong(graph, 2)
        claims = PointClaims.labels(x.float().double().numpy(), wrong.tolist(), 3)
        certificate = PointCertificate.create(graph.record(), claims)
        for arithmetic in ("real", "float32"):
            check = check_points(certificate, graph.record(), claims, arithmetic=arithmetic)
            assert check.status is Verdict.UNKNOWN
            assert check.failed == (0, 1)

    def test_overflow_proves_nothing(self) -> None:
        graph = mlp((2, 3, 2), dtype=torch.float32)
        huge = {n: torch.full_like(v, 3e38) for n, v in graph.parameters.items()}
        graph = graph.with_parameters(huge)
        claims = PointClaims.labels(np.ones((1, 2)), [0], 2)
        certificate = PointCertificate.create(graph.record(), claims)
        check = check_points(certificate, graph.record(), claims, arithmetic="float32")
        assert check.status is Verdict.UNKNOWN

    def test_ties_are_decided_exactly(self) -> None:
        graph = mlp((2, 3, 2), dtype=torch.float32)
        same = {
            "linear3.weight": torch.ones(2, 3),
            "linear3.bias": torch.zeros(2),
        }
        graph = graph.with_parameters(same)
        strict = PointClaims.labels(np.ones((1, 2)), [0], 2)
        loose = PointClaims(
            strict.inputs, strict.rows, strict.offset, strict.point, strict.clause, strict=False
        )
        for claims, verdict in ((strict, Verdict.UNKNOWN), (loose, Verdict.CERTIFIED)):
            certificate = PointCertificate.create(graph.record(), claims)
            assert check_points(certificate, graph.record(), claims).status is verdict
