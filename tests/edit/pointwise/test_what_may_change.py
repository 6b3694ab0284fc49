"""Biases of several layers, weights chosen by gradient, and compute types."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from tests.helpers import conv_net, mlp, residual_net
from torch_prepared.edit.pointwise import Outcome, PointStatus, edit_points
from torch_prepared.edit.pointwise._examples import make_claims
from torch_prepared.edit.pointwise._layer import FreeLayer
from torch_prepared.edit.pointwise._program import build_program
from torch_prepared.edit.pointwise._strongest import strongest_weights
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_all, evaluate_graph

MARGIN = 0.01


def _wrong(graph, count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, graph.input_size, generator=generator).to(graph.dtype)
    labels = evaluate_graph(graph, x).flatten(1).argmax(1)
    return x, (labels + 1) % graph.output_size


def _least_over_patterns(graph, x: np.ndarray, target: int) -> float:
    """The least largest bias change of a 2-hidden-layer network, one LP per pattern of ReLUs."""
    w1, b1, w2, b2, w3, b3 = (p.numpy() for p in graph.parameters.values())
    first, second, classes = len(b1), len(b2), len(b3)
    count = first + second + classes
    z1 = np.concatenate([np.eye(first), np.zeros((first, count - first))], axis=1)
    least = np.inf
    for signs in itertools.product((1.0, -1.0), repeat=first + second):
        s1, s2 = np.array(signs[:first]), np.array(signs[first:])
        a1, c1 = (s1 > 0)[:, None] * z1, (s1 > 0) * (w1 @ x + b1)
        z2, k2 = w2 @ a1, w2 @ c1 + b2
        z2[:, first : first + second] += np.eye(second)
        a2, c2 = (s2 > 0)[:, None] * z2, (s2 > 0) * k2
        y, k3 = w3 @ a2, w3 @ c2 + b3
        y[:, first + second :] += np.eye(classes)
        rivals = [j for j in range(classes) if j != target]
        # every row: matrix @ d >= -const
        matrix = np.concatenate([s1[:, None] * z1, s2[:, None] * z2, y[target] - y[rivals]])
        const = np.concatenate([s1 * (w1 @ x + b1), s2 * k2, k3[target] - k3[rivals] - MARGIN])
        box = np.concatenate([np.eye(count), -np.eye(count)])
        rows = np.concatenate([np.pad(-matrix, ((0, 0), (0, 1))), np.pad(box, ((0, 0), (0, 1)))])
        rows[len(matrix) :, -1] = -1.0
        rhs = np.concatenate([const, np.zeros(2 * count)])
        cost = np.zeros(count + 1)
        cost[-1] = 1.0
        free = [(None, None)] * count + [(0, None)]
        found = linprog(cost, A_ub=rows, b_ub=rhs, bounds=free)
        least = min(least, found.fun) if found.status == 0 else least
    return least


@pytest.mark.parametrize("seed", range(4))
def test_biases_of_all_layers_move_as_little_as_any_pattern_of_relus_allows(seed: int) -> None:
    graph = mlp((3, 4, 3, 3), seed=seed)
    x, labels = _wrong(graph, 1, seed)
    expected = _least_over_patterns(graph, x[0].numpy(), int(labels[0]))
    result = edit_points(graph, x, labels, layer="biases", margin=MARGIN, budget=5.0)
    assert result.outcome is Outcome.EDITED
    assert result.size == pytest.approx(expected, abs=1e-5)
    assert result.status is not PointStatus.UNVERIFIED
    changed = {n for n, v in graph.parameters.items() if result.model.parameters[n] is not v}
    assert changed <= {n for n in graph.parameters if n.endswith(".bias")}
    assert len(changed) > 1
    assert result.stale_layers[0] in ("linear1", "linear3")
    assert "biases of linear1, linear3, linear5" in result.method


@pytest.mark.optional
def test_z3_agrees_on_the_least_change_of_biases() -> None:
    pytest.importorskip("z3")
    graph = mlp((3, 4, 3, 3), seed=5)
    x, labels = _wrong(graph, 2, 5)
    options = {"layer": "biases", "norm": "inf", "margin": MARGIN, "budget": 5.0}
    found = edit_points(graph, x, labels, **options)
    exact = edit_points(graph, x, labels, solver="z3", time_limit=30, **options)
    assert found.outcome is exact.outcome is Outcome.EDITED
    assert exact.size == pytest.approx(found.size, rel=2e-3)


@pytest.mark.parametrize("make", [conv_net, residual_net, lambda: mlp((4, 6, 5, 3), seed=3)])
def test_the_program_is_the_network_with_other_biases(make) -> None:
    graph = make()
    layer = FreeLayer.of(graph, "biases", None)
    x, labels = _wrong(graph, 2)
    claims = make_claims(graph, x, labels, "examples")
    d = 0.3 * np.random.default_rng(0).uniform(-1, 1, layer.count)
    rows = np.arange(len(claims.offset))
    program = build_program(
        layer, layer.prefix(claims.inputs), claims, rows, np.zeros(len(rows)), reach=0.3
    )
    full = program.evaluate(d)
    cells = full[program.unknowns :]
    arguments = program.pre @ full + program.const
    assert (arguments >= program.low).all()
    assert (arguments <= program.high).all()
    np.testing.assert_allclose(cells, np.maximum(arguments, 0.0))
    moved = graph.with_parameters(layer.moved(d))
    y = evaluate_graph(moved, x).flatten(1).numpy()
    values = (y[claims.point] * claims.rows).sum(axis=1)
    order = np.argsort(claims.point, kind="stable")
    got = program.rows.matrix @ full - program.rows.rhs
    np.testing.assert_allclose(got, values[order], atol=1e-9)


def test_chosen_biases_move_and_no_others() -> None:
    graph = mlp((5, 10, 8, 3), dtype=torch.float32)
    x, labels = _wrong(graph, 2)
    result = edit_points(graph, x, labels, layer=["linear3"], margin=MARGIN, budget=20.0)
    assert result.outcome is Outcome.EDITED, result.message
    assert torch.equal(evaluate_graph(result.model, x).argmax(1), labels)
    changed = {n for n, v in graph.parameters.items() if result.model.parameters[n] is not v}
    assert changed == {"linear3.bias"}
    last = edit_points(graph, x[:1], labels[:1], layer=["linear5"], margin=MARGIN)
    y = evaluate_graph(graph.to(torch.float64), x[:1].double())[0]
    lack = MARGIN + float((y - y[labels[0]]).max())
    assert last.size == pytest.approx(lack / 2, abs=1e-7)


def test_biases_without_a_budget_start_from_a_tuned_pattern() -> None:
    graph = mlp((5, 24, 24, 3), dtype=torch.float32, seed=2)
    x, labels = _wrong(graph, 3)
    result = edit_points(graph, x, labels, layer="biases", time_limit=20)
    assert result.outcome is Outcome.EDITED, result.message
    assert torch.equal(evaluate_graph(result.model, x).argmax(1), labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": ["linear1", "nowhere"]}, "nowhere"),
        ({"layer": []}, "bias of their own"),
        ({"layer": "biases", "free": 3}, "free"),
        ({"layer": "biases", "norm": "2"}, "biases of linear1"),
        ({"layer": "biases", "norm": "behavior", "preserve": torch.zeros(3, 5)}, "biases"),
        ({"free": 0, "norm": "1"}, "free"),
        ({"free": 37, "norm": "1"}, "1 to 36"),
        ({"free": True, "norm": "1"}, "whole number"),
        ({"free": 2.5, "norm": "1"}, "whole number"),
        ({"compute": "float8"}, "compute"),
    ],
)
def test_choices_that_make_no_sense_are_refused(arguments, message: str) -> None:
    graph = mlp((5, 16, 12, 3), dtype=torch.float32)
    x, labels = _wrong(graph, 1)
    with pytest.raises(SpecError, match=message):
        edit_points(graph, x, labels, **arguments)


def test_the_strongest_weights_of_a_last_layer_are_those_of_the_largest_features() -> None:
    """d margin / d w = h_k in the row of the class, -h_k in that of its nearest rival."""
    graph = mlp((4, 6, 3), seed=1)
    x, labels = _wrong(graph, 1)
    claims = make_claims(graph, x, labels, "examples")
    h = evaluate_all(graph, x)["relu2"][0]
    y = evaluate_graph(graph, x)[0]
    target = int(labels[0])
    rival = max((j for j in range(3) if j != target), key=lambda j: float(y[j]))
    best = int(h.argmax())
    mask = strongest_weights(graph, claims, None, 2)
    assert set(map(tuple, mask.nonzero().tolist())) == {(target, best), (rival, best)}


def test_the_strongest_weights_of_a_hidden_layer_add_up_over_examples() -> None:
    graph = mlp((4, 6, 5, 3), seed=4)
    x, labels = _wrong(graph, 3)
    claims = make_claims(graph, x, labels, "examples")
    total, step = torch.zeros(6, 4, dtype=torch.float64), 1e-6
    weight = graph.parameters["linear1.weight"]

    def margins(value: torch.Tensor) -> torch.Tensor:
        y = evaluate_graph(graph.with_parameters({"linear1.weight": value}), x)
        own = y.gather(1, labels[:, None])[:, 0]
        return own - y.scatter(1, labels[:, None], -torch.inf).amax(dim=1)

    for place in itertools.product(range(6), range(4)):
        moved = weight.clone()
        moved[place] += step
        total[place] = ((margins(moved) - margins(weight)) / step).abs().sum()
    expected = torch.zeros(24, dtype=torch.bool)
    expected[total.reshape(-1).argsort(descending=True)[:5]] = True
    assert torch.equal(strongest_weights(graph, claims, "linear1", 5), expected.reshape(6, 4))


@pytest.mark.parametrize("norm", ["inf", "1", "0"])
def test_a_number_of_weights_is_the_mask_of_the_strongest(norm: str) -> None:
    graph = mlp((5, 16, 12, 3), dtype=torch.float32)
    x, labels = _wrong(graph, 1)
    claims = make_claims(graph, x, labels, "examples")
    mask = strongest_weights(graph, claims, None, 4)
    assert int(mask.sum()) == 4
    options = {"norm": norm, "budget": 50.0, "time_limit": 20}
    by_number = edit_points(graph, x, labels, free=4, **options)
    by_mask = edit_points(graph, x, labels, free=mask, **options)
    assert by_number.outcome is by_mask.outcome is Outcome.EDITED
    assert by_number.size == by_mask.size
    moved = by_number.model.parameters["linear5.weight"] != graph.parameters["linear5.weight"]
    assert not bool((moved & ~mask).any())


def test_a_float_verdict_names_its_compute_type() -> None:
    graph = mlp((5, 16, 12, 3), dtype=torch.float32)
    x, labels = _wrong(graph, 2)
    plain = edit_points(graph, x, labels, norm="inf", margin=1e-3)
    narrow = edit_points(graph, x, labels, norm="inf", margin=1e-3, compute="bfloat16")
    wide = edit_points(
        graph, x, labels, norm="inf", margin=1e-3, compute="bfloat16", verify="float"
    )
    assert plain.status is PointStatus.VERIFIED_FLOAT
    assert plain.compute == plain.manifest["compute"] == "float32"
    assert narrow.status is PointStatus.VERIFIED_EXACT
    assert wide.status is PointStatus.VERIFIED_FLOAT
    assert "bfloat16" in wide.message
    assert (wide.margins_float > 0).all()
    assert wide.margins.min() > 10 * narrow.margins.min()
    y = evaluate_graph(wide.model.to(torch.bfloat16), x.bfloat16())
    assert torch.equal(y.argmax(1), labels)


def test_a_type_without_a_model_says_why() -> None:
    graph = mlp((5, 16, 3))
    x, labels = _wrong(graph, 1)
    result = edit_points(graph, x, labels, norm="inf", compute="tf32", verify="float")
    assert result.outcome is Outcome.UNKNOWN
    assert "stored in float64" in result.message
    assert result.certificate is None


def test_intervals_of_cells_hold_and_are_tighter_than_interval_arithmetic(monkeypatch) -> None:
    from torch_prepared.edit.pointwise import _program

    graph = mlp((6, 12, 12, 12, 3), seed=3)
    x, labels = _wrong(graph, 2)
    layer = FreeLayer.of(graph, "linear1", None)
    claims = make_claims(graph, x, labels, "examples")
    rows = np.arange(len(claims.offset))
    prefix = layer.prefix(claims.inputs)

    def build():
        return build_program(layer, prefix, claims, rows, np.zeros(len(rows)), reach=0.1)

    program = build()
    for seed in range(200):
        d = 0.1 * np.random.default_rng(seed).choice([-1.0, 1.0], layer.count)
        arguments = program.pre @ program.evaluate(d) + program.const
        assert ((program.low <= arguments) & (arguments <= program.high)).all()
    monkeypatch.setattr(_program._Build, "_crown", lambda *_: {})
    plain = build()
    assert program.cells <= plain.cells
    assert (program.high - program.low).sum() < 0.95 * (plain.high - plain.low).sum()
