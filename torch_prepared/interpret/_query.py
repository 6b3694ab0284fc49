"""What a reduced proof says, in both modes: margins of kept sets, and cuts for the exact search."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torch_prepared.bounds import RegionBatch, bound_nodes
from torch_prepared.core.graph import Graph
from torch_prepared.errors import SpecError
from torch_prepared.interpret._relaxed import ProofMethod
from torch_prepared.interpret.features import ProofFeatures
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, InputSet

__all__ = ["CoarsenQuery", "PruneQuery", "Query", "ReductionMode", "make_query"]


class ReductionMode(enum.Enum):
    """What becomes of the features that are not kept, hence what the reduced proof proves.

    ``PRUNE``: their columns in the last layer are zeroed. The reduced proof is about the *pruned*
    network, which satisfies the property too; this is the paper's notion.
    ``COARSEN``: they are only known to lie where they lie on a whole input domain. The reduced
    proof is about the *original* network, whose kept features alone depend on the region.
    """

    PRUNE = "prune"
    COARSEN = "coarsen"

    @classmethod
    def named(cls, name: str | ReductionMode) -> ReductionMode:
        """The mode called ``name``."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(m.value for m in cls)
            raise SpecError(f"mode: got {name!r}; expected one of {known}") from None


Cuts = tuple[Tensor, Tensor]
"""Coefficients (c, n) and constants (c,): ``coefficients @ kept + constants >= slack`` holds for
every sufficient set."""


class Query(ABC):
    """A reduced proof as a function of the kept set; counts its evaluations."""

    def __init__(self, features: ProofFeatures) -> None:
        self.features = features
        self.calls = 0

    @property
    @abstractmethod
    def priority(self) -> Tensor:
        """(n,) how much a margin can change when a feature is dropped; zero for those unused."""

    @abstractmethod
    def cuts(self, mask: Tensor) -> Cuts:
        """Conditions that all sufficient sets meet; if ``mask`` (n,) is not one, some fail on it.

        The last may be missing where no such condition is known.
        """

    @abstractmethod
    def _row_margins(self, masks: Tensor) -> Tensor: ...

    def margins(self, masks: Tensor) -> Tensor:
        """Margins (q,) of the kept sets ``masks`` (q, n) bool; NaN proves nothing."""
        self.calls += len(masks)
        return self._row_margins(masks).amin(dim=1)

    def sufficient(self, masks: Tensor) -> Tensor:
        """Which kept sets (q,) suffice, rounding allowed for; NaN does not."""
        return self.margins(masks) >= self.features.slack


class PruneQuery(Query):
    """Features that are not kept are zero."""

    @property
    def priority(self) -> Tensor:
        """Priorities of the paper."""
        return self.features.priority

    def _row_margins(self, masks: Tensor) -> Tensor:
        return self.features.pruned_margins(masks)

    def cuts(self, mask: Tensor) -> Cuts:
        """One linear function per row that is above the margin everywhere and equal at ``mask``.

        Box and zonotope margins are minima of linear functions of the kept set. A CROWN margin
        need not be; there the points are values of z at concrete inputs, which any sound margin
        is below, and perhaps none fails.
        """
        mine = self.features
        kept = torch.where(mask, mine.rows, 0.0)
        if mine.method is not ProofMethod.CROWN:
            points = mine.support(kept)[1]
            return mine.rows * points, mine.offset
        inputs = mine.worst_inputs(kept).to(mine.rows.device, torch.float64)
        with torch.no_grad():
            points = evaluate_graph(self._head, inputs).flatten(1)
        return mine.rows * points, mine.offset

    @cached_property
    def _head(self) -> Graph:
        return self.features.cut.head().to(torch.float64)


@dataclass(frozen=True)
class Reference:
    """Intervals (n,) of the hidden features over an input domain, and that domain."""

    lower: Tensor
    upper: Tensor
    domain: InputSet


class CoarsenQuery(Query):
    """Features that are not kept lie anywhere in their interval over the domain."""

    def __init__(self, features: ProofFeatures, reference: Reference) -> None:
        super().__init__(features)
        self.reference = reference
        rows = features.rows
        near = torch.minimum(rows * features.lower, rows * features.upper)
        far = torch.minimum(rows * reference.lower, rows * reference.upper)
        self._gains = near - far  # (s, n), not negative
        self._base = features.offset + far.sum(dim=1)

    @property
    def priority(self) -> Tensor:
        """The largest loss of any row's margin when a feature is coarsened."""
        return self._gains.amax(dim=0)

    def _row_margins(self, masks: Tensor) -> Tensor:
        return masks.to(self._gains.dtype) @ self._gains.T + self._base

    def cuts(self, mask: Tensor) -> Cuts:
        """The margins themselves are linear."""
        del mask
        return self._gains, self._base


def make_query(
    features: ProofFeatures, mode: ReductionMode, domain: InputSet | None = None
) -> Query:
    """The reduced proofs of one mode.

    Raises:
        SpecError: ``coarsen`` without a domain, or with one that does not hold the region.
    """
    if mode is ReductionMode.PRUNE:
        return PruneQuery(features)
    if domain is None:
        raise SpecError(
            "mode 'coarsen': got no domain; expected the set of inputs over which features that "
            "are not kept are bounded, such as all images"
        )
    region = features.prop.region
    inside = isinstance(domain, Box) and domain.size == region.size
    if not inside or not bool(
        ((domain.lower <= region.lower) & (region.upper <= domain.upper)).all()
    ):
        raise SpecError(
            f"mode 'coarsen': the domain does not hold the region of '{features.prop.name}'; "
            "expected a box around it"
        )
    graph = features.relaxed.graph
    regions = RegionBatch.of(domain, torch.float64, graph.device)
    with torch.no_grad():
        box = bound_nodes(graph, regions, tighten=False)[features.cut.hidden]
    lower = torch.minimum(box.lower.flatten(), features.lower)
    upper = torch.maximum(box.upper.flatten(), features.upper)
    return CoarsenQuery(features, Reference(lower, upper, domain))
