"""The sequential editor's parts: held slopes, growing regions, rows kept, and every norm."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import torch_prepared as tp
from tests.edit.test_edit_network import CENTER, network, violated
from tests.helpers import NETWORKS, mlp, random_boxes
from torch_prepared.bounds import PropertyBatch
from torch_prepared.certify import Verdict
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.rows import LinearRows, Unknowns
from torch_prepared.edit import _linearize, _pace, sequential
from torch_prepared.edit._atomic import AtomicDistance
from torch_prepared.edit._base import EditOptions, EditProblem, Norm
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._bundle import Bundle
from torch_prepared.edit._certify import certify_network
from torch_prepared.edit._distance import QuadraticDistance
from torch_prepared.edit._linearize import Linearization, MarginFunction
from torch_prepared.edit._metric import euclidean_metric
from torch_prepared.edit._pace import Pace
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.errors import InfeasibleEditError, SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.solvers import minimize_norm, solve
from torch_prepared.specs import Box, Property, SafeSet


def margin_function(name: str, count: int = 2) -> tuple[MarginFunction, tuple[Property, ...]]:
    graph = NETWORKS[name]()
    classes = graph.output_size
    properties = tuple(
        Property(box, SafeSet.argmax(i % classes, classes), f"p{i}")
        for i, box in enumerate(random_boxes(graph.input_size, count, radius=0.2))
    )
    return (
        MarginFunction(graph, PropertyBatch.of(properties), ParameterVector.of(graph)),
        properties,
    )


def start(margins: MarginFunction) -> torch.Tensor:
    return margins.vector.flatten(margins.graph.parameters).double()


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_held_slopes_reproduce_the_operators_own_bounds(name: str) -> None:
    margins, _ = margin_function(name)
    own, slopes = margins.choose(start(margins))
    torch.testing.assert_close(margins.value(start(margins), slopes), own, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_any_slopes_bound_every_output(name: str) -> None:
    margins, properties = margin_function(name)
    _, slopes = margins.choose(start(margins))
    generator = torch.Generator().manual_seed(0)
    wild = torch.rand(slopes.shape, generator=generator, dtype=torch.float64)
    lower = margins.value(start(margins), wild)
    for i, prop in enumerate(properties):
        y = evaluate_graph(margins.graph, prop.region.sample(500, generator)).flatten(1)
        mine = lower[margins.owners == i]
        assert float(mine.min()) <= float(prop.safe.margin(y).min()) + 1e-12


def test_margins_with_held_slopes_have_no_jumps() -> None:
    """Where a neuron's interval tips from left to right the own bound jumps, the held one not."""
    # y = relu(x + tip) - 0.2 (x + 5); the equal terms that cancel keep plain intervals loose.
    safe = SafeSet.from_polytopes([(-torch.eye(1).double(), torch.zeros(1).double())])
    box = Box(torch.tensor([-1.0]).double(), torch.tensor([1.0]).double())
    batch, graph = PropertyBatch.of((Property(box, safe, "p"),)), mlp((1, 4, 1))
    margins = MarginFunction(graph, batch, ParameterVector.of(graph))

    def weights(tip: float) -> torch.Tensor:
        return torch.tensor([1.0, 1, 1, 1, tip, 5, 5, 5, 1, -0.2, -1, 1, 0]).double()

    tie = 2.0**-17  # where upper = -lower, but for a little; see ops.leans_up
    before, after = weights(tie - 1e-6), weights(tie + 1e-6)
    _, slopes = margins.choose(before)
    own = margins.choose(after)[0] - margins.choose(before)[0]
    held = margins.value(after, slopes) - margins.value(before, slopes)
    assert float(own.abs().max()) > 0.5
    assert float(held.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_jacobians_are_derivatives(name: str) -> None:
    margins, _ = margin_function(name)
    theta = start(margins)
    value, slopes = margins.choose(theta)
    slopes = slopes.clamp(0.2, 0.8)
    value = margins.value(theta, slopes)
    rows = torch.tensor([0, len(value) - 1])
    line = margins.linearize(theta, slopes, value, rows)
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(len(theta), generator=generator, dtype=torch.float64)
    h = 1e-6
    moved = margins.value(theta + h * delta, slopes) - margins.value(theta - h * delta, slopes)
    torch.testing.assert_close(
        (line.jacobian.double() @ delta), moved[rows] / (2 * h), rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("name", ["mlp", "conv", "residual"])
def test_large_networks_have_the_gradients_of_their_lowest_margins(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, _ = margin_function(name, 3)
    theta = start(usual)
    value, slopes = usual.choose(theta)
    rows = torch.arange(len(value))
    every = usual.linearize(theta, slopes, value, rows)
    monkeypatch.setattr(_linearize, "AT_ONCE", 0)
    large, _ = margin_function(name, 3)
    torch.testing.assert_close(large.value(theta, 0.5 * slopes), value, rtol=0, atol=1e-12)
    line = large.linearize(theta, slopes, value, rows)
    assert line.rows.tolist() == [
        int(rows[large.owners == i][value[large.owners == i].argmin()]) for i in range(3)
    ]
    torch.testing.assert_close(line.jacobian, every.jacobian[line.rows], rtol=1e-3, atol=1e-3)
    few = large.linearize(theta, slopes, value, rows[-1:])
    assert few.rows.tolist() == [len(value) - 1]
    torch.testing.assert_close(few.jacobian, every.jacobian[-1:], rtol=1e-3, atol=1e-3)


def test_proofs_carry_the_slopes_and_the_checker_accepts_them() -> None:
    model = network()
    graph = tp.capture_module(model, CENTER[None]).to(torch.float64)
    label = int(model(CENTER[None])[0].argmax())
    prop = Property(
        Box(CENTER.double() - 0.01, CENTER.double() + 0.01), SafeSet.argmax(label, 3), "p"
    )
    margins = MarginFunction(graph, PropertyBatch.of((prop,)), ParameterVector.of(graph))
    theta = start(margins)
    _, slopes = margins.choose(theta)
    slopes = 0.9 * slopes + 0.05
    promised = float(margins.value(theta, slopes).min())
    assert promised > 0
    proofs = margins.proofs(theta, slopes, (prop,))
    certified = certify_network(graph, (prop,), proofs, {})
    assert certified.check.status is Verdict.CERTIFIED
    assert certified.check.margin == pytest.approx(promised, rel=1e-6)


LENGTHS = {
    Norm.L1: lambda d: d.abs().sum(),
    Norm.LINF: lambda d: d.abs().max(),
    Norm.L1_PLUS_LINF: lambda d: d.abs().sum() + d.abs().max(),
}


@pytest.mark.parametrize("norm", list(LENGTHS))
@pytest.mark.parametrize("m", [1, 7])
def test_column_generation_agrees_with_the_whole_program(norm: Norm, m: int) -> None:
    """The dense linear program over all p entries has the same optimal value."""
    p = 40
    generator = torch.Generator().manual_seed(m)
    jacobian = torch.randn(m, p, generator=generator)
    lift = torch.rand(m, generator=generator, dtype=torch.float64) - 0.2
    lift[0] = 1.0
    distance = AtomicDistance(norm)
    step = distance.step(distance.extend(None, jacobian), lift)
    assert step is not None
    assert bool((jacobian.double() @ step.delta >= lift - 1e-6).all())
    unknowns = Unknowns()
    block = unknowns.add("d", (p,))
    program = minimize_norm(
        unknowns,
        LinearRows(jacobian.double().numpy(), lift.numpy()),
        block.columns,
        norm=norm.value,
    )
    size = float(LENGTHS[norm](step.delta))
    assert size == pytest.approx(solve(program).objective, rel=2e-3)
    assert distance.size(step.delta) == pytest.approx(size)


def test_rows_that_contradict_each_other_give_no_step() -> None:
    jacobian = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    lift = torch.tensor([1.0, 1.0], dtype=torch.float64)
    for distance in (QuadraticDistance(euclidean_metric()), AtomicDistance(Norm.L1)):
        step = distance.step(distance.extend(None, jacobian), lift)
        assert step is None or not bool((jacobian.double() @ step.delta >= lift).all())


def test_rows_extended_one_by_one_are_the_rows_at_once() -> None:
    jacobian = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    distance = QuadraticDistance(euclidean_metric())
    whole = distance.extend(None, jacobian)
    parts = distance.extend(distance.extend(None, jacobian[:2]), jacobian[2:])
    torch.testing.assert_close(parts.products, whole.products)
    torch.testing.assert_close(
        parts.take(torch.tensor([4, 1])).products, whole.products[[4, 1]][:, [4, 1]]
    )


def test_a_bundle_never_says_less_than_the_truth_and_replaces_on_request() -> None:
    bundle = Bundle(QuadraticDistance(euclidean_metric()))
    theta, value = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -2.0]).double()

    def line(jacobian: torch.Tensor, at: torch.Tensor) -> Linearization:
        return Linearization(at, torch.tensor([0, 1]), jacobian)

    bundle.add(line(torch.eye(3)[:2], value), theta)
    moved = torch.tensor([5.0, -5.0, 0.0]).double()
    truth = torch.tensor([2.0, -3.0]).double()
    assert bundle.lines(moved, truth).tolist() == [6.0, -3.0]
    bundle.add(line(2 * torch.eye(3)[:2], truth), moved)
    assert len(bundle) == 4
    bundle.add(line(torch.eye(3)[:2], truth), moved, replace=True)
    assert len(bundle) == 2
    assert bundle.lines(moved, truth).tolist() == truth.tolist()


def test_every_norm_is_certified_and_the_one_asked_for_is_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sequential, "LAST_SHRINK_STEPS", 10)
    model = network()
    prop = violated(model, CENTER)
    size = {"1": lambda d: d.l1, "2": lambda d: d.l2, "inf": lambda d: d.linf}
    deltas = {}
    for norm in (*size, "1+inf", "behavior"):
        result = tp.edit_network(
            model, prop, method="sequential", norm=norm, example_input=CENTER[None]
        )
        assert result.status is tp.Verdict.CERTIFIED
        assert result.report.method == "sequential"
        deltas[norm] = result.report.delta
    for norm, length in size.items():
        assert length(deltas[norm]) <= 1.1 * min(length(d) for d in deltas.values())


def test_parts_of_a_graph_without_bends_have_no_slopes() -> None:
    graph: Graph = NETWORKS["mlp"]("tanh")
    prop = Property(random_boxes(4, 1)[0], SafeSet.argmax(0, 3), "p")
    margins = MarginFunction(graph, PropertyBatch.of((prop,)), ParameterVector.of(graph))
    value, slopes = margins.choose(start(margins))
    assert slopes.shape == (1, 0)
    line = margins.linearize(start(margins), slopes, value, torch.tensor([0]))
    assert bool(torch.isfinite(line.jacobian).all())


def test_a_layer_that_is_not_there_is_refused_in_one_line() -> None:
    graph = NETWORKS["mlp"]()
    for name in ("nope", graph.nodes[2].name):  # the second is an activation
        with pytest.raises(SpecError, match="expected editable layers"):
            ParameterVector.of(graph, (name,))


@pytest.mark.parametrize("name", ["mlp", "conv"])
def test_gradients_do_not_depend_on_what_shares_a_pass(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    margins, _ = margin_function(name, count=5)
    value, slopes = margins.choose(start(margins))
    rows = torch.randperm(len(value), generator=torch.Generator().manual_seed(0))[:7]
    found = []
    for size in (1, 2, 100):
        monkeypatch.setattr(_linearize, "BLOCK", size)
        monkeypatch.setattr(_linearize, "BLOCK_FLOPS", 1e30)
        found.append(margins.linearize(start(margins), slopes, value, rows))
        assert torch.equal(found[-1].rows, rows)
    for other in found[1:]:
        torch.testing.assert_close(other.jacobian, found[0].jacobian, rtol=1e-4, atol=1e-5)


def crowded_task(radius: float = 0.09) -> tuple[torch.nn.Module, Tensor, list[Property]]:
    """A trained classifier and boxes around six of its points, of three classes, close together."""
    torch.manual_seed(1)
    x = torch.rand(600, 6, generator=torch.Generator().manual_seed(1))
    label = (x[:, 0] + 0.5 * torch.sin(6 * x[:, 1]) > 0.75).long() + (x[:, 2] > 0.6).long()
    sizes = (6, 24, 24, 24, 24)
    layers = [m for n, k in pairwise(sizes) for m in (torch.nn.Linear(n, k), torch.nn.ReLU())]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(24, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    right = model(x).argmax(dim=1) == label
    chosen = [i for c in range(3) for i in (right & (label == c)).nonzero()[:2, 0].tolist()]
    boxes = [Box((x[i] - radius).double(), (x[i] + radius).double()) for i in chosen]
    return (
        model,
        x,
        [
            Property(box, SafeSet.argmax(int(label[i]), 3), f"p{i}")
            for i, box in zip(chosen, boxes, strict=True)
        ],
    )


def crowded_search(radius: float = 0.09) -> sequential._Search:
    model, x, properties = crowded_task(radius)
    graph = tp.capture_module(model, x[:1])
    reference = Reference.of(graph, x, None, None, tuple(properties), 0)
    problem = EditProblem(graph, tuple(properties), reference, EditOptions(norm=Norm.L2))
    return sequential._Search.start(problem, 0.1, Deadline(None))


def test_goals_are_most_of_the_centers_margins_and_half_of_what_holds_anyway() -> None:
    search = crowded_search(0.02)
    center, whole = (search.margins.scaled(s).choose(search.origin)[0] for s in (0.0, 1.0))
    signal, goal = search._goals(search.margins)
    torch.testing.assert_close(signal, center)
    holds = whole > search.aim
    assert 0 < int(holds.sum()) < len(holds)
    assert bool((goal >= search.aim).all())
    most = (sequential.SIGNAL * center).clamp_min(search.aim)
    torch.testing.assert_close(goal[~holds], most[~holds])
    half = torch.minimum(most, sequential.HELD * whole)
    torch.testing.assert_close(goal[holds], half[holds].clamp_min(search.aim))
    assert bool((goal[holds] < most[holds]).any())


def test_a_network_that_takes_too_long_to_bound_is_given_up_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No other damping is tried: it would take as long."""
    monkeypatch.setattr(_pace, "FEWEST_PASSES", 1e9)
    model = network()
    seen: list[float] = []
    genuine = sequential._Search.start

    def noting(problem, damping, deadline):  # type: ignore[no-untyped-def]
        seen.append(damping)
        return genuine(problem, damping, deadline)

    monkeypatch.setattr(sequential._Search, "start", noting)
    with pytest.raises(InfeasibleEditError, match="expected time to bound it several times"):
        tp.edit_network(model, violated(model, CENTER), method="sequential", time_limit=60)
    assert seen == [0.1]


def test_only_margins_below_their_goal_are_linearized() -> None:
    search = crowded_search(0.02)
    _, search.goal = search._goals(search.margins)
    value, slopes = search.margins.choose(search.origin)
    line = search._linearize(search._at(search.origin, slopes, value))
    assert sorted(line.rows.tolist()) == (value < search.goal).nonzero()[:, 0].tolist()
    assert 0 < len(line.rows) < len(value)


@pytest.mark.parametrize("depth", [0.05, 0.5])
def test_the_next_size_is_the_largest_that_one_step_can_follow(depth: float) -> None:
    search = crowded_search()
    size = search._reach(search.margins, search.origin, depth)
    sizes = torch.tensor([size, min(1.0, size + 2 * sequential.GROWTH_GAIN * size)])
    near, far = (
        float(search.margins.scaled(float(s)).choose(search.origin)[0].min()) for s in sizes
    )
    assert 0.0 < size < 1.0
    assert far < -depth <= near


def test_a_refused_step_teaches_the_rows_of_where_it_led(monkeypatch: pytest.MonkeyPatch) -> None:
    search = crowded_search()
    _, search.goal = search._goals(search.margins)
    value, slopes = search.margins.choose(search.origin)
    state, bundle = search._at(search.origin, slopes, value), Bundle(search.distance)
    bundle.add(search._linearize(state), state.theta)
    known = len(bundle.index)
    monkeypatch.setattr(sequential, "FAIR_SHARE", 1e9)  # no step is good enough
    monkeypatch.setattr(sequential, "BACKTRACKS", 3)
    with pytest.raises(InfeasibleEditError, match="no step raises"):
        search._restore_once(state, bundle, 0.1)
    assert known < len(bundle.index) <= known + 2 * sequential.NULL_ROWS


class TestPace:
    def test_growth_ends_in_time_for_the_leap_and_never_without_a_limit(self) -> None:
        now = time.monotonic()
        assert Pace(Deadline(None), pass_seconds=1e9).growing == math.inf
        assert Pace(Deadline(100.0, now)).growing > 0
        assert Pace(Deadline(100.0, now - 80.0)).growing < 0
        assert Pace(Deadline(100.0, now), pass_seconds=100.0 / _pace.LEAP).growing < 0

    def test_slow_gradients_leave_no_time_for_growth(self) -> None:
        pace = Pace(Deadline(100.0), row_seconds=2 * _pace.SLOW_SHARE * 100.0)
        assert pace.slow
        assert pace.growing == 0.0
        assert not Pace(Deadline(None), row_seconds=1e9).slow

    def test_one_first_pass_that_was_held_up_does_not_end_growth(self) -> None:
        now, seconds = time.monotonic(), 100.0 / _pace.LEAP
        assert Pace(Deadline(100.0, now), pass_seconds=seconds, passes=1).grows
        assert not Pace(Deadline(100.0, now), pass_seconds=seconds, passes=2).grows
        assert not Pace(Deadline(100.0, now), pass_seconds=3 * seconds, passes=1).grows
        assert Pace(Deadline(None), pass_seconds=1e9, passes=2).grows

    def test_nothing_is_restored_where_bounds_take_most_of_the_time(self) -> None:
        enough = 100.0 / _pace.FEWEST_PASSES
        assert Pace(Deadline(100.0), bound_seconds=1.01 * enough).hopeless
        assert not Pace(Deadline(100.0), bound_seconds=0.9 * enough).hopeless
        assert not Pace(Deadline(None), bound_seconds=1e9).hopeless

    def test_growth_is_behind_when_its_rest_takes_longer_than_there_is(self) -> None:
        pace = Pace(Deadline(100.0))
        left = pace.growing
        assert not pace.behind(0.5, 0.9 * left)
        assert pace.behind(0.5, 1.1 * left)
        assert pace.behind(0.1, 0.2 * left)
        assert not pace.behind(1.0, 1e9)
        assert not Pace(Deadline(None)).behind(0.01, 1e9)

    def test_a_pass_that_does_not_fit_and_the_end(self) -> None:
        late = time.monotonic() - 90.0
        assert Pace(Deadline(100.0, late), pass_seconds=20.0).cramped
        assert not Pace(Deadline(100.0, late), pass_seconds=5.0).cramped
        assert Pace(Deadline(100.0, late)).ending
        assert Pace(Deadline(100.0), reserve=200.0).ending
        assert not Pace(Deadline(None), reserve=1e9).ending

    def test_passes_and_candidates_are_timed(self) -> None:
        pace = Pace(Deadline(100.0))
        with pace.gradients(4):
            time.sleep(0.02)
        assert pace.pass_seconds >= 0.02
        assert pace.row_seconds == pytest.approx(pace.pass_seconds / 4)
        with pace.candidate():
            time.sleep(0.02)
        assert pace.reserve >= 0.03
