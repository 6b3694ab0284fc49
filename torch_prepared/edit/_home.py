"""The way home: once all is proved, the weights move toward the original ones.

A step goes to the nearest network on linearized leaves and points. Leaves may lose some of their
margin, to be split again; those that lose more than that, bounded where the step leads, join the
rows, and the step is taken anew. So the trees know about a step before they follow it, and where
they cannot follow all of it, they follow half.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.bounds.branch import SplitTree
from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._forest import Forest, Integers
from torch_prepared.edit._repair import LEAF_AIM, Repair

__all__ = ["go_home"]

logger = logging.getLogger(__name__)

ROUNDS = 6  #: of mending, after one step
LOOKS = 5  #: at where a step leads, before it is taken
TRIES = 3  #: at shares of a step, each half of the one before
FEW_SURPRISES = 0.01  #: share of the leaves that a step may open unforeseen
LEAST_OPEN = 0.05  #: share of the leaves that any step may open
SPLITS = 4.0  #: leaves that an opened one becomes, more than it was, for planning
LOWER_AIM = 0.5  #: of the aim, on the way home and again wherever it seems to end
LEAST_AIM = 0.02  #: of the first aim
POINT_FLOOR = 0.3  #: share of the aim that points must keep
CAUTION, LEAST_CAUTION, MOST_CAUTION = 0.3, 0.1, 20.0  #: a step goes 1 / (1 + it) of the way
FIRST_LOSS, LEAST_LOSS = 0.75, 0.02  #: in aims, of every leaf's margin
MORE_LOSS, LESS_LOSS = 2.0, 0.2  #: at most, after a step that was proved, and when none was
GAIN = 0.97  #: share of the distance that a step must reach
GROWN = 3.0  #: times the capacity, that trees may grow to before they are cut down
REACH = 2.0  #: aims that lifted leaves may lack


def go_home(repair: Repair, most: int) -> None:
    """Move toward the origin as long as the properties can be proved again.

    Args:
        repair: proved trees, which follow the weights. When this is interrupted, weights and trees
            are those of the last step that was proved.
        most: leaves to bound in one round of growth.
    """
    walk = repair.walk
    walk.look_around()
    least = LEAST_AIM * repair.aim
    repair.aim_at(LOWER_AIM * repair.aim)
    caution, loss = CAUTION, FIRST_LOSS * repair.aim
    while not repair.out_of_time and repair.aim > least and caution < MOST_CAUTION:
        step = _look(repair, caution, loss)
        if step is None:
            return
        if walk.distance(walk.theta + step.delta) > GAIN * walk.distance():
            repair.aim_at(LOWER_AIM * repair.aim)
            loss *= MORE_LOSS
            continue
        caution = max(0.5 * caution, LEAST_CAUTION) if step.known else 2.0 * caution
        room = step.room(repair)
        share = _follow(repair, step, min(1.0, room), most)
        if share < min(1.0, room):
            loss *= max(share, LESS_LOSS)
        else:
            loss *= min(room, MORE_LOSS)
        if loss < LEAST_LOSS * repair.aim:
            return


@dataclass
class _Step:
    """A change of the weights.

    Args:
        delta: (p,) float64.
        trees: bounded where it leads.
        known: whether rows speak of nearly all leaves that it opens.
    """

    delta: Tensor
    trees: list[SplitTree]
    known: bool

    def room(self, repair: Repair) -> float:
        """Times as many leaves as this step opens that may be opened."""
        leaves = repair.forest.leaf_count
        allowed = (repair.capacity / leaves - 1.0) / SPLITS
        opened = sum(len(tree.open) for tree in self.trees) / leaves
        return max(allowed, LEAST_OPEN) / max(opened, 1e-9)


def _look(repair: Repair, caution: float, loss: float) -> _Step | None:
    """The step toward the nearest network for which no leaf loses more than ``loss``, roughly."""
    forest, points, spare = repair.forest, repair.points, LEAF_AIM * repair.aim
    chosen = known = forest.choose([tree.leaves for tree in forest.trees], -np.inf, worst=True)
    normals, margins = points.rows(near=2 * repair.aim)
    rise = margins.clamp_max(POINT_FLOOR * repair.aim) - margins
    step = None
    for _ in range(LOOKS):
        jacobian, value = forest.leaf_rows(chosen)
        normals = torch.cat([normals, jacobian])
        rise = torch.cat([rise, value.clamp_max(spare) - loss - value])
        found = repair.walk.nearest(normals, rise * (1 + caution))
        if found is None:
            return step
        moved = _bounded(repair, repair.walk.theta + found / (1 + caution), forest.trees)
        opened = [
            _surprises(old, new, used, spare, loss)
            for old, new, used in zip(forest.trees, moved.trees, known, strict=True)
        ]
        few = sum(map(len, opened)) <= FEW_SURPRISES * forest.leaf_count
        step = _Step(found / (1 + caution), moved.trees, few)
        if step.known:
            break
        chosen = moved.choose(opened, -np.inf, worst=True)
        known = [np.concatenate(pair) for pair in zip(known, chosen, strict=True)]
    return step


def _surprises(
    old: SplitTree, new: SplitTree, used: Integers, spare: float, loss: float
) -> Integers:
    """The leaves, other than used ones, that lose too much."""
    rest = np.setdiff1d(old.leaves, used)
    goal = np.minimum(old.margins(rest), spare) - loss
    return rest[~(new.margins(rest) >= goal)]


def _bounded(repair: Repair, theta: Tensor, trees: Sequence[SplitTree]) -> Forest:
    """Copies of the trees, bounded for other weights."""
    walk = repair.walk
    kept, forest = walk.theta, repair.forest.copy_of(trees)
    walk.theta = theta
    try:
        forest.bound()
    finally:
        walk.theta = kept
    return forest


def _follow(repair: Repair, step: _Step, share: float, most: int) -> float:
    """Take so much of a step, or less, that the trees are proved; what was taken."""
    walk, forest = repair.walk, repair.forest
    theta, trees = walk.theta, forest.trees
    needed, distance = repair.check_seconds, walk.distance()
    for _ in range(TRIES):
        gained = False
        there = theta + share * step.delta
        try:
            forest.trees = step.trees if share == 1 else _bounded(repair, there, trees).trees
            walk.theta = there
            deadline = Deadline(max(repair.deadline.left - needed, 0.0))
            opened = forest.open_count
            enough = (1 - share * (1 - GAIN)) * distance
            gained = _prove(repair, enough, deadline, most)
            logger.info(
                "home: %g of a step, %d open, %d leaves, %s, distance %g -> %g",
                share, opened, forest.leaf_count,
                "proved" if gained else "not proved", distance, walk.distance(),
            )  # fmt: skip
        finally:  # also when interrupted
            if not gained:
                walk.theta, forest.trees = theta, trees
        if gained or repair.out_of_time:
            return share * gained
        share /= 2
    return 0.0


def _prove(repair: Repair, distance: float, deadline: Deadline, most: int) -> bool:
    """Whether bounded trees can be proved again, no farther away than ``distance``."""
    forest, walk, bounded, reach = repair.forest, repair.walk, repair.walk.theta, REACH
    for _ in range(ROUNDS):
        low = repair.grow(deadline, most)
        if walk.distance() > distance or deadline.over:
            return False
        if forest.proved:
            if bounded is walk.theta or forest.bound():
                break
            bounded = walk.theta
        elif forest.leaf_count > GROWN * repair.capacity:
            return False
        elif low:
            repair.points.satisfy(deadline)
        else:
            repair.lift(reach)
            reach *= 2.0
    else:
        return False
    repair.coarsen(deadline)
    return repair.fits and not repair.out_of_time
