"""Chains: recognition, folding, agreement with the general engine, and the engine factory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from torch_prepared import ops
from torch_prepared.bounds import PropertyBatch, RegionBatch, bound_nodes, bound_rows
from torch_prepared.bounds._leaf import LeafBounds, LeafEngine
from torch_prepared.bounds.branch import SplitTree
from torch_prepared.bounds.chain import Chain
from torch_prepared.bounds.engine import chain_engine, general_engine, leaf_engine
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.core.interval import Interval
from torch_prepared.core.onnx import load_onnx
from torch_prepared.errors import ModelFormatError, SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, Property, SafeSet, load_vnnlib

ACAS = Path(__file__).parents[3] / "shared" / "data" / "vnncomp2022" / "acasxu"
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
WIDTHS = [(3, 9, 2), (5, 50, 50, 50, 4), (4, 17, 33, 1, 19, 3), (2, 70, 70, 1)]


def _refs(*names: str) -> dict[str, ParameterRef]:
    return {name.split(".")[1]: ParameterRef(name) for name in names}


def _decorated(widths: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Graph:
    """scale, gather, reshape, then linear and relu by turns, then scale and gather."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    n, m = widths[0], widths[-1]
    parameters = {"in.scale": random(n), "in.shift": random(1, n), "out.shift": random(m)}
    turn = np.arange(n)[::-1].reshape(n, 1).copy()
    nodes = [
        Node("x", "input", (), (1, n)),
        Node("in", "scale", ("x",), (1, n), _refs("in.scale", "in.shift")),
        Node("turn", "gather", ("in",), (n, 1), attrs={"index": turn}),
        Node("flat", "reshape", ("turn",), (n,)),
    ]
    for k, (before, after) in enumerate(pairwise(widths)):
        last = nodes[-1].name
        parameters[f"l{k}.weight"] = random(after, before) / before**0.5
        parameters[f"l{k}.bias"] = random(after) * 0.3
        refs = _refs(f"l{k}.weight", f"l{k}.bias")
        nodes.append(Node(f"l{k}", "linear", (last,), (after,), refs))
        if k < len(widths) - 2:
            nodes.append(Node(f"r{k}", "relu", (f"l{k}",), (after,)))
    nodes.append(Node("out", "scale", (nodes[-1].name,), (m,), _refs("out.shift")))
    nodes.append(Node("pick", "gather", ("out",), (m,), attrs={"index": np.arange(m)[::-1].copy()}))
    editable = frozenset(name for name in parameters if name.startswith("l"))
    return Graph(tuple(nodes), parameters, editable)


def _boxes(count: int, size: int, radius: float) -> Interval:
    generator = torch.Generator().manual_seed(1)
    center = torch.randn(count, size, generator=generator, dtype=torch.float64)
    spread = torch.rand(count, size, generator=generator, dtype=torch.float64) * radius
    return Interval(center - spread, center + spread)


def _batch(graph: Graph) -> PropertyBatch:
    rows = np.concatenate([np.eye(graph.output_size), -np.ones((1, graph.output_size))])
    safe = SafeSet([(torch.from_numpy(rows), torch.zeros(len(rows), dtype=torch.float64))])
    zero = torch.zeros(graph.input_size, dtype=torch.float64)
    return PropertyBatch.of([Property(Box(zero - 1, zero + 1), safe)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("widths", WIDTHS)
def test_chain_agrees_with_the_general_engine(
    widths: tuple[int, ...], radius: float, dtype: torch.dtype
) -> None:
    graph = _decorated(widths, dtype)
    chain = Chain.of(graph)
    assert chain is not None
    assert chain.hidden_size == sum(widths[1:-1])
    batch, box = _batch(graph), _boxes(6, widths[0], radius)
    box = Interval(box.lower.to(dtype), box.upper.to(dtype))
    expected = general_engine(graph, batch)(box)
    found = chain.bounds(box, batch.rows[0])
    for mine, theirs in ((found.values, expected.values), (found.inputs, expected.inputs)):
        scale = TOLERANCE[dtype] * (1 + float(theirs.abs().max()))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=scale)
    boxes = bound_nodes(graph, RegionBatch(box.lower, box.upper))
    names = [node.inputs[0] for node in graph.nodes if node.op == "relu"]
    for end, mine in (("lower", found.hidden.lower), ("upper", found.hidden.upper)):
        theirs = torch.cat([getattr(boxes[name], end) for name in names], dim=1)
        scale = TOLERANCE[dtype] * (1 + float(theirs.abs().max()))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=scale)


def test_known_intervals_agree_with_the_general_engine() -> None:
    graph = _decorated((3, 20, 20, 20, 2), torch.float64)
    chain = Chain.of(graph)
    assert chain is not None
    box, rows = _boxes(5, 3, 0.5), torch.eye(2, dtype=torch.float64)
    wide = Interval(box.lower - 0.05, box.upper + 0.05)
    hidden = chain.bounds(wide, rows).hidden
    found = chain.bounds(box, rows, hidden)
    names = [node.inputs[0] for node in graph.nodes if node.op == "relu"]
    known = {name: hidden[:, 20 * k : 20 * k + 20] for k, name in enumerate(names)}
    regions = RegionBatch(box.lower, box.upper)
    boxes = bound_nodes(graph, regions, known=known)
    expected = bound_rows(graph, regions, boxes, rows.unsqueeze(0))
    torch.testing.assert_close(found.values, expected.lower, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_hold_at_samples(dtype: torch.dtype) -> None:
    graph = _decorated((4, 30, 30, 3), dtype)
    chain = Chain.of(graph)
    assert chain is not None
    box, rows = _boxes(10, 4, 0.5), torch.eye(3, dtype=torch.float64)
    values = chain.bounds(box, rows).values.double()
    share = torch.rand(100, 1, 4, dtype=torch.float64).round(decimals=1)
    points = (box.lower + share * (box.upper - box.lower)).reshape(-1, 4)
    wide = graph.to(torch.float64)
    outputs = evaluate_graph(wide, points).reshape(100, 10, 3)
    assert bool((values <= outputs + (1e-12 if dtype == torch.float64 else 1e-4)).all())


@pytest.mark.parametrize("radius", [0.0, 0.5, 3.0])
def test_gradients_at_samples_stay_within_reach(radius: float) -> None:
    graph = _decorated((4, 30, 30, 3), torch.float64)
    chain = Chain.of(graph)
    assert chain is not None
    box, rows = _boxes(10, 4, radius), torch.eye(3, dtype=torch.float64)
    hidden = chain.bounds(box, rows).hidden
    share = torch.rand(50, 1, 4, dtype=torch.float64)
    points = (box.lower + share * (box.upper - box.lower)).reshape(-1, 4).requires_grad_()
    outputs = evaluate_graph(graph, points)
    for row in range(3):
        (found,) = torch.autograd.grad(outputs[:, row].sum(), points, retain_graph=True)
        steepest = found.abs().reshape(50, 10, 4).amax(dim=0)
        reach = chain.gradient_reach(hidden, rows[row].expand(10, 3))
        assert bool((steepest <= reach * (1 + 1e-12)).all())
        if radius == 0.0:
            torch.testing.assert_close(reach, steepest)


def test_splits_by_rows_and_gradients_need_fewer_leaves_than_by_rows() -> None:
    leaves = {"both": 0, "rows": 0}
    zero = torch.zeros(5, dtype=torch.float64)
    box = Box(zero - 1, zero + 1)
    for seed in (0, 1, 4):
        graph = _decorated((5, 40, 40, 40, 2), torch.float64, seed)
        outputs = evaluate_graph(graph, box.sample(20_000, torch.Generator().manual_seed(1)))
        margins = outputs[:, 0] - outputs[:, 1]
        offset = (margins.std() - margins.min()).reshape(1)
        rows = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
        batch = PropertyBatch.of([Property(box, SafeSet.polytope(rows, offset))])
        chain = Chain.of(graph)
        assert chain is not None
        both = chain_engine(chain, batch)

        def by_rows(box: Interval, both: LeafEngine = both) -> LeafBounds:
            found = both(box)
            return LeafBounds(found.values, found.inputs)

        for name, engine in (("both", both), ("rows", by_rows)):
            tree = SplitTree(batch)
            for _ in tree.grow(engine, Deadline(60), 10_000, chunk=256):
                pass
            assert tree.proved
            leaves[name] += len(tree.leaves)
    assert leaves["both"] < 0.7 * leaves["rows"]


def test_boxes_are_rounded_outward() -> None:
    parameters = {"l.weight": torch.ones(1, 1)}
    nodes = (
        Node("x", "input", (), (1,)),
        Node("l", "linear", ("x",), (1,), _refs("l.weight")),
    )
    chain = Chain.of(Graph(nodes, parameters, frozenset()))
    assert chain is not None
    for number in (0.1, 0.7, -0.1, 1 / 3):
        point = torch.tensor([[number]], dtype=torch.float64)
        bound = chain.bounds(Interval(point, point), torch.ones(1, 1)).values
        assert bound.dtype == torch.float32
        assert float(bound) <= number


def test_parameters_are_replaced() -> None:
    graph = _decorated((3, 9, 2), torch.float64)
    chain = Chain.of(graph)
    assert chain is not None
    changed = {"l0.weight": torch.randn(9, 3, dtype=torch.float64)}
    box, rows = _boxes(4, 3, 0.5), torch.eye(2, dtype=torch.float64)
    found = chain.with_parameters(changed).bounds(box, rows)
    expected = general_engine(graph.with_parameters(changed), _batch(graph))(box)
    torch.testing.assert_close(found.values, expected.values[:, :2], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        found.values, leaf_engine(graph, _batch(graph), changed)(box).values[:, :2]
    )
    with pytest.raises(ModelFormatError, match="does not exist"):
        chain.with_parameters({"nobody": torch.zeros(1)})


def test_other_networks_are_not_chains() -> None:
    base = _decorated((3, 9, 2), torch.float32)
    parameters = dict(base.parameters)
    tanh = Node("t", "tanh", ("pick",), (2,))
    relu = Node("t", "relu", ("pick",), (2,))
    skip = Node("t", "add", ("pick", "l1"), (2,), attrs={"signs": (1, 1)})
    for extra in (tanh, relu, skip):
        graph = Graph((*base.nodes, extra), parameters, base.editable)
        assert Chain.of(graph) is None
        engine = leaf_engine(graph, _batch(graph))
        assert engine(_boxes(4, 3, 0.2)).values.shape == (4, 3)


def test_misfits_are_named() -> None:
    graph = _decorated((3, 9, 2), torch.float32)
    chain = Chain.of(graph)
    assert chain is not None
    with pytest.raises(SpecError, match="box: got 4 numbers; expected 3"):
        chain.bounds(_boxes(2, 4, 0.1), torch.eye(2))
    with pytest.raises(SpecError, match="rows: got 3 numbers; expected 2"):
        chain.bounds(_boxes(2, 3, 0.1), torch.eye(3))
    other = _decorated((3, 9, 4), torch.float32)
    for build in (leaf_engine, general_engine):
        with pytest.raises(SpecError, match="expected one property on the network's 2"):
            build(graph, _batch(other))


def test_improper_boxes_prove_nothing() -> None:
    graph = _decorated((3, 9, 2), torch.float32)
    box = _boxes(3, 3, 0.1)
    box.upper[1, 0] = torch.nan
    for engine in (leaf_engine(graph, _batch(graph)), general_engine(graph, _batch(graph))):
        values = engine(box).values
        assert bool(values[1].isnan().all())
        assert bool(values[[0, 2]].isfinite().all())


def test_general_engine_chunks_change_nothing() -> None:
    graph = _decorated((3, 20, 20, 2), torch.float64)
    box, batch = _boxes(23, 3, 0.5), _batch(graph)
    whole, parts = (
        general_engine(graph, batch)(box),
        general_engine(graph, batch, max_memory=1)(box),
    )
    torch.testing.assert_close(whole.values, parts.values, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(whole.inputs, parts.inputs, rtol=1e-11, atol=1e-11)
    assert general_engine(graph, batch)(box[:0]).inputs.shape == (0, 3, 3)


@pytest.mark.skipif(not ACAS.exists(), reason="the ACAS Xu benchmark files are not here")
def test_acas_property_search_agrees() -> None:
    graph = load_onnx(ACAS / "onnx" / "ACASXU_run2a_1_1_batch_2000.onnx.gz").graph
    found = load_vnnlib(ACAS / "vnnlib" / "prop_2.vnnlib.gz")
    batch = PropertyBatch.of(list(found) if isinstance(found, list | tuple) else [found])
    chain = Chain.of(graph)
    assert chain is not None
    assert [len(bias) for bias in chain.biases] == [50] * 6 + [5]
    tree = SplitTree(batch, slack=1e-4)
    for _ in tree.grow(chain_engine(chain, batch), Deadline(None), 300):
        pass
    proved = np.setdiff1d(tree.leaves, tree.open)
    assert tree.volume(proved) > 0.5
    again = tree.copy()
    again.bound(general_engine(graph, batch), again.leaves, 4096)
    tree.bound(chain_engine(chain, batch), tree.leaves, 4096)
    margins = tree.margins(tree.leaves)
    assert np.allclose(again.margins(again.leaves), margins, rtol=1e-4, atol=1e-4)
    if ops.build_info().native:
        same = leaf_engine(graph, batch)(tree.boxes(tree.leaves[:50]))
        expected = chain_engine(chain, batch)(tree.boxes(tree.leaves[:50]))
        assert torch.equal(same.values, expected.values)
