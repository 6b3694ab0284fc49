"""Split trees: they always cover the region, and survive changes of weights."""

from __future__ import annotations

import numpy as np
import torch

from tests.helpers import mlp
from torch_prepared.bounds import PropertyBatch
from torch_prepared.bounds.branch import SplitTree
from torch_prepared.bounds.engine import general_engine
from torch_prepared.certify import ProofTree, Verdict
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._certify import certify_network, prove, prove_by_splitting, tree_proof
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, Property, SafeSet


def setting(seed: int = 0) -> tuple[Graph, Property]:
    """A network and a true property of a box that one bounding pass cannot prove."""
    graph = mlp((2, 16, 16, 2), "relu", seed, torch.float32)
    region = Box(torch.full((2,), -1.0), torch.full((2,), 1.0))
    x = region.sample(20_000, torch.Generator().manual_seed(1))
    y = evaluate_graph(graph.to(torch.float64), x)
    low = float((y[:, 0] - y[:, 1]).min())
    rows = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
    spread = float((y[:, 0] - y[:, 1]).std())
    safe = SafeSet.polytope(rows, torch.tensor([-low + 0.05 * spread], dtype=torch.float64))
    return graph, Property(region, safe, "low")


def covered(tree: SplitTree, x: torch.Tensor) -> torch.Tensor:
    box = tree.boxes(tree.leaves)
    inside = (x[:, None] >= box.lower) & (x[:, None] <= box.upper)
    return inside.all(dim=2).any(dim=1)


def test_a_tree_proves_what_one_pass_cannot_and_the_checker_agrees() -> None:
    graph, prop = setting()
    _, margins = prove(graph, [prop])
    assert margins[0] < 0
    proof, violating = prove_by_splitting(graph, prop, Deadline(60))
    assert violating is None
    assert proof is not None
    assert proof.leaves > 1
    assert certify_network(graph, [prop], [proof], {}).check.status is Verdict.CERTIFIED


def test_a_violation_met_while_splitting_is_returned() -> None:
    graph, prop = setting()
    rows, offset = prop.safe.clauses[0]
    broken = Property(prop.region, SafeSet(((rows, offset - 0.5 * offset.abs() - 1),)), "false")
    proof, x = prove_by_splitting(graph, broken, Deadline(60))
    assert proof is None
    assert x is not None
    assert not bool(broken.safe.contains(evaluate_graph(graph.to(torch.float64), x[None]))[0])


def test_leaves_always_cover_the_region_and_coarsening_keeps_the_proof() -> None:
    graph, prop = setting()
    batch = PropertyBatch.of([prop])
    tree, engine = SplitTree(batch), general_engine(graph.to(torch.float64), batch)
    x = prop.region.sample(500, torch.Generator().manual_seed(2))
    for _ in tree.grow(engine, Deadline(60), 100_000, chunk=64):
        assert bool(covered(tree, x).all())
    assert tree.proved
    assert tree.volume(tree.leaves) == 1.0 or abs(tree.volume(tree.leaves) - 1) < 1e-12

    # Needless splits: halve every leaf once more, then merge back.
    before = len(tree.leaves)
    finer = tree.copy()
    finer.bound(engine, finer.split(finer.leaves), 64)
    assert finer.proved
    assert len(finer.leaves) == 2 * before == 2 * len(tree.leaves)
    finer.coarsen(engine, Deadline(60), 64)
    assert finer.proved
    assert len(finer.leaves) <= before
    assert bool(covered(finer, x).all())
    proof = tree_proof(finer, engine, graph)
    assert certify_network(graph, [prop], [proof], {}).check.status is Verdict.CERTIFIED


def test_nan_bounds_never_close_a_leaf() -> None:
    graph, prop = setting()
    batch = PropertyBatch.of([prop])
    tree = SplitTree(batch)

    def broken(box):  # type: ignore[no-untyped-def]
        found = general_engine(graph, batch)(box)
        return type(found)(torch.full_like(found.values, torch.nan), found.inputs)

    tree.bound(broken, tree.leaves, 64)
    assert not tree.proved
    assert tree.margins(tree.leaves)[0] == -np.inf


def test_a_wrong_tree_is_not_certified() -> None:
    graph, prop = setting()
    single = ProofTree.leaf([0])
    assert certify_network(graph, [prop], [single], {}).check.status is Verdict.UNKNOWN
