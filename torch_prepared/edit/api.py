"""``edit_network``: the one function that edits, whatever the method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from torch_prepared.certify import Verdict
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork
from torch_prepared.edit._base import EditOptions, Editor, Norm
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._driver import Run, Task
from torch_prepared.edit._result import EditResult
from torch_prepared.edit._source import Network, read_network
from torch_prepared.edit._team import Team
from torch_prepared.edit.auto import AutoEditor
from torch_prepared.edit.one_shot import OneShotEditor
from torch_prepared.edit.refine import RefineEditor
from torch_prepared.edit.sequential import SequentialEditor
from torch_prepared.errors import InfeasibleEditError, SpecError
from torch_prepared.specs import Property

__all__ = ["EDITORS", "edit_network"]

EDITORS: dict[str, type[Editor]] = {
    "auto": AutoEditor,
    "one_shot": OneShotEditor,
    "sequential": SequentialEditor,
    "refine": RefineEditor,
}


def edit_network(
    model: Network,
    properties: Property | Sequence[Property],
    *,
    keep: Property | Sequence[Property] = (),
    holdout: Property | Sequence[Property] = (),
    method: str = "auto",
    preserve: Tensor | None = None,
    labels: Tensor | None = None,
    domain: tuple[Tensor | float, Tensor | float] | None = None,
    norm: str | Norm | None = None,
    layers: Sequence[str] | None = None,
    margin: float | None = None,
    time_limit: float | None = None,
    example_input: Tensor | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: bool = False,
    raise_on_failure: bool = True,
    team: Team | None = None,
    checkpoint: str | Path | None = None,
) -> EditResult[nn.Module | OnnxNetwork | Graph]:
    """Change a network as little as possible so that properties provably hold.

    Args:
        model: a module, an ONNX network or its path, or a graph. Never mutated.
        properties: all that must hold afterwards, for every input of their regions.
        keep: properties that hold now and must still hold. They cost the edit nothing unless it
            threatens them; the certificate covers them, after ``properties``. One that cannot be
            proved beforehand is edited for like the others; one that is violated is refused.
        holdout: properties that are only reported on, before and after, to show whether the edit
            generalizes; no editor sees them.
        method: name of an editor; see ``EDITORS``.
        preserve: inputs (q, ...) on which the network should stay as it is; fewer than 4,000 are
            joined by blends of two, so that others like them keep their outputs too. Without any,
            samples of ``domain``, or of the regions, stand in.
        labels: right classes (q,) of ``preserve``: the largest output decides, and accuracy is
            reported.
        domain: lower and upper ends of the inputs that matter, scalars or (n,).
        norm: distance to minimize, see :class:`Norm`; None lets the editor choose.
        layers: names of the layers that may change; None lets the editor choose.
        margin: safety margin to aim at, in output units; None chooses one that survives rounding.
        time_limit: wall seconds for everything; the best certified edit so far is returned.
        example_input: (1, ...) an input to trace a module with; defaults to ``preserve[:1]``.
        threads: CPU threads for LP solvers.
        seed: of everything random.
        progress: show a bar on stderr.
        raise_on_failure: raise when no certified edit was found; otherwise the status says so.
        team: processes that share the work, every one of which makes this same call; see
            ``cluster.join_team``. Only ``sequential`` has work to share.
        checkpoint: folder in which ``sequential`` notes where it stands; the same call goes on
            from there. Remove it to start anew.

    Returns:
        An :class:`EditResult`; its ``status`` is the independent checker's verdict on the weights
        as stored in the returned network. Interrupting (Ctrl-C) returns the best edit so far.

    Raises:
        SpecError: properties that do not fit the network, a violated one in ``keep``, or unusable
            options.
        ModelFormatError: an unusable network.
        UnsupportedOperationError: an operator without a sound treatment.
        InfeasibleEditError: no certified edit was found and ``raise_on_failure`` is set.

    Soundness: see ``certify.check_certificate``.
    """
    deadline = Deadline(time_limit)
    wanted, kept, outside = _several(properties), _several(keep), _several(holdout)
    if not wanted:
        raise SpecError("properties: got none; expected at least one")
    if method not in EDITORS:
        raise SpecError(f"method: got {method!r}; expected one of {', '.join(EDITORS)}")
    example = preserve if example_input is None else example_input
    source = read_network(model, example, wanted[0].region.size)
    for prop in (*wanted, *kept, *outside):
        prop.check_against(source.graph.input_size, source.graph.output_size)
    options = EditOptions(
        norm=None if norm is None else Norm.named(norm),
        margin=margin,
        layers=None if layers is None else tuple(layers),
        threads=threads,
        seed=seed,
        team=team,
        checkpoint=None if checkpoint is None else Path(checkpoint),
    )
    ends = _domain(domain, source.graph)
    reference = Reference.of(source.graph, preserve, labels, ends, wanted, seed)
    task = Task(
        source=source,
        properties=wanted,
        keep=kept,
        holdout=outside,
        reference=reference,
        domain=ends,
        options=options,
        method=method,
        editor=EDITORS[method],
        deadline=deadline,
        progress=progress,
    )
    result = Run(task).edit() if team is None else team.run(task)
    if raise_on_failure and result.status is not Verdict.CERTIFIED:
        raise InfeasibleEditError(result.report.message)
    return result


def _several(properties: Property | Sequence[Property]) -> tuple[Property, ...]:
    """One or many properties as many."""
    return (properties,) if isinstance(properties, Property) else tuple(properties)


def _domain(
    domain: tuple[Tensor | float, Tensor | float] | None, graph: Graph
) -> tuple[Tensor, Tensor] | None:
    """Ends of the stated input domain, (n,) each."""
    if domain is None:
        return None
    ends = []
    for end in domain:
        vector = torch.as_tensor(end, dtype=torch.float64).reshape(-1)
        if vector.numel() not in (1, graph.input_size):
            raise SpecError(
                f"domain: got {vector.numel()} numbers; expected one or {graph.input_size}"
            )
        ends.append(vector.expand(graph.input_size))
    if not bool((ends[0] <= ends[1]).all() & torch.isfinite(ends[0]).all()) or not bool(
        torch.isfinite(ends[1]).all()
    ):
        raise SpecError("domain: got NaN, infinity or lower > upper; expected a box")
    return ends[0], ends[1]
