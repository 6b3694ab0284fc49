"""Edits end to end: what is returned is certified, and nothing else was touched."""

from __future__ import annotations

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import nn

import torch_prepared as tp
from torch_prepared.bounds.parametric import editable_layers
from torch_prepared.core.deadline import Deadline
from torch_prepared.edit import EDITORS, Candidate, Editor, EditProblem, auto
from torch_prepared.edit._base import EditOptions
from torch_prepared.edit._behavior import Drawdown, Reference
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.edit.auto import AutoEditor
from torch_prepared.edit.one_shot import OneShotEditor
from torch_prepared.edit.refine import RefineEditor
from torch_prepared.edit.sequential import SequentialEditor
from torch_prepared.errors import InfeasibleEditError, ModelFormatError, SpecError
from torch_prepared.specs import Box, LpBall, Property, SafeSet, VPolytope


def network(seed: int = 0, sizes: tuple[int, ...] = (3, 12, 10, 3)) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes):
        layer = nn.Linear(n, m)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(m, n, generator=generator) / n**0.5)
            layer.bias.copy_(0.1 * torch.randn(m, generator=generator))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def other_label(model: nn.Module, x: torch.Tensor) -> int:
    """The runner-up: a decision the network does not make at x."""
    return int(model(x[None])[0].argsort()[-2])


def violated(model: nn.Module, x: torch.Tensor, eps: float = 0.05, name: str = "p") -> Property:
    region = Box(x.double() - eps, x.double() + eps)
    return Property(region, SafeSet.argmax(other_label(model, x), 3), name)


def worst_sampled_margin(model: nn.Module, prop: Property) -> float:
    x = prop.region.sample(4000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(prop.safe.margin(copy.deepcopy(model).double()(x)).min())


CENTER = torch.tensor([0.3, -0.2, 0.5])


@pytest.mark.parametrize("method", sorted(EDITORS))
def test_every_editor_returns_a_certified_copy(method: str) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    prop = violated(model, CENTER)
    reference = torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    result = tp.edit_network(model, prop, method=method, preserve=reference, time_limit=30)
    assert result.status is tp.Verdict.CERTIFIED
    assert result.certificate is not None
    assert worst_sampled_margin(model, prop) <= 0 < worst_sampled_margin(result.model, prop)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    record = tp.capture_module(result.model, reference[:1]).record()
    again = tp.check_certificate(result.certificate, record, [prop.record()])
    assert again.status is tp.Verdict.CERTIFIED
    assert result.report.margin == pytest.approx(again.margin)
    assert 0 <= result.report.drawdown.agreement <= 1


@pytest.mark.parametrize("norm", ["1", "2", "inf", "1+inf"])
def test_one_shot_minimizes_the_norm_it_is_asked_for(norm: str) -> None:
    model = network()
    prop = violated(model, CENTER)
    size = {
        "1": lambda d: d.l1,
        "2": lambda d: d.l2,
        "inf": lambda d: d.linf,
        "1+inf": lambda d: d.l1 + d.linf,
    }
    deltas = {
        n: tp.edit_network(
            model, prop, method="one_shot", norm=n, layers=["linear_2"], example_input=CENTER[None]
        ).report.delta
        for n in size
    }
    for other in deltas.values():
        assert size[norm](deltas[norm]) <= size[norm](other) * (1 + 1e-3)


def test_only_the_chosen_layer_and_later_biases_change() -> None:
    model = network()
    layers = tp.bounds.editable_layers(tp.capture_module(model, CENTER[None]))
    result = tp.edit_network(
        model, violated(model, CENTER), method="one_shot", layers=[layers[1]],
        example_input=CENTER[None],
    )  # fmt: skip
    before, after = model.state_dict(), result.model.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert torch.equal(before["0.bias"], after["0.bias"])
    assert torch.equal(before["4.weight"], after["4.weight"])


def test_several_properties_and_kinds_of_regions_at_once() -> None:
    model = network(3)
    points = [CENTER, -CENTER, torch.tensor([0.8, 0.9, -0.7])]
    regions = [
        Box(points[0].double() - 0.04, points[0].double() + 0.04),
        LpBall(points[1].double(), 0.05, 2),
        VPolytope(points[2].double() + 0.05 * torch.eye(3, dtype=torch.float64)),
    ]
    properties = [
        Property(region, SafeSet.argmax(other_label(model, x), 3), f"p{i}")
        for i, (region, x) in enumerate(zip(regions, points, strict=True))
    ]
    result = tp.edit_network(model, properties, time_limit=40, example_input=CENTER[None])
    assert result.status is tp.Verdict.CERTIFIED
    assert [p.after.state for p in result.report.properties] == ["certified"] * 3
    assert all(worst_sampled_margin(result.model, p) > 0 for p in properties)


def test_a_union_of_polytopes_needs_one_disjunct_only() -> None:
    model = network()
    y = model(CENTER[None])[0].detach().double()
    eye = torch.eye(3, dtype=torch.float64)
    # Safe: output 0 far below or far above where it is now.
    safe = SafeSet.from_polytopes([(eye[:1], y[:1] - 0.3), (-eye[:1], -(y[:1] + 0.2))])
    prop = Property(Box(CENTER.double() - 0.02, CENTER.double() + 0.02), safe, "away")
    result = tp.edit_network(model, prop, time_limit=30, example_input=CENTER[None])
    assert result.status is tp.Verdict.CERTIFIED
    assert worst_sampled_margin(result.model, prop) >= 0


def test_a_property_that_holds_already_changes_nothing() -> None:
    model = network()
    label = int(model(CENTER[None])[0].argmax())
    prop = Property(LpBall(CENTER.double(), 1e-3, torch.inf), SafeSet.argmax(label, 3), "holds")
    result = tp.edit_network(model, prop, example_input=CENTER[None])
    assert result.status is tp.Verdict.CERTIFIED
    assert result.report.method == "none"
    assert result.report.delta.changed == 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), result.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("method", ["one_shot", "auto"])
def test_contradictory_properties_are_refused_by_name(method: str) -> None:
    model = network()
    region = Box(CENTER.double() - 0.05, CENTER.double() + 0.05)
    properties = [
        Property(region, SafeSet.argmax(0, 3), "zero wins"),
        Property(region, SafeSet.argmax(1, 3), "one wins"),
    ]
    with pytest.raises(InfeasibleEditError, match=r"zero wins.*one wins"):
        tp.edit_network(model, properties, method=method, time_limit=6, example_input=CENTER[None])
    result = tp.edit_network(
        model, properties, method=method, time_limit=6, example_input=CENTER[None],
        raise_on_failure=False,
    )  # fmt: skip
    assert result.status is tp.Verdict.UNKNOWN
    assert result.certificate is None


class StubbornEditor(Editor):
    """Claims an edit that proves nothing, then a good one, then is interrupted."""

    name = "stubborn"

    def candidates(self, problem: EditProblem, deadline):
        yield Candidate({}, note="claims the unchanged network")
        yield next(iter(EDITORS["one_shot"]().candidates(problem, deadline)))
        raise KeyboardInterrupt


def test_claims_are_not_believed_and_interrupts_keep_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(EDITORS, "stubborn", StubbornEditor)
    model = network()
    result = tp.edit_network(
        model, violated(model, CENTER), method="stubborn", example_input=CENTER[None]
    )
    assert [a.certified for a in result.report.attempts] == [False, True]
    assert result.status is tp.Verdict.CERTIFIED


class RepetitiveEditor(Editor):
    """Proposes the same good edit again and again."""

    name = "repetitive"

    def candidates(self, problem: EditProblem, deadline):
        found = next(iter(EDITORS["one_shot"]().candidates(problem, deadline)))
        for number in range(3):
            yield dataclasses.replace(found, note=str(number))


def test_the_best_edit_loses_least_in_decisions_and_outputs_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Perfect decisions do not excuse ruined outputs, nor small changes lost decisions."""
    monkeypatch.setitem(EDITORS, "repetitive", RepetitiveEditor)
    judged = [
        Drawdown(agreement, None, None, relative**2, relative, relative, 100, "preserve")
        for agreement, relative in ((1.0, 100.0), (0.99, 0.1), (0.8, 0.05))
    ]
    told = iter(judged)
    monkeypatch.setattr(Reference, "drawdown", lambda *_: next(told))
    model = network()
    result = tp.edit_network(
        model, violated(model, CENTER), method="repetitive", example_input=CENTER[None]
    )
    assert [a.note for a in result.report.attempts] == ["0", "1", "2"]
    assert result.report.drawdown == judged[1]


def test_bad_input_is_named() -> None:
    model = network()
    prop = violated(model, CENTER)
    with pytest.raises(SpecError, match="method"):
        tp.edit_network(model, prop, method="magic")
    with pytest.raises(SpecError, match="norm"):
        tp.edit_network(model, prop, norm="3")
    with pytest.raises(SpecError, match="domain"):
        tp.edit_network(model, prop, domain=(1.0, 0.0))
    with pytest.raises(SpecError):
        tp.edit_network(model, [])
    with pytest.raises(SpecError):
        tp.edit_network(network(sizes=(4, 5, 3)), prop, example_input=torch.zeros(1, 4))
    with pytest.raises(SpecError, match="reference"):
        tp.edit_network(model, prop, preserve=torch.full((4, 3), torch.nan))
    broken = network()
    with torch.no_grad():
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(ModelFormatError, match="NaN"):
        tp.edit_network(broken, prop)


@pytest.mark.parametrize("method", ["refine"])
def test_norms_that_an_editor_cannot_minimize_are_refused(method: str) -> None:
    model = network()
    with pytest.raises(SpecError, match="norm"):
        tp.edit_network(
            model, violated(model, CENTER), method=method, norm="1", example_input=CENTER[None]
        )


def test_auto_falls_back_when_an_editor_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()

    def exhausted(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried too much")

    monkeypatch.setattr("torch_prepared.edit.refine._Refinement.start", exhausted)
    monkeypatch.setattr("torch_prepared.edit.sequential._Search.start", exhausted)
    result = tp.edit_network(model, violated(model, CENTER), time_limit=30)
    assert result.status is tp.Verdict.CERTIFIED
    assert result.report.method == "one_shot"


def test_auto_tries_all_layers_when_nothing_else_is_certified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Editors are told whether their edits held; the first one-shot edit fails here."""
    model = network()
    tried: list[str] = []
    genuine = OneShotEditor._edit

    def spoiled(self, problem, layer, *rest):  # type: ignore[no-untyped-def]
        candidate = genuine(self, problem, layer, *rest)
        tried.append(layer)
        if len(tried) == 1:
            return dataclasses.replace(candidate, parameters={})
        return candidate

    def infeasible(*_: object) -> None:
        raise InfeasibleEditError("none")

    monkeypatch.setattr(OneShotEditor, "_edit", spoiled)
    monkeypatch.setattr("torch_prepared.edit.refine._Refinement.start", infeasible)
    monkeypatch.setattr("torch_prepared.edit.sequential._Search.start", infeasible)
    result = tp.edit_network(model, violated(model, CENTER), time_limit=30)
    assert result.status is tp.Verdict.CERTIFIED
    assert len(tried) > 1


def test_the_safety_net_of_auto_is_one_edit() -> None:
    model = network()
    result = tp.edit_network(model, violated(model, CENTER), time_limit=30)
    methods = [attempt.method for attempt in result.report.attempts]
    assert methods.count("one_shot") == 1
    assert len(methods) > 1


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("splits", [True, False])
def test_single_layers_have_their_turn_where_steps_of_all_are_slow(
    monkeypatch: pytest.MonkeyPatch, many: bool, splits: bool
) -> None:
    model = network()
    graph, prop = tp.capture_module(model, torch.zeros(1, 3)), violated(model, CENTER)
    reference = Reference.of(graph, CENTER[None], None, None, (prop,), 0)
    problem = EditProblem(graph, (prop,), reference, EditOptions())
    monkeypatch.setattr(auto, "MANY_WEIGHTS", 0 if many else 10**9)
    monkeypatch.setattr(auto, "FEWEST_LEAVES", 0 if splits else 10**9)
    plan = [editor for editor, _ in AutoEditor()._plan(problem, Deadline(60))]
    last_layer, others = OneShotEditor(end=1), OneShotEditor(begin=1, extra=1.0)
    expected: list[Editor] = [last_layer]
    expected += [RefineEditor(last_only=True)] if many and splits else []
    expected += [others] if many else []
    expected += [RefineEditor()] if splits else []
    expected += [others] if splits and not many else []
    assert plan == [*expected, SequentialEditor(), OneShotEditor()]


def test_auto_splits_for_the_last_layer_of_a_large_network_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It changes the last layer alone; then all layers may change, whether or not that held."""
    model = network()
    wanted = violated(model, CENTER)
    moved: list[tuple[str, ...]] = []
    genuine = ParameterVector.chosen

    def noting(graph, layers, *most):  # type: ignore[no-untyped-def]
        vector = genuine(graph, layers, *most)
        moved.append(vector.names)
        return vector

    monkeypatch.setattr(ParameterVector, "chosen", noting)
    monkeypatch.setattr("torch_prepared.edit.auto.MANY_WEIGHTS", 10)
    result = tp.edit_network(model, wanted, time_limit=30)
    assert result.status is tp.Verdict.CERTIFIED
    every = ParameterVector.of(tp.capture_module(model, torch.zeros(1, 3))).names
    assert moved[:2] == [every[-2:], every]
    methods = [attempt.method for attempt in result.report.attempts if attempt.certified]
    assert methods.count("refine") == 2


def test_a_large_network_moves_its_last_layers_only() -> None:
    graph = tp.capture_module(network(), torch.zeros(1, 3))
    every = ParameterVector.of(graph)
    assert ParameterVector.chosen(graph, None) == every
    few = ParameterVector.chosen(graph, None, every.count - 1)
    assert 0 < few.count < every.count
    assert few.names == every.names[-len(few.names) :]
    assert ParameterVector.chosen(graph, tuple(editable_layers(graph))) == every
