"""The graph as data: validated, immutable, copyable."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from tests.helpers import NETWORKS
from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.errors import ModelFormatError
from torch_prepared.relax import evaluate_graph


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_copies_compute_the_same(name: str, clone) -> None:
    graph = NETWORKS[name]()
    x = torch.randn(3, graph.input_size, dtype=torch.float64)
    other = clone(graph)
    assert torch.equal(evaluate_graph(graph, x), evaluate_graph(other, x))
    assert graph.record().structure == other.record().structure


def line(weight: torch.Tensor, **changes: object) -> Graph:
    nodes = (
        Node("x", "input", (), (2,)),
        Node("y", "linear", ("x",), (1,), {"weight": ParameterRef("w")}),
    )
    return Graph(changes.get("nodes", nodes), {"w": weight}, frozenset({"w"}))  # type: ignore[arg-type]


def test_malformed_graphs_are_refused_by_name() -> None:
    weight = torch.ones(1, 2)
    line(weight)
    with pytest.raises(ModelFormatError, match=r"w.*NaN"):
        line(torch.full((1, 2), torch.nan))
    dangling = (Node("x", "input", (), (2,)), Node("y", "relu", ("z",), (2,)))
    with pytest.raises(ModelFormatError, match="'z'"):
        line(weight, nodes=dangling)
    twice = (Node("x", "input", (), (2,)), Node("x", "relu", ("x",), (2,)))
    with pytest.raises(ModelFormatError, match="twice"):
        line(weight, nodes=twice)
    with pytest.raises(ModelFormatError, match="does not exist"):
        line(weight).with_parameters({"v": weight})


def test_parameter_references_read_views_of_what_is_stored() -> None:
    stored = torch.arange(6.0).reshape(2, 3)
    ref = ParameterRef("w", permute=(1, 0), reshape=(1, 6))
    assert ref.read({"w": stored}).tolist() == [[0.0, 3.0, 1.0, 4.0, 2.0, 5.0]]
