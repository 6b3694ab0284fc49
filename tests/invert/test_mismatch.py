"""How far apart a second network's outputs can be where the first one's agree."""

from __future__ import annotations

import math

import numpy as np
import pytest

from torch_prepared.errors import SpecError
from torch_prepared.invert import Effort, Outcome, matching_radius, max_collision, max_mismatch
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.specs import Box

from .nets import absolute, affine, chain, fold, random_net
from .test_preimage import exact_collision

QUICK = Effort(time_limit=20.0, threads=1)


@pytest.mark.parametrize("seed", range(2))
def test_a_network_never_differs_from_itself(seed):
    net = random_net((2, 4, 4, 2), seed)
    found = max_mismatch(net, net, [0.2, 0.1], 0.6, effort=QUICK)
    assert found.lower == 0.0
    assert found.upper <= 1e-4
    assert found.outcome is Outcome.SOLVED


@pytest.mark.parametrize("seed", range(3))
def test_everything_is_a_function_of_an_injective_network(seed):
    first = affine([[2.0, 1.0], [-1.0, 1.0]])
    found = max_mismatch(first, random_net((2, 6, 2), seed), [0.1, 0.2], 1.0, effort=QUICK)
    assert found.lower == 0.0
    assert found.upper <= 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_of_a_constant_the_diameter_of_the_outputs_is_left(seed):
    second, center, radius = random_net((2, 6, 2), seed), np.array([0.1, -0.2]), 0.7
    found = max_mismatch(affine([[0.0, 0.0]]), second, center, radius, effort=QUICK)
    ticks = np.linspace(-radius, radius, 401)
    points = center + np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    values = PiecewiseNetwork.of(second, 2).values(points)
    want = float(np.ptp(values, axis=0).max())
    assert found.upper >= want
    assert found.upper == pytest.approx(want, rel=5e-3)
    assert found.lower == pytest.approx(want, rel=5e-3)
    assert found.outcome is Outcome.SOLVED
    x, y = found.witness.floats
    there = PiecewiseNetwork.of(second, 2).values(np.stack([x, y]))
    assert np.abs(there[0] - there[1]).max() == pytest.approx(found.lower)


def test_the_identity_measures_collisions():
    eye = affine([[1.0, 0.0], [0.0, 1.0]])
    for first, center in ((fold(0.4), [0.3, 0.1]), (random_net((2, 5, 5, 2), 2), [0.2, 0.1])):
        own = max_collision(first, center, 1.2, effort=QUICK)
        found = max_mismatch(first, eye, center, 1.2, effort=QUICK)
        assert found.upper == pytest.approx(own.upper, abs=1e-3)
        assert found.lower == pytest.approx(own.lower, abs=1e-3)


def test_it_is_positive_just_beyond_the_matching_radius():
    """(|x|, y) does not know (x + 0.5 |x|, y) apart on the other side of the fold."""
    bent = chain(([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], None),
                 ([[1.5, -0.5, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]], None))  # fmt: skip
    radius = matching_radius(fold(), bent, [0.3, 0.0], r_max=0.5, effort=Effort(3.0, 1))
    assert radius.lower == pytest.approx(0.3, abs=2e-3)
    inside = max_mismatch(fold(), bent, [0.3, 0.0], 0.29, effort=QUICK)
    assert (inside.lower, inside.witness) == (0.0, None)
    assert inside.upper <= 1e-4
    outside = max_mismatch(fold(), bent, [0.3, 0.0], 0.5, effort=QUICK)
    assert outside.lower <= 0.4 <= outside.upper  # 0.2 and -0.2
    assert outside.upper - outside.lower <= 1e-3
    assert exact_collision(fold(), outside)


@pytest.mark.parametrize("seed", range(2))
def test_one_input_agrees_with_a_grid(seed):
    """Brute force over level sets of f1, with a tolerance that the grid resolves."""
    first, second = random_net((1, 6, 1), seed), random_net((1, 6, 1), seed + 10)
    x = np.linspace(-0.8, 0.8, 1201)[:, None]
    a, b = (PiecewiseNetwork.of(net, 1).values(x)[:, 0] for net in (first, second))
    found = max_mismatch(first, second, [0.0], 0.8, output_tolerance=0.05, effort=QUICK)
    agree = np.abs(a[:, None] - a) <= 0.05
    want = float(np.abs(b[:, None] - b)[agree].max())
    assert found.upper >= want
    assert found.upper == pytest.approx(want, rel=0.03)
    assert found.lower == pytest.approx(found.upper, rel=2e-3)


def test_norms_and_domains_make_it_smaller():
    constant, plane = affine([[0.0, 0.0]]), affine([[1.0, 1.0]])
    asked = {"center": [0.0, 0.0], "radius": 1.0, "effort": QUICK}
    for norm, want in ((math.inf, 4.0), (1, 2.0)):
        found = max_mismatch(constant, plane, norm=norm, **asked)
        assert found.lower <= want <= found.upper
        assert found.upper == pytest.approx(want, abs=1e-3)
    round_ball = max_mismatch(constant, plane, norm=2, **asked)
    assert round_ball.upper >= 2 * math.sqrt(2)  # a polytope around the ball
    assert round_ball.upper == pytest.approx(2 * math.sqrt(2), rel=0.03)
    half = max_mismatch(constant, plane, domain=Box([0.0, 0.0], [1.0, 1.0]), **asked)
    assert half.upper == pytest.approx(2.0, abs=1e-3)


def test_time_over_leaves_all_there_can_be():
    first, second = random_net((2, 40, 40, 2), 0), random_net((2, 4, 2), 1)
    found = max_mismatch(first, second, [0.0, 0.0], 2.0, effort=Effort(1e-6, 1))
    assert found.outcome is Outcome.OPEN
    assert found.lower == 0.0
    points = np.random.default_rng(0).uniform(-2, 2, size=(2000, 2))
    assert found.upper >= np.ptp(PiecewiseNetwork.of(second, 2).values(points), axis=0).max()


def test_weights_beyond_numbers_leave_it_unknown():
    huge = affine([[1e308, 1e308]])
    found = max_mismatch(absolute(), affine([[1e308]]), [0.5], 100.0, effort=QUICK)
    assert found.outcome is Outcome.OPEN
    assert found.upper == math.inf
    found = max_mismatch(huge, huge, [0.5, 0.5], 100.0, effort=QUICK)
    assert found.outcome is Outcome.OPEN


def test_networks_of_other_inputs_are_refused():
    for first, second, word in ((fold(), absolute(), "second"), (absolute(), fold(), "first")):
        with pytest.raises(SpecError, match=f"{word} network"):
            max_mismatch(first, second, [0.0, 0.0], 1.0)
    with pytest.raises(SpecError, match="radius"):
        max_mismatch(fold(), fold(), [0.0, 0.0], math.nan)
