"""The behavior distance is evaluated, and its steps really bring it down."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.helpers import NETWORKS
from torch_prepared.edit._base import EditOptions, EditProblem
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._distance import BehaviorDistance, QuadraticDistance, quadratic_distance
from torch_prepared.edit._loss import BehaviorLoss
from torch_prepared.edit._metric import Metric, euclidean_metric
from torch_prepared.edit._sketch import FlatSketch
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, Property, SafeSet


def setting(name: str = "mlp") -> tuple[EditProblem, ParameterVector]:
    graph = NETWORKS[name]().to(torch.float32)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, graph.input_size, generator=generator)
    outputs = evaluate_graph(graph, inputs).flatten(1)
    box = Box(-torch.ones(graph.input_size), torch.ones(graph.input_size))
    prop = Property(box, SafeSet.argmax(0, graph.output_size))
    reference = Reference(inputs, outputs, None, "preserve")
    problem = EditProblem(graph, (prop,), reference, EditOptions())
    return problem, ParameterVector.of(problem.exact)


def behavior(problem: EditProblem, vector: ParameterVector) -> BehaviorDistance:
    distance = quadratic_distance(problem, vector, problem.reference, 0.1)
    assert isinstance(distance, BehaviorDistance)
    return distance


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_loss_is_the_mean_cost_and_its_gradient_agrees_with_differences(name: str) -> None:
    problem, vector = setting(name)
    loss = BehaviorLoss.of(problem.graph, vector, problem.reference, seed=0)
    assert loss is not None
    generator = torch.Generator().manual_seed(1)
    theta = vector.flatten(problem.exact.parameters)
    assert loss.value(theta) == pytest.approx(0.0, abs=1e-10)
    moved = theta + 0.05 * torch.randn(len(theta), generator=generator, dtype=torch.float64)
    exact = dataclasses.replace(
        loss, graph=problem.exact, inputs=loss.inputs.double(), outputs=loss.outputs.double()
    )
    way = torch.randn(len(theta), generator=generator, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        ends = [float(exact._mean(moved + s * step * way)) for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert float(loss.gradient(moved) @ way) == pytest.approx(slope, rel=2e-3, abs=1e-4)


def test_nearest_keeps_the_rows_and_beats_the_metric_alone() -> None:
    problem, vector = setting()
    distance = behavior(problem, vector)
    alone = QuadraticDistance(distance.metric)
    generator = torch.Generator().manual_seed(2)
    jacobian = torch.randn(3, vector.count, generator=generator, dtype=torch.float64)
    delta = 0.3 * torch.randn(vector.count, generator=generator, dtype=torch.float64)
    lift = jacobian.norm(dim=1) * 0.5
    rows = distance.extend(None, jacobian)
    found, plain = distance.nearest(rows, delta, lift), alone.nearest(rows, delta, lift)
    assert found is not None
    assert plain is not None
    for step in (found, plain):
        assert bool((jacobian @ step.delta >= lift - 1e-6 * lift.abs().max()).all())
    shortest = alone.step(rows, lift)
    assert shortest is not None
    for step in (plain, shortest):
        assert distance.size(delta + found.delta) < distance.size(delta + step.delta)


def test_steps_come_closer_where_the_metric_knows_next_to_nothing() -> None:
    """Far steps along directions that a sketch calls free cost much; the true distance knows."""
    problem, vector = setting()
    values = dataclasses.replace(problem.reference, decides=False)
    distance = behavior(dataclasses.replace(problem, reference=values), vector)
    sketch = distance.metric.sketch
    assert sketch is not None
    poor = dataclasses.replace(distance, metric=distance.metric.damped(1e-5), ridge=1e-5)
    generator = torch.Generator().manual_seed(4)
    jacobian = torch.randn(3, vector.count, generator=generator, dtype=torch.float64)
    delta = 1e-3 * torch.randn(vector.count, generator=generator, dtype=torch.float64)
    lift = 0.5 * jacobian.norm(dim=1)
    rows = poor.extend(None, jacobian)
    plain, short = poor.step(rows, lift), poor.shortest(rows, delta, lift)
    near = poor.nearest(rows, delta, lift)
    assert plain is not None
    assert short is not None
    assert near is not None
    for step in (short, near):
        assert bool((jacobian @ step.delta >= lift - 1e-6 * lift.abs().max()).all())
    assert poor.size(delta + short.delta) < 0.7 * poor.size(delta + plain.delta)
    assert poor.size(delta + near.delta) < poor.size(delta + short.delta)
    later = poor.after(short)
    assert later.metric.damping == short.damping > poor.metric.damping
    again = later.step(rows, lift)
    assert again is not None
    torch.testing.assert_close(again.delta, short.delta)


def test_grams_of_rows_hold_for_every_damping() -> None:
    problem, vector = setting()
    distance = behavior(problem, vector)
    jacobian = torch.randn(4, vector.count, dtype=torch.float64)
    rows = distance.extend(distance.extend(None, jacobian[:1]), jacobian[1:])
    for damping in (distance.ridge, 100 * distance.ridge):
        metric = distance.metric.damped(damping)
        expected = metric.solve(jacobian) @ jacobian.T
        found = metric.gram(rows.products, rows.image)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def test_steps_are_measured_where_one_stands_after_looking_around() -> None:
    problem, vector = setting()
    distance = behavior(problem, vector)
    same = distance.around(torch.zeros(vector.count, dtype=torch.float64))
    probe = torch.randn(vector.count, dtype=torch.float64)
    assert same.metric.norm_squared(probe) == pytest.approx(
        distance.metric.norm_squared(probe), rel=1e-3
    )
    delta = 0.5 * torch.randn(vector.count, dtype=torch.float64)
    other = distance.around(delta)
    assert other.metric.damping == distance.metric.damping
    assert other.size(delta) == distance.size(delta)
    assert other.metric.norm_squared(probe) != pytest.approx(
        distance.metric.norm_squared(probe), rel=1e-3
    )


def test_forbidden_outputs_inside_a_region_are_not_to_be_kept() -> None:
    problem, _ = setting()
    graph, prop = problem.graph, problem.properties[0]
    inside = prop.region.sample(200, torch.Generator().manual_seed(3))
    inputs = torch.cat([inside, torch.full((1, graph.input_size), 5.0)])
    outputs = evaluate_graph(graph, inputs.float()).flatten(1)
    safe = prop.safe.contains(outputs)
    assert bool(safe[:-1].any())
    assert not bool(safe[:-1].all())
    known = Reference.of(graph, inputs, None, None, (prop,), 0)
    assert len(known.inputs) == len(inputs)  # reports count everything
    assert len(known.that_may_stay((prop,)).inputs) == int(safe[:-1].sum()) + 1


def test_float32_points_count_as_inside_of_boxes_thinner_than_their_spacing() -> None:
    low = torch.tensor([0.1, 0.7], dtype=torch.float64)
    box = Box(low, low + 1e-17)
    points = low[None].float()
    assert not bool(box.contains(points)[0])
    assert bool(box.contains(points, rounding=True)[0])
    assert not bool(box.contains(points + 1e-6, rounding=True)[0])
    nan = torch.tensor([[float("nan"), 0.7]])
    assert not bool(box.contains(nan, rounding=True)[0])


@pytest.mark.parametrize("damping", [1e-3, 1.0])
@pytest.mark.parametrize("kind", ["few", "repeated", "most", "none"])
def test_projections_on_many_rows_need_few_of_them(
    kind: str, damping: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    sketch = FlatSketch(torch.randn(20, 500, generator=generator))
    distance = QuadraticDistance(Metric(1.0, sketch).damped(damping))
    jacobian = torch.randn(400, 500, generator=generator, dtype=torch.float64)
    inside = torch.randn(500, generator=generator, dtype=torch.float64)
    slack = torch.rand(400, generator=generator, dtype=torch.float64)
    if kind == "few":
        jacobian[40:] = jacobian[:40].repeat(9, 1) + 0.05 * jacobian[40:]
        slack[40:] += 2.0
    elif kind == "repeated":
        jacobian = jacobian[:30].repeat(14, 1)[:400]
        slack = slack[:30].repeat(14)[:400]
    lift = jacobian @ inside - slack
    if kind == "none":
        lift = -slack
    rows = distance.extend(None, jacobian)
    found = distance.step(rows, lift)
    assert found is not None
    monkeypatch.setattr("torch_prepared.solvers.projection._FEW", 10**9)  # by all at once
    plain = distance.step(rows, lift)
    assert plain is not None
    assert (found.multipliers >= 0).all()
    # Both up to the rounding of the sketch, which is kept in float32.
    size = float(plain.delta.norm())
    assert float((found.delta - plain.delta).norm()) <= 1e-5 * size
    assert float((lift - jacobian @ found.delta).max()) <= 1e-5 * float(lift.abs().max())
    assert distance.size(found.delta) == pytest.approx(distance.size(plain.delta), rel=1e-5)


def test_contradictions_among_many_rows_are_found() -> None:
    generator = torch.Generator().manual_seed(1)
    jacobian = torch.randn(300, 600, generator=generator, dtype=torch.float64)
    jacobian[7] = -jacobian[211]
    lift = 0.1 * torch.randn(300, generator=generator, dtype=torch.float64)
    lift[7] = lift[211] = 1.0
    distance = QuadraticDistance(euclidean_metric())
    assert distance.step(distance.extend(None, jacobian), lift) is None
    lift[7] = -1.5
    assert distance.step(distance.extend(None, jacobian), lift) is not None
