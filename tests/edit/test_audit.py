"""Audits: what is found must be real, what is bounded must hold, and nothing more is claimed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import mlp, residual_net
from torch_prepared.edit.audit import (
    AuditVerdict,
    audit_networks,
    bound_difference,
    difference_graph,
)
from torch_prepared.edit.pointwise import edit_points
from torch_prepared.errors import SpecError
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
        ({}, "neither"),
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
