"""Sufficient features: a small part of a proof that proves the property by itself."""

from __future__ import annotations

import enum
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.interpret._confirm import confirm
from torch_prepared.interpret._confirmation import Confirmation
from torch_prepared.interpret._exact import exact_search
from torch_prepared.interpret._query import PruneQuery, Query, ReductionMode, make_query
from torch_prepared.interpret._search import (
    Extractor,
    FeatureOrder,
    Found,
    greedy_search,
    order_features,
    prefix_search,
)
from torch_prepared.interpret.features import ProofFeatures
from torch_prepared.specs import InputSet

__all__ = ["FeatureSet", "Outcome", "extract_sufficient"]


class Outcome(enum.Enum):
    """What an extraction ended with.

    ``SUFFICIENT``: the reduced proof was replayed by the certificate checker. ``NOT_PROVED``: the
    bounds do not prove the property even with all features. ``UNCONFIRMED``: the bounds call the
    set sufficient and the checker does not, so nothing is claimed.
    """

    SUFFICIENT = "sufficient"
    NOT_PROVED = "not proved"
    UNCONFIRMED = "unconfirmed"


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """A set of kept features.

    Args:
        kept: (k,) int64, the most important first; empty when nothing was proved.
        outcome: see :class:`Outcome`. A set is *sufficient* only if it says so.
        mode: what became of the other features.
        method: the search.
        order: what the search sorted by.
        candidates: features that the proof uses at all.
        margin: the checker's lower bound of the reduced proof's margin; NaN when there is none.
        claimed: the bounds' own margin of the reduced proof.
        calls: reduced proofs evaluated in the search.
        irreducible: no single feature can be dropped, as the bounds see it.
        fewest: no smaller set than this suffices, as the bounds (and HiGHS) see it.
        complete: whether the search ended by itself rather than for lack of time or rounds.
        seconds: wall time of search and replay.
        confirmation: the checker's verdict with the replayable certificate.
    """

    kept: Tensor
    outcome: Outcome
    mode: ReductionMode
    method: Extractor
    order: FeatureOrder
    candidates: int
    margin: float
    claimed: float
    calls: int
    irreducible: bool
    fewest: int
    complete: bool
    seconds: float
    confirmation: Confirmation | None

    @property
    def sufficient(self) -> bool:
        """Whether the checker confirmed the reduced proof."""
        return self.outcome is Outcome.SUFFICIENT

    @property
    def minimum(self) -> bool | None:
        """True when no sufficient set is smaller, None when that is not known."""
        return True if self.sufficient and len(self.kept) <= self.fewest else None

    @property
    def statement(self) -> str:
        """What the reduced proof proves, in one sentence."""
        if self.outcome is Outcome.NOT_PROVED:
            return "Nothing: the bounds do not prove the property, so there is no proof to reduce."
        if self.outcome is Outcome.UNCONFIRMED:
            return "Nothing: the certificate checker does not confirm the reduced proof."
        count = len(self.kept)
        if self.mode is ReductionMode.PRUNE:
            return (
                f"The network whose last affine layer reads {count} of its {self.candidates} "
                "features in use, and zero in place of all others, satisfies the property on the "
                f"whole region with margin at least {self.margin:.6g}. This is a statement about "
                "that pruned network"
                + ("." if count else ", which is constant: its biases alone decide.")
            )
        return (
            f"The network itself satisfies the property on the whole region, knowing how the "
            f"region bounds {count} of its {self.candidates} features in use and only how the "
            f"wider domain bounds the others; margin at least {self.margin:.6g}."
        )


def extract_sufficient(
    features: ProofFeatures,
    *,
    method: str | Extractor = Extractor.GREEDY,
    mode: str | ReductionMode = ReductionMode.PRUNE,
    order: str | FeatureOrder = FeatureOrder.PRIORITY,
    domain: InputSet | None = None,
    time_limit: float | None = None,
    seed: int = 0,
) -> FeatureSet:
    """Search a small set of features that proves the property, and have it replayed.

    Args:
        features: the proof.
        method: the search, see :class:`Extractor`.
        mode: what becomes of the other features, see :class:`ReductionMode`.
        order: what the features are sorted by.
        domain: for mode ``coarsen``: the box over which the other features are bounded.
        time_limit: wall seconds; a search that runs out keeps the best set so far.
        seed: of the random order.

    Returns:
        A :class:`FeatureSet`, whose ``seconds`` leave out a replay that an earlier search on the
        same features has paid for. A property that is not proved is an outcome, not an error.

    Raises:
        SpecError: unknown names, or an unusable domain.

    Soundness: the outcome ``SUFFICIENT`` is the checker's verdict on the reduced proof. Sizes of
    smaller sets that do not suffice (``irreducible``, ``fewest``) are about the bounds.

    Source: Banerjee, Singh and Singh (ICLR 2024), algorithm SuPFEx / ProFIt, for ``prefix``.
    """
    start, deadline = time.monotonic(), Deadline(time_limit)
    search, kind = Extractor.named(method), FeatureOrder.named(order)
    query = make_query(features, ReductionMode.named(mode), domain)
    everything = torch.ones(1, features.size, dtype=torch.bool, device=features.rows.device)
    ordered = order_features(query, kind, seed)
    found, confirmation = None, None
    if bool(query.sufficient(everything)[0]):
        found = _search(query, search, ordered, deadline)
        confirmation = _replayed(query, found.mask, deadline)
    kept = torch.zeros(0, dtype=torch.int64)
    calls, claimed = query.calls, math.nan
    if found is not None:
        kept = found.mask.nonzero().flatten()
        kept = kept[query.priority[kept].argsort(descending=True, stable=True)].cpu()
        claimed = float(query.margins(found.mask[None])[0])
    return FeatureSet(
        kept=kept,
        outcome=_outcome(confirmation),
        mode=ReductionMode.named(mode),
        method=search,
        order=kind,
        candidates=len(ordered),
        margin=math.nan if confirmation is None else confirmation.margin,
        claimed=claimed,
        calls=calls,
        irreducible=found is not None and found.irreducible,
        fewest=0 if found is None else found.fewest,
        complete=found is not None and found.complete,
        seconds=time.monotonic() - start,
        confirmation=confirmation,
    )


def _outcome(confirmation: Confirmation | None) -> Outcome:
    if confirmation is None:
        return Outcome.NOT_PROVED
    return Outcome.SUFFICIENT if confirmation.holds else Outcome.UNCONFIRMED


def _replayed(query: Query, mask: Tensor, deadline: Deadline) -> Confirmation:
    """The checker's verdict; several searches on one proof often end in the same set."""
    if not isinstance(query, PruneQuery):
        return confirm(query, mask, deadline)
    known, key = query.features.replays, tuple(mask.nonzero().flatten().tolist())
    if key not in known or not known[key].holds:
        known[key] = confirm(query, mask, deadline)
    return known[key]


def _search(query: Query, method: Extractor, ordered: Tensor, deadline: Deadline) -> Found:
    found = prefix_search(query, ordered)
    if method is Extractor.PREFIX:
        return found
    found = greedy_search(query, found, ordered, deadline)
    if method is Extractor.GREEDY or deadline.over:
        return found
    return exact_search(query, found, ordered, deadline)
