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
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.bounds.branch import LeafEngine, SplitTree
from torch_prepared.bounds.engine import leaf_engine
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._base import Candidate, Editor, EditProblem
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._certify import tree_proof
from torch_prepared.edit._leaves import PropertyRows, low_points
from torch_prepared.edit._metric import Metric
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.errors import InfeasibleEditError
from torch_prepared.relax import evaluate_graph
from torch_prepared.solvers import Status, gram_matrix, project

__all__ = ["RefineEditor"]

logger = logging.getLogger(__name__)

POINT_ROWS = 400
POINT_STEPS = 30
FAIR_SHARE = 0.2
LEAF_ROWS = 300
ROUNDS = 200
SHRINK_ROUNDS = 3
CHECKED_PER_SECOND = 900  #: leaves that the checker replays, for planning
MOST_LEAVES = 20_000


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
    damping: float = 0.1
    leaves: int = 100_000
    relative_margin: float = 0.1
    reach: float = 10.0

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Iterator[Candidate]:
        run = _Refinement.start(problem, self, deadline)
        for theta in run.proved():
            yield run.candidate(theta)


@dataclass
class _Site:
    """One property: its tree, its rows and the points collected for it."""

    rows: PropertyRows
    tree: SplitTree
    points: Tensor


@dataclass
class _Refinement:
    problem: EditProblem
    settings: RefineEditor
    deadline: Deadline
    vector: ParameterVector
    metric: Metric
    origin: Tensor
    theta: Tensor
    aim: float
    sites: list[_Site]
    generator: torch.Generator = field(default_factory=torch.Generator)

    @classmethod
    def start(cls, problem: EditProblem, settings: RefineEditor, deadline: Deadline) -> _Refinement:
        vector = ParameterVector.of(problem.exact, problem.options.layers)
        origin = vector.flatten(problem.exact.parameters).detach().clone()
        generator = torch.Generator().manual_seed(problem.options.seed)
        sites, kept, sizes = [], [problem.reference.inputs.double()], []
        for i, prop in enumerate(problem.properties):
            rows = PropertyRows(problem.exact, problem.batch[i : i + 1], vector)
            inside = prop.region.sample(max(50, 300 // len(problem.properties)), generator)
            margins = rows.at_points(origin, inside)
            kept.append(inside[margins > 0])
            sizes.append(margins.abs())
            empty = torch.zeros(0, inside.shape[1], dtype=torch.float64)
            sites.append(_Site(rows, SplitTree(rows.batch), empty))
        reference = _reference(problem, torch.cat(kept))
        metric = problem.metric(vector, reference, settings.damping)
        typical = float(torch.cat(sizes).median())
        aim = problem.options.margin or max(settings.relative_margin * typical, 1e-9)
        for site in sites:
            site.tree.slack = 0.01 * aim
        return cls(
            problem,
            settings,
            deadline,
            vector,
            metric,
            origin,
            origin.clone(),
            aim,
            sites,
            generator,
        )

    def candidate(self, theta: Tensor) -> Candidate:
        """The weights, as stored, with the trees as proofs."""
        details = {"distance": self.metric.norm_squared(theta - self.origin)}
        return Candidate(
            self.problem.store(self.vector.split(theta)),
            note=f"{sum(len(s.tree.leaves) for s in self.sites)} leaves",
            proofs=tuple(tree_proof(s.tree, self.problem.exact) for s in self.sites),
            details=details,
        )

    def proved(self) -> Iterator[Tensor]:
        """Weights for which every leaf of every tree is proved; the closest ones found."""
        self._fix_points()
        self._prove(ROUNDS)
        if not self._is_proved():
            raise InfeasibleEditError(self._left_open())
        self._shrink()
        yield self.theta

    def _prove(self, rounds: int) -> None:
        """Grow and lift until every leaf is proved, in float64 at last, or rounds are over."""
        for done in range(rounds):
            self._grow(self.problem.graph)
            if self._is_proved():
                self._coarsen()
                self._grow(self.problem.exact)
                if self._is_proved():
                    return
            if self._out_of_time():
                return
            if self._violated_leaves():
                self._fix_points()
            else:
                self._lift(self.settings.reach * 3.0**done)

    def _is_proved(self) -> bool:
        return all(site.tree.proved for site in self.sites)

    def _out_of_time(self) -> bool:
        """Whether what is left is needed for checking the trees."""
        leaves = sum(len(site.tree.leaves) for site in self.sites)
        return self.deadline.left < min(leaves, MOST_LEAVES) / CHECKED_PER_SECOND

    def _shrink(self) -> None:
        """Move toward the origin as long as the property can be proved again."""
        caution = 0.5
        while not self._out_of_time() and caution < 20:
            kept, distance = (self.theta, [s.tree for s in self.sites]), self._distance()
            step = self._step_home(caution)
            if step is None:
                return
            self.theta = self.theta + step
            for site in self.sites:
                site.tree = site.tree.copy()
            self._prove(SHRINK_ROUNDS)
            closer = self._distance()
            if self._is_proved() and closer < 0.98 * distance:
                logger.info("shrink: distance %g -> %g", distance, closer)
                caution = max(0.5 * caution, 0.25)
                continue
            self.theta = kept[0]
            for site, tree in zip(self.sites, kept[1], strict=True):
                site.tree = tree
            caution *= 4

    def _step_home(self, caution: float) -> Tensor | None:
        """The step to the origin's projection onto linearized leaves and points, made shorter."""
        leaves = [site.tree.leaves for site in self.sites]
        jacobian, value = self._leaf_rows(leaves, True, torch.inf)
        point_rows, point_values = self._point_rows(near=2 * self.aim)
        jacobian, value = torch.cat([jacobian, point_rows]), torch.cat([value, point_values])
        moved = self.theta - self.origin
        goal = torch.minimum(value, torch.full_like(value, 0.3 * self.aim))
        wanted = (goal - value) * (1 + caution) + jacobian @ moved
        found = self._project(jacobian, wanted)
        return None if found is None else (found - moved) / (1 + caution)

    def _left_open(self) -> str:
        parts = []
        for site, prop in zip(self.sites, self.problem.properties, strict=True):
            leaves = site.tree.open
            if len(leaves):
                share = site.tree.volume(leaves)
                parts.append(f"{prop.name}: {len(leaves)} leaves, {share:.2g} of the volume")
        return "time over with open leaves in " + "; ".join(parts)

    # Points

    def _fix_points(self) -> None:
        """Attack and edit until nothing of low margin is found."""
        for step in range(ROUNDS):
            found = 0
            for site, prop in zip(self.sites, self.problem.properties, strict=True):
                low = low_points(site.rows, self.theta, prop.region, 0.3 * self.aim, self.generator)
                found += len(low)
                site.points = torch.cat([site.points, low])
            if not found or self.deadline.over:
                return
            self._satisfy_points()
            logger.info("points %d: %d new, distance %g", step, found, self._distance())

    def _satisfy_points(self) -> None:
        """Raise the margins of all collected points to the aim.

        First by the projection of the origin onto the linearized rows, which forgets earlier
        steps; where linearization goes too far, by steps from where we are, shortened until the
        lowest true margin rises by a fair share of what they promise.
        """
        for _ in range(POINT_STEPS):
            lowest = self._lowest_point(self.theta)
            if lowest >= 0.95 * self.aim:
                return
            jacobian, value = self._point_rows()
            wanted = 1.02 * self.aim - value
            home = jacobian @ (self.theta - self.origin)
            trials = [(self.origin, wanted + home)]
            trials += [
                (self.theta, wanted.clamp_max(wanted.max() * s)) for s in (1.0, 0.3, 0.1, 0.03)
            ]
            for start, rise in trials:
                step = self._project(jacobian, rise)
                if step is None:
                    continue
                promised = min(float(rise.max()), self.aim - lowest)
                if self._lowest_point(start + step) > lowest + FAIR_SHARE * promised:
                    self.theta = start + step
                    break
            else:
                return

    def _lowest_point(self, theta: Tensor) -> float:
        """The smallest margin of all collected points."""
        margins = [s.rows.at_points(theta, s.points).min() for s in self.sites if len(s.points)]
        return float(torch.stack(margins).min()) if margins else torch.inf

    def _point_rows(self, near: float = torch.inf) -> tuple[Tensor, Tensor]:
        """Rows of the points of lowest margin, over all properties."""
        rows, values = [], []
        share = max(20, POINT_ROWS // len(self.sites))
        for site in self.sites:
            if not len(site.points):
                continue
            margins = site.rows.at_points(self.theta, site.points)
            chosen = margins.argsort()[:share]
            chosen = chosen[margins[chosen] < near]
            if len(chosen):
                jacobian, value = site.rows.point_rows(self.theta, site.points[chosen])
                rows.append(jacobian)
                values.append(value)
        if not rows:
            return self.theta.new_zeros(0, len(self.theta)), self.theta.new_zeros(0)
        return torch.cat(rows), torch.cat(values)

    # Leaves

    def _engines(self, graph: Graph) -> list[LeafEngine]:
        """Engines for the current weights, as they would be stored, in the graph's dtype."""
        stored = self.problem.store(self.vector.split(self.theta))
        changed = {name: value.to(graph.dtype) for name, value in stored.items()}
        return [leaf_engine(graph, site.rows.batch, changed) for site in self.sites]

    def _grow(self, graph: Graph) -> None:
        """Bound all leaves at the current weights, then split within the round's budget."""
        for site, engine in zip(self.sites, self._engines(graph), strict=True):
            site.tree.bound(engine, site.tree.leaves, 4096)
            budget = max(1000, self.settings.leaves // len(self.sites))
            for _ in site.tree.grow(engine, self.deadline, budget):
                pass
            fresh = site.tree.open
            site.tree.bound(engine, fresh[~np.isfinite(site.tree.margins(fresh))], 4096)
            logger.info(
                "grow: %d leaves, %d open, volume %g",
                len(site.tree.leaves), len(site.tree.open), site.tree.volume(site.tree.open),
            )  # fmt: skip

    def _coarsen(self) -> None:
        """Drop splits that the edited network does not need."""
        for site, engine in zip(self.sites, self._engines(self.problem.exact), strict=True):
            before = len(site.tree.leaves)
            site.tree.coarsen(engine)
            logger.info("coarsen: %d of %d leaves remain", len(site.tree.leaves), before)

    def _violated_leaves(self) -> bool:
        """Whether a leaf's center has a low margin; such centers become points."""
        found = False
        for site in self.sites:
            box = site.tree.boxes(site.tree.open)
            center = box.center
            margins = site.rows.at_points(self.theta, center)
            low = center[margins < 0.2 * self.aim]
            if len(low):
                chosen = torch.randperm(len(low), generator=self.generator)[:100]
                site.points = torch.cat([site.points, low[chosen]])
                found = True
        return found

    def _lift(self, reach: float) -> bool:
        """Steps that raise the certified margins of open leaves; False when none helps."""
        opened = [site.tree.open for site in self.sites]
        total = sum(len(o) for o in opened)
        for attempt in range(4):
            jacobian, value = self._leaf_rows(opened, attempt % 2 == 0, reach)
            if not len(value):
                break
            point_rows, point_values = self._point_rows(near=2 * self.aim)
            jacobian, value = torch.cat([jacobian, point_rows]), torch.cat([value, point_values])
            target = torch.full_like(value, 0.3 * self.aim)
            target[len(value) - len(point_values) :] = 0.7 * self.aim
            step = self._project(jacobian, target - value)
            if step is None:
                return False
            self.theta = self.theta + step
            engines = self._engines(self.problem.graph)
            for site, engine, leaves in zip(self.sites, engines, opened, strict=True):
                site.tree.bound(engine, leaves, 4096)
            left = sum(len(site.tree.open) for site in self.sites)
            logger.info(
                "lift %d: %d of %d open, distance %g", attempt, left, total, self._distance()
            )
            if left == 0 or self.deadline.over:
                break
        return True

    def _leaf_rows(
        self, opened: list[NDArray[np.int64]], worst: bool, reach: float
    ) -> tuple[Tensor, Tensor]:
        rows, values = [], []
        share = max(20, LEAF_ROWS // len(self.sites))
        for site, leaves in zip(self.sites, opened, strict=True):
            if not len(leaves):
                continue
            margins = site.tree.margins(leaves)
            near = margins > -reach * self.aim
            leaves, margins = leaves[near], margins[near]
            if not len(leaves):
                continue
            if worst:
                chosen = leaves[np.argsort(margins)[:share]]
            else:
                order = torch.randperm(len(leaves), generator=self.generator)[:share].numpy()
                chosen = leaves[order]
            jacobian, value = site.rows.leaf_rows(self.theta, site.tree.boxes(chosen))
            rows.append(jacobian)
            values.append(value)
        if not rows:
            return self.theta.new_zeros(0, len(self.theta)), self.theta.new_zeros(0)
        return torch.cat(rows), torch.cat(values)

    def _project(self, jacobian: Tensor, wanted: Tensor) -> Tensor | None:
        """The smallest step with ``jacobian @ step >= wanted``; None when there is none."""
        inverse = self.metric.solve(jacobian)
        answer = project(gram_matrix(jacobian, lambda _: inverse), wanted)
        if answer.status is Status.INFEASIBLE:
            return None
        return inverse.T @ torch.from_numpy(answer.multipliers)

    def _distance(self) -> float:
        return self.metric.norm_squared(self.theta - self.origin)


def _reference(problem: EditProblem, inputs: Tensor) -> Reference:
    """Reference inputs plus inputs of the regions that are safe already."""
    with torch.no_grad():
        outputs = evaluate_graph(problem.graph, inputs.to(problem.graph.dtype)).flatten(1)
    return Reference(inputs.to(problem.graph.dtype), outputs, None, problem.reference.source)
