"""One linear program over one layer: PREPARED as published, and the baseline of everything else.

Smallest weight change is not smallest damage: a minimal edit may turn the network into a constant.
Use ``sequential`` or ``auto`` to keep what the network does.

Source: Tao and Thakur, "Provable Editing of Deep Neural Networks using Parametric Linear
Relaxation" (NeurIPS 2024).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.bounds import ParametricBounds, bound_nodes, bound_rows, editable_layers
from torch_prepared.bounds.crown import tightened_names
from torch_prepared.certify import ProofTree
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.interval import Interval
from torch_prepared.core.rows import Floats
from torch_prepared.edit._base import Candidate, Candidates, Editor, EditProblem, Norm
from torch_prepared.edit._certify import within_clauses
from torch_prepared.edit._margin import aimed_margin
from torch_prepared.errors import InfeasibleEditError, SpecError
from torch_prepared.solvers import Solution, Status, minimize_norm, solve

__all__ = ["OneShotEditor"]

logger = logging.getLogger(__name__)

EXTRA_SHARE = 0.4  #: of the time limit, for further layers once an edit is found
SOLVER_SHARE, FIRST_SHARE = 0.5, 0.9  #: of the time left, for one program
SIGN_ROUNDS = 8
CLAIMED_VIOLATION = 1e-4
PARTIAL_ROUNDS = 2  #: afterwards every weight gets its own column and no sign can surprise
MARGIN_ROUNDS = 4
EXACT_WEIGHTS = 4096
MAX_ROW_ENTRIES = 30_000_000


@dataclass
class OneShotEditor(Editor):
    """Tries layers from the last to the first, one LP each, as long as time allows.

    Args:
        solver: of the linear programs.
        begin: pass over so many layers of those that would be tried.
        end: try none from there on; None tries all.
        extra: share of the time for further layers once an edit is found.
    """

    name = "one_shot"
    solver: str = "highs"
    begin: int = 0
    end: int | None = None
    extra: float = EXTRA_SHARE

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Candidates:
        if problem.options.norm is Norm.BEHAVIOR:
            raise SpecError(
                "norm: got 'behavior' for one_shot, which minimizes a norm of the weights; "
                "use method 'sequential', 'refine' or 'auto', or norm 1, 2, inf or 1+inf"
            )
        layers = self._layers(problem)[self.begin : self.end]
        boxes = self._boxes(problem)
        picks = _choose_rows(problem)
        failures: list[str] = []
        found = False
        spent = 0.0
        for layer in layers:
            if found and self._enough(deadline, spent):
                break
            clock = Deadline()
            try:
                found |= bool((yield self._edit(problem, layer, boxes, picks, deadline)))
            except InfeasibleEditError as error:
                failures.append(f"{layer}: {error}")
                logger.info("one_shot: %s", failures[-1])
            spent = clock.elapsed
            if deadline.over:
                break
        if not found:
            raise InfeasibleEditError("; ".join(failures) or "no edit of one layer is certified")

    def _enough(self, deadline: Deadline, spent: float) -> bool:
        """Whether trying one more layer would endanger the edit found: checking takes time too."""
        if deadline.seconds is None:
            return False
        return deadline.left - 3 * spent < (1 - self.extra) * deadline.seconds

    def _layers(self, problem: EditProblem) -> tuple[str, ...]:
        every = editable_layers(problem.graph)
        chosen = problem.options.layers
        if chosen is not None:
            strange = [name for name in chosen if name not in every]
            if strange:
                raise SpecError(
                    f"layers: got {strange[0]!r}; expected editable layers: {', '.join(every)}"
                )
            return tuple(chosen)
        return every[::-1]

    def _boxes(self, problem: EditProblem) -> list[dict[str, Interval]]:
        """Intervals of every node, one dict per property."""
        return [
            {name: box[i : i + 1] for name, box in problem.boxes.items()}
            for i in range(len(problem.properties))
        ]

    def _edit(
        self,
        problem: EditProblem,
        layer: str,
        boxes: list[dict[str, Interval]],
        picks: list[_Pick],
        deadline: Deadline,
    ) -> Candidate:
        """The smallest change of one layer; a larger margin when rounding ate the first."""
        margin = aimed_margin(problem)
        for _ in range(MARGIN_ROUNDS):
            deltas, solution = self._solve(problem, layer, boxes, picks, margin, deadline)
            changed = {
                name: problem.exact.parameters[name] + torch.from_numpy(delta)
                for name, delta in deltas.items()
                if np.any(delta)
            }
            stored = problem.store(changed)
            if self._holds(problem, layer, boxes, picks, stored):
                break
            margin *= 8
        before = self._before(problem, layer)
        return Candidate(
            stored,
            note=f"one LP over {layer}",
            proofs=tuple(ProofTree.leaf(pick.clause_rows, tighten=before) for pick in picks),
            details={"objective": solution.objective, "solver_seconds": solution.seconds},
        )

    def _before(self, problem: EditProblem, layer: str) -> tuple[str, ...]:
        """Values before the layer whose intervals the program took from backward passes."""
        order = [node.name for node in problem.exact.nodes]
        before = set(order[: order.index(layer)]) if problem.tightens else set()
        names = tightened_names(problem.exact, problem.batch.regions.is_box)
        return tuple(name for name in names if name in before)

    def _solve(
        self,
        problem: EditProblem,
        layer: str,
        boxes: list[dict[str, Interval]],
        picks: list[_Pick],
        margin: float,
        deadline: Deadline,
    ) -> tuple[dict[str, Floats], Solution]:
        """Minimal changes by parameter; signs of weights are fixed until they flip."""
        options = problem.options
        weight = problem.exact.node(layer).params["weight"]
        count = weight.read(problem.exact.parameters).numel()
        exact = np.full(count, count <= EXACT_WEIGHTS)
        share = FIRST_SHARE if self.end == 1 else SOLVER_SHARE
        for attempt in range(SIGN_ROUNDS):
            bounds = ParametricBounds(problem.exact, layer, exact=exact)
            ends = []
            for i, pick in enumerate(picks):
                bounds.add_property(boxes[i], pick.rows, pick.offset, margin, tag=f"p{i}")
                ends.append(bounds.builder.count)
            rows_now = bounds.rows()
            if rows_now.entries > MAX_ROW_ENTRIES:
                raise InfeasibleEditError(f"needs {rows_now.entries} row entries, too many")
            columns = np.concatenate([b.columns.ravel() for b in bounds.deltas.values()])
            norm = options.norm or Norm.L1
            program = minimize_norm(bounds.unknowns, rows_now, columns, norm=norm.value)
            solution = solve(
                program,
                solver="clarabel" if norm is Norm.L2 else self.solver,
                time_limit=deadline.limit(share, least=1.0),
                threads=options.threads,
            )
            if solution.status is Status.INFEASIBLE:
                raise InfeasibleEditError(_conflict(problem, layer, ends, solution))
            # A point that misses a row by little is a fair claim: the checker judges it.
            if solution.x is None or solution.violation > CLAIMED_VIOLATION:
                raise InfeasibleEditError(
                    f"solver stopped: {solution.status.value}, {solution.message}"
                )
            split = bounds.unknowns.split(solution.x)
            deltas = {name: split[block.name] for name, block in bounds.deltas.items()}
            delta = weight.read({weight.name: torch.from_numpy(deltas[weight.name])})
            flipped = bounds.flipped(delta.reshape(-1).numpy())
            if not flipped.any():
                break
            exact = exact | flipped | (attempt >= PARTIAL_ROUNDS)
        return deltas, solution

    def _holds(
        self,
        problem: EditProblem,
        layer: str,
        boxes: list[dict[str, Interval]],
        picks: list[_Pick],
        stored: Mapping[str, Tensor],
    ) -> bool:
        """Whether interval propagation after the layer proves the rows for the stored weights."""
        changed = {name: value.double().cpu() for name, value in stored.items()}
        order = [node.name for node in problem.exact.nodes]
        fixed = order[: order.index(layer)]
        for i, pick in enumerate(picks):
            region = problem.batch.regions[i : i + 1]
            known = {name: boxes[i][name] for name in fixed}
            with torch.no_grad():
                after = bound_nodes(
                    problem.exact, region, parameters=changed, tighten=False, known=known
                )
                lower = bound_rows(
                    problem.exact, region, after, torch.from_numpy(pick.rows)[None],
                    parameters=changed, shallow=True,
                ).lower  # fmt: skip
            if not bool((lower[0] + torch.from_numpy(pick.offset) > 0).all()):
                return False
        return True


@dataclass(frozen=True)
class _Pick:
    """One row of each clause of a property: (k, m), (k,), and its position in its clause."""

    rows: Floats
    offset: Floats
    clause_rows: list[int]


def _choose_rows(problem: EditProblem) -> list[_Pick]:
    """The rows likeliest to hold: those with the best bounds for the original weights."""
    chosen = []
    best = problem.batch.best_rows(problem.row_bounds)
    for i, prop in enumerate(problem.properties):
        index = best[i, : len(prop.safe.clauses)]
        rows, offset = problem.batch.rows[i, index], problem.batch.offset[i, index]
        chosen.append(_Pick(rows.numpy(), offset.numpy(), within_clauses(prop, index.tolist())))
    return chosen


def _conflict(problem: EditProblem, layer: str, ends: list[int], solution: Solution) -> str:
    """Why a program is infeasible: the properties whose rows the Farkas ray uses."""
    names = [prop.name for prop in problem.properties]
    if solution.ray is not None:
        used = np.flatnonzero(np.abs(solution.ray) > 1e-9 * np.abs(solution.ray).max())
        owners = np.searchsorted(ends, used[used < ends[-1]], side="right")
        names = [names[i] for i in np.unique(owners)] or names
    return f"no change of {layer} and later biases satisfies together: {', '.join(names)}"
