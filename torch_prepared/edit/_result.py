"""What an edit returns: a network, a certificate and the numbers that tell whether it is useful."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from torch_prepared.certify import Certificate, CheckResult, Verdict
from torch_prepared.core.graph import Graph
from torch_prepared.edit._behavior import Drawdown
from torch_prepared.edit._report_locality import Locality
from torch_prepared.edit.report import Generalization, PropertyReport

__all__ = [
    "Attempt",
    "Delta",
    "EditReport",
    "EditResult",
    "LayerDelta",
]

Model = TypeVar("Model")
_TINY = 1e-300


@dataclass(frozen=True)
class LayerDelta:
    """Change of one layer's editable parameters.

    Args:
        name: of the layer.
        op: its operator.
        parameters: names of the stored parameters, each counted at its first reader only.
        size: number of their scalars.
        changed: how many of them moved.
        l1: sum of absolute changes; ``l2`` and ``linf`` likewise.
        relative_l2: ``l2`` over the 2-norm of the layer's original parameters.
    """

    name: str
    op: str
    parameters: tuple[str, ...]
    size: int
    changed: int
    l1: float
    l2: float
    linf: float
    relative_l2: float


@dataclass(frozen=True)
class Delta:
    """Size of the weight change over all editable parameters, by parameter and by layer."""

    l1: float
    l2: float
    linf: float
    relative_l2: float
    changed: int
    by_parameter: Mapping[str, float]
    by_layer: tuple[LayerDelta, ...] = ()

    @classmethod
    def between(cls, before: Graph, parameters: Mapping[str, Tensor]) -> Delta:
        """From the stored parameters of ``before`` to ``parameters``."""
        old = {name: before.parameters[name].double().cpu() for name in sorted(before.editable)}
        moved = {
            name: parameters[name].double().cpu() - value
            for name, value in old.items()
            if name in parameters
        }
        flat = _flatten(moved.values())
        layers, seen = [], set[str]()
        for node in before.nodes:
            names = tuple(
                dict.fromkeys(
                    ref.name
                    for ref in node.params.values()
                    if ref.name in old and ref.name not in seen
                )
            )
            if names:
                seen.update(names)
                layers.append(_layer(node.name, node.op, names, old, moved))
        return cls(
            l1=float(flat.abs().sum()),
            l2=float(flat.norm()),
            linf=float(flat.abs().max()),
            relative_l2=float(flat.norm()) / max(float(_flatten(old.values()).norm()), _TINY),
            changed=int((flat != 0).sum()),
            by_parameter={
                name: float(m.norm()) / max(float(old[name].norm()), _TINY)
                for name, m in moved.items()
                if bool((m != 0).any())
            },
            by_layer=tuple(layers),
        )


def _flatten(tensors: Iterable[Tensor]) -> Tensor:
    """All entries in one float64 vector; a single zero when there are none."""
    parts = [t.reshape(-1) for t in tensors if t.numel()]
    return torch.cat(parts) if parts else torch.zeros(1, dtype=torch.float64)


def _layer(
    name: str,
    op: str,
    names: tuple[str, ...],
    old: Mapping[str, Tensor],
    moved: Mapping[str, Tensor],
) -> LayerDelta:
    flat = _flatten(moved[n] for n in names if n in moved)
    whole = _flatten(old[n] for n in names)
    return LayerDelta(
        name=name,
        op=op,
        parameters=names,
        size=sum(old[n].numel() for n in names),
        changed=int((flat != 0).sum()),
        l1=float(flat.abs().sum()),
        l2=float(flat.norm()),
        linf=float(flat.abs().max()),
        relative_l2=float(flat.norm()) / max(float(whole.norm()), _TINY),
    )


@dataclass(frozen=True)
class Attempt:
    """One candidate that was tried, kept or not.

    Args:
        method: the editor that made it.
        note: one line from it.
        seconds: since the start, when the verdict was known.
        certified: the checker's verdict on all properties.
        margin: smallest margin the checker proved; NaN when it was not asked.
        score: what it lost on the reference inputs (decisions, relative output change).
        failed: names of the properties that were not proved.
    """

    method: str
    note: str
    seconds: float
    certified: bool
    margin: float
    score: tuple[float, float] | None
    failed: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditReport:
    """Numbers of an edit.

    Args:
        method: the editor whose candidate was returned; ``"none"`` when nothing had to change.
        seconds: wall time by phase, and ``total``.
        margin: lower bound of the smallest safety margin that the checker proved; NaN if none.
        delta: size of the change.
        drawdown: what was lost on the reference inputs.
        locality: where in input space outputs moved; None without an edit.
        properties: every property before and after: edited, kept, held out, in this order.
        generalization: summary of those held out; None without any, or without an edit.
        conflicts: names of properties that no network at all satisfies together.
        attempts: everything that was tried.
        message: one line for people.
    """

    method: str
    seconds: Mapping[str, float]
    margin: float
    delta: Delta
    drawdown: Drawdown | None
    locality: Locality | None
    properties: tuple[PropertyReport, ...]
    generalization: Generalization | None
    conflicts: tuple[tuple[str, ...], ...]
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
        certificate: replayable proof of the edited and the kept properties, in this order; None
            when nothing certified was found.
        check: the checker's full answer on that certificate.
        report: numbers.
        worst_inputs: (b, n) float64, the input with the smallest margin that an attack on the
            *original* network met, for every edited, then every kept property.
    """

    status: Verdict
    model: Model
    certificate: Certificate | None
    check: CheckResult | None
    report: EditReport
    worst_inputs: Tensor
