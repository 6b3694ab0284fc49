"""Steps of all layers at once, many examples, layers with few positive scalars."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import conv_net, mlp
from torch_prepared.bounds import compute_bounds
from torch_prepared.certify import Verdict
from torch_prepared.core.deadline import Deadline
from torch_prepared.edit.pointwise import Outcome, PointStatus, edit_points, lift_to_balls
from torch_prepared.edit.pointwise._curved import _multipliers, raise_rows
from torch_prepared.edit.pointwise._examples import make_claims, point_margins, row_values
from torch_prepared.edit.pointwise._layer import FreeLayer
from torch_prepared.edit.pointwise._program import build_program
from torch_prepared.edit.pointwise._wanted import Wanted
from torch_prepared.edit.pointwise.lift import ball_properties
from torch_prepared.relax import evaluate_graph
from torch_prepared.solvers import Status, project
from torch_prepared.solvers.smt import solve_smt

MARGIN = 0.01


def _random_labels(graph, count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, graph.input_size, generator=generator)
    shift = 1 + torch.randint(graph.output_size - 1, (count,), generator=generator)
    labels = evaluate_graph(graph, x.to(graph.dtype)).flatten(1).argmax(1)
    return x, (labels + shift) % graph.output_size


def _margins(graph, claims):
    outputs = evaluate_graph(graph, torch.from_numpy(claims.inputs).to(graph.dtype)).flatten(1)
    return point_margins(claims, row_values(claims, outputs.double().numpy()))


@pytest.mark.parametrize("seed", range(5))
def test_active_sets_give_the_multipliers_of_the_exact_projection(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(30, 60, generator=generator, dtype=torch.float64)
    rows /= rows.norm(dim=1, keepdim=True)
    gram, lift = rows @ rows.T, torch.randn(30, generator=generator, dtype=torch.float64)
    exact = project(gram, lift)
    assert exact.status is Status.OPTIMAL
    np.testing.assert_allclose(_multipliers(gram, lift).numpy(), exact.multipliers, atol=1e-7)


@pytest.mark.parametrize("make", [lambda: mlp((6, 40, 30, 4), dtype=torch.float32), conv_net])
def test_all_rows_are_raised_and_nothing_else_is_touched(make) -> None:
    graph = make().to(torch.float32, "cpu")
    x, labels = _random_labels(graph, 12)
    claims = make_claims(graph, x, labels, "examples")
    before = {name: value.clone() for name, value in graph.parameters.items()}
    stay = torch.randn(500, graph.input_size)
    found = raise_rows(
        graph, claims, stay, MARGIN, 3 * MARGIN, layers=None, deadline=Deadline(20.0)
    )
    assert (_margins(graph, claims) < 0).all()
    assert (_margins(found, claims) >= MARGIN - 1e-5).all()
    assert all(torch.equal(graph.parameters[name], value) for name, value in before.items())
    dense = {r.name for n in graph.nodes if n.op == "linear" for r in n.params.values()}
    changed = {n for n, v in found.parameters.items() if not torch.equal(v, before[n])}
    assert changed
    assert changed <= dense


def test_layers_that_may_not_move_stay() -> None:
    graph = mlp((6, 40, 30, 4), dtype=torch.float32)
    x, labels = _random_labels(graph, 3)
    claims = make_claims(graph, x, labels, "examples")
    found = raise_rows(
        graph, claims, x, MARGIN, 3 * MARGIN, layers=("linear3",), deadline=Deadline(10.0)
    )
    changed = {n for n, v in found.parameters.items() if not torch.equal(v, graph.parameters[n])}
    assert changed <= {"linear3.weight", "linear3.bias"}


def test_one_step_of_a_linear_network_is_the_least_change_in_the_metric() -> None:
    """min trace(G D A D') with the rows raised, against a dense solve."""
    from torch_prepared.edit.pointwise import _curved

    graph = mlp((5, 3), dtype=torch.float32)
    x, labels = _random_labels(graph, 1)
    claims = make_claims(graph, x, labels, "examples")
    stay = torch.randn(400, 5)
    node = next(n for n in graph.nodes if n.op == "linear")
    search = _curved._Search(graph, claims, x, stay, [node])
    state = {name: graph.parameters[name] for name in _curved._names(graph, node)}
    (metric,) = search.metrics(state)
    values = search.values(state)
    moved = search.step(state, [metric], values, MARGIN, 0.0)
    assert moved is not None
    h = torch.cat([x[0], torch.ones(1)]).double()
    rows = np.flatnonzero(values < _curved.NEAR * MARGIN)
    jacobian = torch.stack([torch.kron(torch.from_numpy(claims.rows[r]), h) for r in rows])
    inverse = torch.kron(metric.outer.double(), metric.inner.double())
    answer = project(jacobian @ inverse @ jacobian.T, MARGIN - values[rows])
    change = (inverse @ jacobian.T @ torch.from_numpy(answer.multipliers)).reshape(3, 6)
    weight = moved[node.params["weight"].name] - state[node.params["weight"].name]
    torch.testing.assert_close(weight.double(), change[:, :-1], atol=1e-4, rtol=1e-3)


def test_hundreds_of_examples_at_once() -> None:
    graph = mlp((30, 80, 60, 4), dtype=torch.float32)
    x, labels = _random_labels(graph, 320)
    stay = torch.randn(3000, 30, generator=torch.Generator().manual_seed(9))
    result = edit_points(graph, x, labels, preserve=stay, time_limit=15)
    assert result.outcome is Outcome.EDITED
    assert result.status is not PointStatus.UNVERIFIED
    assert torch.equal(evaluate_graph(result.model, x).argmax(1), labels)


def test_a_hidden_layer_that_is_dead_at_the_examples_is_woken() -> None:
    graph = mlp((5, 24, 24, 3), dtype=torch.float32)
    low = graph.parameters["linear3.bias"] - 3.0
    graph = graph.with_parameters({"linear3.bias": low})
    x, labels = _random_labels(graph, 4)
    result = edit_points(graph, x, labels, layer="linear3", norm="inf", time_limit=10)
    assert result.outcome is Outcome.EDITED, result.message
    assert torch.equal(evaluate_graph(result.model, x).argmax(1), labels)


def test_what_no_weight_can_do_is_infeasible_for_both_solvers() -> None:
    pytest.importorskip("z3")
    graph = mlp((3, 4, 3), seed=1)
    x = torch.randn(1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, x + 1e-12])
    own = int(evaluate_graph(graph, x[:1]).argmax())
    labels = [own, (own + 1) % 3]
    found = edit_points(graph, x, labels, layer="linear1", norm="inf", margin=MARGIN, budget=2.0)
    assert found.outcome is Outcome.INFEASIBLE
    layer = FreeLayer.of(graph, "linear1", None)
    claims = make_claims(graph, x, labels, "examples")
    wanted = Wanted.of(layer, claims, None, MARGIN, None)
    program = build_program(
        layer, layer.prefix(claims.inputs), claims, wanted.rows, wanted.required, reach=2.0
    )
    answer = solve_smt(program, time_limit=30)
    assert answer.status is Status.INFEASIBLE
    assert set(answer.conflict) == {0, 1}


@pytest.mark.parametrize("radius", [0.0, 0.02])
def test_balls_hold_by_intervals_over_the_last_layer(radius: float) -> None:
    graph = mlp((5, 16, 12, 3), dtype=torch.float32)
    x, labels = _random_labels(graph, 2)
    lifted = lift_to_balls(graph, x, labels, radius, method="one_shot", raise_on_failure=False)
    assert lifted.status is Verdict.CERTIFIED
    edited = lifted.model
    weight = edited.parameters["linear5.weight"].double()
    bias = edited.parameters["linear5.bias"].double()
    head = edited.nodes[: [n.name for n in edited.nodes].index("linear5")]
    from dataclasses import replace

    before_last = replace(edited, nodes=head).to(torch.float64, "cpu")
    for prop, label in zip(ball_properties(edited, x, labels, radius), labels, strict=True):
        box = compute_bounds(before_last, prop.region)
        for rival in {0, 1, 2} - {int(label)}:
            c = weight[label] - weight[rival]
            least = torch.where(c > 0, c * box.lower[0], c * box.upper[0]).sum()
            assert float(least + bias[label] - bias[rival]) > -1e-6
