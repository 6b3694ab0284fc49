"""Sufficiency confirmed: the reduced proof is replayed by the independent checker."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_prepared._version import __version__
from torch_prepared.certify import Certificate, ProofTree, Verdict, check_certificate
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.interpret._confirmation import Confirmation
from torch_prepared.interpret._query import CoarsenQuery, Query
from torch_prepared.specs import Box, InputSet, Property, SafeSet

__all__ = ["confirm"]

_WIDEN = 1e-9  #: claimed ends of features are moved out by this share, so that rounding fits in


def confirm(query: Query, mask: Tensor, deadline: Deadline) -> Confirmation:
    """Have the reduced proof of the kept set ``mask`` (n,) replayed.

    ``prune``: the network with zeros for all other features must satisfy the property.
    ``coarsen``: three certificates: kept features stay in their intervals over the region, the
    others in theirs over the domain, and the affine end of the network satisfies the property on
    the box of all these intervals.

    Soundness: the checker's; see ``certify.check_certificate``.
    """
    features = query.features
    if isinstance(query, CoarsenQuery):
        return _confirm_coarse(query, mask, deadline)
    network = features.cut.pruned(mask.nonzero().flatten())
    return _check(network, features.prop, features.proof_tree(network), deadline)


def _confirm_coarse(query: CoarsenQuery, mask: Tensor, deadline: Deadline) -> Confirmation:
    features, reference = query.features, query.reference
    near = _widened(features.lower, features.upper)
    far = _widened(reference.lower, reference.upper)
    used = (features.rows != 0).any(dim=0)
    head = features.cut.head()
    tree = features.proof_tree(head)
    for region, ends, wanted, plan in (
        (features.prop.region, near, mask & used, tree),
        (reference.domain, far, ~mask & used, None),
    ):
        claim = _interval_claim(region, ends, wanted, features.prop.name)
        if claim is None:
            continue
        rows = [0] * len(claim.safe.clauses)
        slopes = {} if plan is None else plan.slopes
        names = () if plan is None else plan.plan
        leaf = ProofTree.leaf(rows, tighten=names, slopes=slopes, tighten_slopes=slopes)
        found = _check(head, claim, leaf, deadline)
        if not found.holds:
            return found
    lower = torch.where(mask, near[0], far[0])
    upper = torch.where(mask, near[1], far[1])
    # A feature that no row reads may be anything; zero keeps the box bounded.
    box = Box(torch.where(used, lower, 0.0), torch.where(used, upper, 0.0))
    last = Property(box, features.prop.safe, features.prop.name)
    return _check(features.cut.tail(), last, ProofTree.leaf(features.chosen), deadline)


def _widened(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Ends moved out a little."""
    scale = _WIDEN * torch.maximum(lower.abs(), upper.abs()).amax()
    return (lower - scale).cpu(), (upper + scale).cpu()


def _interval_claim(
    region: InputSet, ends: tuple[Tensor, Tensor], wanted: Tensor, name: str
) -> Property | None:
    """The property that the features ``wanted`` (n,) lie between ``ends``."""
    wanted = wanted.cpu()
    if not bool(wanted.any()):
        return None
    lower = torch.where(wanted, ends[0], -math.inf).tolist()
    upper = torch.where(wanted, ends[1], math.inf).tolist()
    return Property(region, SafeSet.interval(lower, upper), f"features of {name}")


def _check(graph: Graph, prop: Property, proof: ProofTree, deadline: Deadline) -> Confirmation:
    record, claims = graph.record(), [prop.record()]
    metadata = {"generator": f"torch_prepared {__version__}", "method": "interpret"}
    certificate = Certificate.create(record, claims, [proof], metadata)
    limit = deadline.limit(least=1.0)
    result = check_certificate(certificate, record, claims, time_limit=limit)
    check = result.per_property[0]
    if result.status is not Verdict.CERTIFIED:
        return Confirmation(result.status, math.nan, None, None, f"{prop.name}: {check.reason}")
    return Confirmation(result.status, check.margin, certificate, graph)
