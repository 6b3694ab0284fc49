"""Optimization-based bound tightening: linear relaxations for the range of every unstable switch.

Layer by layer the least and the largest value that each open switch can read is bounded by a linear
program over the relaxation of the whole network, with the output fixed. That costs two programs per
switch, and leaves fewer integers and tighter rows to branch and bound.

Source: Tjeng, Xiao & Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer
Programming" (ICLR 2019), section 4.2; the fixed output is ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from torch_prepared.bounds import RegionBatch, bound_nodes
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.interval import Interval
from torch_prepared.core.rows import Floats, LinearRows
from torch_prepared.invert._ball import Ball
from torch_prepared.invert._encoding import Affine, Program, encode_copy
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.invert._solve import TOLERANCE, Effort
from torch_prepared.solvers import HighsSolver, LinearProgram, Status, solve

__all__ = ["Target", "tighten_boxes"]

_LONGEST = 10.0  #: seconds for one linear program

Target = tuple[Floats, float]
"""Output (m,) that every point of interest has, and by how much entries may differ from it."""


def tighten_boxes(
    net: PiecewiseNetwork,
    ball: Ball,
    boxes: Mapping[str, Interval],
    effort: Effort,
    deadline: Deadline,
    target: Target,
) -> dict[str, Interval]:
    """Intervals of every node's value over the points of the ball with the target's output.

    Args:
        net: the network.
        ball: where the points lie.
        boxes: intervals (1, *shape) over the ball.
        effort: threads.
        deadline: what is not reached by then stays as it is.
        target: known output.

    Soundness: dual bounds only, each lowered by the relative tolerance that those of branch and
        bound are lowered by; a linear program that fails changes nothing. Good for claims.
    """
    found = dict(boxes)
    names = [node.inputs[0] for node in net.graph.nodes[1:] if node.op in ("relu", "leaky_relu")]
    for name in dict.fromkeys(names):
        if deadline.over:
            break
        program = Program()
        region = ball.region
        inputs = program.add("x", region.lower.numpy(), region.upper.numpy())
        reach = program.add("reach", np.full(1, ball.radius), np.full(1, ball.radius))
        ball.confine(program, "x", program.pick(inputs), program.pick(reach))
        copy = encode_copy(program, "f", net.graph, found, inputs)
        both = copy.output.shifted(-target[0]).both_signs()
        program.at_least(Affine(-both.matrix, -both.offset), -target[1])
        found[name] = _tighten(program, copy.values[name], found[name], effort, deadline)
        with torch.no_grad():  # what follows is bounded anew, from what is known now
            known = {n: found[n] for n in names}
            found = bound_nodes(net.graph, RegionBatch.of([region]), known=known)
    return found


def _tighten(
    program: Program, value: Affine, box: Interval, effort: Effort, deadline: Deadline
) -> Interval:
    """A smaller interval of ``value``, the entries that are the least settled first."""
    lower = box.lower.flatten().double().numpy().copy()
    upper = box.upper.flatten().double().numpy().copy()
    rows = program.build_rows()
    width = value.widen(program.columns)
    open_ = np.flatnonzero((lower < 0.0) & (upper > 0.0))
    for i in open_[np.argsort(-np.minimum(-lower, upper)[open_], kind="stable")]:
        cost = np.asarray(width[[i]].todense()).ravel()
        low = _least(program, rows, cost, effort, deadline) + value.offset[i]
        high = value.offset[i] - _least(program, rows, -cost, effort, deadline)
        if low <= high:  # else no point is left, which branch and bound finds out, too
            lower[i], upper[i] = max(lower[i], low), min(upper[i], high)
    shape = box.lower.shape
    return Interval(torch.from_numpy(lower).reshape(shape), torch.from_numpy(upper).reshape(shape))


def _least(
    program: Program, rows: LinearRows, cost: Floats, effort: Effort, deadline: Deadline
) -> float:
    """A lower bound of ``cost @ columns``; minus infinity when there is none in time."""
    if deadline.over:
        return -np.inf
    problem = LinearProgram(cost, rows, program.unknowns.lower, program.unknowns.upper)
    limit = min(_LONGEST, max(deadline.left, 1e-3))
    found = solve(problem, HighsSolver(find_ray=False), time_limit=limit, threads=effort.threads)
    if found.status is Status.INFEASIBLE or not np.isfinite(found.dual_bound):
        return -np.inf
    return float(found.dual_bound - TOLERANCE * max(1.0, abs(found.dual_bound)))
