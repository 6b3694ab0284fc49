"""Counterexample-guided edits over a whole region, proved by branch and bound.

Three things alternate. *Points*: an attack collects inputs of low margin; the nearest network (in
the behavior metric) on which all collected margins reach the aim is found by a few re-linearized
projections. *Growth*: the region is halved where bounds are loose, breadth first; proved leaves
drop out. *Lift*: for the leaves that stay open, certified margins over their boxes become rows,
and the smallest step that raises them is taken: the network is edited for provability, not only
for safety. The tree outlives every change of weights, and in the end it is the certificate.

A disjunctive safe set chooses its disjunct by leaf and by point.

Source: the idea of counterexample-guided repair is old (e.g. Bauer-Marquart et al., "SpecRepair",
SPIN 2022); rows from open leaves in a behavior metric are ours.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.bounds._leaf import LeafEngine, SlopedEngine
from torch_prepared.bounds.branch import SplitTree
from torch_prepared.bounds.engine import leaf_engine
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._base import Candidate, Editor, EditProblem
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._certify import tree_proof
from torch_prepared.edit._leaves import PropertyRows
from torch_prepared.edit._points import PointSet
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.edit._walk import Walk
from torch_prepared.errors import InfeasibleEditError
from torch_prepared.relax import evaluate_graph

__all__ = ["RefineEditor"]

logger = logging.getLogger(__name__)

LEAF_ROWS = 150
ROUNDS = 200
SHRINK_ROUNDS = 3
LIFTS = 4
WORTH = 0.3  #: share of the open leaves that one more lift must close
RESERVED = 0.25  #: share of the time for checking that the editor leaves; the rest is the driver's
OPEN_SHARE = 0.2  #: share of the capacity that may be open when trees have reached it
RAISES = 2  #: times that the aim is doubled for trees that grow too large
FEW = 2000  #: nodes bounded in float64 to mend a proof
RECENT = 3  #: chunks of leaves by which growth is judged
THIN = 1e-4  #: share of the volume below which leaves are lifted rather than split ever more
SPLIT_SPARE = 0.07  #: share of the aim that new leaves must have in hand
SPARE = 0.8  #: share of the capacity to which a tree is cut down
LOW_CENTER = 0.2  #: margins of leaf centers below this share of the aim become points
LEAF_AIM, POINT_AIM = 0.15, 0.7  #: shares of the aim that lifted leaves and points must reach
CHECKED_PER_SECOND = 2800  #: leaves that one thread of the checker replays, for planning
CHECKING = 0.35  #: share of the time that checking may take
MOST_LEAVES = 200_000  #: a certificate's leaves, however much time there is


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

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Iterator[Candidate]:
        run = _Refinement.start(problem, self, deadline)
        yield from run.candidates()


@dataclass
class _Refinement:
    settings: RefineEditor
    deadline: Deadline
    walk: Walk
    aim: float
    rows: list[PropertyRows]
    trees: list[SplitTree]
    points: PointSet
    generator: torch.Generator
    capacity: float
    pace: float
    raises: int = 0
    settled: bool = False  #: whether all leaves have been proved once

    @classmethod
    def start(cls, problem: EditProblem, settings: RefineEditor, deadline: Deadline) -> _Refinement:
        vector = ParameterVector.of(problem.exact, problem.options.layers)
        origin = vector.flatten(problem.exact.parameters).detach().clone()
        generator = torch.Generator().manual_seed(problem.options.seed)
        rows, kept, sizes = [], [problem.reference.inputs.double()], []
        for i, prop in enumerate(problem.properties):
            rows.append(
                PropertyRows(problem.exact, problem.graph, problem.batch[i : i + 1], vector)
            )
            inside = prop.region.sample(max(50, 300 // len(problem.properties)), generator)
            margins = rows[-1].at_points(origin, inside)
            kept.append(inside[margins > 0])
            sizes.append(margins.abs())
        metric = problem.metric(vector, _reference(problem, torch.cat(kept)), settings.damping)
        typical = float(torch.cat(sizes).median())
        aim = problem.options.margin or max(settings.relative_margin * typical, 1e-9)
        walk = Walk(problem, vector, metric, origin, origin)
        trees = [SplitTree(r.batch, slack=0.01 * aim) for r in rows]
        points = PointSet(walk, problem.properties, rows, aim, generator)
        pace = CHECKED_PER_SECOND * torch.get_num_threads()
        capacity = min(MOST_LEAVES, pace * CHECKING * min(deadline.left, 3600.0))
        return cls(settings, deadline, walk, aim, rows, trees, points, generator, capacity, pace)

    def candidates(self) -> Iterator[Candidate]:
        """Weights for which every leaf of every tree is proved, ever closer to the origin."""
        self.points.seek(self.deadline)
        self._prove(ROUNDS)
        if not self._is_proved():
            raise InfeasibleEditError(self._left_open())
        self._shrink()
        yield self._candidate()

    def _candidate(self) -> Candidate:
        """The weights, as stored, with the trees as proofs."""
        return Candidate(
            self.walk.stored(),
            note=f"{self._leaf_count()} leaves",
            proofs=tuple(
                tree_proof(tree, engine, self.walk.problem.exact)
                for tree, engine in zip(
                    self.trees, self._engines(self.walk.problem.exact), strict=True
                )
            ),
            details={"distance": self.walk.distance()},
        )

    def _prove(self, rounds: int) -> None:
        """Grow and lift until every leaf is proved, in float64 at last, or rounds are over."""
        reach = self.settings.reach
        for _ in range(rounds):
            low = self._grow(self.walk.problem.graph)
            self.settled |= self._is_proved()
            if self._is_proved() and not self._proves(self.walk.problem.graph):
                continue
            if self._is_proved():
                self._coarsen()
                if self._leaf_count() <= self.capacity:
                    if self._proves_exactly():
                        return
                else:
                    self._merge(reach)
            if self._out_of_time():
                return
            if self._is_too_large():
                self._raise_aim()
            elif low:
                self.points.satisfy(self.deadline)
                self.points.seek(self.deadline)
            else:
                self._lift(reach)
                reach *= 2.0

    def _is_too_large(self) -> bool:
        """Whether trees at half their capacity, then at all, leave a good part of it open."""
        allowed = self.capacity * (self.raises + 1) / RAISES
        if self.settled or self.raises == RAISES or self._leaf_count() < allowed:
            return False
        return sum(len(tree.open) for tree in self.trees) > OPEN_SHARE * allowed

    def _raise_aim(self) -> None:
        """Aim at more: wider margins need fewer leaves."""
        self.aim *= 2.0
        self.raises += 1
        self.points.aim = self.aim
        self.points.satisfy(self.deadline)
        logger.info("aim %g, distance %g", self.aim, self.walk.distance())

    def _proves(self, graph: Graph) -> bool:
        """Bound all leaves anew, the proved ones included."""
        for tree, engine in zip(self.trees, self._engines(graph), strict=True):
            tree.bound(engine, tree.leaves, 4096)
        return self._is_proved()

    def _proves_exactly(self) -> bool:
        """Bound all leaves in float64; the few that float32 had taken for proved are split."""
        for tree, engine in zip(self.trees, self._engines(self.walk.problem.exact), strict=True):
            tree.bound(engine, tree.leaves, 4096)
            for _ in tree.grow(engine, self.deadline, FEW):
                pass
        return self._is_proved()

    def _is_proved(self) -> bool:
        return all(tree.proved for tree in self.trees)

    def _leaf_count(self) -> int:
        return sum(len(tree.leaves) for tree in self.trees)

    def _out_of_time(self) -> bool:
        """Whether what is left is needed for checking the trees."""
        return self.deadline.left < RESERVED * min(self._leaf_count(), self.capacity) / self.pace

    def _shrink(self) -> None:
        """Move toward the origin as long as the property can be proved again."""
        caution = 0.5
        while not self._out_of_time() and caution < 20:
            kept, distance = (self.walk.theta, self.trees), self.walk.distance()
            step = self._step_home(caution)
            if step is None:
                return
            self.walk.theta = self.walk.theta + step
            self.trees = [tree.copy() for tree in self.trees]
            self._prove(SHRINK_ROUNDS)
            closer = self.walk.distance()
            if (
                self._is_proved()
                and self._leaf_count() <= self.capacity
                and (closer < 0.98 * distance)
            ):
                logger.info("shrink: distance %g -> %g", distance, closer)
                caution = max(0.5 * caution, 0.25)
                continue
            self.walk.theta, self.trees = kept
            caution *= 4

    def _step_home(self, caution: float) -> Tensor | None:
        """The step to the origin's projection onto linearized leaves and points, made shorter."""
        leaves = [tree.leaves for tree in self.trees]
        jacobian, value = self._leaf_rows(leaves, True, torch.inf)
        point_rows, point_values = self.points.rows(near=2 * self.aim)
        jacobian, value = torch.cat([jacobian, point_rows]), torch.cat([value, point_values])
        goal = torch.minimum(value, torch.full_like(value, LEAF_AIM * self.aim))
        step = self.walk.nearest(jacobian, (goal - value) * (1 + caution))
        return None if step is None else step / (1 + caution)

    def _left_open(self) -> str:
        parts = []
        for tree, prop in zip(self.trees, self.walk.problem.properties, strict=True):
            leaves = tree.open
            if len(leaves):
                share = tree.volume(leaves)
                parts.append(f"{prop.name}: {len(leaves)} leaves, {share:.2g} of the volume")
        return "time over with open leaves in " + "; ".join(parts)

    # Leaves

    def _engines(self, graph: Graph) -> list[LeafEngine]:
        """Engines for the current weights, as they would be stored, in the graph's dtype."""
        changed = {name: value.to(graph.dtype) for name, value in self.walk.stored().items()}
        return [leaf_engine(graph, rows.batch, changed) for rows in self.rows]

    def _grow(self, graph: Graph) -> bool:
        """Bound open leaves at the current weights, then split within the round's budget.

        Splitting stops early at leaves whose center has a low margin: no splitting proves those.
        Their centers become points, and the answer is True.
        """
        found = False
        for i, engine in enumerate(self._engines(graph)):
            tree = self.trees[i]
            tree.bound(engine, tree.open, 4096)
            budget = max(1000, self.settings.leaves // len(self.trees))
            found |= self._collect(i, tree.open)
            recent: deque[tuple[int, int]] = deque(maxlen=RECENT)
            growth = tree.grow(engine, self.deadline, budget, spare=SPLIT_SPARE * self.aim)
            for bounded, failing in growth:
                recent.append((bounded, len(failing)))
                if self._collect(i, failing):
                    found = True
                    break
                if self._is_thin(tree, recent):
                    break
            fresh = tree.open
            tree.bound(engine, fresh[~np.isfinite(tree.margins(fresh))], 4096)
            logger.info(
                "grow: %d leaves, %d open, volume %g",
                len(tree.leaves), len(tree.open), tree.volume(tree.open),
            )  # fmt: skip
        return found

    def _is_thin(self, tree: SplitTree, recent: Sequence[tuple[int, int]]) -> bool:
        """Whether what is open is next to nothing, yet grows: then lifting is cheap."""
        bounded, failing = (sum(counts) for counts in zip(*recent, strict=True))
        exploding = len(recent) == RECENT and 2 * failing > bounded
        return exploding and tree.volume(tree.open) < THIN

    def _collect(self, position: int, nodes: NDArray[np.int64]) -> bool:
        """Whether the center of a node has a low margin; some such centers become points."""
        if not len(nodes):
            return False
        center = self.trees[position].boxes(nodes).center
        margins = self.rows[position].at_points(self.walk.theta, center)
        low = center[margins < LOW_CENTER * self.aim]
        chosen = torch.randperm(len(low), generator=self.generator)[:100]
        self.points.add(position, low[chosen])
        return len(low) > 0

    def _coarsen(self) -> None:
        """Drop splits that the edited network does not need."""
        for tree, engine in zip(self.trees, self._engines(self.walk.problem.graph), strict=True):
            before = len(tree.leaves)
            tree.coarsen(engine)
            logger.info("coarsen: %d of %d leaves remain", len(tree.leaves), before)

    def _merge(self, reach: float) -> None:
        """Undo splits whose boxes lack little as a whole, for a certificate that can be checked.

        They are open then, to be lifted.
        """
        excess = self._leaf_count() - SPARE * self.capacity
        for tree in self.trees:
            tree.merge(-reach * self.aim, int(excess / len(self.trees)))
            logger.info("merge: %d leaves, %d open", len(tree.leaves), len(tree.open))

    def _lift(self, reach: float) -> None:
        """Steps that raise the certified margins of open leaves, as long as they close many."""
        opened = [tree.open for tree in self.trees]
        left = total = sum(len(o) for o in opened)
        for attempt in range(LIFTS):
            start, before = self.walk.theta, left
            if not self._lift_once(opened, reach):
                return
            for tree, engine, leaves in zip(
                self.trees, self._engines(self.walk.problem.graph), opened, strict=True
            ):
                tree.bound(engine, leaves, 4096)
                if isinstance(engine, SlopedEngine):
                    tree.search(engine, self._some(tree.open), 0.0)
            left = sum(len(tree.open) for tree in self.trees)
            logger.info(
                "lift %d: %d of %d open, distance %g", attempt, left, total, self.walk.distance()
            )
            if left > (1 - WORTH) * before and attempt:
                self.walk.theta = start
                return
            if left == 0 or self.deadline.over:
                return

    def _some(self, nodes: NDArray[np.int64]) -> NDArray[np.int64]:
        """At most a chunk of nodes, drawn at random."""
        chosen: NDArray[np.int64] = torch.randperm(len(nodes), generator=self.generator).numpy()
        return nodes[chosen[:4096]]

    def _lift_once(self, opened: list[NDArray[np.int64]], reach: float) -> bool:
        """The shortest step that lifts some of the open leaves; False when there is none."""
        jacobian, value = self._leaf_rows(opened, False, reach)
        if not len(value):
            return False
        goal = LEAF_AIM * self.aim
        proved = [np.setdiff1d(tree.leaves, o) for tree, o in zip(self.trees, opened, strict=True)]
        guard_rows, guards = self._leaf_rows(proved, True, torch.inf)
        point_rows, points = self.points.rows(near=2 * self.aim)
        rise = torch.cat(
            [goal - value, guards.clamp_max(goal) - guards, POINT_AIM * self.aim - points]
        )
        step = self.walk.shortest(torch.cat([jacobian, guard_rows, point_rows]), rise)
        if step is None:
            return False
        self.walk.theta = self.walk.theta + step
        return True

    def _leaf_rows(
        self, opened: list[NDArray[np.int64]], worst: bool, reach: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients (m, p) and margins (m,) of leaves whose margins lack at most ``reach`` aims."""
        theta = self.walk.theta
        found, values = [theta.new_zeros(0, len(theta))], [theta.new_zeros(0)]
        share = max(20, LEAF_ROWS // len(self.trees))
        engines = self._engines(self.walk.problem.exact)
        for tree, engine, rows, leaves in zip(self.trees, engines, self.rows, opened, strict=True):
            margins = tree.margins(leaves)
            if not len(leaves):
                continue
            near = margins >= -reach * self.aim
            leaves, margins = leaves[near], margins[near]
            if not len(leaves):
                continue
            order = np.argsort(margins)
            if not worst:
                order = torch.randperm(len(leaves), generator=self.generator).numpy()
            chosen = leaves[order[:share]]
            boxes, alphas = tree.boxes(chosen), None
            if isinstance(engine, SlopedEngine):
                slopes = engine.slopes.chosen(boxes, tree.shares(chosen, engine.slopes.size))
                alphas = engine.slopes.by_node(slopes.double())
            jacobian, value = rows.leaf_rows(theta, boxes, alphas)
            found.append(jacobian)
            values.append(value)
        return torch.cat(found), torch.cat(values)


def _reference(problem: EditProblem, inputs: Tensor) -> Reference:
    """Reference inputs plus inputs of the regions that are safe already."""
    with torch.no_grad():
        outputs = evaluate_graph(problem.graph, inputs.to(problem.graph.dtype)).flatten(1)
    return Reference(inputs.to(problem.graph.dtype), outputs, None, problem.reference.source)
