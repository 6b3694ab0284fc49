"""What an edit's report says: recomputed here from the two networks."""

from __future__ import annotations

import json
import math

import pytest
import torch
from _kept_network import CENTER, flipped, network, steady
from torch import nn

import torch_prepared as tp
from torch_prepared.edit import EDITORS, Candidate, Editor, Reference, State, _report_locality
from torch_prepared.edit._report_locality import distances_to, measure_locality
from torch_prepared.specs import Box, LpBall, Property, SafeSet


@pytest.fixture(scope="module")
def edited():
    model = network()
    holdout = [*steady(model, 2), Property(Box(CENTER.double() - 0.06, CENTER.double() + 0.06),
                                           flipped(model).safe, "larger")]  # fmt: skip
    reference = torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    result = tp.edit_network(
        model, flipped(model), holdout=holdout, method="sequential", preserve=reference,
        time_limit=30,
    )  # fmt: skip
    return model, result, reference


def test_layers_add_up_to_the_whole_change(edited) -> None:
    model, result, _ = edited
    delta = result.report.delta
    layers = delta.by_layer
    old, new = list(model.parameters()), list(result.model.parameters())
    moved = [(b - a).detach().double() for a, b in zip(old, new, strict=True)]
    assert len(layers) == 3
    for k, layer in enumerate(layers):
        flat = torch.cat([m.reshape(-1) for m in moved[2 * k : 2 * k + 2]])
        before = torch.cat([p.detach().double().reshape(-1) for p in old[2 * k : 2 * k + 2]])
        assert layer.size == flat.numel()
        assert layer.changed == int((flat != 0).sum())
        assert layer.l1 == pytest.approx(float(flat.abs().sum()))
        assert layer.linf == pytest.approx(float(flat.abs().max()))
        assert layer.relative_l2 == pytest.approx(float(flat.norm() / before.norm()))
    assert sum(layer.l1 for layer in layers) == pytest.approx(delta.l1)
    assert sum(layer.l2**2 for layer in layers) == pytest.approx(delta.l2**2)
    assert max(layer.linf for layer in layers) == pytest.approx(delta.linf)


def test_held_out_properties_are_judged_but_not_claimed(edited) -> None:
    _, result, _ = edited
    held = [p for p in result.report.properties if p.role == "holdout"]
    assert len(held) == 3
    assert [p.before.state for p in held] == ["holds", "holds", "violated"]
    assert State.CERTIFIED not in [p.after.state for p in held]
    summary = result.report.generalization
    assert summary.properties == 3
    assert summary.holds_before == 2
    assert summary.violated_before == 1
    assert summary.holds_after == sum(p.after.state == "holds" for p in held)
    assert len(result.certificate.properties) == 1


def test_the_report_is_plain_data(edited) -> None:
    _, result, _ = edited
    text = json.dumps(result.report.to_json())
    data = json.loads(text)
    assert data["properties"][0]["before"]["state"] == "violated"
    assert data["locality"]["outside"]["samples"] > 0


def test_seconds_of_all_phases_fit_into_the_total(edited) -> None:
    _, result, _ = edited
    seconds = dict(result.report.seconds)
    total = seconds.pop("total")
    assert {"attack", "bounds", "edit", "check", "keep", "report"} >= set(seconds)
    assert 0 < sum(seconds.values()) <= total * 1.01


def test_locality_is_what_the_outputs_say(edited) -> None:
    model, result, reference = edited
    region = flipped(model).region
    locality = result.report.locality
    far = reference[~region.contains(reference)]
    with torch.no_grad():
        change = (result.model(far) - model(far)).abs().max()
    assert locality.outside.largest >= float(change) - 1e-6
    counted = sum(band.samples for band in locality.bands)
    assert counted == locality.outside.samples
    shells = [band for band in locality.bands if band.kind == "shell"]
    assert len(shells) == 6
    middles = [(band.nearest + band.farthest) / 2 for band in shells]
    assert middles == sorted(middles)
    assert all(band.nearest > 0 for band in locality.bands)
    thirds = [band for band in locality.bands if band.kind == "reference"]
    assert len(thirds) == 3
    assert sum(band.samples for band in thirds) == len(far)


def test_locality_of_no_change_is_zero_and_of_a_constant_shift_is_the_same_everywhere() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    graph = tp.capture_module(model, torch.zeros(1, 2))
    prop = Property(Box(torch.zeros(2), torch.ones(2)), SafeSet.argmax(0, 2))
    reference = Reference.of(graph, torch.randn(60, 2), None, None, [prop], 0)
    same = measure_locality(graph, graph, [prop], reference, None, 0)
    assert same.outside.largest == 0
    assert same.outside.agreement == 1
    bias = {n: v + 0.25 for n, v in graph.parameters.items() if v.dim() == 1}
    moved = measure_locality(graph, graph.with_parameters(bias), [prop], reference, None, 0)
    for band in (moved.inside, moved.outside, *moved.bands):
        assert band.largest == pytest.approx(0.25, abs=1e-5)
        assert band.relative == pytest.approx(math.sqrt(2 * 0.25**2 / reference.spread), rel=1e-4)


def test_locality_of_slow_networks_looks_at_fewer_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tp.capture_module(nn.Sequential(nn.Linear(2, 2)), torch.zeros(1, 2))
    prop = Property(Box(torch.zeros(2), torch.ones(2)), SafeSet.argmax(0, 2))
    reference = Reference.of(graph, 5.0 + torch.rand(300, 2), None, None, [prop], 0)
    monkeypatch.setattr(_report_locality, "MOST_FLOPS", 0.0)
    found = measure_locality(graph, graph, [prop], reference, None, 0)
    seen = [band.samples for band in found.bands if band.kind == "reference"]
    assert sum(seen) == _report_locality.FEWEST
    assert found.outside is not None
    assert found.outside.largest == 0  # outputs that were known belong to their inputs


def test_distances_to_boxes_and_membership_in_sets() -> None:
    regions = [Box(torch.zeros(2), torch.ones(2)), LpBall(torch.tensor([5.0, 0.0]), 1.0, 2)]
    points = torch.tensor([[0.5, 0.5], [2.0, 0.5], [0.5, -3.0], [5.9, 0.9], [5.0, 0.5]])
    distance, inside = distances_to(regions, points)
    assert distance.tolist() == pytest.approx([0.0, 1.0, 3.0, 0.0, 0.0])
    assert inside.tolist() == [True, False, False, False, True]


def test_a_single_point_as_region_still_has_surroundings() -> None:
    graph = tp.capture_module(nn.Sequential(nn.Linear(2, 1)), torch.zeros(1, 2))
    prop = Property(Box(torch.zeros(2), torch.zeros(2)), SafeSet.interval([0.0], [1.0]))
    reference = Reference.of(graph, None, None, None, [prop], 0)
    found = measure_locality(graph, graph, [prop], reference, None, 0)
    assert found.outside.samples > 0
    assert found.outside.agreement is None


def test_worst_inputs_lie_in_their_regions_and_violate() -> None:
    model = network()
    prop, keep = flipped(model), steady(model, 1)
    result = tp.edit_network(
        model, prop, keep=keep, method="sequential", example_input=CENTER[None],
        preserve=torch.randn(100, 3, generator=torch.Generator().manual_seed(2)), time_limit=30,
    )  # fmt: skip
    assert result.worst_inputs.shape == (2, 3)
    assert prop.region.contains(result.worst_inputs[:1]).all()
    y = model.double()(result.worst_inputs[:1])
    assert float(prop.safe.margin(y.detach())[0]) <= 0


class IdleEditor(Editor):
    """Claims that nothing needs to change."""

    name = "idle"

    def candidates(self, problem, deadline):
        yield Candidate({}, note="unchanged")


def test_a_failed_edit_is_reported_by_property(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EDITORS, "idle", IdleEditor)
    model = network()
    result = tp.edit_network(
        model, flipped(model), holdout=steady(model, 1), method="idle",
        example_input=CENTER[None], raise_on_failure=False,
    )  # fmt: skip
    report = result.report
    assert result.status is tp.Verdict.UNKNOWN
    assert "lower bound" in report.message
    assert "lower bound" in report.properties[0].reason
    assert report.attempts[0].failed == ("flip",)
    assert report.locality is None
    assert report.generalization is None
    assert [p.before.state for p in report.properties] == ["violated", "holds"]
    assert all(p.after is None for p in report.properties)
    assert report.delta.changed == 0
