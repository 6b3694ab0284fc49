"""From stored weights to a certificate and the checker's verdict on it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.bounds import PropertyBatch, bound_nodes, bound_rows
from torch_prepared.bounds.branch import LeafEngine, SlopedEngine, SplitTree
from torch_prepared.bounds.crown import tightened_names
from torch_prepared.bounds.engine import leaf_engine
from torch_prepared.certify import (
    MOST_FAILED,
    Certificate,
    CheckResult,
    ProofTree,
    PropertyCheck,
    Slopes,
    Verdict,
    check_certificate,
)
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Property

LOW_DIMENSION = 16
"""Regions with at most so many coordinates of positive width are worth splitting."""

SLACK = 1e-9  #: a leaf's margin must exceed this, for the rounding of engine and checker
MENDINGS = 4  #: rounds in which leaves that the checker refuses are split
MENDING_SECONDS, MENDING_CHECKS = 1.0, 4.0  #: for them: so many, or so many times the first check

__all__ = [
    "LOW_DIMENSION",
    "SLACK",
    "Certified",
    "certify_network",
    "check_and_mend",
    "prove",
    "prove_by_splitting",
    "tree_proof",
    "within_clauses",
]

logger = logging.getLogger(__name__)


Certify = Callable[
    [Graph, Sequence[Property], Sequence[ProofTree], Mapping[str, str], Deadline], "Certified"
]


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
    every = tightened_names(exact, batch.regions.is_box) if tighten is None else tuple(tighten)
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


def tree_proof(tree: SplitTree, engine: LeafEngine, graph: Graph) -> ProofTree:
    """A split tree as the checker reads it, every leaf tightened.

    Args:
        tree: every leaf proved.
        engine: what proved them; writes out the slopes of leaves where any has its own.
        graph: the network, for the names of its values.
    """
    dim, value, left, right, rows = tree.links()
    sizes = np.bincount(tree.batch.clause[0].numpy(), minlength=rows.shape[1])
    starts = np.cumsum(sizes) - sizes
    box = tree.batch.regions.is_box
    proof, nodes = ProofTree.from_links(
        dim, value, left, right, rows - starts, plan=tightened_names(graph, box)
    )
    if not isinstance(engine, SlopedEngine) or not tree.has_slopes:
        return proof
    leaves = nodes[proof.split_dim < 0]
    lines: dict[str, list[Tensor]] = {}
    for part in np.array_split(leaves, -(-len(leaves) // 4096)):
        shares = engine.slopes.chosen(tree.boxes(part), tree.shares(part, engine.slopes.size))
        for name, line in engine.slopes.lower_lines(shares).items():
            lines.setdefault(name, []).append(line)
    slopes = {name: Slopes(lower=torch.cat(parts).float().numpy()) for name, parts in lines.items()}
    return dataclasses.replace(proof, slopes=slopes, tighten_slopes=slopes)


def prove_by_splitting(
    graph: Graph,
    prop: Property,
    deadline: Deadline,
    max_leaves: int = 2_000_000,
    tree: SplitTree | None = None,
) -> tuple[ProofTree | None, Tensor | None]:
    """Branch and bound over one property's region.

    Args:
        graph: the network as stored.
        prop: its region has few coordinates of positive width, or this is hopeless.
        deadline: when to stop.
        max_leaves: when to stop.
        tree: splits of the property's region to begin with, grown in place.

    Returns:
        A proof that the engine believes in, or None; and an input (n,) that seems to violate the
        property, met on the way, or None.
    """
    batch = PropertyBatch.of([prop])
    tree = SplitTree(batch, slack=SLACK) if tree is None else tree
    for network in (graph, graph.to(torch.float64, "cpu")):
        engine = leaf_engine(network, batch)
        tree.bound(engine, tree.leaves, chunk=4096)
        for _, failing in tree.grow(engine, deadline, max_leaves):
            if not len(failing):
                continue
            center = tree.boxes(failing).center
            with torch.no_grad():
                y = evaluate_graph(graph, center.to(graph.dtype)).flatten(1).double()
            margins = prop.safe.margin(y)
            if float(margins.min()) <= 0:
                return None, center[int(margins.argmin())]
            logger.debug("%s: %d nodes", prop.name, tree.count)
        if not tree.proved:
            return None, None
    return tree_proof(tree, engine, graph), None


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
    limit = None if deadline is None else deadline.limit(least=1.0)
    check = check_certificate(
        certificate, record, claims, time_limit=limit, workers=torch.get_num_threads()
    )
    return Certified(certificate, check)


def check_and_mend(
    certify: Certify,
    graph: Graph,
    properties: Sequence[Property],
    proofs: Sequence[ProofTree],
    metadata: Mapping[str, str],
    deadline: Deadline,
) -> Certified:
    """Have proofs checked; the few leaves that the checker refuses are split and checked again.

    Engine and checker bound the same leaf, but not by the same intermediate intervals: the
    checker recomputes only those that decide something. Where plain intervals are tighter than
    backward passes (lattice networks), leaves that the engine has proved may fail, and smaller
    ones do not.

    Args:
        certify: as :func:`certify_network`.
        graph: the network as stored.
        properties: what the proofs are about.
        proofs: one per property.
        metadata: of the certificate.
        deadline: no round is begun that is not expected to be over by then.
    """
    certified = certify(graph, properties, proofs, metadata, deadline)
    budget = max(MENDING_SECONDS, MENDING_CHECKS * certified.check.seconds)
    until = Deadline(min(budget, deadline.left))
    for _ in range(MENDINGS):
        pairs = list(zip(properties, proofs, certified.check.per_property, strict=True))
        if certified.holds or not all(_can_mend(prop, check) for prop, _, check in pairs):
            break
        finer = [_split_failed(*pair) for pair in pairs]
        growth = sum(p.leaves for p in finer) / sum(p.leaves for p in proofs)
        if until.left < growth * certified.check.seconds:
            break
        proofs = finer
        certified = certify(graph, properties, proofs, metadata, deadline)
        logger.info("mended proofs: %s", certified.check.status.value)
    return certified


def _can_mend(prop: Property, check: PropertyCheck) -> bool:
    wide = int((prop.region.upper > prop.region.lower).sum())
    few = 0 < len(check.failed) <= MOST_FAILED and wide <= LOW_DIMENSION
    return check.status is Verdict.CERTIFIED or few


def _split_failed(prop: Property, proof: ProofTree, check: PropertyCheck) -> ProofTree:
    """The proof with its failed leaves halved, each where it is widest relative to the region."""
    if not check.failed:
        return proof
    low, high = (end.double().cpu().numpy() for end in (prop.region.lower, prop.region.upper))
    width = np.where(high > low, high - low, np.inf)
    dims, values = [], []
    for leaf in check.failed:
        a, b = proof.leaf_box(leaf, low, high)
        dims.append(int(((b - a) / width).argmax()))
        values.append(float(0.5 * a[dims[-1]] + 0.5 * b[dims[-1]]))
    return proof.split_leaves(check.failed, dims, values)


def within_clauses(prop: Property, best: list[int]) -> list[int]:
    """Positions in the concatenated rows to positions in each clause."""
    starts, total = [], 0
    for rows, _ in prop.safe.clauses:
        starts.append(total)
        total += len(rows)
    return [position - start for position, start in zip(best, starts, strict=False)]
