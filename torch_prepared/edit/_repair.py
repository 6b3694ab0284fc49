"""A network whose trees of boxes are being proved, and the moves that help them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._forest import Forest, Integers
from torch_prepared.edit._points import PointSet
from torch_prepared.edit._walk import Walk

__all__ = ["Repair"]

logger = logging.getLogger(__name__)

LIFTS = 4
WORTH = 0.3  #: share of the open leaves that one more lift must close
LOW_CENTER = 0.2  #: margins of leaf centers below this share of the aim become points
LEAF_AIM, POINT_AIM = 0.15, 0.7  #: shares of the aim that lifted leaves and points must reach
FEWEST_NODES = 20_000  #: of one round of growth
SPLIT_SPARE = 0.07  #: share of the aim that new leaves must have in hand
COARSEN_SHARE = 0.2  #: of the time left
START_SECONDS = 1.0  #: that checking takes before the first leaf, for planning
SPARE_SECONDS = 1.1  #: times what checking is expected to take


@dataclass
class Repair:
    """Where an edit stands.

    Args:
        deadline: of the editor, checking included.
        walk: the weights.
        forest: the trees of all properties.
        points: inputs whose margins must reach the aim.
        aim: margin in output units.
        capacity: leaves that can be checked in time.
        pace: leaves that are checked per second.
    """

    deadline: Deadline
    walk: Walk
    forest: Forest
    points: PointSet
    aim: float
    capacity: float
    pace: float

    @property
    def fits(self) -> bool:
        """Whether the trees are small enough to be checked."""
        return self.forest.leaf_count <= self.capacity

    @property
    def out_of_time(self) -> bool:
        """Whether what is left is needed for checking the trees."""
        return self.deadline.left < self.check_seconds

    @property
    def check_seconds(self) -> float:
        """That checking the trees will take, or as many leaves as can be checked."""
        leaves = min(self.forest.leaf_count, self.capacity)
        return START_SECONDS + SPARE_SECONDS * leaves / self.pace

    def aim_at(self, aim: float) -> None:
        """From here on, aim at another margin."""
        self.aim = self.points.aim = aim

    def grow(self, deadline: Deadline, most: int) -> bool:
        """Split open leaves, few where few leaves can be checked.

        Args:
            deadline: for all of it.
            most: leaves to bound.

        Returns:
            Whether inputs of low margin were met, which no splitting proves; they are points now.
        """
        budget = int(min(most, max(self.capacity, FEWEST_NODES)))
        return self.forest.grow(deadline, budget, SPLIT_SPARE * self.aim, self._collect)

    def coarsen(self, deadline: Deadline) -> None:
        """Drop splits that are not needed, in a part of the time left."""
        self.forest.coarsen(deadline.share(COARSEN_SHARE))

    def lift(self, reach: float) -> bool:
        """Steps that raise the certified margins of open leaves, as long as they close many.

        Args:
            reach: aims that a leaf's margin may lack; others are not lifted.

        Returns:
            Whether they closed a fair share.
        """
        opened = [tree.open for tree in self.forest.trees]
        left = total = sum(len(leaves) for leaves in opened)
        for attempt in range(LIFTS):
            start, before = self.walk.theta, left
            if not self._lift_once(opened, reach):
                break
            left = self.forest.close(opened)
            logger.info(
                "lift %d: %d of %d open, distance %g", attempt, left, total, self.walk.distance()
            )
            if left > (1 - WORTH) * before and attempt:
                self.walk.theta = start
                break
            if left == 0 or self.deadline.over:
                break
        return left <= (1 - WORTH) * total

    def _lift_once(self, opened: list[Integers], reach: float) -> bool:
        """The shortest step that lifts some of the open leaves; False when there is none."""
        forest, goal = self.forest, LEAF_AIM * self.aim
        jacobian, value = forest.leaf_rows(forest.choose(opened, -reach * self.aim, worst=False))
        if not len(value):
            return False
        proved = [
            np.setdiff1d(tree.leaves, leaves)
            for tree, leaves in zip(forest.trees, opened, strict=True)
        ]
        guard_rows, guards = forest.leaf_rows(forest.choose(proved, -np.inf, worst=True))
        point_rows, points = self.points.rows(near=2 * self.aim)
        rise = torch.cat(
            [goal - value, guards.clamp_max(goal) - guards, POINT_AIM * self.aim - points]
        )
        step = self.walk.shortest(torch.cat([jacobian, guard_rows, point_rows]), rise)
        if step is None:
            return False
        self.walk.theta = self.walk.theta + step
        return True

    def _collect(self, position: int, centers: Tensor) -> bool:
        """Whether a center of a box has a low margin; some such centers become points."""
        if not len(centers):
            return False
        margins = self.forest.rows[position].at_points(self.walk.theta, centers)
        low = centers[margins < LOW_CENTER * self.aim]
        chosen = torch.randperm(len(low), generator=self.forest.generator)[:100]
        self.points.add(position, low[chosen])
        return len(low) > 0
