"""The checker's word on a reduced proof."""

from __future__ import annotations

from dataclasses import dataclass

from torch_prepared.certify import Certificate, Verdict
from torch_prepared.core.graph import Graph

__all__ = ["Confirmation"]


@dataclass(frozen=True)
class Confirmation:
    """What the checker said of a reduced proof.

    Args:
        verdict: certified or unknown.
        margin: proved lower bound of the safety margin of what the reduced proof is about.
        certificate: replayable; of the pruned network in mode ``prune``, of the last, affine
            step in mode ``coarsen``. None when nothing was certified.
        network: what the certificate is about; None likewise.
        reason: why not, in one line.
    """

    verdict: Verdict
    margin: float
    certificate: Certificate | None
    network: Graph | None
    reason: str = ""

    @property
    def holds(self) -> bool:
        """Whether everything was certified."""
        return self.verdict is Verdict.CERTIFIED
