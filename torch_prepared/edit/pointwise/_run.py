"""One call of ``edit_points``: propose, round, evaluate exactly, widen the margin where needed."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from torch_prepared._version import __version__
from torch_prepared.certify import (
    PointCertificate,
    PointCheck,
    PointClaims,
    Verdict,
    check_points,
    weights_digest,
)
from torch_prepared.certify.compute import ComputeType
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork
from torch_prepared.edit._behavior import Drawdown
from torch_prepared.edit._result import Delta
from torch_prepared.edit._source import Source
from torch_prepared.edit.pointwise._result import Outcome, PointEditResult, PointStatus
from torch_prepared.edit.pointwise._solve import PointProblem, Proposed, propose
from torch_prepared.solvers import Status

__all__ = ["ROUNDS", "Run"]

logger = logging.getLogger(__name__)

ROUNDS = 6  #: margins that are tried
_OUTCOMES = {Status.INFEASIBLE: Outcome.INFEASIBLE, Status.TIME_LIMIT: Outcome.TIME_LIMIT}


@dataclass
class Run:
    """One call of :func:`edit_points`."""

    source: Source
    problem: PointProblem
    verify: str
    compute: ComputeType
    deadline: Deadline
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str = ""  #: why the checker refused the last proposal, where no margin would help

    def edit(self, progress: bool) -> PointEditResult[nn.Module | OnnxNetwork | Graph]:
        """Propose with growing margins until the checker agrees; keep the least harmful."""
        best: tuple[float, Proposed, _Verified, Drawdown | None] | None = None
        last: Proposed | None = None
        problem = self.problem
        with tqdm(disable=not progress, unit="edit", desc="pointwise", leave=False) as bar:
            for _ in range(ROUNDS):
                widen = 0.0
                stream = propose(problem, self.deadline)
                while True:
                    clock = time.monotonic()
                    proposed = next(stream, None)
                    self._spend("solve", clock)
                    if proposed is None:
                        break
                    bar.update()
                    last = proposed
                    if proposed.found.d is None:
                        continue
                    verified = self._verify(proposed)
                    if not verified.suffices(self.verify):
                        lack = verified.shortfall(self.verify)
                        self.reason = verified.reason(self.verify) if lack == 0.0 else ""
                        widen = max(widen, lack)
                        continue
                    lost = self._drawdown(proposed)
                    total = 0.0 if lost is None else lost.total
                    if best is None or total < best[0]:
                        best = total, proposed, verified, lost
                if best is not None or widen == 0.0 or self.deadline.over:
                    break
                margin = max(2.0 * problem.options.margin, problem.options.margin + 1.5 * widen)
                problem = replace(problem, options=replace(problem.options, margin=margin))
                logger.info("margin raised to %g", margin)
        if best is None:
            return self._failed(last)
        return self._result(best[1], best[2], best[3])

    def conflict(
        self, examples: tuple[int, ...]
    ) -> PointEditResult[nn.Module | OnnxNetwork | Graph]:
        """Equal inputs with different targets: no solver is asked."""
        message = f"equal inputs with different targets: examples {_listed(examples)}"
        return self._empty(Outcome.INFEASIBLE, examples, message)

    def _verify(self, proposed: Proposed) -> _Verified:
        clock = time.monotonic()
        graph = self.problem.graph.with_parameters(proposed.parameters)
        record = graph.record()
        certificate = PointCertificate.create(
            record, self.problem.edits, self._manifest(graph, proposed)
        )
        if self.verify == "none":
            return _Verified(certificate, None, None)
        exact = check_points(certificate, record, self.problem.edits)
        loose = check_points(certificate, record, self.problem.edits, arithmetic=self.compute)
        self._spend("check", clock)
        return _Verified(certificate, exact, loose)

    def _drawdown(self, proposed: Proposed) -> Drawdown | None:
        if self.problem.reference is None:
            return None
        return self.problem.reference.drawdown(
            self.problem.graph.with_parameters(proposed.parameters)
        )

    def _spend(self, phase: str, since: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - since

    def _manifest(self, graph: Graph, proposed: Proposed) -> dict[str, str]:
        """Who, what and how, as text by key."""
        claims, options = self.problem.edits, self.problem.options
        before, after = self.problem.graph.record(), graph.record()
        changed = proposed.parameters
        return {
            "generator": f"torch_prepared {__version__}",
            "method": proposed.method,
            "weights_before": weights_digest(before.weights),
            "weights_after": weights_digest(after.weights),
            "changed_parameters": ", ".join(sorted(changed)),
            "examples": str(len(claims.inputs)),
            "examples_digest": claims.digest,
            "example_digests": " ".join(
                hashlib.sha256((x + 0.0).astype("<f8").tobytes()).hexdigest()[:16]
                for x in claims.inputs
            ),
            "kept_examples": "0"
            if self.problem.keeps is None
            else str(len(self.problem.keeps.inputs)),
            "norm": options.norm.value,
            "solver": options.solver,
            "margin": repr(options.margin),
            "size": repr(proposed.found.size),
            "solver_status": proposed.found.status.value,
            "compute": self.compute,
        }

    def _result(
        self, proposed: Proposed, verified: _Verified, lost: Drawdown | None
    ) -> PointEditResult[nn.Module | OnnxNetwork | Graph]:
        self.seconds["total"] = self.deadline.elapsed
        graph = self.problem.graph
        found, changed = proposed.found, proposed.parameters
        return PointEditResult(
            outcome=Outcome.EDITED,
            status=verified.status,
            model=self.source.rebuild(changed),
            method=proposed.method if changed else "none",
            margins=verified.margins(self.problem.edits),
            margins_float=verified.margins_float(self.problem.edits),
            size=found.size,
            bound=found.bound,
            delta=Delta.between(graph, changed),
            drawdown=lost,
            conflicting=(),
            certificate=verified.certificate,
            manifest=verified.certificate.manifest,
            stale_layers=_stale(graph, changed),
            seconds=dict(self.seconds),
            message=f"{verified.status.value}{self._type(verified)} by {proposed.method}"
            if changed
            else "the examples hold already; the network is returned unchanged",
            compute=self.compute,
        )

    def _type(self, verified: _Verified) -> str:
        """The compute type that a float verdict speaks of, where it is not the usual one."""
        named = verified.status is PointStatus.VERIFIED_FLOAT and self.compute != "float32"
        return f" ({self.compute})" if named else ""

    def _failed(self, last: Proposed | None) -> PointEditResult[nn.Module | OnnxNetwork | Graph]:
        conflict: tuple[int, ...] = ()
        if last is None or last.found.d is not None:
            outcome = Outcome.UNKNOWN
            message = "no proposal survived exact evaluation; raise the margin or the time limit"
            if self.reason:
                message = f"no proposal was verified: {self.reason}"
            if self.deadline.over:
                outcome, message = Outcome.TIME_LIMIT, "time over before an edit was verified"
        else:
            found = last.found
            outcome = _OUTCOMES.get(found.status, Outcome.UNKNOWN)
            edits = len(self.problem.edits.inputs)
            conflict = tuple(i for i in found.conflict if i < edits)
            kept = sum(i >= edits for i in found.conflict)
            parts = [f"{last.method}: {found.message or found.status.value}"]
            if conflict or kept:
                parts.append(f"in conflict: examples {_listed(conflict)}, {kept} kept ones")
            message = "; ".join(parts)
        return self._empty(outcome, conflict, message)

    def _empty(
        self, outcome: Outcome, conflict: tuple[int, ...], message: str
    ) -> PointEditResult[nn.Module | OnnxNetwork | Graph]:
        self.seconds["total"] = self.deadline.elapsed
        nothing = np.full(len(self.problem.edits.inputs), np.nan)
        return PointEditResult(
            outcome, PointStatus.UNVERIFIED, self.source.rebuild({}), "none", nothing, nothing,
            float("nan"), float("nan"), Delta.between(self.problem.graph, {}), None, conflict,
            None, {}, (), dict(self.seconds), message, self.compute,
        )  # fmt: skip


@dataclass(frozen=True)
class _Verified:
    """A certificate with the checker's word in both arithmetics; None where it was not asked."""

    certificate: PointCertificate
    exact: PointCheck | None
    loose: PointCheck | None

    @property
    def status(self) -> PointStatus:
        """The strongest verdict."""
        if self.exact is None or self.exact.status is not Verdict.CERTIFIED:
            return PointStatus.UNVERIFIED
        if self.loose is not None and self.loose.status is Verdict.CERTIFIED:
            return PointStatus.VERIFIED_FLOAT
        return PointStatus.VERIFIED_EXACT

    def suffices(self, verify: str) -> bool:
        """Whether what was asked for is proved."""
        if verify == "none":
            return True
        wanted = [PointStatus.VERIFIED_FLOAT]
        return self.status in (
            [*wanted, PointStatus.VERIFIED_EXACT] if verify == "exact" else wanted
        )

    def reason(self, verify: str) -> str:
        """The checker's."""
        check = self.loose if verify == "float" else self.exact
        return "" if check is None else check.reason

    def shortfall(self, verify: str) -> float:
        """How much larger a margin should be for the checker to agree; 0 when that is hopeless."""
        check = self.loose if verify == "float" else self.exact
        if check is None or not np.isfinite(check.margins).all():
            return 0.0
        return max(-check.margin, 0.0) + 1e-12

    def margins(self, claims: PointClaims) -> np.ndarray:
        """Exact margins, rounded down."""
        return np.full(len(claims.inputs), np.nan) if self.exact is None else self.exact.margins

    def margins_float(self, claims: PointClaims) -> np.ndarray:
        """Lower bounds over evaluations in the compute type."""
        return np.full(len(claims.inputs), np.nan) if self.loose is None else self.loose.margins


def _stale(graph: Graph, changed: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Nodes that read a changed parameter, and all that depend on them."""
    found: dict[str, None] = {}
    for node in graph.nodes:
        reads = any(ref.name in changed for ref in node.params.values())
        if reads or any(name in found for name in node.inputs):
            found[node.name] = None
    return tuple(found)


def _listed(examples: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, examples[:8])) or "none"
    return shown if len(examples) <= 8 else f"{shown}, ... ({len(examples)} in all)"
