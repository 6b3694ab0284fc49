"""Counterexample-guided edits over a whole region, proved by branch and bound.

Three things alternate. *Points*: an attack collects inputs of low margin; the nearest network (in
behavior) on which all collected margins reach the aim is found by a few re-linearized projections.
*Growth*: the region is halved where bounds are loose, breadth first; proved leaves drop out.
*Lift*: for the leaves that stay open, certified margins over their boxes become rows, and the
smallest step that raises them is taken: the network is edited for provability, not only for
safety. The tree outlives every change of weights, and in the end it is the certificate.

Wider margins need fewer leaves. So the aim starts low and is raised when trees outgrow what can be
checked in time; once all is proved, the network comes home as far as the trees can follow.

A disjunctive safe set chooses its disjunct by leaf and by point.

Source: the idea of counterexample-guided repair is old (e.g. Bauer-Marquart et al., "SpecRepair",
SPIN 2022); rows from open leaves in a behavior metric are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_prepared.bounds.branch import SplitTree
from torch_prepared.bounds.cost import crown_flops
from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._base import Candidate, Candidates, Editor, EditProblem
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._distance import quadratic_distance
from torch_prepared.edit._forest import Forest
from torch_prepared.edit._home import go_home
from torch_prepared.edit._leaves import PropertyRows
from torch_prepared.edit._points import PointSet
from torch_prepared.edit._repair import Repair
from torch_prepared.edit._vector import MOST_SCALARS, ParameterVector
from torch_prepared.edit._walk import Walk
from torch_prepared.errors import InfeasibleEditError
from torch_prepared.relax import evaluate_graph

__all__ = ["FEWEST_LEAVES", "RefineEditor", "affordable_leaves"]

logger = logging.getLogger(__name__)

ROUNDS = 200
SEEKS = 2  #: rounds of attack between growths
CHEAP = 2e-5  #: distance below which the aim may be raised before anything else
EARLY_RAISES, EARLY_SHARE = 3, 0.1  #: at most so often, in this share of the time left
RAISE, RAISES = 2.0, 8  #: of the aim, and times that trees that grow too large raise it at most
CROWDED, VAST = 0.4, 0.01  #: shares of open leaves and volume, beyond which it is raised twice
RAISE_SHARE = 0.5  #: of the capacity, past which trees are too large
OPEN_SHARE = 0.3  #: of these leaves, that must be open
LEAF_SECONDS, FLOP_SECONDS = 5.5e-5, 3.4e-11  #: that one thread of the checker takes
CHECKING = 0.25  #: share of the time that checking may take
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
        last_only: change the last layer only, unless layers were chosen.
    """

    name = "refine"
    damping: float = 0.03
    leaves: int = 300_000
    relative_margin: float = 0.05
    reach: float = 2.0
    last_only: bool = False

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Candidates:
        run = _Refinement.start(problem, self, deadline)
        yield from run.candidates()


@dataclass
class _Refinement:
    settings: RefineEditor
    repair: Repair
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
        most = 1 if settings.last_only else MOST_SCALARS
        vector = ParameterVector.chosen(problem.exact, problem.options.layers, most)
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
        pace = _pace(problem)
        return cls(settings, Repair(deadline, walk, forest, points, aim, capacity, pace))

    def candidates(self) -> Iterator[Candidate]:
        """Weights for which every leaf of every tree is proved, ever closer to the origin."""
        repair = self.repair
        repair.points.seek(repair.deadline, 1)  # more only where trees show that it is worth it
        early = repair.deadline.share(EARLY_SHARE)
        while self.raises < EARLY_RAISES and repair.walk.distance() < CHEAP and not early.over:
            self._raise_aim()
            repair.points.seek(repair.deadline, SEEKS)
        self._prove()
        interrupted = self._go_home()
        yield Candidate(
            repair.walk.stored(),
            note=f"{repair.forest.leaf_count} leaves",
            proofs=repair.forest.proofs(),
            details={"distance": repair.walk.distance()},
        )
        if interrupted:
            raise KeyboardInterrupt

    def _prove(self) -> None:
        """Grow and lift until every leaf is proved, in float64 at last.

        Trees that are too large raise the aim.

        Raises:
            InfeasibleEditError: time is over, or rounds are.
        """
        repair, forest, reach = self.repair, self.repair.forest, self.settings.reach
        for _ in range(ROUNDS):
            low = repair.grow(repair.deadline, self.settings.leaves)
            if forest.proved and not forest.bound():
                continue
            if forest.proved and self._is_small():
                return
            if repair.out_of_time:
                break
            proved = forest.proved
            lifted = forest.is_nearly_proved and not low and repair.lift(reach)
            if proved or (not lifted and self._is_too_large()):
                if self.raises >= RAISES:
                    break
                self._raise_aim()
            elif low:
                repair.points.satisfy(repair.deadline)
                repair.points.seek(repair.deadline, SEEKS)
            elif not lifted:
                repair.lift(reach)
            reach *= 1.0 if low else 2.0
        raise InfeasibleEditError(self._what_is_missing())

    def _go_home(self) -> bool:
        """Come as close to the origin as the trees can follow; whether that was interrupted."""
        repair, interrupted = self.repair, False
        kept = (repair.walk.theta, [tree.copy() for tree in repair.forest.trees])
        try:
            go_home(repair, self.settings.leaves)
        except KeyboardInterrupt:
            logger.warning("interrupted: checking what is proved so far; again to stop at once")
            interrupted = True
        if not repair.forest.bound_exactly(repair.deadline):
            repair.walk.theta, repair.forest.trees = kept
        return interrupted

    def _is_small(self) -> bool:
        """Whether the proved trees, cut down where they can be, are proved in float64 too."""
        repair = self.repair
        if not self.settled:
            repair.coarsen(repair.deadline)
        self.settled = True
        return repair.fits and repair.forest.bound_exactly(repair.deadline)

    @property
    def _is_crowded(self) -> bool:
        """Whether so much of the trees is open that they would outgrow everything.

        So it is before they have grown at all: a distance of next to nothing calls for large steps.
        """
        forest = self.repair.forest
        vast = max(tree.volume(tree.open) for tree in forest.trees) > VAST
        return vast and forest.open_count > CROWDED * forest.leaf_count

    def _is_too_large(self) -> bool:
        """Whether trees have outgrown a good part of what can be checked, and much is open."""
        forest, allowed = self.repair.forest, RAISE_SHARE * self.repair.capacity
        enough = 0.5 * allowed if self._is_crowded else allowed
        large = forest.leaf_count > enough and not self.settled
        return large and forest.open_count > OPEN_SHARE * enough

    def _raise_aim(self) -> None:
        """Aim at more, and start new trees: wider margins need fewer leaves."""
        repair = self.repair
        repair.aim_at((RAISE**2 if self._is_crowded else RAISE) * repair.aim)
        self.raises += 1
        self.settled = False
        repair.walk.look_around()
        repair.points.satisfy(repair.deadline)
        repair.forest.fell()
        logger.info("aim %g, distance %g", repair.aim, repair.walk.distance())

    def _what_is_missing(self) -> str:
        forest = self.repair.forest
        if forest.proved:
            return (
                f"{forest.leaf_count} leaves prove it; expected at most "
                f"{self.repair.capacity:.0f}, which can be checked in the time; allow more time"
            )
        return f"time over with open leaves in {forest.what_is_open()}"


def _reference(problem: EditProblem, inputs: Tensor) -> Reference:
    """Reference inputs plus inputs of the regions that are safe already."""
    with torch.no_grad():
        outputs = evaluate_graph(problem.graph, inputs.to(problem.graph.dtype)).flatten(1)
    reference = problem.reference
    return replace(
        reference, inputs=inputs.to(problem.graph.dtype), outputs=outputs, labels=None, blends=0
    )
