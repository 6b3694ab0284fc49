"""What every editor gets and gives. Editors claim; only the certificate checker certifies."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from torch_prepared.bounds import PropertyBatch, bound_nodes, bound_rows
from torch_prepared.bounds.cost import crown_flops
from torch_prepared.certify import ProofTree
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._metric import Metric, behavior_metric, euclidean_metric
from torch_prepared.edit._team import Team
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.errors import SpecError
from torch_prepared.specs import Property

CROWN_BUDGET = 2e11  #: operations of backward passes worth spending on one network

__all__ = [
    "Answer",
    "Candidate",
    "Candidates",
    "EditOptions",
    "EditProblem",
    "Editor",
    "Norm",
    "following",
]


class Norm(enum.Enum):
    """Distance between the edited and the original network.

    ``BEHAVIOR`` counts what happens to outputs on the inputs to preserve: decisions that are lost,
    each once, where there are labels or where some property compares outputs; else how far their
    values move. The others are norms of the change of the weights.
    """

    L1 = "1"
    L2 = "2"
    LINF = "inf"
    L1_PLUS_LINF = "1+inf"
    BEHAVIOR = "behavior"

    @classmethod
    def named(cls, name: str | Norm) -> Norm:
        """The norm called ``name``."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(n.value for n in cls)
            raise SpecError(f"norm: got {name!r}; expected one of {known}") from None


@dataclass(frozen=True)
class EditOptions:
    """Choices that every editor understands.

    Args:
        norm: distance to minimize; None lets the editor choose.
        margin: safety margin to aim at, in output units; None chooses one that survives rounding.
        layers: names of the layers an edit may change; None lets the editor choose.
        threads: CPU threads for solvers; None leaves the libraries' default.
        seed: of everything random.
        team: processes that share the work; None does all of it here.
        checkpoint: folder for where the edit stands, so that a run that is cut short can go on.
    """

    norm: Norm | None = None
    margin: float | None = None
    layers: tuple[str, ...] | None = None
    threads: int | None = None
    seed: int = 0
    team: Team | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class EditProblem:
    """One network, the properties its edit must have, and what should stay.

    Args:
        graph: the network with parameters as stored.
        properties: all that must hold afterwards.
        reference: inputs on which the behavior should stay.
        options: choices.
    """

    graph: Graph
    properties: tuple[Property, ...]
    reference: Reference
    options: EditOptions
    _metrics: dict[tuple[object, ...], Metric] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def exact(self) -> Graph:
        """The network in float64 on the CPU."""
        return self.graph.to(torch.float64, "cpu")

    @cached_property
    def batch(self) -> PropertyBatch:
        """The properties, batched, in float64."""
        return PropertyBatch.of(self.properties)

    @cached_property
    def to_keep(self) -> Reference:
        """The reference inputs, few of them with blends, that the properties allow to stay."""
        blended = self.reference.blended(self.graph, self.options.seed)
        return blended.that_may_stay(self.properties)

    @cached_property
    def tightens(self) -> bool:
        """Whether backward passes for every value are affordable, judged by their arithmetic."""
        return crown_flops(self.exact) * len(self.properties) < CROWN_BUDGET

    @cached_property
    def boxes(self) -> dict[str, Interval]:
        """Intervals of every node's value over every region, for the original weights."""
        with torch.no_grad():
            return bound_nodes(self.exact, self.batch.regions, tighten=self.tightens)

    @cached_property
    def row_bounds(self) -> Tensor:
        """Lower bounds (b, s) of every property's rows for the original weights."""
        with torch.no_grad():
            bound = bound_rows(self.exact, self.batch.regions, self.boxes, self.batch.rows)
        return bound.lower + self.batch.offset

    def metric(self, vector: ParameterVector, reference: Reference, damping: float) -> Metric:
        """The quadratic metric of the chosen norm: behavior unless the 2-norm was asked for.

        Raises:
            SpecError: a norm that is not quadratic, which only ``one_shot`` minimizes.
        """
        norm = self.options.norm
        if norm is Norm.L2:
            return euclidean_metric()
        if norm in (None, Norm.BEHAVIOR):
            key = (vector, id(reference), damping)
            if key not in self._metrics:
                self._metrics.clear()  # one at a time: its sketch may be large
                self._metrics[key] = behavior_metric(
                    self.graph, vector, reference, self.options.seed, damping
                )
            return self._metrics[key]
        raise SpecError(
            f"norm: got '{norm.value}', which only method 'one_shot' minimizes; expected "
            "'behavior' or '2' here"
        )

    def store(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies rounded to the dtype, and on the device, that the parameters are stored in."""
        return {
            name: value.detach().to(self.graph.parameters[name], copy=True)
            for name, value in parameters.items()
        }


@dataclass(frozen=True)
class Candidate:
    """Changed parameters, as stored, that their editor believes to satisfy the properties.

    Args:
        parameters: by name.
        note: one line for people.
        proofs: one proof tree per property; None lets the driver find single-leaf proofs.
        editor: name of the editor that made it; empty means the one that was asked.
        details: numbers for the report.
    """

    parameters: Mapping[str, Tensor]
    note: str
    proofs: tuple[ProofTree, ...] | None = None
    editor: str = ""
    details: Mapping[str, float] = field(default_factory=dict)


class Answer(enum.IntEnum):
    """What became of a candidate; false where it was not certified."""

    REFUSED = 0
    CERTIFIED = 1
    BEST = 2  #: certified, and it keeps more than all before


Candidates = Generator[Candidate, Answer | None, None]
"""Edits out; what became of the last one, in."""


def following(stream: Candidates, answer: Answer | None) -> Candidate | None:
    """The next candidate, its editor being told of the last one; None after the last."""
    try:
        return stream.send(answer)
    except StopIteration:
        return None


class Editor(ABC):
    """A way to find edits. Yields ever new candidates until it has no better or time is up."""

    name: ClassVar[str]

    @abstractmethod
    def candidates(self, problem: EditProblem, deadline: Deadline) -> Candidates:
        """Claimed edits, the first as soon as possible; each is answered by what became of it.

        Raises:
            InfeasibleEditError: no edit of this kind exists; the message names the properties that
                contradict each other when they are known.
        """
