"""Counterexample-guided edits over a whole region, proved by branch and bound.

Three things alternate. *Points*: an attack collects inputs of low margin; the nearest network (in
behavior) on which all collected margins reach the aim is found by a few re-linearized projections.
*Growth*: the region is halved where bounds are loose, breadth first; proved leaves drop out.
*Lift*: for the leaves that stay open, certified margins over their boxes become rows, and the
smallest step that raises them is taken: the network is edited for provability, not only for
safety. The tree outlives every change of weights, and in the end it is the certificate.

Wider margins need fewer leaves. So the aim starts low and is raised when trees outgrow what can be
checked in time; once all is proved, the network comes home as far as the trees can follow, step by
step, each held back by the leaves that the step before would have opened.

A disjunctive safe set chooses its disjunct by leaf and by point.

Source: the idea of counterexample-guided repair is old (e.g. Bauer-Marquart et al., "SpecRepair",
SPIN 2022); rows from open leaves in a behavior metric are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.bounds.branch import SplitTree
from torch_prepared.bounds.cost import crown_flops
from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._base import Candidate, Candidates, Editor, EditProblem
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._distance import quadratic_distance
from torch_prepared.edit._forest import Forest, Integers
from torch_prepared.edit._leaves import PropertyRows
from torch_prepared.edit._points import PointSet
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.edit._walk import Walk
from torch_prepared.errors import InfeasibleEditError
from torch_prepared.relax import evaluate_graph

__all__ = ["FEWEST_LEAVES", "RefineEditor", "affordable_leaves"]

logger = logging.getLogger(__name__)

ROUNDS = 200
SEEKS = 2  #: rounds of attack between growths
HOME_ROUNDS = 6
LIFTS = 4
WORTH = 0.3  #: share of the open leaves that one more lift must close
CHEAP = 2e-5  #: distance below which the aim may be raised before anything else
EARLY_RAISES, EARLY_SHARE = 3, 0.1  #: at most so often, in this share of the time left
RAISE, RAISES = 2.0, 8  #: of the aim, and times that trees that grow too large raise it at most
CROWDED, VAST = 0.4, 0.01  #: shares of open leaves and volume, beyond which it is raised twice
RAISE_SHARE = 0.5  #: of the capacity, past which trees are too large
OPEN_SHARE = 0.3  #: of these leaves, that must be open
COARSEN_SHARE = 0.2  #: of the time left
SPLIT_SPARE = 0.07  #: share of the aim that new leaves must have in hand
LOW_CENTER = 0.2  #: margins of leaf centers below this share of the aim become points
LEAF_AIM, POINT_AIM = 0.15, 0.7  #: shares of the aim that lifted leaves and points must reach
POINT_FLOOR = 0.3  #: share of the aim that points must keep on the way home
HOME_AIM = 0.5  #: of the aim, on the way home
FIRST_CAUTION, LEAST_CAUTION, MOST_CAUTION = 0.3, 0.1, 20.0  #: a step goes 1 / (1 + it) of the way
FIRST_DROP, MOST_DROP = 0.5, 10.0  #: in aims, of leaves on the way home, to be split again
HOME_GAIN = 0.98  #: share of the distance that a way home must reach
FEWEST_NODES = 20_000  #: of one round of growth
START_SECONDS = 1.0  #: that checking takes before the first leaf, for planning
LEAF_SECONDS, FLOP_SECONDS = 5.5e-5, 3.4e-11  #: that one thread of the checker takes
CHECKING = 0.25  #: share of the time that checking may take
SPARE_SECONDS = 1.1  #: times what checking is expected to take
MOST_LEAVES = 200_000  #: a certificate's leaves, however much time there is
FEWEST_LEAVES = 50  #: that must be affordable for splitting to be worth a try


def affordable_leaves(problem: EditProblem, deadline: Deadline) -> float:
    """Leaves, of all properties together, that can be checked in a fair part of the time left."""
    return min(MOST_LEAVES, _pace(problem) * CHECKING * min(deadline.left, 3600.0))


def _pace(problem: EditProblem) -> float:
    """Leaves that the checker replays per second."""
    each = LEAF_SECONDS + FLOP_SECONDS * crown_flops(problem.exact)
    return (problem.options.threads or torch.get_num_threads()) / each


@dataclass
class RefineEditor(Editor):
    """Branch and bound with counterexample points and lifted leaves.

    Args:
        damping: weight of the 2-norm in the behavior metric, relative to the mean curvature.
        leaves: leaves bounded per round of growth.
        relative_margin: aim at this share of the margins' median size on the region.
        reach: lift only leaves whose margin lacks at most so many aims; the others are split.
    """

    name = "refine"
    damping: float = 0.03
    leaves: int = 300_000
    relative_margin: float = 0.05
    reach: float = 2.0

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Candidates:
        run = _Refinement.start(problem, self, deadline)
        yield from run.candidates()


@dataclass
class _Refinement:
    settings: RefineEditor
    deadline: Deadline
    walk: Walk
    aim: float
    forest: Forest
    points: PointSet
    capacity: float
    pace: float
    raises: int = 0
    settled: bool = False  #: whether the trees have been proved and cut down once

    @classmethod
    def start(cls, problem: EditProblem, settings: RefineEditor, deadline: Deadline) -> _Refinement:
        capacity = affordable_leaves(problem, deadline)
        if capacity < FEWEST_LEAVES:
            raise InfeasibleEditError(
                f"got a network and a time limit with room for {capacity:.0f} leaves; expected at "
                f"least {FEWEST_LEAVES}: use method 'sequential', or allow more time"
            )
        vector = ParameterVector.chosen(problem.exact, problem.options.layers)
        origin = vector.flatten(problem.exact.parameters).detach().clone()
        generator = torch.Generator().manual_seed(problem.options.seed)
        rows, kept, sizes = [], [problem.to_keep.inputs.double()], []
        for i, prop in enumerate(problem.properties):
            rows.append(
                PropertyRows(problem.exact, problem.graph, problem.batch[i : i + 1], vector)
            )
            inside = prop.region.sample(max(50, 300 // len(problem.properties)), generator)
            margins = rows[-1].at_points(origin, inside)
            kept.append(inside[margins > 0])
            sizes.append(margins.abs())
        known = _reference(problem, torch.cat(kept))
        measure = quadratic_distance(problem, vector, known, settings.damping)
        typical = float(torch.cat(sizes).median())
        aim = problem.options.margin or max(settings.relative_margin * typical, 1e-9)
        walk = Walk(problem, vector, measure, origin, origin)
        forest = Forest(walk, rows, [SplitTree(r.batch, slack=0.01 * aim) for r in rows], generator)
        points = PointSet(walk, problem.properties, rows, aim, generator)
        return cls(settings, deadline, walk, aim, forest, points, capacity, _pace(problem))

    def candidates(self) -> Iterator[Candidate]:
        """Weights for which every leaf of every tree is proved, ever closer to the origin."""
        self.points.seek(self.deadline, 1)  # more only where trees show that it is worth it
        early = self.deadline.share(EARLY_SHARE)
        while self.raises < EARLY_RAISES and self.walk.distance() < CHEAP and not early.over:
            self._raise_aim()
            self.points.seek(self.deadline, SEEKS)
        self._prove(ROUNDS, RAISES)
        if not self._is_done():
            raise InfeasibleEditError(self._what_is_missing())
        interrupted = False
        try:
            self._go_home()
        except KeyboardInterrupt:
            logger.warning("interrupted: checking what is proved so far; again to stop at once")
            interrupted = True
        yield Candidate(
            self.walk.stored(),
            note=f"{self.forest.leaf_count} leaves",
            proofs=self.forest.proofs(),
            details={"distance": self.walk.distance()},
        )
        if interrupted:
            raise KeyboardInterrupt

    def _prove(self, rounds: int, raises: int) -> None:
        """Grow and lift until every leaf is proved, in float64 at last, or rounds are over.

        Trees that are too large raise the aim, as long as it was raised less than ``raises`` times.
        """
        reach, forest = self.settings.reach, self.forest
        for _ in range(rounds):
            low = forest.grow(self.deadline, self._budget, SPLIT_SPARE * self.aim, self._collect)
            if forest.proved and not forest.bound():
                continue
            if forest.proved and self._is_small():
                return
            overgrown = self.settled and forest.leaf_count > self.capacity
            if self._out_of_time() or (overgrown and not raises):
                return
            proved = forest.proved
            lifted = forest.is_nearly_proved and not low and self._lift(reach)
            if proved or (not lifted and self._is_too_large()):
                if self.raises >= raises:
                    return
                self._raise_aim()
            elif low:
                self.points.satisfy(self.deadline)
                self.points.seek(self.deadline, SEEKS)
            elif not lifted:
                self._lift(reach)
            reach *= 1.0 if low else 2.0

    @property
    def _budget(self) -> int:
        """Nodes of one round of growth; few where few leaves can be checked."""
        return int(min(self.settings.leaves, max(self.capacity, FEWEST_NODES)))

    def _is_small(self) -> bool:
        """Whether the proved trees, cut down where they can be, are proved in float64 too."""
        if not self.settled:
            self.forest.coarsen(self.deadline.share(COARSEN_SHARE))
        self.settled = True
        return self.forest.leaf_count <= self.capacity and self.forest.bound_exactly(self.deadline)

    def _is_done(self) -> bool:
        return self.forest.proved and self.forest.leaf_count <= self.capacity

    @property
    def _is_crowded(self) -> bool:
        """Whether so much of the trees is open that they would outgrow everything.

        So it is before they have grown at all: a distance of next to nothing calls for large steps.
        """
        forest = self.forest
        vast = max(tree.volume(tree.open) for tree in forest.trees) > VAST
        return vast and forest.open_count > CROWDED * forest.leaf_count

    def _is_too_large(self) -> bool:
        """Whether trees have outgrown a good part of what can be checked, and much is open."""
        allowed = RAISE_SHARE * self.capacity
        enough = 0.5 * allowed if self._is_crowded else allowed
        large = self.forest.leaf_count > enough and not self.settled
        return large and self.forest.open_count > OPEN_SHARE * enough

    def _raise_aim(self) -> None:
        """Aim at more, and start new trees: wider margins need fewer leaves."""
        self._aim_at((RAISE**2 if self._is_crowded else RAISE) * self.aim)
        self.raises += 1
        self.settled = False
        self.walk.look_around()
        self.points.satisfy(self.deadline)
        self.forest.fell()
        logger.info("aim %g, distance %g", self.aim, self.walk.distance())

    def _out_of_time(self) -> bool:
        """Whether what is left is needed for checking the trees."""
        leaves = min(self.forest.leaf_count, self.capacity)
        return self.deadline.left < START_SECONDS + SPARE_SECONDS * leaves / self.pace

    def _what_is_missing(self) -> str:
        if self.forest.proved:
            return (
                f"{self.forest.leaf_count} leaves prove it; expected at most "
                f"{self.capacity:.0f}, which can be checked in the time; allow more time"
            )
        return f"time over with open leaves in {self.forest.what_is_open()}"

    def _go_home(self) -> None:
        """Move toward the origin as long as the properties can be proved again.

        Leaves may lose some of their margin on the way, to be split again: the more, the better
        that went, and the less room is left in the trees.
        """
        caution, drop, most = FIRST_CAUTION, FIRST_DROP * self.aim, MOST_DROP * self.aim
        self.walk.look_around()
        self._aim_at(HOME_AIM * self.aim)
        while not self._out_of_time() and caution < MOST_CAUTION and drop < most:
            kept, distance = (self.walk.theta, self.forest.trees), self.walk.distance()
            room, gained = max(0.0, 1.0 - self.forest.leaf_count / self.capacity), False
            try:
                step = self._step_home(caution, drop * room)
                if step is None:
                    return
                self.walk.theta = self.walk.theta + step
                self.forest.trees = self.forest.copy().trees
                self._prove(HOME_ROUNDS, 0)
                closer, done = self.walk.distance(), self._is_done()
                gained = done and closer < HOME_GAIN * distance
            finally:  # also when interrupted
                if not gained:
                    self.walk.theta, self.forest.trees = kept
            logger.info(
                "home: caution %g, drop %g, %s, distance %g -> %g",
                caution, drop, "proved" if done else "not proved", distance, closer,
            )  # fmt: skip
            if gained:
                caution, drop = max(0.5 * caution, LEAST_CAUTION), 2.0 * drop
            elif done:
                caution, drop = max(0.5 * caution, LEAST_CAUTION), 4.0 * drop
                self._aim_at(HOME_AIM * self.aim)
            else:
                caution, drop = 3.0 * caution, 0.3 * drop

    def _aim_at(self, aim: float) -> None:
        self.aim = self.points.aim = aim

    def _step_home(self, caution: float, loss: float) -> Tensor | None:
        """The step toward the nearest network on linearized leaves and points, made shorter.

        Leaves may lose a margin of ``loss``.
        """
        spare = LEAF_AIM * self.aim
        leaves = [tree.leaves for tree in self.forest.trees]
        chosen = self.forest.choose(leaves, -np.inf, worst=True)
        normals, margins = self.points.rows(near=2 * self.aim)
        rise = margins.clamp_max(POINT_FLOOR * self.aim) - margins
        for again in (True, False):
            jacobian, value = self.forest.leaf_rows(chosen)
            normals = torch.cat([normals, jacobian])
            rise = torch.cat([rise, value.clamp_max(spare) - loss - value])
            found = self.walk.nearest(normals, rise * (1 + caution))
            if found is None:
                return None
            step = found / (1 + caution)
            if again:
                chosen = self._surprises(step, chosen, spare, loss)
                if not any(len(part) for part in chosen):
                    break
        return step

    def _surprises(
        self, step: Tensor, known: list[Integers], spare: float, loss: float
    ) -> list[Integers]:
        """The leaves that a step would open most, other than known ones."""
        before, moved = self.forest, self.forest.copy()
        theta = self.walk.theta
        self.walk.theta = theta + step
        moved.bound()
        self.walk.theta = theta
        opened = []
        for old, new, used in zip(before.trees, moved.trees, known, strict=True):
            rest = np.setdiff1d(old.leaves, used)
            goal = np.minimum(old.margins(rest), spare) - loss
            opened.append(rest[~(new.margins(rest) >= goal)])
        return moved.choose(opened, -np.inf, worst=True)

    def _collect(self, position: int, centers: Tensor) -> bool:
        """Whether a center of a box has a low margin; some such centers become points."""
        if not len(centers):
            return False
        margins = self.forest.rows[position].at_points(self.walk.theta, centers)
        low = centers[margins < LOW_CENTER * self.aim]
        chosen = torch.randperm(len(low), generator=self.forest.generator)[:100]
        self.points.add(position, low[chosen])
        return len(low) > 0

    def _lift(self, reach: float) -> bool:
        """Steps that raise the certified margins of open leaves, as long as they close many.

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
        trees, goal = self.forest.trees, LEAF_AIM * self.aim
        forest = self.forest
        jacobian, value = forest.leaf_rows(forest.choose(opened, -reach * self.aim, worst=False))
        if not len(value):
            return False
        proved = [np.setdiff1d(tree.leaves, o) for tree, o in zip(trees, opened, strict=True)]
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


def _reference(problem: EditProblem, inputs: Tensor) -> Reference:
    """Reference inputs plus inputs of the regions that are safe already."""
    with torch.no_grad():
        outputs = evaluate_graph(problem.graph, inputs.to(problem.graph.dtype)).flatten(1)
    return Reference(inputs.to(problem.graph.dtype), outputs, None, problem.reference.source)
