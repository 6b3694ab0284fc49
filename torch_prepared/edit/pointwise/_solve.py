"""Ways to propose a pointwise edit: each returns changed parameters as stored."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torch_prepared.certify import PointClaims
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit.pointwise._curved import raise_rows
from torch_prepared.edit.pointwise._examples import point_margins, row_values
from torch_prepared.edit.pointwise._finetune import finetune
from torch_prepared.edit.pointwise._hidden import solve_hidden, solve_with_z3
from torch_prepared.edit.pointwise._layer import FreeLayer, Layers, Prefix
from torch_prepared.edit.pointwise._linear import PointNorm, solve_linear
from torch_prepared.edit.pointwise._program import build_program
from torch_prepared.edit.pointwise._projection import LastLayer
from torch_prepared.edit.pointwise._wanted import Found, Wanted, solve_lazily
from torch_prepared.errors import SpecError
from torch_prepared.solvers import Status

__all__ = ["PointOptions", "PointProblem", "Proposed", "propose"]

logger = logging.getLogger(__name__)

TUNE_SHARE = 0.88
METRIC_INPUTS = 10_000  #: enough for the second moments of one layer's features
MANY = 50  #: examples from which on all layers are tuned first
MOST_BARE = 300  #: examples up to which a projection without tuning is tried at all
POSITIVE = (0.0, 0.25, 0.5, 0.9)  #: least shares of a hidden layer's scalars, to start from
RAISED = 3.0  #: margins that proposals for a hidden layer aim at
LITTLE_LOST = 5e-4
"""Share of decisions on the reference whose loss is not worth a second method."""


@dataclass(frozen=True)
class PointOptions:
    """Choices; see :func:`edit_points`."""

    layer: Layers
    norm: PointNorm
    solver: str
    margin: float
    keep_weight: float | None
    free: Tensor | None
    budget: float | None
    round_to: torch.dtype | None
    threads: int | None
    seed: int


@dataclass(frozen=True)
class PointProblem:
    """One network, examples to edit and to keep, inputs that say what matters."""

    graph: Graph
    edits: PointClaims
    keeps: PointClaims | None
    reference: Reference | None
    options: PointOptions


@dataclass(frozen=True)
class Proposed:
    """Changed parameters, rounded to the storage dtype, that some solver claims to suffice."""

    method: str
    found: Found
    parameters: dict[str, Tensor]


def propose(problem: PointProblem, deadline: Deadline) -> Iterator[Proposed]:
    """Claimed edits, the first as soon as possible; later ones are worth comparing with it."""
    options = problem.options
    layer = FreeLayer.of(problem.graph, options.layer, options.free)
    if options.norm in (PointNorm.BEHAVIOR, PointNorm.L2):
        yield from _by_behavior(problem, layer, deadline)
        return
    wanted = Wanted.of(layer, problem.edits, problem.keeps, options.margin, options.keep_weight)
    if options.solver == "z3":
        found = solve_with_z3(layer, wanted, options.norm, options.budget, deadline)
        yield _proposed(problem, f"z3 over {layer.title}", layer, found)
    elif layer.is_last:
        found = _lazily(layer, wanted, options, deadline)
        kind = "milp" if options.norm is PointNorm.L0 else "lp"
        yield _proposed(problem, f"{kind} over {layer.title}", layer, found)
    else:
        found = solve_hidden(
            layer, wanted, options.norm, options.budget,
            lambda: _tuned_layer(problem, layer, deadline), deadline, options.threads,
        )  # fmt: skip
        yield _proposed(problem, f"milp over {layer.title}", layer, found)


def _lazily(layer: FreeLayer, wanted: Wanted, options: PointOptions, deadline: Deadline) -> Found:
    """The last layer: rows are linear, and only those that some answer violates are built."""
    prefix = layer.prefix(wanted.claims.inputs)
    weight = 0.0 if wanted.softness is None else 1.0 / wanted.softness
    reach = np.inf if options.budget is None else options.budget

    def step(active: np.ndarray) -> Found:
        program = build_program(
            layer, prefix, wanted.claims, wanted.rows[active], wanted.required[active], reach=reach
        )
        answer = solve_linear(
            program,
            options.norm,
            soft=wanted.soft[active],
            weight=weight,
            time_limit=deadline.limit(least=0.1),
            threads=options.threads,
        )
        conflict = answer.conflict
        return Found(answer.status, answer.d, conflict, answer.size, answer.bound, answer.message)

    return solve_lazily(layer, wanted, step, deadline)


def _by_behavior(problem: PointProblem, layer: FreeLayer, deadline: Deadline) -> Iterator[Proposed]:
    """The last layer projected; where that costs decisions, all layers tuned and then projected.

    Many examples are never cheap for one layer alone: there tuning comes first, and the bare
    projection, if they are not too many, only where nothing came of it.
    """
    options, reference = problem.options, problem.reference
    tunes = reference is not None and options.norm is PointNorm.BEHAVIOR and options.free is None
    tunes &= options.layer is None or not (layer.is_last or layer.shifted)
    projects = layer.is_last and layer.is_dense
    if not (tunes or projects):
        raise SpecError(
            f"{layer.title}: norm '{options.norm.value}' needs a last, fully connected layer, "
            "or 'behavior' with inputs to preserve and no mask; expected that, or norm '1', 'inf' "
            "or '0'"
        )
    many = tunes and len(problem.edits.inputs) > MANY
    first: Proposed | None = None
    if projects and not many:
        first = _projected(problem, layer, deadline, "projection")
        yield first
    if tunes and not deadline.over and not (first and _costs_little(problem, first)):
        tuned = _tuned(problem, layer, deadline)
        yield tuned
        bare = many and projects and len(problem.edits.inputs) <= MOST_BARE
        if bare and tuned.found.d is None and not deadline.over:
            yield _projected(problem, layer, deadline, "projection")


def _costs_little(problem: PointProblem, proposed: Proposed) -> bool:
    """Whether an edit leaves nearly all decisions on the reference as they were."""
    if proposed.found.d is None or problem.reference is None:
        return False
    edited = problem.graph.with_parameters(proposed.parameters)
    return problem.reference.drawdown(edited).score[0] <= LITTLE_LOST


def _tuned(problem: PointProblem, layer: FreeLayer, deadline: Deadline) -> Proposed:
    """All layers (or the chosen one) tuned, then what is left closed by the last layer."""
    options, reference = problem.options, problem.reference
    if reference is None:
        raise SpecError("norm 'behavior': got no inputs to preserve; expected some")
    chosen = None if options.layer is None else (layer.node.name,)
    graph = finetune(
        problem.graph, problem.edits, reference.inputs, options.margin,
        layers=chosen, deadline=deadline.share(TUNE_SHARE), seed=options.seed,
    )  # fmt: skip
    last = FreeLayer.of(graph, None, None)
    if chosen is None and last.is_last and last.is_dense:
        return _projected(problem, last, deadline, "finetune, projection")
    return _proposed(problem, "finetune", last, Found(Status.FEASIBLE, np.zeros(last.count)))


def _projected(
    problem: PointProblem, layer: FreeLayer, deadline: Deadline, method: str
) -> Proposed:
    """``layer`` may belong to a tuned network; changes of all layers are returned."""
    options = problem.options
    wanted = Wanted.of(layer, problem.edits, problem.keeps, options.margin, options.keep_weight)
    behavior = options.norm is PointNorm.BEHAVIOR and problem.reference is not None
    reference: Prefix | None = None
    if behavior and problem.reference is not None:
        inputs = problem.reference.inputs
        reference = layer.prefix(inputs[:: -(-len(inputs) // METRIC_INPUTS)])
    metric = LastLayer.of(layer, reference)
    prefix = layer.prefix(wanted.claims.inputs)
    start = layer.run(prefix)
    values = (start[wanted.claims.point] * wanted.claims.rows).sum(axis=1) + wanted.claims.offset
    lift = wanted.required - values[wanted.rows]
    softness = np.where(wanted.soft, wanted.softness or 0.0, 0.0)

    def step(active: np.ndarray) -> Found:
        status, d, conflict = metric.step(
            wanted.claims, prefix, wanted.rows[active], lift[active], softness[active]
        )
        size = float("nan") if d is None else float(np.linalg.norm(d))
        return Found(status, d, conflict, size, message=f"projection: {status.value}")

    found = solve_lazily(layer, wanted, step, deadline)
    return _proposed(problem, f"{method} over {layer.node.name}", layer, found)


def _tuned_layer(problem: PointProblem, layer: FreeLayer, deadline: Deadline) -> FreeLayer:
    """The layer of a network tuned in that layer alone, for its pattern.

    Where few scalars are positive there is little to tune, so starts with raised biases are tried.
    """
    options, claims = problem.options, problem.edits
    if layer.shifted:
        return _tuned_biases(problem, layer, deadline)
    points = torch.from_numpy(claims.inputs)
    value = layer.values(layer.prefix(points))[layer.node.name]
    for share in POSITIVE if len(layer.names) == 2 else POSITIVE[:1]:
        lift = max(0.0, -float(np.quantile(value.numpy(), 1.0 - share))) if share else 0.0
        bias = layer.names[-1]
        start = problem.graph.with_parameters({bias: problem.graph.parameters[bias] + lift})
        tuned = raise_rows(
            start, claims, points, options.margin, RAISED * options.margin,
            layers=(layer.node.name,), deadline=deadline.share(0.1),
        )  # fmt: skip
        found = FreeLayer.of(tuned, layer.node.name, options.free)
        reached = point_margins(claims, row_values(claims, found.run(found.prefix(points))))
        if deadline.over or bool((reached >= options.margin).all()):
            return found
    reference = None if problem.reference is None else problem.reference.inputs
    tuned = finetune(
        problem.graph, claims, reference, options.margin,
        layers=(layer.node.name,), deadline=deadline.share(0.2), seed=options.seed,
    )  # fmt: skip
    return FreeLayer.of(tuned, layer.node.name, options.free)


def _tuned_biases(problem: PointProblem, layer: FreeLayer, deadline: Deadline) -> FreeLayer:
    """The same biases of a network tuned in them alone."""
    options = problem.options
    graph = replace(problem.graph, editable=frozenset(layer.names))
    tuned = finetune(
        graph, problem.edits, None, options.margin,
        layers=None, deadline=deadline.share(0.2), seed=options.seed,
    )  # fmt: skip
    return FreeLayer.of(tuned, options.layer, None)


def _proposed(problem: PointProblem, method: str, layer: FreeLayer, found: Found) -> Proposed:
    """Parameters that differ from the original network's, as stored."""
    moved: dict[str, Tensor] = {}
    if found.d is not None:
        table = {**layer.graph.parameters, **layer.moved(found.d)}
        for name in problem.graph.editable:
            old = problem.graph.parameters[name]
            value = table[name].detach()
            rounded = (
                value if problem.options.round_to is None else value.to(problem.options.round_to)
            )
            new = rounded.to(old, copy=True)
            changed = value.to(old.device, torch.float64) != old.double()
            new = torch.where(changed, new, old)
            if bool((new != old).any()):
                moved[name] = new
    return Proposed(method, found, moved)
