"""Split trees: coverage, inheritance of intervals, progress, time limits, speed."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.certify import (
    Certificate,
    NetworkRecord,
    ProofTree,
    PropertyRecord,
    Slopes,
    Verdict,
    check_certificate,
    evaluate_exactly,
    margin_exactly,
)
from torch_prepared.certify.network import read_network
from torch_prepared.certify.operators import Arithmetic
from torch_prepared.certify.replay import TreeReplay
from torch_prepared.errors import CertificateError

from .nets import NetBuilder, box, mlp, nonlinear_inputs, row_property


def uniform_tree(
    depth: int,
    lower: np.ndarray,
    upper: np.ndarray,
    plan: tuple[str, ...] = (),
    flagged: tuple[int, ...] = (),
) -> ProofTree:
    """Bisects the dimensions in turn; tightens at the depths ``flagged``."""
    dims, values, flags = [], [], []
    pending = [(lower, upper, 0)]
    while pending:
        low, high, level = pending.pop()
        flags.append(level in flagged)
        if level == depth:
            dims.append(-1)
            values.append(0.0)
            continue
        k = level % len(low)
        middle = (low[k] + high[k]) / 2
        dims.append(k)
        values.append(middle)
        left_high, right_low = high.copy(), low.copy()
        left_high[k] = right_low[k] = middle
        pending += [(right_low, high, level + 1), (low, left_high, level + 1)]
    return ProofTree(
        np.array(dims, dtype=np.int32),
        np.array(values),
        np.zeros((2**depth, 1), dtype=np.int32),
        np.array(flags),
        plan,
    )


def margin(net: NetworkRecord, prop: PropertyRecord, proof: ProofTree) -> float:
    return check_certificate(Certificate.create(net, [prop], [proof]), net, [prop]).margin


def lifted(prop: PropertyRecord, by: float = 1e6) -> PropertyRecord:
    """The property with so large an offset that all leaves pass and are replayed."""
    return PropertyRecord(prop.region, [(rows, offset + by) for rows, offset in prop.clauses])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), depth=st.integers(0, 6), flags=st.sets(st.integers(0, 6)))
def test_leaves_cover_the_region(seed: int, depth: int, flags: set[int]) -> None:
    net = mlp((3, 6, 6, 2), seed).record()
    rng = np.random.default_rng(seed)
    region = box(-rng.random(3), rng.random(3))
    prop = lifted(row_property(region, rng.normal(size=(1, 2))), 64.0)
    plan = nonlinear_inputs(net)
    tree = uniform_tree(depth, region.lower, region.upper, plan, tuple(flags))
    bound = Fraction(margin(net, prop, tree))
    for _ in range(20):
        point = region.lower + rng.random(3) * (region.upper - region.lower)
        point = np.clip(point, region.lower, region.upper)
        assert bound <= margin_exactly(prop, evaluate_exactly(net, point))


def test_a_missed_corner_is_not_certified() -> None:
    """A violation in one small corner is found by no split that leaves the corner out."""
    net = NetBuilder((2,))
    net.linear(1)
    net.weights["w1.weight"][:] = 1.0
    net.weights["w1.bias"][:] = 0.0
    record = net.record()
    region = box(np.zeros(2), np.ones(2))
    prop = row_property(region, np.array([[-1.0]]), np.array([1.999]))
    for value in (-1.0, 0.0, 0.5, 1.0, 2.0, 1e300):
        tree = ProofTree(
            np.array([0, -1, 1, -1, -1], dtype=np.int32),
            np.array([value, 0, value, 0, 0]),
            np.zeros((3, 1), dtype=np.int32),
            np.zeros(5, dtype=np.bool_),
        )
        result = check_certificate(Certificate.create(record, [prop], [tree]), record, [prop])
        assert result.status is Verdict.UNKNOWN
        assert "lower bound" in result.per_property[0].reason


@pytest.mark.parametrize("beside", [-1e-3, -1e-9, 0.0, 1e-9, 1e-3])
@pytest.mark.parametrize("plane", [-0.7, 0.4])
def test_no_gap_between_the_halves(plane: float, beside: float) -> None:
    """A spike of violation next to a splitting plane is met by one of the halves."""
    peak = np.float32(plane + beside)
    net = NetBuilder((1,))
    net.linear(1)
    net.elementwise("abs")
    net.linear(1)
    net.weights["w1.weight"][:], net.weights["w1.bias"][:] = 1.0, -peak
    net.weights["w3.weight"][:], net.weights["w3.bias"][:] = 1.0, -1e-12
    record = net.record()
    prop = row_property(box(-np.ones(1), np.ones(1)), np.ones((1, 1)))
    assert margin_exactly(prop, evaluate_exactly(record, np.array([peak]))) < 0
    tree = ProofTree(
        np.array([0, 0, -1, -1, 0, -1, -1], dtype=np.int32),
        np.array([plane, -0.9, 0, 0, 0.9, 0, 0]),
        np.zeros((4, 1), dtype=np.int32),
        np.zeros(7, dtype=np.bool_),
    )
    result = check_certificate(Certificate.create(record, [prop], [tree]), record, [prop])
    assert result.status is Verdict.UNKNOWN


def test_inherited_intervals_help_and_never_hurt() -> None:
    net = mlp((3, 12, 12, 12, 2), 5).record()
    region = box(-np.ones(3), np.ones(3))
    prop = lifted(row_property(region, np.array([[1.0, -1.0]])))
    plan = nonlinear_inputs(net)
    found = [
        margin(net, prop, uniform_tree(6, region.lower, region.upper, plan, flags))
        for flags in ((), (0,), (0, 3), (0, 3, 6))
    ]
    assert found == sorted(found)
    assert found[0] < found[2] < found[3]


def test_the_best_leaf_row_is_the_tree_s_choice() -> None:
    """A disjunctive clause holds although no single row holds everywhere."""
    net = NetBuilder((1,))
    net.linear(1)
    net.weights["w1.weight"][:] = 1.0
    net.weights["w1.bias"][:] = 0.0
    record = net.record()
    region = box(-np.ones(1), np.ones(1))
    prop = row_property(region, np.array([[1.0], [-1.0]]), np.array([0.1, 0.1]))
    for rows, expected in (([[1], [0]], Verdict.CERTIFIED), ([[0], [1]], Verdict.UNKNOWN)):
        tree = ProofTree(
            np.array([0, -1, -1], dtype=np.int32),
            np.zeros(3),
            np.array(rows, dtype=np.int32),
            np.zeros(3, dtype=np.bool_),
        )
        certificate = Certificate.create(record, [prop], [tree])
        assert check_certificate(certificate, record, [prop]).status is expected


def test_links_become_preorder() -> None:
    dims = np.array([0, 1, -1, -1, -1])
    left, right = np.array([1, 3, 0, 0, 0]), np.array([2, 4, 0, 0, 0])
    rows = np.arange(5)[:, None]
    tree, order = ProofTree.from_links(dims, np.full(5, 0.5), left, right, rows)
    assert order.tolist() == [0, 1, 3, 4, 2]
    assert tree.split_dim.tolist() == [0, 1, -1, -1, -1]
    assert tree.rows[:, 0].tolist() == [3, 4, 2]
    assert tree.right_children().tolist() == [4, 3, -1, -1, -1]
    with pytest.raises(CertificateError):
        ProofTree.from_links(dims, np.full(5, 0.5), np.zeros(5, int), right, rows)


def test_deep_trees_do_not_recurse() -> None:
    net = mlp((2, 3, 1), 0).record()
    depth = 2000
    prop = row_property(box(np.zeros(2), np.ones(2)), np.ones((1, 1)), np.full(1, 1e3))
    tree = ProofTree(
        np.array([0, -1] * depth + [-1], dtype=np.int32),
        np.array([v for k in range(depth) for v in (k / depth, 0.0)] + [0.0]),
        np.zeros((depth + 1, 1), dtype=np.int32),
        np.zeros(2 * depth + 1, dtype=np.bool_),
    )
    result = check_certificate(Certificate.create(net, [prop], [tree]), net, [prop])
    assert result.status is Verdict.CERTIFIED
    assert result.per_property[0].leaves == depth + 1


def test_progress_and_time_limit() -> None:
    net = mlp((2, 4, 1), 0).record()
    prop = row_property(box(np.zeros(2), np.ones(2)), np.ones((1, 1)), np.full(1, 1e3))
    tree = uniform_tree(12, prop.region.lower, prop.region.upper)
    certificate = Certificate.create(net, [prop, prop], [tree, tree])
    seen: list[tuple[int, int]] = []
    result = check_certificate(
        certificate, net, [prop, prop], progress=lambda done, total: seen.append((done, total))
    )
    assert result.status is Verdict.CERTIFIED
    assert seen[-1] == (8192, 8192)
    assert seen == sorted(seen)
    result = check_certificate(certificate, net, [prop, prop], time_limit=0.0)
    assert result.status is Verdict.UNKNOWN
    assert "time limit" in result.per_property[0].reason


@pytest.mark.slow
def test_twenty_thousand_leaves_in_seconds() -> None:
    net = mlp((5, 50, 50, 50, 50, 50, 50, 5), 1).record()
    region = box(-np.ones(5), np.ones(5))
    prop = lifted(row_property(region, np.array([[1.0, -1.0, 0, 0, 0]])))
    tree = uniform_tree(15, region.lower, region.upper, nonlinear_inputs(net), (10,))
    certificate = Certificate.create(net, [prop], [tree])
    result = check_certificate(certificate, net, [prop])
    assert result.status is Verdict.CERTIFIED
    assert result.seconds < 30


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), depth=st.integers(1, 4), data=st.data())
def test_split_leaves_cover_what_the_leaf_covered(
    seed: int, depth: int, data: st.DataObject
) -> None:
    """Boxes, claimed rows and slopes of the children are those of the leaf, in halves."""
    rng = np.random.default_rng(seed)
    low, high = -rng.random(3), rng.random(3)
    leaves = 2**depth
    tree = uniform_tree(depth, low, high, ("v",), (depth,))
    number = np.arange(leaves, dtype=np.float32)[:, None]
    tree = dataclasses.replace(
        tree,
        rows=np.arange(leaves, dtype=np.int32)[:, None],
        slopes={"a": Slopes(lower=number)},
        tighten_slopes={"a": Slopes(lower=number), "b": Slopes(upper=np.ones((1, 1)))},
    )
    chosen = sorted(data.draw(st.sets(st.integers(0, leaves - 1))))
    dims = [int(rng.integers(3)) for _ in chosen]
    boxes = [tree.leaf_box(leaf, low, high) for leaf in chosen]
    values = [float(rng.uniform(a[d], b[d])) for d, (a, b) in zip(dims, boxes, strict=True)]
    grown = tree.split_leaves(chosen, dims, values)
    assert grown.leaves == leaves + len(chosen)
    assert grown.tighten.sum() == grown.leaves
    assert np.array_equal(grown.slopes["a"].lower, grown.rows)
    assert np.array_equal(grown.tighten_slopes["a"].lower, grown.rows)
    assert len(grown.tighten_slopes["b"].upper) == 1
    position = 0
    for leaf in range(leaves):
        a, b = tree.leaf_box(leaf, low, high)
        parts = [(a, b)]
        if leaf in chosen:
            dim, value = dims[chosen.index(leaf)], values[chosen.index(leaf)]
            left, right = b.copy(), a.copy()
            left[dim] = right[dim] = value
            parts = [(a, left), (right, b)]
        for part in parts:
            assert np.array_equal(grown.leaf_box(position, low, high), part)
            assert grown.rows[position, 0] == leaf
            position += 1


def test_the_leaves_that_fail_are_named() -> None:
    net = mlp((3, 8, 8, 2), 5)
    region = box(-np.ones(3), np.ones(3))
    prop = row_property(region, np.array([[1.0, -1.0]]), np.full(1, 1e3))
    tree = uniform_tree(5, region.lower, region.upper, nonlinear_inputs(net.record()), (5,))
    number = np.arange(32)
    replay = TreeReplay(read_network(net.record()), prop, tree, Arithmetic())
    margins = np.zeros(32)
    for leaves, bounds in replay.run():
        margins[leaves] = bounds[:, 0]
    shift = np.sort(margins)[2:4].mean()
    hard = PropertyRecord(region, [(rows, offset - shift) for rows, offset in prop.clauses])
    result = check_certificate(
        Certificate.create(net.record(), [hard], [tree]), net.record(), [hard]
    )
    found = result.per_property[0]
    assert found.status is Verdict.UNKNOWN
    assert found.failed == tuple(number[margins < shift])
    assert len(found.failed) == 3
    assert found.reason.startswith("leaf ")
