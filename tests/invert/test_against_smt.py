"""Claims against an exact solver: z3 in rational arithmetic finds no pair that a claim excludes."""

from fractions import Fraction

import numpy as np
import pytest

from torch_prepared.invert import Effort, injectivity_radius, nearest_preimage

from .nets import random_net

z3 = pytest.importorskip("z3", reason="the exact comparison needs z3-solver")
QUICK = Effort(time_limit=20.0, threads=1)


def _number(value):
    exact = Fraction(float(value))
    return z3.Q(exact.numerator, exact.denominator)


def _output(graph, x):
    """The network's output as z3 terms."""
    values = list(x)
    for node in graph.nodes[1:]:
        if node.op == "relu":
            values = [z3.If(v > 0, v, 0) for v in values]
            continue
        weight = node.read("weight", graph.parameters).numpy()
        bias = node.read("bias", graph.parameters).numpy()
        values = [
            z3.Sum([_number(w) * v for w, v in zip(row, values, strict=True)]) + _number(b)
            for row, b in zip(weight, bias, strict=True)
        ]
    return values


def _point(name, center, radius):
    x = [z3.Real(f"{name}{i}") for i in range(len(center))]
    near = [z3.And(v - _number(c) < radius, _number(c) - v < radius)
            for v, c in zip(x, center, strict=True)]  # fmt: skip
    return x, near


@pytest.mark.parametrize("seed", [0, 1, 2, 4])  # the center of 3 lies on a flat piece
def test_no_preimage_within_a_claimed_radius(seed):
    graph, center = random_net((2, 5, 2), seed), np.array([0.2, 0.1])
    found = nearest_preimage(graph, center, r_max=1.5, method="milp", effort=QUICK)
    assert found.lower > 0.0
    solver = z3.Solver()
    x, near = _point("x", center, _number(found.lower))
    solver.add(*near, z3.Or(*(v != _number(c) for v, c in zip(x, center, strict=True))))
    there = _output(graph, [_number(c) for c in center])
    solver.add(*(a == b for a, b in zip(_output(graph, x), there, strict=True)))
    assert solver.check() == z3.unsat
    if found.witness is not None:
        assert Fraction(found.upper) >= max(abs(found.witness.x - found.witness.y))


@pytest.mark.parametrize("seed", [1, 2, 3])  # the center of 0 lies on a flat piece
def test_no_separated_pair_within_a_claimed_radius(seed):
    graph, center = random_net((2, 4, 2), seed), np.array([0.2, 0.1])
    found = injectivity_radius(graph, center, r_max=1.0, separation=0.01, effort=QUICK)
    assert found.lower > 0.0
    solver = z3.Solver()
    x, near_x = _point("x", center, _number(found.lower))
    y, near_y = _point("y", center, _number(found.lower))
    eta = _number(0.01)
    solver.add(*near_x, *near_y, z3.Or(*(a - b >= eta for a, b in zip(x, y, strict=True))))
    solver.add(*(a == b for a, b in zip(_output(graph, x), _output(graph, y), strict=True)))
    assert solver.check() == z3.unsat
