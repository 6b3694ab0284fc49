"""Searches for small sufficient sets: the paper's, and a greedy one after it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.errors import SpecError
from torch_prepared.interpret._query import Query

__all__ = ["Extractor", "FeatureOrder", "Found", "greedy_search", "order_features", "prefix_search"]

_BATCH = 512


class Extractor(enum.Enum):
    """How a sufficient set is searched.

    ``PREFIX``: the paper's bisection over the features by priority. ``GREEDY``: then drop single
    features until none can be dropped. ``EXACT``: then prove, or find, the smallest set.
    """

    PREFIX = "prefix"
    GREEDY = "greedy"
    EXACT = "exact"

    @classmethod
    def named(cls, name: str | Extractor) -> Extractor:
        """The extractor called ``name``."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(m.value for m in cls)
            raise SpecError(f"extract: got {name!r}; expected one of {known}") from None


class FeatureOrder(enum.Enum):
    """What features are sorted by before the search.

    ``PRIORITY`` as in the paper; ``WEIGHT`` by the largest |v| alone, the paper's gradient
    baseline; ``RANDOM`` by chance, its other baseline.
    """

    PRIORITY = "priority"
    WEIGHT = "weight"
    RANDOM = "random"

    @classmethod
    def named(cls, name: str | FeatureOrder) -> FeatureOrder:
        """The order called ``name``."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(m.value for m in cls)
            raise SpecError(f"order: got {name!r}; expected one of {known}") from None


@dataclass(frozen=True)
class Found:
    """A set that the bounds call sufficient.

    Args:
        mask: (n,) bool.
        irreducible: no single feature can be dropped.
        fewest: no sufficient set is smaller than this.
        complete: whether the search ended by itself, not for lack of time.
    """

    mask: Tensor
    irreducible: bool = False
    fewest: int = 0
    complete: bool = True

    @property
    def count(self) -> int:
        """Number of kept features."""
        return int(self.mask.sum())


def order_features(query: Query, order: FeatureOrder, seed: int) -> Tensor:
    """Features (c,) that the proof uses at all, the least important first."""
    priority = query.priority
    used = (priority > 0).nonzero().flatten()
    if order is FeatureOrder.RANDOM:
        generator = torch.Generator().manual_seed(seed)
        return used[torch.randperm(len(used), generator=generator).to(used.device)]
    key = priority if order is FeatureOrder.PRIORITY else query.features.rows.abs().amax(dim=0)
    return used[key[used].argsort(stable=True)]


def prefix_search(query: Query, ordered: Tensor) -> Found:
    """The paper's search: bisect for the longest prefix of ``ordered`` that can be dropped.

    The whole set must be sufficient. The result is a set that was itself evaluated; as dropping
    a feature may help, it need not be the shortest suffix. The empty set is tried first.
    """

    def suffix(start: int) -> Tensor:
        mask = torch.zeros(query.features.size, dtype=torch.bool, device=ordered.device)
        mask[ordered[start:]] = True
        return mask

    empty = suffix(len(ordered))
    if bool(query.sufficient(empty[None])[0]):
        return Found(empty, irreducible=True)
    low, high, dropped = 0, len(ordered) - 1, 0
    while low <= high:
        middle = (low + high) // 2
        if bool(query.sufficient(suffix(middle)[None])[0]):
            dropped, low = max(dropped, middle), middle + 1
        else:
            high = middle - 1
    return Found(suffix(dropped), fewest=1)


def greedy_search(query: Query, start: Found, ordered: Tensor, deadline: Deadline) -> Found:
    """Drop single features of a sufficient set, the first possible of ``ordered`` each time.

    The result is irreducible unless time ran out.
    """
    mask = start.mask.clone()
    while not deadline.over:
        members = ordered[mask[ordered]]
        for part in torch.split(members, _BATCH):
            trial = mask.repeat(len(part), 1)
            trial[torch.arange(len(part)), part] = False
            fine = query.sufficient(trial).nonzero().flatten()
            if len(fine):
                mask = trial[fine[0]]
                break
        else:
            fewest = 0 if not len(members) else start.fewest
            return Found(mask, irreducible=True, fewest=fewest)
    return Found(mask, fewest=start.fewest, complete=False)
