"""One linear program over one layer: PREPARED as published, and the baseline of everything else.

Smallest weight change is not smallest damage: a minimal edit may turn the network into a constant.
Use ``sequential`` or ``auto`` to keep what the network does.

Source: Tao and Thakur, "Provable Editing of Deep Neural Networks using Parametric Linear
Relaxation" (NeurIPS 2024).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torch_prepared.bounds import ParametricBounds, bound_nodes, bound_rows, editable_layers
from torch_prepared.bounds.cost import crown_flops
from torch_prepared.bounds.crown import tightened_names
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.interval import Interval
from torch_prepared.core.rows import Floats
from torch_prepared.edit._base import Candidate, Editor, EditProblem, Norm
from torch_prepared.edit._margin import aimed_margin
from torch_prepared.errors import InfeasibleEditError, SpecError
from torch_prepared.solvers import Solution, Status, minimize_norm, solve

__all__ = ["OneShotEditor"]

logger = logging.getLogger(__name__)

SIGN_ROUNDS = 8
MARGIN_ROUNDS = 4
EXACT_WEIGHTS = 4096
MAX_ROW_ENTRIES = 30_000_000
CROWN_BUDGET = 4e11


@dataclass
class OneShotEditor(Editor):
    """Tries layers from the last to the first, one LP each, as long as time allows."""

    name = "one_shot"
    solver: str = "highs"
    first_only: bool = field(default=False)

    def candidates(self, problem: EditProblem, deadline: Deadline) -> Iterator[Candidate]:
        if problem.options.norm is Norm.BEHAVIOR:
            raise SpecError(
                "norm: got 'behavior' for one_shot, which minimizes a norm of the weights; "
                "use method 'sequential', 'refine' or 'auto', or norm 1, 2, inf or 1+inf"
            )
        layers = self._layers(problem)
        boxes = self._boxes(problem)
        picks = choose_rows(problem, boxes)
        failures: list[str] = []
        found = False
        spent = 0.0
        for layer in layers:
            if found and deadline.left < 2 * spent:
                break
            clock = Deadline()
            try:
                yield self._edit(problem, layer, boxes, picks, deadline)
                found = True
            except InfeasibleEditError as error:
                failures.append(f"{layer}: {error}")
                logger.info("one_shot: %s", failures[-1])
            spent = clock.elapsed
            if deadline.over or (found and self.first_only):
                break
        if not found:
            raise InfeasibleEditError("; ".join(failures) or "no editable layer")

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
        tighten = self._tightens(problem)
        with torch.no_grad():
            boxes = bound_nodes(problem.exact, problem.batch.regions, tighten=tighten)
        return [
            {name: box[i : i + 1] for name, box in boxes.items()}
            for i in range(len(problem.properties))
        ]

    def _edit(
        self,
        problem: EditProblem,
        layer: str,
        boxes: list[dict[str, Interval]],
        picks: list[tuple[Floats, Floats]],
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
        return Candidate(
            stored,
            note=f"one LP over {layer}",
            tighten=self._before(problem, layer),
            details={"objective": solution.objective, "solver_seconds": solution.seconds},
        )

    def _before(self, problem: EditProblem, layer: str) -> tuple[str, ...]:
        """Values before the layer whose intervals the program took from backward passes."""
        order = [node.name for node in problem.exact.nodes]
        before = set(order[: order.index(layer)]) if self._tightens(problem) else set()
        return tuple(name for name in tightened_names(problem.exact) if name in before)

    def _tightens(self, problem: EditProblem) -> bool:
        return crown_flops(problem.exact) * len(problem.properties) < CROWN_BUDGET

    def _solve(
        self,
        problem: EditProblem,
        layer: str,
        boxes: list[dict[str, Interval]],
        picks: list[tuple[Floats, Floats]],
        margin: float,
        deadline: Deadline,
    ) -> tuple[dict[str, Floats], Solution]:
        """Minimal changes by parameter; signs of weights are fixed until they flip."""
        options = problem.options
        weight = problem.exact.node(layer).params["weight"]
        base = weight.read(problem.exact.parameters).detach().reshape(-1).numpy()
        exact = np.full(base.shape, len(base) <= EXACT_WEIGHTS)
        for _ in range(SIGN_ROUNDS):
            bounds = ParametricBounds(problem.exact, layer, exact=exact)
            for i, (rows, offset) in enumerate(picks):
                bounds.add_property(boxes[i], rows, offset, margin, tag=f"p{i}")
            rows_now = bounds.rows()
            if rows_now.entries > MAX_ROW_ENTRIES:
                raise InfeasibleEditError(f"needs {rows_now.entries} row entries, too many")
            columns = np.concatenate([b.columns.ravel() for b in bounds.deltas.values()])
            norm = options.norm or Norm.L1
            program = minimize_norm(bounds.unknowns, rows_now, columns, norm=norm.value)
            solution = solve(
                program,
                solver="clarabel" if norm is Norm.L2 else self.solver,
                time_limit=None if deadline.seconds is None else max(deadline.left, 1.0),
                threads=options.threads,
            )
            if solution.status is Status.INFEASIBLE:
                raise InfeasibleEditError(_conflict(problem, bounds))
            if not solution.status.has_point or solution.x is None:
                raise InfeasibleEditError(
                    f"solver stopped: {solution.status.value}, {solution.message}"
                )
            split = bounds.unknowns.split(solution.x)
            deltas = {name: split[block.name] for name, block in bounds.deltas.items()}
            after = (
                weight.read({weight.name: torch.from_numpy(deltas[weight.name])})
                .reshape(-1)
                .numpy()
                + base
            )
            flipped = (np.sign(after) * np.where(base < 0, -1.0, 1.0) < 0) & ~exact
            if not flipped.any():
                break
            exact = exact | flipped
        return deltas, solution

    def _holds(
        self,
        problem: EditProblem,
        layer: str,
        boxes: list[dict[str, Interval]],
        picks: list[tuple[Floats, Floats]],
        stored: Mapping[str, Tensor],
    ) -> bool:
        """Whether interval propagation after the layer proves the rows for the stored weights."""
        changed = {name: value.double().cpu() for name, value in stored.items()}
        order = [node.name for node in problem.exact.nodes]
        fixed = order[: order.index(layer)]
        for i, (rows, offset) in enumerate(picks):
            region = problem.batch.regions[i : i + 1]
            known = {name: boxes[i][name] for name in fixed}
            with torch.no_grad():
                after = bound_nodes(
                    problem.exact, region, parameters=changed, tighten=False, known=known
                )
                lower = bound_rows(
                    problem.exact, region, after, torch.from_numpy(rows)[None],
                    parameters=changed, shallow=True,
                ).lower  # fmt: skip
            if not bool((lower[0] + torch.from_numpy(offset) > 0).all()):
                return False
        return True


def choose_rows(
    problem: EditProblem, boxes: list[dict[str, Interval]]
) -> list[tuple[Floats, Floats]]:
    """Per property the likeliest row of each clause: ``(rows (k, m), offset (k,))``."""
    chosen = []
    for i, prop in enumerate(problem.properties):
        one = problem.batch[i : i + 1]
        with torch.no_grad():
            bound = bound_rows(problem.exact, one.regions, boxes[i], one.rows)
        best = one.best_rows(bound.lower + one.offset)[0]
        best = best[best >= 0][: len(prop.safe.clauses)]
        chosen.append((one.rows[0, best].numpy(), one.offset[0, best].numpy()))
    return chosen


def _conflict(problem: EditProblem, bounds: ParametricBounds) -> str:
    """Why a program is infeasible, for people."""
    names = ", ".join(p.name for p in problem.properties)
    return f"no change of {bounds.layer} and later biases satisfies together: {names}"
