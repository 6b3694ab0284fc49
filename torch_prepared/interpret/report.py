"""How large sufficient sets are: one table over many properties, searches and orders."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch_prepared.core.graph import Graph
from torch_prepared.interpret._query import ReductionMode
from torch_prepared.interpret._relaxed import ProofMethod
from torch_prepared.interpret._search import Extractor, FeatureOrder
from torch_prepared.interpret.extract import FeatureSet, extract_sufficient
from torch_prepared.interpret.features import ProofFeatures, proof_features
from torch_prepared.specs import Property

__all__ = ["SizeRow", "proof_size_report", "summarize_sizes"]

Search = tuple[str | Extractor, str | FeatureOrder]
Visit = Callable[[int, ProofFeatures, dict[tuple[str, str], FeatureSet]], None]


@dataclass(frozen=True)
class SizeRow:
    """Sizes of kept sets of one search over the properties that are proved.

    ``unconfirmed`` counts sets that the checker did not confirm; they are in no other number.
    ``minimum`` counts the sets known to be smallest.
    """

    method: str
    order: str
    proofs: int
    properties: int
    unconfirmed: int
    minimum: int
    used_mean: float
    kept_mean: float
    kept_median: float
    kept_largest: int
    seconds_mean: float
    seconds_largest: float


def proof_size_report(
    graph: Graph,
    properties: Sequence[Property],
    *,
    method: str | ProofMethod = ProofMethod.CROWN,
    searches: Sequence[Search] = (("prefix", "priority"), ("greedy", "priority")),
    mode: str | ReductionMode = ReductionMode.PRUNE,
    time_limit: float | None = 10.0,
    seed: int = 0,
    visit: Visit | None = None,
) -> list[SizeRow]:
    """Interpret many proofs of one network.

    Args:
        graph: the network.
        properties: what to prove, one after the other.
        method: how to bound.
        searches: pairs of extractor and order.
        mode: what becomes of other features.
        time_limit: wall seconds for each search.
        seed: of random orders; property i uses ``seed + i``.
        visit: called with (position, features, sets by (extractor, order)) for every property;
            the sets are empty where nothing is proved.

    Returns:
        One row per search.
    """
    pairs = [(Extractor.named(a), FeatureOrder.named(b)) for a, b in searches]
    found: dict[tuple[str, str], list[FeatureSet]] = {(a.value, b.value): [] for a, b in pairs}
    for position, prop in enumerate(properties):
        features = proof_features(graph, prop, method)
        sets: dict[tuple[str, str], FeatureSet] = {}
        for extractor, order in pairs if features.proved else ():
            one = extract_sufficient(
                features,
                method=extractor,
                mode=mode,
                order=order,
                time_limit=time_limit,
                seed=seed + position,
            )
            sets[extractor.value, order.value] = one
            found[extractor.value, order.value].append(one)
        if visit is not None:
            visit(position, features, sets)
    return [summarize_sizes(*key, sets, len(properties)) for key, sets in found.items()]


def summarize_sizes(
    method: str, order: str, sets: Sequence[FeatureSet], properties: int
) -> SizeRow:
    """One row of the table."""
    good = [s for s in sets if s.sufficient]
    kept = [len(s.kept) for s in good]
    seconds = [s.seconds for s in sets]
    return SizeRow(
        method=method,
        order=order,
        proofs=len(good),
        properties=properties,
        unconfirmed=len(sets) - len(good),
        minimum=sum(bool(s.minimum) for s in good),
        used_mean=_mean([s.candidates for s in good]),
        kept_mean=_mean(kept),
        kept_median=float(statistics.median(kept)) if kept else float("nan"),
        kept_largest=max(kept, default=0),
        seconds_mean=_mean(seconds),
        seconds_largest=max(seconds, default=0.0),
    )


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")
