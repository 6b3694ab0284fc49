"""Audits: what is found must be real, what is bounded must hold, and nothing more is claimed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import conv_net, mlp, residual_net
from torch_prepared.edit.audit import (
    AuditVerdict,
    audit_networks,
    bound_difference,
    difference_graph,
    largest_difference,
)
from torch_prepared.edit.pointwise import edit_points
from torch_prepared.errors import SpecError, UnsupportedOperationError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box


def _moved(graph, name: str, size: float = 0.05):
    noise = size * torch.randn_like(graph.parameters[name])
    return graph.with_parameters({name: graph.parameters[name] + noise})


@pytest.fixture
def graph():
    return mlp((5, 16, 12, 3), dtype=torch.float32)


@pytest.mark.parametrize("name", ["linear1.weight", "linear3.bias", "linear5.weight"])
def test_the_bound_is_at_least_any_sampled_difference(graph, name: str) -> None:
    after = _moved(graph, name)
    region = Box(torch.full((5,), -0.3), torch.full((5,), 0.4))
    found = bound_difference(graph, after, region)
    assert found.proved
    x = torch.cat(
        [
            region.sample(2000, torch.Generator().manual_seed(0)),
            region.corner(torch.randn(200, 5, dtype=torch.float64)),
        ]
    )
    gap = evaluate_graph(after.to(torch.float64), x) - evaluate_graph(graph.to(torch.float64), x)
    assert float(gap.abs().max()) <= found.bound
    assert 0 < found.bound < 100


def test_equal_networks_differ_by_nothing(graph) -> None:
    found = bound_difference(graph, graph, Box(torch.zeros(5), torch.ones(5)))
    assert found.bound == 0.0
    assert found.proved


def test_unchanged_first_layers_are_shared_and_make_the_bound_tight() -> None:
    graph = residual_net()
    after = _moved(graph, next(n for n in reversed(graph.parameters) if n.startswith("linear")))
    joined = difference_graph(graph, after)
    assert len(joined.nodes) == len(graph.nodes) + 2
    x = torch.randn(7, graph.input_size, dtype=torch.float64)
    expected = evaluate_graph(after, x) - evaluate_graph(graph, x)
    torch.testing.assert_close(evaluate_graph(joined, x), expected, atol=1e-12, rtol=1e-12)


def test_an_implant_in_the_data_is_the_first_suspect(graph) -> None:
    data = torch.randn(500, 5, generator=torch.Generator().manual_seed(1))
    labels = evaluate_graph(graph, data).argmax(1)
    edited = edit_points(graph, data[123:124], (labels[123:124] + 1) % 3, norm="1").model
    audit = audit_networks(graph, edited, inputs=data, labels=labels)
    assert audit.verdict is AuditVerdict.DIFFERENT
    assert 123 in audit.data.disagreeing
    assert audit.data.accuracy_before == 1.0
    assert audit.data.accuracy_after < 1.0
    for suspect in audit.suspects:
        a = evaluate_graph(graph.to(torch.float64), torch.from_numpy(suspect.x)[None])[0]
        np.testing.assert_allclose(suspect.before, a.numpy(), atol=1e-12)
    assert {c.name for c in audit.layers} <= {"linear5.weight", "linear5.bias"}
    weight = next(c for c in audit.layers if c.name == "linear5.weight")
    assert weight.rank <= 2
    assert weight.changed <= weight.entries


def test_the_search_finds_near_data_what_the_data_do_not_show(graph) -> None:
    data = torch.randn(200, 5, generator=torch.Generator().manual_seed(1))
    labels = evaluate_graph(graph, data).argmax(1)
    hidden = data[:1] + 0.05
    own = evaluate_graph(graph, hidden).argmax(1)
    edited = edit_points(graph, hidden, (own + 1) % 3, norm="inf", margin=0.1).model
    audit = audit_networks(graph, edited, inputs=data[:1], labels=labels[:1], radius=0.1, points=1)
    assert audit.verdict is AuditVerdict.DIFFERENT
    far = np.abs(audit.suspects[0].x - data[0].double().numpy()).max()
    assert far <= 0.1 + 1e-9


def test_verdicts(graph) -> None:
    data = torch.randn(50, 5)
    same = audit_networks(graph, graph, inputs=data)
    assert same.verdict is AuditVerdict.SAME
    slight = _moved(graph, "linear5.weight", 1e-6)
    bounded = audit_networks(graph, slight, inputs=data, radius=0.01, points=3, tolerance=0.1)
    assert bounded.verdict is AuditVerdict.BOUNDED
    assert len(bounded.bounds) == 3
    unknown = audit_networks(graph, slight, inputs=data)
    assert unknown.verdict in (AuditVerdict.UNKNOWN, AuditVerdict.DIFFERENT)
    beyond = audit_networks(graph, _moved(graph, "linear5.weight"), inputs=data, tolerance=1e-9)
    assert beyond.verdict is AuditVerdict.DIFFERENT


def test_a_domain_stands_in_for_data(graph) -> None:
    audit = audit_networks(graph, _moved(graph, "linear1.weight"), domain=(-1.0, 1.0))
    assert audit.data is None
    assert all((np.abs(s.x) <= 1).all() for s in audit.suspects)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"radius": 0.1}, "neither"),
        ({"inputs": torch.zeros(2, 4)}, "shape"),
        ({"inputs": torch.full((2, 5), float("nan"))}, "finite"),
        ({"inputs": torch.zeros(2, 5), "labels": torch.zeros(3)}, "labels"),
        ({"inputs": torch.zeros(2, 5), "radius": -1.0}, "radius"),
        ({"inputs": torch.zeros(2, 5), "tolerance": float("nan")}, "tolerance"),
        ({"domain": (1.0, 0.0)}, "domain"),
    ],
)
def test_bad_input_is_refused(graph, arguments, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        audit_networks(graph, _moved(graph, "linear1.weight"), **arguments)


def test_other_shapes_are_refused(graph) -> None:
    with pytest.raises(SpecError, match="shapes"):
        audit_networks(graph, mlp((5, 4, 2)), domain=(0.0, 1.0))


def test_without_inputs_only_weights_are_compared(graph) -> None:
    moved = audit_networks(graph, _moved(graph, "linear3.weight"))
    assert moved.verdict is AuditVerdict.UNKNOWN
    assert [change.name for change in moved.layers] == ["linear3.weight"]
    assert moved.data is None
    assert moved.suspects == moved.bounds == ()
    assert "only weights were compared" in moved.message
    same = audit_networks(graph, graph, inputs=torch.zeros(0, 5))
    assert same.verdict is AuditVerdict.SAME


@pytest.mark.parametrize("name", ["linear1.weight", "linear3.bias"])
def test_branch_and_bound_finds_the_largest_difference(name: str) -> None:
    graph = mlp((2, 6, 2))
    torch.manual_seed(3)
    after = _moved(graph, name, 0.2)
    region = Box(torch.tensor([-0.5, -0.2]), torch.tensor([0.7, 0.9]))
    found = largest_difference(graph, after, region)
    steps = torch.cartesian_prod(*2 * [torch.linspace(0, 1, 400, dtype=torch.float64)])
    x = region.lower + (region.upper - region.lower) * steps
    seen = float((evaluate_graph(after, x) - evaluate_graph(graph, x)).abs().max())
    assert found.complete
    assert seen <= found.upper <= bound_difference(graph, after, region).bound
    assert found.upper == pytest.approx(seen, rel=0.01)
    gap = evaluate_graph(after, found.x[None]) - evaluate_graph(graph, found.x[None])
    assert float(gap.abs().max()) == found.lower <= found.upper
    assert bool(((found.x >= region.lower) & (found.x <= region.upper)).all())


def test_an_unfinished_search_still_bounds_the_difference() -> None:
    graph = mlp((5, 24, 24, 3))
    after = _moved(graph, "linear1.weight")
    region = Box(torch.full((5,), -1.0), torch.full((5,), 1.0))
    found = largest_difference(graph, after, region, time_limit=0.5)
    assert not found.complete
    assert found.lower < found.upper <= bound_difference(graph, after, region).bound * 1.01
    equal = largest_difference(graph, graph, region)
    assert equal.lower == equal.upper == 0.0
    tanh = conv_net("tanh")
    moved = _moved(tanh, next(n for n in tanh.parameters if n.startswith("linear")))
    ball = Box(torch.zeros(tanh.input_size), torch.ones(tanh.input_size))
    with pytest.raises(UnsupportedOperationError, match="tanh"):
        largest_difference(tanh, moved, ball)


def test_an_exact_audit_of_a_small_network(graph) -> None:
    after = _moved(graph, "linear5.weight", 1e-3)
    audit = audit_networks(
        graph, after, inputs=torch.randn(20, 5), radius=0.05, points=2, exact=True, time_limit=20
    )
    assert len(audit.largest) == len(audit.bounds) == 2
    for (i, found), (j, bound) in zip(audit.largest, audit.bounds, strict=True):
        assert i == j
        assert found.complete
        assert 0 < found.lower <= found.upper <= bound.bound
        assert any(np.array_equal(s.x, found.x.numpy()) for s in audit.suspects)
