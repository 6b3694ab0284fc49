"""``edit_points``: finitely many examples come out as wanted, provably."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from torch_prepared.certify import PointClaims
from torch_prepared.certify.compute import COMPUTE_TYPES, ComputeType
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._result import Delta
from torch_prepared.edit._source import Network, Source, read_network
from torch_prepared.edit.pointwise._examples import (
    Targets,
    contradictions,
    make_claims,
    row_values,
)
from torch_prepared.edit.pointwise._layer import FreeLayer, Layers
from torch_prepared.edit.pointwise._linear import PointNorm
from torch_prepared.edit.pointwise._result import Outcome, PointEditResult, PointStatus
from torch_prepared.edit.pointwise._run import Run
from torch_prepared.edit.pointwise._solve import PointOptions, PointProblem
from torch_prepared.edit.pointwise._strongest import strongest_weights
from torch_prepared.errors import InfeasibleEditError, SpecError
from torch_prepared.relax import evaluate_graph

__all__ = ["edit_points"]

SOLVERS = ("highs", "z3")
VERIFY = ("exact", "float", "none")
RELATIVE_MARGIN = 1e-2


def edit_points(
    model: Network,
    inputs: Tensor,
    targets: Targets,
    *,
    layer: str | Sequence[str] | None = None,
    norm: str | PointNorm | None = None,
    keep: Tensor | None = None,
    keep_weight: float | None = None,
    preserve: Tensor | None = None,
    labels: Tensor | None = None,
    margin: float | None = None,
    budget: float | None = None,
    free: Tensor | int | None = None,
    solver: str = "highs",
    verify: str = "exact",
    compute: ComputeType = "float32",
    round_to: torch.dtype | None = None,
    time_limit: float | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: bool = False,
    raise_on_failure: bool = False,
) -> PointEditResult[nn.Module | OnnxNetwork | Graph]:
    """Change a network so that finitely many examples come out as wanted, provably.

    With the last layer free the examples are linear rows: one linear program (or projection), with
    rows added as they are violated. With a hidden layer free they are piecewise linear: a linear
    program with the pattern of ReLUs fixed, then a mixed-integer one. Z3 decides either in rational
    arithmetic. Norm ``"behavior"`` moves what the network does on ``preserve`` least and may tune
    all layers first. Whatever proposes, the weights as stored are then evaluated exactly.

    The guarantee is for the listed examples only; see :func:`lift_to_balls` for neighborhoods.

    Args:
        model: a module, an ONNX network or its path, or a graph. Never mutated.
        inputs: m examples (m, ...), rounded to the network's dtype.
        targets: a class each (m,), or a :class:`SafeSet` each.
        layer: name of the layer that may change; None is the last one, or all for ``"behavior"``.
            ``"biases"``, or several names: the biases of all, or these, layers and no weight.
        norm: ``"behavior"`` (the default with ``preserve`` or ``keep``), ``"2"`` (the default
            otherwise), ``"inf"`` (the default for biases), ``"1"`` or ``"0"`` (number of changed
            weights; needs a budget).
        keep: examples (k, ...) whose decision must stay.
        keep_weight: price of a kept example's shortfall; None forbids it.
        preserve: inputs (q, ...) whose outputs should stay; ``keep`` stands in for them.
        labels: right classes (q,) of ``preserve``, to report accuracy.
        margin: to aim at, in output units; enlarged when rounding ate it. None takes a hundredth
            of the rows' usual size. 0 is allowed with ``verify="exact"`` and safe sets that are not
            strict.
        budget: largest change of one weight.
        free: bool of the stored weight's shape, which weights of the layer may change; or a
            number, for as many of those with the largest ``|d margin / d w|`` over the examples.
        solver: ``"highs"`` or ``"z3"`` (norms ``"inf"`` and ``"1"``, hard rows only).
        verify: ``"exact"`` arithmetic, any ``"float"`` evaluation in type ``compute``, or
            ``"none"``.
        compute: ``"float32"``, ``"float64"``, ``"tf32"`` or ``"bfloat16"``, the type of evaluations
            that float margins and verdicts speak of; see ``certify.compute`` for the models.
        round_to: store changed weights as numbers of this narrower type.
        time_limit: wall seconds.
        threads: CPU threads of solvers.
        seed: of everything random.
        progress: show a bar on stderr.
        raise_on_failure: raise instead of returning an outcome that is not ``EDITED``.

    Returns:
        A :class:`PointEditResult`; infeasibility is an outcome that names examples in conflict.

    Raises:
        SpecError: malformed examples or options.
        ModelFormatError: an unusable network.
        UnsupportedOperationError: a nonlinear operator other than ReLU after a hidden layer.
        MissingDependencyError: ``solver="z3"`` without z3-solver.
        InfeasibleEditError: no edit was found and ``raise_on_failure`` is set.

    Soundness: see ``certify.check_points``. A solver's ``INFEASIBLE`` is a claim about the program
        in float64 coefficients, not a certified fact.

    Source: Papusha et al., "Incorrect by Construction: Fine Tuning Neural Networks for Guaranteed
        Performance on Finite Sets of Examples" (FoMLAS 2020); the encodings are ours.
    """
    deadline = Deadline(time_limit)
    source = read_network(model, inputs, inputs[:1].numel() if len(inputs) else 1)
    graph = source.graph
    _check_options(solver, verify, compute, margin, budget, keep_weight)
    layers: Layers = layer if layer is None or isinstance(layer, str) else tuple(layer)
    shifts = layers is not None and bool(FreeLayer.of(graph, layers, None).shifted)
    keep = keep if keep is not None and len(keep) else None  # none to keep asks for nothing
    chosen = _norm(norm, shifts, preserve is not None or keep is not None)
    if solver == "z3" and chosen not in (PointNorm.LINF, PointNorm.L1):
        raise SpecError(f"solver 'z3': got norm {chosen.value!r}; expected 'inf' or '1'")
    if preserve is not None and not preserve.numel():
        raise SpecError(f"preserve: got inputs {tuple(preserve.shape)}; expected at least one")
    keeps = None if keep is None else _kept(graph, keep)
    stay = preserve if preserve is not None else keep
    reference = None
    if stay is not None:
        of = labels if preserve is not None else None
        reference = Reference.of(graph, stay, of, None, (), seed)
    if not len(inputs):
        return _unchanged(source, reference, deadline)
    edits = make_claims(graph, inputs, targets, "examples")
    clash = contradictions(edits.inputs, targets)
    mask = free if free is None or isinstance(free, Tensor) else _free(graph, edits, layers, free)
    options = PointOptions(
        layers, chosen, solver, _margin(graph, edits, margin), keep_weight, mask, budget,
        round_to, threads, seed,
    )  # fmt: skip
    problem = PointProblem(graph, edits, keeps, reference, options)
    run = Run(source, problem, verify, compute, deadline)
    result = run.conflict(clash) if clash else run.edit(progress)
    if raise_on_failure and result.outcome is not Outcome.EDITED:
        raise InfeasibleEditError(result.message)
    return result


def _check_options(
    solver: str,
    verify: str,
    compute: str,
    margin: float | None,
    budget: float | None,
    keep_weight: float | None,
) -> None:
    choices = (
        ("solver", solver, SOLVERS), ("verify", verify, VERIFY), ("compute", compute, COMPUTE_TYPES)
    )  # fmt: skip
    for name, got, known in choices:
        if got not in known:
            raise SpecError(f"{name}: got {got!r}; expected one of {', '.join(known)}")
    for name, value in (("margin", margin), ("budget", budget), ("keep_weight", keep_weight)):
        good = value is None or (0 <= value < np.inf and (value > 0 or name == "margin"))
        if not good:
            raise SpecError(f"{name}: got {value}; expected a finite positive number")
    if margin == 0 and verify != "exact":
        raise SpecError("margin: got 0; expected a positive one unless verify is 'exact'")


def _norm(norm: str | PointNorm | None, shifts: bool, stays: bool) -> PointNorm:
    """The user's, or the usual one for biases, for inputs that shall stay, and otherwise."""
    if norm is None:
        return PointNorm.LINF if shifts else PointNorm.BEHAVIOR if stays else PointNorm.L2
    try:
        return PointNorm(norm)
    except ValueError:
        known = ", ".join(n.value for n in PointNorm)
        raise SpecError(f"norm: got {norm!r}; expected one of {known}") from None


def _margin(graph: Graph, edits: PointClaims, margin: float | None) -> float:
    """The user's, or a hundredth of the usual size of the rows."""
    if margin is not None:
        return margin
    x = torch.from_numpy(edits.inputs)
    with torch.no_grad():
        y = evaluate_graph(graph.to(torch.float64, "cpu"), x).flatten(1).numpy()
    return max(RELATIVE_MARGIN * float(np.median(np.abs(row_values(edits, y)))), 1e-9)


def _free(graph: Graph, edits: PointClaims, layers: Layers, count: int) -> Tensor:
    """A number of weights as the mask of the strongest ones."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise SpecError(f"free: got {count!r}; expected a bool tensor or a whole number")
    return strongest_weights(graph, edits, layers, count)


def _kept(graph: Graph, keep: Tensor) -> PointClaims:
    """Examples with the network's own decisions."""
    flat = torch.as_tensor(keep).detach().cpu().reshape(len(keep), -1)
    if flat.shape[1] != graph.input_size:
        raise SpecError(f"keep: got inputs of {flat.shape[1]} numbers; expected {graph.input_size}")
    exact = graph.to(torch.float64, "cpu")
    with torch.no_grad():
        parts = [
            evaluate_graph(exact, p.to(graph.dtype).double()).flatten(1).argmax(1)
            for p in flat.split(2048)
        ]
    return make_claims(graph, flat, torch.cat(parts), "keep")


def _unchanged(
    source: Source, reference: Reference | None, deadline: Deadline
) -> PointEditResult[nn.Module | OnnxNetwork | Graph]:
    """No examples: nothing to do, nothing to prove."""
    none = np.zeros(0)
    lost = None if reference is None else reference.drawdown(source.graph)
    return PointEditResult(
        Outcome.EDITED, PointStatus.UNVERIFIED, source.rebuild({}), "none", none, none, 0.0, 0.0,
        Delta.between(source.graph, {}), lost, (), None, {}, (), {"total": deadline.elapsed},
        "no examples; the network is returned unchanged",
    )  # fmt: skip
