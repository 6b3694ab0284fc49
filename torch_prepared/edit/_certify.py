"""From stored weights to a certificate and the checker's verdict on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.bounds import PropertyBatch, bound_nodes, bound_rows
from torch_prepared.bounds.crown import tightened_names
from torch_prepared.certify import Certificate, CheckResult, ProofTree, Verdict, check_certificate
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.specs import Property

__all__ = ["Certified", "certify_network", "prove", "within_clauses"]


@dataclass(frozen=True)
class Certified:
    """A certificate with what the checker said of it."""

    certificate: Certificate
    check: CheckResult

    @property
    def holds(self) -> bool:
        """Whether the checker certified every property."""
        return self.check.status is Verdict.CERTIFIED


def prove(
    graph: Graph,
    properties: Sequence[Property],
    parameters: Mapping[str, Tensor] | None = None,
    tighten: Sequence[str] | None = None,
) -> tuple[list[ProofTree], Tensor]:
    """Single-leaf proofs and the margins (b,) that bounds in float64 promise for them.

    The cheapest plan that promises a positive margin: plain intervals, else backward passes for
    ``tighten`` (every value that a nonlinear operator reads when None).
    """
    exact = graph.to(torch.float64, "cpu")
    batch = PropertyBatch.of(properties)
    changed = None
    if parameters is not None:
        changed = {name: value.detach().double().cpu() for name, value in parameters.items()}
    every = tightened_names(exact) if tighten is None else tuple(tighten)
    found: list[ProofTree | None] = [None] * len(properties)
    margins = torch.full((len(properties),), -torch.inf, dtype=torch.float64)
    with torch.no_grad():
        for plan in ((), every) if every else ((),):
            boxes = bound_nodes(exact, batch.regions, parameters=changed, only=plan)
            values = bound_rows(exact, batch.regions, boxes, batch.rows, parameters=changed).lower
            values = values + batch.offset
            now, best = batch.margins(values), batch.best_rows(values)
            for i, prop in enumerate(properties):
                if margins[i] > 0 or now[i] <= margins[i]:
                    continue
                margins[i] = now[i]
                found[i] = ProofTree.leaf(within_clauses(prop, best[i].tolist()), tighten=plan)
            if bool((margins > 0).all()):
                break
    first = [ProofTree.leaf([0] * len(p.safe.clauses)) for p in properties]
    return [tree or plain for tree, plain in zip(found, first, strict=True)], margins


def certify_network(
    graph: Graph,
    properties: Sequence[Property],
    proofs: Sequence[ProofTree],
    metadata: Mapping[str, str],
    deadline: Deadline | None = None,
) -> Certified:
    """Write the certificate of a network as stored and have it checked."""
    record = graph.record()
    claims = [p.record() for p in properties]
    certificate = Certificate.create(record, claims, proofs, metadata)
    limit = None if deadline is None or deadline.seconds is None else max(deadline.left, 1.0)
    return Certified(certificate, check_certificate(certificate, record, claims, time_limit=limit))


def within_clauses(prop: Property, best: list[int]) -> list[int]:
    """Positions in the concatenated rows to positions in each clause."""
    starts, total = [], 0
    for rows, _ in prop.safe.clauses:
        starts.append(total)
        total += len(rows)
    return [position - start for position, start in zip(best, starts, strict=False)]
