"""Bounds by linear programs: they hold for all that has the output, and change no answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.helpers import Net
from torch_prepared.core.deadline import Deadline
from torch_prepared.invert import Effort, max_collision, nearest_preimage
from torch_prepared.invert._ball import Ball
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.invert._programs import start
from torch_prepared.invert._solve import bound_network, minimize
from torch_prepared.invert._tighten import tighten_boxes
from torch_prepared.invert.dynamics import _next
from torch_prepared.invert.preimage import phases
from torch_prepared.relax import evaluate_all

from .nets import chain, random_net

PROGRAMS = Effort(20.0, 1, "obbt")


@pytest.mark.parametrize("norm", [1.0, 2.0, np.inf])
@pytest.mark.parametrize("within", [0.0, 0.3])
def test_they_hold_for_all_points_with_the_output(norm, within):
    net = PiecewiseNetwork.of(random_net((3, 12, 10, 1), 1), 3)
    ball = Ball(np.array([0.1, -0.2, 0.3]), 0.6, norm)
    points = ball.region.sample(200_000, torch.Generator().manual_seed(0))
    values = net.values(points.numpy())[:, 0]
    goal = float(np.quantile(values, 0.9))
    same = points[np.abs(values - goal) <= (within or 1e-4)]
    assert len(same) > 20
    before = bound_network(net, ball, "crown")
    after = tighten_boxes(
        net, ball, before, PROGRAMS, Deadline(), (np.array([goal]), within or 1e-4)
    )
    inside = evaluate_all(net.graph, same)
    narrower = 0
    for node in net.graph.nodes[1:]:
        if node.op != "relu":
            continue
        name = node.inputs[0]
        low, high = after[name].lower, after[name].upper
        assert bool(((inside[name] >= low - 1e-9) & (inside[name] <= high + 1e-9)).all())
        assert bool((low >= before[name].lower - 1e-9).all())
        assert bool((high <= before[name].upper + 1e-9).all())
        narrower += int((high - low < 0.9 * (before[name].upper - before[name].lower)).sum())
    assert narrower >= 3


@pytest.mark.parametrize("seed", range(3))
def test_answers_stay_and_programs_shrink(seed):
    net, center = random_net((2, 10, 10, 2), seed), [0.3, 0.1]
    plain, tight = (
        nearest_preimage(net, center, r_max=1.5, method="milp", effort=Effort(20.0, 1, bounds))
        for bounds in ("crown", "obbt")
    )
    assert tight.lower == pytest.approx(plain.lower, rel=2e-3)
    assert tight.upper == pytest.approx(plain.upper, rel=2e-3)
    assert tight.integers <= plain.integers
    far = [
        max_collision(net, center, 1.0, anchor=True, effort=Effort(20.0, 1, bounds))
        for bounds in ("crown", "obbt")
    ]
    assert far[0].upper == pytest.approx(far[1].upper, abs=2e-3)


def test_no_time_leaves_bounds_as_they_are():
    net = PiecewiseNetwork.of(random_net((2, 6, 2), 0), 2)
    ball = Ball(np.zeros(2), 1.0, np.inf)
    boxes = bound_network(net, ball, "crown")
    same = tighten_boxes(net, ball, boxes, PROGRAMS, Deadline(0.0), (np.zeros(2), 0.0))
    assert all(bool((same[n].lower == boxes[n].lower).all()) for n in boxes)


def test_patterns_that_a_region_does_not_hold_exclude_nothing():
    """||x| - 1| is 0.5 at -0.5, whose second layer is in the phase that it has at 0.5."""
    first, second = [[1.0], [-1.0]], [[1.0, 1.0], [-1.0, -1.0]]
    net = PiecewiseNetwork.of(chain((first, None), (second, [-1.0, 1.0]), ([[1.0, 1.0]], None)), 1)
    ball = Ball(np.array([-0.8]), 0.75, np.inf)  # without 0.5
    patterns = [phases(net, np.array([0.5]))]
    for bounds in ("crown", "obbt"):
        effort = Effort(10.0, 1, bounds)
        answer, points = _next(net, np.array([0.5]), ball, patterns, effort, Deadline())
        assert points[-1][0] == pytest.approx(-0.5, abs=1e-5)
        assert answer.bound == pytest.approx(0.3, abs=1e-4)


def test_pooling_patterns_that_a_region_does_not_hold_exclude_nothing():
    net = Net((1, 2), seed=0)
    net.pool("max_pool", 2, 1)
    net.flatten()
    net.linear(1)
    graph = PiecewiseNetwork.of(net.graph(), 2)
    target = graph.values(np.array([[2.0, 3.0]]))[0]
    ball = Ball(np.array([2.9, 1.0]), 0.5, np.inf)  # the first of the two is the larger one
    patterns = [phases(graph, np.array([2.0, 3.0]))]
    answer, points = _next(graph, target, ball, patterns, Effort(10.0, 1), Deadline())
    assert points[-1][0] == pytest.approx(3.0, abs=1e-5)
    assert answer.bound == pytest.approx(0.1, abs=1e-4)


class _RunningOut(Deadline):
    """Time that runs out between a look at the clock and the call of the solver."""

    over = False


def test_time_that_runs_out_before_a_program_starts_is_no_error():
    net, late = PiecewiseNetwork.of(random_net((2, 10, 10, 2), 0), 2), _RunningOut(0.0)
    ball = Ball(np.array([0.3, 0.1]), 1.5, np.inf)
    draft = start(ball, 1)
    assert minimize(draft.program, draft.reach, late, PROGRAMS).bound <= 1.5
    before = bound_network(net, ball, "crown")
    after = tighten_boxes(net, ball, before, PROGRAMS, late, (np.zeros(2), 0.5))
    for name, box in before.items():
        assert bool((after[name].lower >= box.lower).all())
        assert bool((after[name].upper <= box.upper).all())
