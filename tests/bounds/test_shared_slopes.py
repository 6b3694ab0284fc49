"""Slopes shared by all rows of a box: valid, never worse after a search, part of certificates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.bounds.test_branch import setting
from tests.helpers import mlp
from tests.rounding import rounding_slack
from torch_prepared import ops
from torch_prepared.bounds import AlphaOptions, PropertyBatch
from torch_prepared.bounds.branch import LeafBounds, SlopedEngine, SplitTree
from torch_prepared.bounds.engine import general_engine, leaf_engine
from torch_prepared.bounds.shared_slopes import SharedSlopes
from torch_prepared.certify import Slopes, Verdict
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.interval import Interval
from torch_prepared.edit._certify import certify_network, tree_proof
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, Property, SafeSet

pytestmark = pytest.mark.skipif(
    not ops.build_info().native, reason="slopes of boxes need the native extension"
)


def batch_of(inputs: int, outputs: int) -> PropertyBatch:
    rows = torch.randn(3, outputs, generator=torch.Generator().manual_seed(3)).double()
    box = Box(torch.full((inputs,), -1.0), torch.full((inputs,), 1.0))
    safe = SafeSet.polytope(rows, torch.zeros(3, dtype=torch.float64))
    return PropertyBatch.of([Property(box, safe, "rows")])


def boxes(count: int, inputs: int, radius: float) -> Interval:
    generator = torch.Generator().manual_seed(4)
    center = 2 * torch.rand(count, inputs, generator=generator, dtype=torch.float64) - 1
    return Interval(center - radius, center + radius)


@pytest.mark.parametrize("kind", ["relu", "leaky_relu"])
def test_without_slopes_the_bounds_are_those_of_crown(kind: str) -> None:
    graph, batch = mlp((3, 12, 12, 12, 2), kind, 5, torch.float64), batch_of(3, 2)
    slopes, box = SharedSlopes.of(graph, batch), boxes(40, 3, 0.4)
    assert slopes is not None
    assert slopes.size == 36
    found = slopes.bound(box, torch.full((40, 36), -1.0))
    expected = general_engine(graph, batch)(box)
    torch.testing.assert_close(found.values, expected.values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.inputs, expected.inputs, rtol=1e-9, atol=1e-9)
    written = slopes.bound(box, slopes.chosen(box, torch.full((40, 36), -1.0)))
    torch.testing.assert_close(written.values, found.values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["relu", "leaky_relu"])
def test_any_slopes_bound_and_a_search_gains(kind: str) -> None:
    graph, batch = mlp((3, 12, 12, 12, 2), kind, 6, torch.float64), batch_of(3, 2)
    slopes, box = SharedSlopes.of(graph, batch), boxes(60, 3, 0.5)
    assert slopes is not None
    share = torch.rand(60, 200, 3, generator=torch.Generator().manual_seed(1)).double()
    x = box.lower[:, None] + share * box.width[:, None]
    y = evaluate_graph(graph, x.reshape(-1, 3)).reshape(60, 200, 2) @ batch.rows[0].T
    usual = torch.full((60, slopes.size), -1.0)
    anything = torch.rand(60, slopes.size, generator=torch.Generator().manual_seed(2))
    row = torch.arange(60) % 3
    found, bounds = slopes.search(box, usual, row, torch.full((60,), torch.inf))
    layers = [node for node in graph.nodes if node.op == "linear"]
    weights, biases = (
        [node.params[name].read(graph.parameters) for node in layers] for name in ("weight", "bias")
    )
    slack = rounding_slack(weights, biases, batch.rows[0], box)[:, None]
    assert float(slack.max()) < 1e-9
    for given in (usual, anything, found):
        assert bool((slopes.bound(box, given).values[:, None] - slack <= y).all())
    before, after = (slopes.bound(box, s).values.gather(1, row[:, None]) for s in (usual, found))
    assert float((after - before).mean()) > 0
    torch.testing.assert_close(bounds.values, slopes.bound(box, found).values)


@pytest.mark.parametrize("spare", [0.0, 1.0])
def test_no_node_of_a_tree_gets_worse_by_a_search(spare: float) -> None:
    """Exactly: margins, and what the stored slopes give when the nodes are bounded once more."""
    graph, prop = setting()
    batch = PropertyBatch.of([prop])
    engine = leaf_engine(graph, batch)
    assert isinstance(engine, SlopedEngine)
    tree = SplitTree(batch, slack=1e-6)
    for _ in range(5):
        tree.bound(engine, tree.leaves, 64)
        tree.split(tree.leaves)
    nodes = tree.leaves
    tree.bound(engine, nodes, 64)
    before = tree.margins(nodes).copy()
    tree.search(engine, nodes, spare)
    after = tree.margins(nodes).copy()
    assert bool((after >= before).all())
    assert bool((after > before).any())
    tree.bound(engine, nodes, 7)
    assert np.array_equal(tree.margins(nodes), after)


@pytest.mark.parametrize("chain", [True, False])
def test_momenta_are_those_of_the_options(chain: bool) -> None:
    graph, batch = mlp((3, 12, 12, 12, 2), "relu", 6, torch.float64), batch_of(3, 2)
    box, row = boxes(30, 3, 0.4), torch.arange(30) % 3
    found = []
    for momentum in ((0.4, 0.9), (0.9, 0.999)):
        slopes = SharedSlopes(graph, batch, AlphaOptions(4, 0.3, 0.9, momentum))
        if not chain:
            slopes._chain = None  # as for a network that is none
        usual, enough = torch.full((30, slopes.size), -1.0), torch.full((30,), torch.inf)
        before = slopes.bound(box, usual).values.gather(1, row[:, None])
        values = slopes.search(box, usual, row, enough)[1].values.gather(1, row[:, None])
        assert float((values - before).mean()) > 0
        found.append(values)
    assert not torch.equal(*found)


def test_children_are_searched_from_their_parents_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, prop = setting()
    batch = PropertyBatch.of([prop])
    engine = leaf_engine(graph, batch)
    assert isinstance(engine, SlopedEngine)
    tree = SplitTree(batch, slack=1e-6)
    tree.bound(engine, tree.leaves, 64)
    tree.search(engine, tree.leaves, 0.0)
    assert tree.has_slopes
    kept = tree.shares(tree.leaves, engine.slopes.size)
    for _ in range(2):  # those of an ancestor, where the parent has none
        tree.split(tree.leaves)
        tree.bound(engine, tree.leaves, 64)
    leaves, plain = tree.leaves, engine.plain(tree.boxes(tree.leaves))
    # Not searched yet, they are bounded and replayed with the usual slopes.
    assert not tree.has_slopes
    assert bool((tree.shares(leaves, engine.slopes.size) == -1).all())
    rows = torch.from_numpy(tree._row[leaves])
    values = plain.values.double() + batch.offset
    assert np.array_equal(tree.margins(leaves), values.gather(1, rows[:, None])[:, 0].numpy())
    given, search = [], engine.slopes.search

    def spy(
        box: Interval, slopes: torch.Tensor, row: torch.Tensor, enough: torch.Tensor
    ) -> tuple[torch.Tensor, LeafBounds]:
        given.append(slopes)
        return search(box, slopes, row, enough)

    monkeypatch.setattr(engine.slopes, "search", spy)
    tree.search(engine, leaves, 0.0)
    assert torch.equal(given[0], kept.expand(len(leaves), -1))


def test_a_search_stops_where_a_bound_is_enough() -> None:
    graph, batch = mlp((3, 12, 12, 2), "relu", 6, torch.float64), batch_of(3, 2)
    slopes, box = SharedSlopes.of(graph, batch), boxes(10, 3, 0.3)
    assert slopes is not None
    usual, row = torch.full((10, slopes.size), -1.0), torch.zeros(10, dtype=torch.int64)
    found, _ = slopes.search(box, usual, row, torch.full((10,), -torch.inf))
    written = (slopes.chosen(box, usual) * ops.SLOPE_LEVELS).round() / ops.SLOPE_LEVELS
    torch.testing.assert_close(found.clamp_min(0), written)


def test_a_tree_with_slopes_is_smaller_and_certified() -> None:
    graph, prop = setting()
    batch = PropertyBatch.of([prop])
    sizes, trees = {}, {}
    engine = leaf_engine(graph, batch)
    assert isinstance(engine, SlopedEngine)
    for name, one in (("plain", engine.plain), ("sloped", engine)):
        tree = trees[name] = SplitTree(batch, slack=1e-6, first_search=0)
        for _ in tree.grow(one, Deadline(60), 100_000, chunk=64):
            pass
        assert tree.proved
        sizes[name] = len(tree.leaves)
    assert sizes["sloped"] < sizes["plain"]
    tree = trees["sloped"]
    assert tree.has_slopes
    proof = tree_proof(tree, engine, graph)
    check = certify_network(graph, [prop], [proof], {}).check
    assert check.status is Verdict.CERTIFIED
    # Slopes are suggestions: bad ones lose the proof, they do not break it.
    flat = {name: Slopes(lower=np.zeros_like(part.lower)) for name, part in proof.slopes.items()}
    worse = dataclasses.replace(proof, slopes=flat, tighten_slopes=flat)
    assert certify_network(graph, [prop], [worse], {}).check.status is Verdict.UNKNOWN


def test_a_copy_keeps_its_slopes() -> None:
    graph, prop = setting()
    batch = PropertyBatch.of([prop])
    engine = leaf_engine(graph, batch)
    assert isinstance(engine, SlopedEngine)
    tree = SplitTree(batch, slack=1e-6, first_search=0)
    for _ in tree.grow(engine, Deadline(60), 200, chunk=64):
        pass
    other, leaves = tree.copy(), tree.leaves
    kept = tree.shares(leaves, engine.slopes.size)
    for _ in other.grow(engine, Deadline(60), 100_000, chunk=64):
        pass
    assert torch.equal(tree.shares(leaves, engine.slopes.size), kept)


def test_other_networks_have_none() -> None:
    assert SharedSlopes.of(mlp((3, 8, 2), "tanh", 0), batch_of(3, 2)) is None


def test_a_box_with_nan_proves_nothing() -> None:
    graph, batch = mlp((3, 12, 12, 2), "relu", 6, torch.float32), batch_of(3, 2)
    slopes, box = SharedSlopes.of(graph, batch), boxes(4, 3, 0.3)
    assert slopes is not None
    box.upper[1, 0] = torch.nan
    usual = torch.full((4, slopes.size), -1.0)
    row, enough = torch.zeros(4, dtype=torch.int64), torch.full((4,), 1e9)
    values = slopes.search(box, usual, row, enough)[1].values
    assert not bool((values[1] > -torch.inf).any())
    assert bool(values[[0, 2, 3]].isfinite().all())


def test_a_search_that_finds_nothing_better_keeps_the_usual_slopes() -> None:
    graph, prop = setting()
    batch = PropertyBatch.of([prop])
    engine = leaf_engine(graph, batch)
    assert isinstance(engine, SlopedEngine)
    tree = SplitTree(batch, slack=-1e9)
    tree.bound(engine, tree.leaves, 64)
    before = tree.margins(tree.leaves)
    tree.search(engine, tree.leaves, 0.0)  # enough already: no step is taken
    assert not tree.has_slopes
    assert np.array_equal(tree.margins(tree.leaves), before)
