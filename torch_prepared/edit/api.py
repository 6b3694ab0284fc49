"""``edit_network``: propose, round, certify, compare, keep the best."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torch_prepared._version import __version__
from torch_prepared.certify import ProofTree, Verdict
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork
from torch_prepared.edit._base import Candidate, EditOptions, Editor, EditProblem, Norm
from torch_prepared.edit._behavior import Drawdown, Reference
from torch_prepared.edit._certify import Certified, certify_network, prove
from torch_prepared.edit._result import Attempt, Delta, EditReport, EditResult
from torch_prepared.edit._source import Network, Source, read_network
from torch_prepared.edit.auto import AutoEditor
from torch_prepared.edit.one_shot import OneShotEditor
from torch_prepared.edit.refine import RefineEditor
from torch_prepared.edit.sequential import SequentialEditor
from torch_prepared.errors import InfeasibleEditError, SpecError
from torch_prepared.specs import Property

__all__ = ["EDITORS", "edit_network"]

logger = logging.getLogger(__name__)

CHECK_GRACE = 0.2  #: share of the time limit that the checker may take beyond it

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
) -> EditResult[nn.Module | OnnxNetwork | Graph]:
    """Change a network as little as possible so that properties provably hold.

    Args:
        model: a module, an ONNX network or its path, or a graph. Never mutated.
        properties: all that must hold afterwards, for every input of their regions.
        method: name of an editor; see ``EDITORS``.
        preserve: inputs (q, ...) on which the network should stay as it is. Without them samples
            of ``domain``, or of the regions, stand in.
        labels: right classes (q,) of ``preserve``, to report accuracy.
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

    Returns:
        An :class:`EditResult`; its ``status`` is the independent checker's verdict on the weights
        as stored in the returned network. Interrupting (Ctrl-C) returns the best edit so far.

    Raises:
        SpecError: properties that do not fit the network, or unusable options.
        ModelFormatError: an unusable network.
        UnsupportedOperationError: an operator without a sound treatment.
        InfeasibleEditError: no certified edit was found and ``raise_on_failure`` is set.

    Soundness: see ``certify.check_certificate``.
    """
    deadline = Deadline(time_limit)
    wanted = (properties,) if isinstance(properties, Property) else tuple(properties)
    if not wanted:
        raise SpecError("properties: got none; expected at least one")
    if method not in EDITORS:
        raise SpecError(f"method: got {method!r}; expected one of {', '.join(EDITORS)}")
    example = preserve if example_input is None else example_input
    source = read_network(model, example, wanted[0].region.size)
    for prop in wanted:
        prop.check_against(source.graph.input_size, source.graph.output_size)
    options = EditOptions(
        norm=None if norm is None else Norm.named(norm),
        margin=margin,
        layers=None if layers is None else tuple(layers),
        threads=threads,
        seed=seed,
    )
    reference = Reference.of(
        source.graph, preserve, labels, _domain(domain, source.graph), wanted, seed
    )
    run = _Run(source, EditProblem(source.graph, wanted, reference, options), deadline, progress)
    result = run.edit(method)
    if raise_on_failure and result.status is not Verdict.CERTIFIED:
        raise InfeasibleEditError(result.report.message)
    return result


@dataclass
class _Run:
    """One call of :func:`edit_network`: tries candidates and keeps the best certified one."""

    source: Source
    problem: EditProblem
    deadline: Deadline
    progress: bool
    seconds: dict[str, float] = field(default_factory=dict)
    attempts: list[Attempt] = field(default_factory=list)
    best: tuple[Candidate, Certified, Drawdown, str] | None = None
    message: str = ""

    def edit(self, method: str) -> EditResult[nn.Module | OnnxNetwork | Graph]:
        """Certify the network as it is, else edit it."""
        clock = time.monotonic()
        margins = self.problem.batch.margins(self.problem.row_bounds)
        self._spend("bounds", clock)
        logger.info("certified margins before the edit: %s", margins.tolist())
        if bool((margins > 0).all()) and self._certify(Candidate({}, "unchanged"), "none").holds:
            self.message = "the properties hold already; the network is returned unchanged"
            return self._result()
        editor = EDITORS[method]()
        stream = editor.candidates(self.problem, self.deadline)
        bar = tqdm(disable=not self.progress, unit="edit", desc=method, leave=False)
        try:
            while True:
                clock = time.monotonic()
                candidate = next(stream, None)
                self._spend("edit", clock)
                if candidate is None:
                    break
                self._certify(candidate, candidate.editor or method)
                bar.update()
                if self.deadline.over:
                    break
        except InfeasibleEditError as error:
            self.message = str(error)
        except KeyboardInterrupt:
            self.message = "interrupted"
            if self.best is None:
                raise
        finally:
            bar.close()
        return self._result()

    def _certify(self, candidate: Candidate, method: str) -> Certified:
        """Have a candidate checked; keep it when it is certified and the best so far."""
        clock = time.monotonic()
        graph = self.source.graph.with_parameters(candidate.parameters)
        proofs: Sequence[ProofTree] | None = candidate.proofs
        if proofs is None:
            proofs, _ = prove(graph, self.problem.properties)
        self._spend("bounds", clock)
        clock = time.monotonic()
        metadata = {"generator": f"torch_prepared {__version__}", "method": method}
        grace = None if self.deadline.seconds is None else CHECK_GRACE * self.deadline.seconds
        limit = None if grace is None else max(self.deadline.left, grace)
        certified = certify_network(
            graph, self.problem.properties, proofs, metadata, Deadline(limit)
        )
        self._spend("check", clock)
        drawdown = None
        if certified.holds:
            drawdown = self.problem.reference.drawdown(graph)
            if self.best is None or drawdown.score < self.best[2].score:
                self.best = (candidate, certified, drawdown, method)
        attempt = Attempt(
            method,
            candidate.note,
            self.deadline.elapsed,
            certified.holds,
            certified.check.margin,
            None if drawdown is None else drawdown.score,
        )
        self.attempts.append(attempt)
        logger.info("%s", attempt)
        if not certified.holds:
            self.message = next(
                (c.reason for c in certified.check.per_property if c.reason), "not proved"
            )
        return certified

    def _spend(self, phase: str, since: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - since

    def _result(self) -> EditResult[nn.Module | OnnxNetwork | Graph]:
        candidate, certified, drawdown, method = self.best or (None, None, None, "none")
        changed = {} if candidate is None else candidate.parameters
        model = self.source.rebuild(changed)
        check = None if certified is None else certified.check
        if check is not None and method != "none":
            self.message = f"certified by {method}"
        self.seconds["total"] = self.deadline.elapsed
        report = EditReport(
            method=method,
            seconds=dict(self.seconds),
            margin=float("nan") if check is None else check.margin,
            delta=Delta.between(self.source.graph, changed),
            drawdown=drawdown,
            per_property=[]
            if check is None
            else [(c.name, c.status.value, c.reason) for c in check.per_property],
            attempts=tuple(self.attempts),
            message=self.message,
        )
        return EditResult(
            status=Verdict.UNKNOWN if check is None else check.status,
            model=model,
            certificate=None if certified is None else certified.certificate,
            check=check,
            report=report,
        )


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
