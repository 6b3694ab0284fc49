"""Kept properties: certified as well, edited for once an edit loses them, refused if broken."""

from __future__ import annotations

import itertools

import pytest
import torch
from _kept_network import CENTER, ball, flipped, network, sampled, steady, threatened
from torch import nn

import torch_prepared as tp
from torch_prepared.edit import EDITORS, Candidate, Editor, State
from torch_prepared.edit._conflict import find_conflicts
from torch_prepared.edit.attack import find_counterexamples
from torch_prepared.errors import InfeasibleEditError, SpecError
from torch_prepared.specs import Box, LpBall, Property, SafeSet


def test_properties_that_an_edit_would_lose_are_kept() -> None:
    model = network(1)
    prop, keep = flipped(model), threatened(model)
    options = {"method": "one_shot", "example_input": CENTER[None], "time_limit": 30}
    careless = tp.edit_network(model, prop, **options)
    lost = [p for p in keep if sampled(careless.model, p) <= 0]
    assert lost
    result = tp.edit_network(model, prop, keep=keep, **options)
    assert result.status is tp.Verdict.CERTIFIED
    assert all(sampled(result.model, p) > 0 for p in [prop, *keep])
    failed = {name for attempt in result.report.attempts for name in attempt.failed}
    assert {p.name for p in lost} <= failed


@pytest.mark.parametrize("method", [pytest.param("auto", marks=pytest.mark.slow), "sequential"])
def test_the_certificate_covers_edited_and_kept_properties_in_order(method: str) -> None:
    model = network()
    prop, keep = flipped(model), steady(model)
    reference = torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    result = tp.edit_network(
        model, prop, keep=keep, method=method, preserve=reference, time_limit=30
    )
    assert result.certificate is not None
    assert [p.name for p in result.certificate.properties] == ["flip", *(p.name for p in keep)]
    record = tp.capture_module(result.model, reference[:1]).record()
    claims = [p.record() for p in (prop, *keep)]
    again = tp.check_certificate(result.certificate, record, claims)
    assert again.status is tp.Verdict.CERTIFIED
    report = result.report
    assert [p.role for p in report.properties] == ["edit", "keep", "keep", "keep"]
    assert [p.before.state for p in report.properties] == ["violated", *["holds"] * 3]
    for told, check in zip(report.properties, again.per_property, strict=True):
        assert told.after is not None
        assert told.after.state is State.CERTIFIED
        assert told.after.lower == pytest.approx(check.margin)
        assert told.after.lower <= told.after.upper


def test_a_violated_property_cannot_be_kept_and_is_named() -> None:
    model = network()
    prop = flipped(model)
    keep = [*steady(model, 1), Property(prop.region, prop.safe, "broken already")]
    with pytest.raises(SpecError, match=r"keep: 'broken already' does not hold before"):
        tp.edit_network(model, prop, keep=keep, example_input=CENTER[None])


def test_kept_properties_of_another_network_are_refused() -> None:
    model = network()
    strange = Property(Box(torch.zeros(4), torch.ones(4)), SafeSet.argmax(0, 3), "strange")
    for role in ("keep", "holdout"):
        with pytest.raises(SpecError, match="strange"):
            tp.edit_network(model, flipped(model), example_input=CENTER[None], **{role: strange})


def test_a_property_to_keep_that_contradicts_the_edit_is_named_at_once() -> None:
    model = network()
    prop = flipped(model)
    label = int(model(CENTER[None])[0].argmax())
    keep = Property(LpBall(CENTER.double(), 1e-3, 2), SafeSet.argmax(label, 3), "as before")
    with pytest.raises(InfeasibleEditError, match=r"'flip' and 'as before'"):
        tp.edit_network(model, prop, keep=keep, example_input=CENTER[None], time_limit=30)
    result = tp.edit_network(
        model, prop, keep=keep, example_input=CENTER[None], raise_on_failure=False
    )
    assert result.report.conflicts == (("flip", "as before"),)
    assert result.status is tp.Verdict.UNKNOWN
    assert all(p.after is None for p in result.report.properties)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), result.model.parameters(), strict=True)
    )


class ForgetfulEditor(Editor):
    """Edits by ``one_shot`` and counts how often it was started, on how many properties."""

    name = "forgetful"
    started: list[tuple[str, ...]]

    def candidates(self, problem, deadline):
        self.started.append(tuple(p.name for p in problem.properties))
        yield from EDITORS["one_shot"]().candidates(problem, deadline)


def test_kept_properties_join_the_edit_only_when_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EDITORS, "forgetful", ForgetfulEditor)
    monkeypatch.setattr(ForgetfulEditor, "started", [], raising=False)
    model = network(1)
    keep = threatened(model)
    result = tp.edit_network(
        model, flipped(model), keep=keep, method="forgetful", example_input=CENTER[None]
    )
    assert result.status is tp.Verdict.CERTIFIED
    assert ForgetfulEditor.started[0] == ("flip",)
    assert len(ForgetfulEditor.started) >= 2
    assert len(ForgetfulEditor.started[1]) > 1


def test_an_edit_that_always_loses_a_kept_property_is_not_certified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class ConstantEditor(Editor):
        """A network whose output is the same everywhere."""

        name = "constant"

        def candidates(self, problem, deadline):
            zero = {n: torch.zeros_like(v) for n, v in problem.graph.parameters.items()}
            bias = next(n for n in zero if "4.bias" in n)
            zero[bias][int(model(CENTER[None])[0].argsort()[-2])] = 1.0
            yield Candidate(zero, note="constant")

    monkeypatch.setitem(EDITORS, "constant", ConstantEditor)
    model = network()
    keep = steady(model, 1)
    alone = tp.edit_network(model, flipped(model), method="constant", example_input=CENTER[None])
    assert alone.status is tp.Verdict.CERTIFIED
    result = tp.edit_network(
        model, flipped(model), keep=keep, method="constant", example_input=CENTER[None],
        raise_on_failure=False,
    )  # fmt: skip
    assert result.status is tp.Verdict.UNKNOWN
    assert result.certificate is None
    assert "steady 0" in {name for a in result.report.attempts for name in a.failed}
    assert result.report.properties[1].reason


def test_a_network_that_has_it_all_is_certified_unchanged_with_what_is_kept() -> None:
    model = network()
    props = steady(model)
    result = tp.edit_network(model, props[0], keep=props[1:], example_input=CENTER[None])
    assert result.report.method == "none"
    assert [p.after.state for p in result.report.properties] == ["certified"] * 3


def wide(model: nn.Module) -> Property:
    """Holds, which no single leaf proves."""
    graph = tp.capture_module(model, CENTER[None]).to(torch.float64)
    for known in steady(model, 30):
        x = known.region.lower.float()
        for eps in (0.5, 0.4, 0.3, 0.25, 0.2, 0.15):
            prop = Property(ball(x, eps), known.safe, "wide")
            whole = float(tp.bounds.certified_margin(graph, prop).margin)
            if whole <= 0 and sampled(model, prop) > 0.05 and (x - CENTER).abs().max() > eps + 0.1:
                return prop
    raise AssertionError("the test's network has no such region")


def test_a_kept_property_that_needs_splitting_is_proved_again() -> None:
    model = network()
    result = tp.edit_network(
        model, flipped(model), keep=wide(model), method="sequential", example_input=CENTER[None],
        preserve=torch.randn(200, 3, generator=torch.Generator().manual_seed(2)), time_limit=60,
    )  # fmt: skip
    assert result.status is tp.Verdict.CERTIFIED
    assert [p.after.state for p in result.report.properties] == ["certified"] * 2
    assert result.report.properties[1].before.state is State.HOLDS
    assert result.report.properties[1].before.lower > 0
    assert result.check.per_property[1].leaves > 1


@pytest.mark.slow
def test_a_kept_property_that_was_not_proved_is_edited_for_and_named() -> None:
    model = network(0, (20, 24, 24, 3))
    graph = tp.capture_module(model, torch.zeros(1, 20)).to(torch.float64)
    points = torch.randn(200, 20, generator=torch.Generator().manual_seed(3))
    for x, eps in itertools.product(points, (0.06, 0.08, 0.1)):
        safe = SafeSet.argmax(int(model(x[None])[0].argmax()), 3)
        keep = Property(ball(x, eps), safe, "unproved")
        bound = float(tp.bounds.certified_margin(graph, keep).margin)
        if -0.1 < bound < 0 and sampled(model, keep) > 0.05:
            if float(find_counterexamples(graph, keep).margins) > 0.02:
                break
    else:
        raise AssertionError("the test's network has no such region")
    other = points[(points - x).abs().amax(dim=1).argmax()]
    label = int(model(other[None])[0].argsort()[-2])
    prop = Property(ball(other, 0.01), SafeSet.argmax(label, 3), "flip")
    result = tp.edit_network(
        model, prop, keep=keep, method="sequential", preserve=points, time_limit=120
    )
    assert result.status is tp.Verdict.CERTIFIED
    assert result.report.properties[1].before.state is State.UNKNOWN
    assert result.report.properties[1].after.state is State.CERTIFIED
    assert result.report.message.endswith("not proved before, so edited for: unproved")


class TestConflicts:
    """What no network satisfies, by linear programs over the outputs."""

    REGION = Box(torch.zeros(2), torch.ones(2))

    def conflicts(self, *safe: SafeSet, regions=None) -> tuple:
        regions = [self.REGION] * len(safe) if regions is None else regions
        props = [
            Property(r, s, f"p{i}") for i, (r, s) in enumerate(zip(regions, safe, strict=True))
        ]
        return find_conflicts(props)

    def test_two_winners_at_one_input_contradict_each_other(self) -> None:
        assert self.conflicts(SafeSet.argmax(0, 3), SafeSet.argmax(1, 3)) == (("p0", "p1"),)

    def test_touching_closed_sets_meet_and_open_ones_do_not(self) -> None:
        row = torch.tensor([[1.0, -1.0]])
        zero = torch.zeros(1)
        closed = [SafeSet.polytope(sign * row, zero, strict=False) for sign in (1, -1)]
        assert self.conflicts(*closed) == ()
        strict = [SafeSet.polytope(sign * row, zero, strict=True) for sign in (1, -1)]
        assert self.conflicts(*strict) == (("p0", "p1"),)

    def test_a_union_needs_one_common_disjunct(self) -> None:
        eye, one = torch.eye(2), torch.ones(1)
        outside = SafeSet.from_polytopes([(eye[:1], -one), (-eye[:1], -one)])  # |y_0| >= 1
        inside = SafeSet.interval([-0.5, -9.0], [0.5, 9.0])
        larger = SafeSet.interval([-0.5, -9.0], [1.5, 9.0])
        assert self.conflicts(outside, inside) == (("p0", "p1"),)
        assert self.conflicts(outside, larger) == ()

    def test_regions_apart_never_conflict(self) -> None:
        regions = [self.REGION, Box(2 * torch.ones(2), 3 * torch.ones(2))]
        safe = SafeSet.argmax(0, 2), SafeSet.argmax(1, 2)
        assert self.conflicts(*safe, regions=regions) == ()

    def test_scaled_rows_do_not_change_the_answer(self) -> None:
        rows = torch.tensor([[1e6, -1e6]])
        safe = SafeSet.polytope(-rows, -1e3 * torch.ones(1)), SafeSet.polytope(rows, torch.zeros(1))
        assert self.conflicts(*safe) == (("p0", "p1"),)
