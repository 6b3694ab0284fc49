"""What an edit returns: a network, a certificate and the numbers that tell whether it is useful."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from torch_prepared.certify import Certificate, CheckResult, Verdict
from torch_prepared.core.graph import Graph
from torch_prepared.edit._behavior import Drawdown

__all__ = ["Delta", "EditReport", "EditResult"]

Model = TypeVar("Model")


@dataclass(frozen=True)
class Delta:
    """Size of the weight change over all editable parameters, and by parameter."""

    l1: float
    l2: float
    linf: float
    relative_l2: float
    changed: int
    by_parameter: Mapping[str, float]

    @classmethod
    def between(cls, before: Graph, parameters: Mapping[str, Tensor]) -> Delta:
        """From the stored parameters of ``before`` to ``parameters``."""
        moved = {
            name: (parameters[name].double().cpu() - before.parameters[name].double().cpu())
            for name in sorted(before.editable)
            if name in parameters
        }
        flat = torch.cat([m.reshape(-1) for m in moved.values()] or [torch.zeros(1)]).double()
        whole = [before.parameters[name].double().square().sum() for name in before.editable]
        size = float(torch.stack(whole).sum().sqrt()) if whole else 0.0
        return cls(
            l1=float(flat.abs().sum()),
            l2=float(flat.norm()),
            linf=float(flat.abs().max()),
            relative_l2=float(flat.norm()) / max(size, 1e-300),
            changed=int((flat != 0).sum()),
            by_parameter={
                name: float(m.norm()) / max(float(before.parameters[name].double().norm()), 1e-300)
                for name, m in moved.items()
                if bool((m != 0).any())
            },
        )


@dataclass(frozen=True)
class Attempt:
    """One candidate that was tried, kept or not."""

    method: str
    note: str
    seconds: float
    certified: bool
    margin: float
    score: tuple[float, float] | None


@dataclass(frozen=True)
class EditReport:
    """Numbers of an edit.

    Args:
        method: the editor whose candidate was returned; ``"none"`` when nothing had to change.
        seconds: wall time by phase, and ``total``.
        margin: lower bound of the smallest safety margin that the checker proved; NaN if none.
        delta: size of the change.
        drawdown: what was lost on the reference inputs.
        per_property: the checker's verdict by property, with its reason.
        attempts: everything that was tried.
        message: one line for people.
    """

    method: str
    seconds: Mapping[str, float]
    margin: float
    delta: Delta
    drawdown: Drawdown | None
    per_property: Sequence[tuple[str, str, str]]
    attempts: Sequence[Attempt]
    message: str

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class EditResult(Generic[Model]):
    """The outcome of an edit.

    Args:
        status: the checker's verdict on the returned network; only the checker certifies.
        model: the edited network, or an unchanged copy when nothing certified was found.
        certificate: replayable proof, None when nothing certified was found.
        check: the checker's full answer on that certificate.
        report: numbers.
    """

    status: Verdict
    model: Model
    certificate: Certificate | None
    check: CheckResult | None
    report: EditReport
