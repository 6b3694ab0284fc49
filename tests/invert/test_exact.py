import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_prepared.certify.exact import evaluate_exactly, to_fractions
from torch_prepared.invert._exact import (
    correct_pair,
    kernel_exactly,
    linear_cell,
    norm_above,
    solve_exactly,
)
from torch_prepared.invert._network import PiecewiseNetwork

from .nets import absolute, affine, fold, random_net

small = st.fractions(min_value=-4, max_value=4, max_denominator=64)


@given(st.lists(small, min_size=1, max_size=5), st.sampled_from([1.0, 2.0, math.inf]))
def test_norms_are_rounded_up_and_tight(entries, p):
    found = norm_above(np.array(entries, dtype=object), p)
    sizes = [abs(e) for e in entries]
    if p == 2:
        square = sum(s * s for s in sizes)
        assert Fraction(found) ** 2 >= square
        assert Fraction(found * (1 - 1e-12)) ** 2 <= square
    else:
        exact = sum(sizes) if p == 1 else max(sizes)
        assert exact <= Fraction(found) <= exact * (1 + Fraction(1, 10**12)) + Fraction(1, 10**300)


@given(st.lists(st.lists(small, min_size=3, max_size=3), min_size=2, max_size=3))
def test_kernels_and_solutions_are_exact(rows):
    matrix = np.array(rows, dtype=object)
    rank, vector = kernel_exactly(matrix)
    if vector is None:
        assert rank == 3
    else:
        assert any(vector)
        assert not any(matrix @ vector)
    if matrix.shape == (3, 3) and vector is None:
        rhs = np.array([Fraction(1), Fraction(2), Fraction(-3)], dtype=object)
        assert np.all(matrix @ solve_exactly(matrix, rhs) == rhs)


def test_a_near_collision_is_moved_onto_an_exact_one():
    net = PiecewiseNetwork.of(absolute(), 1)
    x, y = correct_pair(net, np.array([0.30001]), np.array([-0.3]))
    assert (x[0], y[0]) == (Fraction(0.3), Fraction(-0.3))
    net = PiecewiseNetwork.of(random_net((2, 12, 12, 2), 3), 2)
    found = correct_pair(net, np.array([0.3, 0.2]), np.array([0.3, 0.2]))
    assert found is None  # a point does not collide with itself


def test_float32_weights_are_taken_as_stored():
    net = PiecewiseNetwork.of(absolute(torch.float32, right=0.1), 1)
    pair = correct_pair(net, np.array([0.03]), np.array([-0.3]))
    assert pair is not None
    equal = evaluate_exactly(net.record, pair[0]) == evaluate_exactly(net.record, pair[1])
    assert equal.all()


def test_the_cell_of_the_absolute_value_reaches_to_its_kink():
    net = PiecewiseNetwork.of(absolute(), 1)
    cell = linear_cell(net, np.array([0.75]))
    assert cell.injective
    assert cell.radius == pytest.approx(0.75, rel=1e-15)
    assert cell.radius <= 0.75
    assert linear_cell(net, np.array([0.0])).on_kink


def test_a_flat_direction_is_found_exactly():
    net = PiecewiseNetwork.of(affine([[1.0, 0.1], [3.0, 0.1 * 3.0]]), 2)
    assert linear_cell(net, np.zeros(2)).injective  # 0.1 * 3.0 is not 0.3
    flat = linear_cell(PiecewiseNetwork.of(affine([[1.0, 2.0], [2.0, 4.0]]), 2), np.ones(2)).flat
    assert flat is not None
    assert flat[0] + 2 * flat[1] == 3
    wide = linear_cell(PiecewiseNetwork.of(random_net((9, 6, 2), 0), 9), np.full(9, 0.1))
    assert wide.flat is not None
    record = PiecewiseNetwork.of(random_net((9, 6, 2), 0), 9).record
    same = evaluate_exactly(record, wide.flat) == evaluate_exactly(record, np.full(9, 0.1))
    assert same.all()


def test_no_kink_lies_inside_the_cell():
    net = PiecewiseNetwork.of(random_net((2, 10, 10, 2), 5), 2)
    center = np.array([0.2, -0.4])
    cell = linear_cell(net, center)
    rng = np.random.default_rng(0)
    inside = center + 0.999 * cell.radius * rng.uniform(-1, 1, (400, 2))
    values = net.values(inside)
    design = np.c_[inside - center, np.ones(len(inside))]
    _, residual, *_ = np.linalg.lstsq(design, values, rcond=None)
    assert float(residual.max()) < 1e-24
    assert len(to_fractions(center)) == 2
    assert linear_cell(PiecewiseNetwork.of(fold(), 2), np.array([0.5, 0.25])).radius <= 0.25
