"""One edit by all ranks of a group: the first leads, the others answer."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from torch_prepared import errors
from torch_prepared._version import __version__
from torch_prepared.certify import (
    Certificate,
    CheckResult,
    ProofTree,
    PropertyCheck,
    Verdict,
    weights_digest,
)
from torch_prepared.certify.certificate import property_digest
from torch_prepared.certify.encoding import digest
from torch_prepared.cluster import _shards
from torch_prepared.cluster._group import join_group
from torch_prepared.cluster._ranks import Ranks
from torch_prepared.cluster._shards import Shards, blocks
from torch_prepared.cluster._shared import SharedMargins
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork
from torch_prepared.edit._base import EditProblem, Norm
from torch_prepared.edit._certify import Certified
from torch_prepared.edit._driver import Run, Task
from torch_prepared.edit._result import EditResult
from torch_prepared.edit._steps import Distance
from torch_prepared.edit._team import Team
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.errors import ClusterError, PreparedError
from torch_prepared.specs import Property

__all__ = ["TOLD", "RankTeam", "join_team"]

TOLD = "told by rank 0"
"""Note on errors that the leader raised, and reports itself."""

Result = EditResult[nn.Module | OnnxNetwork | Graph]
_Told = tuple[str, str, float, int, str, list[int]]


class RankTeam(Ranks, Team):
    """The ranks of a group as a team, with the attributes of ``Ranks``; see :func:`join_team`.

    Args:
        group: all ranks.
    """

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which makes the decisions, and should print and write."""
        return not self.group.rank

    def run(self, task: Task) -> Result:
        """Lead the edit, or help until it is over; the same result in every rank.

        Raises:
            ClusterError: another rank is gone or silent, or was given another task.
            PreparedError: what the leader's edit raised.
        """
        self._shards = Shards(task, self.group)
        told = self.group.gather([_identity(task)])
        if not self.leads:
            return _received(task, self._answer())
        try:
            strangers = [i for i, (name,) in enumerate(told) if not torch.equal(name, told[0][0])]
            if strangers:
                raise ClusterError(
                    f"rank {strangers[0]}: was given another network, property, option or version "
                    "than rank 0; expected the same command and files in every rank"
                )
            with self._beating():
                run = Run(task)
                result = run.edit()
        except (PreparedError, KeyboardInterrupt) as error:
            self._end([_shards.to_bytes([type(error).__name__, str(error)])])
            raise
        found = None if result.certificate is None else run.best
        changed = {} if found is None else found.candidate.parameters
        proof = None if result.certificate is None else result.certificate.to_json()
        self._end([*_shards.pack(changed), _frozen(result), _shards.to_bytes(proof)])
        return result

    def margins(self, problem: EditProblem, vector: ParameterVector) -> SharedMargins:
        """Margins of which every rank bounds and linearizes its own properties."""
        quadratic = problem.options.norm in (None, Norm.L2, Norm.BEHAVIOR)
        return SharedMargins(
            problem.exact,
            problem.batch,
            vector,
            ranks=self,
            positions=self._positions(problem.properties),
            parts=tuple(blocks(len(problem.properties), self.group.size)),
            spread=quadratic,
        )

    def distance(self, problem: EditProblem, vector: ParameterVector, damping: float) -> Distance:
        """The distance of the problem's norm, made in every rank."""
        positions = self._positions(problem.properties)
        self.call(_shards.share_distance, [positions, torch.tensor([damping]).double()])
        if self._shards is None or self._shards.distance is None:
            raise ClusterError("distance: got no task; expected `run` to be called first")
        return self._shards.distance

    def certify(
        self,
        graph: Graph,
        properties: Sequence[Property],
        proofs: Sequence[ProofTree],
        metadata: Mapping[str, str],
        deadline: Deadline | None = None,
    ) -> Certified:
        """The certificate of a network, each property replayed by one rank."""
        clock = time.monotonic()
        record, claims = graph.record(), [p.record() for p in properties]
        whole = Certificate.create(record, claims, proofs, metadata)
        seconds = None if deadline is None else deadline.limit(least=1.0)
        limit = -1.0 if seconds is None else seconds
        positions, dealt = self._positions(properties), []
        for part in blocks(len(claims), self.group.size, [p.leaves for p in proofs]):
            text = torch.zeros(0, dtype=torch.uint8)
            if claims[part]:
                own = Certificate.create(record, claims[part], proofs[part])
                text = _shards.to_bytes(own.to_json())
            dealt.append([text, positions[part]])
        shared = [*_shards.pack(graph.parameters), torch.tensor([limit]).double()]
        told = [_shards.from_bytes(t[0]) for t in self.call(_shards.certify, shared, dealt)]
        checks = _merged(told, whole.weights_digest, [c.name for c in claims])
        certified = all(check.status is Verdict.CERTIFIED for check in checks)
        status = Verdict.CERTIFIED if certified else Verdict.UNKNOWN
        check = CheckResult(status, checks, time.monotonic() - clock, "real")
        return Certified(whole, check)

    def _positions(self, properties: Sequence[Property]) -> Tensor:
        """Where properties stand in the task, (b,) int64."""
        if self._shards is None:
            raise ClusterError("properties: got no task; expected `run` to be called first")
        places = {id(p): i for i, p in enumerate(self._shards.task.every)}
        return torch.tensor([places[id(p)] for p in properties], dtype=torch.int64)


@contextmanager
def join_team(timeout: float = 600.0) -> Iterator[RankTeam]:
    """The team of all processes that ``torchrun`` started; of this one alone without it.

    Every process must then make the same calls of ``edit_network(..., team=team)``: the first one
    leads, and all get the same result. ``team.leads`` tells who should print and write.

    Args:
        timeout: seconds that one process is waited for.

    Raises:
        ClusterError: the processes do not find each other.

    Example:
        >>> with join_team() as team:
        ...     team.group.rank, team.group.size, team.leads
        (0, 1, True)
    """
    with join_group(timeout) as group:
        yield RankTeam(group)


def _identity(task: Task) -> Tensor:
    """What ranks must have in common, as bytes (32,)."""
    record, options = task.source.graph.record(), task.options
    chosen = [
        __version__, task.method, options.norm and options.norm.value, options.margin,
        options.layers and list(options.layers), options.seed,
        digest(record.structure), weights_digest(record.weights),
        [property_digest(p.record()) for p in task.every],
        weights_digest({"reference": task.reference.inputs.cpu().numpy()}),
    ]  # fmt: skip
    return torch.frombuffer(bytearray(bytes.fromhex(digest(chosen))), dtype=torch.uint8)


def _merged(
    told: Sequence[object], weights: str, names: Sequence[str]
) -> tuple[PropertyCheck, ...]:
    """The verdicts of all ranks, each on the very same weights, in the properties' order.

    Raises:
        ClusterError: a rank judged other weights, or the properties are not those asked for.
    """
    checks = []
    for rank, answer in enumerate(told):
        known, verdicts = cast("tuple[str, list[_Told]]", answer)
        if known != weights:
            raise ClusterError(f"rank {rank}: replayed on other weights than rank 0 holds")
        for name, status, margin, leaves, reason, failed in verdicts:
            verdict = Verdict(status)
            checks.append(PropertyCheck(name, verdict, margin, leaves, reason, tuple(failed)))
    if [check.name for check in checks] != list(names):
        raise ClusterError(f"replay: got {len(checks)} verdicts; expected {len(names)}")
    return tuple(checks)


def _frozen(result: Result) -> Tensor:
    """Verdict, report and worst inputs as bytes.

    Pickled, as torch.distributed does with objects: ranks of one group run the same program and
    trust each other. Files are never read so.
    """
    parts = (result.status, result.check, result.report, result.worst_inputs)
    return torch.frombuffer(bytearray(pickle.dumps(parts)), dtype=torch.uint8)


def _received(task: Task, told: list[Tensor]) -> Result:
    """The leader's result.

    Raises:
        PreparedError: what the leader raised.
    """
    if len(told) == 1:
        kind, message = cast("tuple[str, str]", _shards.from_bytes(told[0]))
        if kind == "KeyboardInterrupt":
            raise KeyboardInterrupt
        error: PreparedError = getattr(errors, kind, ClusterError)(message)
        error.add_note(TOLD)
        raise error
    names, values, frozen, proof = told
    status, check, report, worst = pickle.loads(frozen.numpy().tobytes())
    certificate = _shards.from_bytes(proof)
    return EditResult(
        status=status,
        model=task.source.rebuild(_shards.unpack(task.source.graph, names, values)),
        certificate=None if certificate is None else Certificate.from_json(certificate),
        check=check,
        report=report,
        worst_inputs=worst,
    )
