"""Branch and bound over a region: sub-boxes that are proved drop out, the rest is halved.

The tree outlives a change of weights: after an edit all leaves are bounded again, those that still
hold stay closed and the others are open once more, so nothing is explored twice.

Source: Bunel et al., "Branch and Bound for Piecewise Linear Neural Network Verification" (JMLR
2020). The splitting rule, the coordinate of the largest ``influence_j width_j``, follows Wang et
al., "Formal Security Analysis of Neural Networks using Symbolic Intervals" (USENIX Security 2018).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared import ops
from torch_prepared.bounds._leaf import LeafBounds, LeafEngine
from torch_prepared.bounds._properties import PropertyBatch
from torch_prepared.bounds.shared_slopes import SlopedEngine
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.interval import Interval

__all__ = ["LeafBounds", "LeafEngine", "SlopedEngine", "SplitTree"]

FIRST_CAPACITY = 1024
_NODES = ("_lower", "_upper", "_dim", "_left", "_rows", "_margin", "_axis", "_row")
_ARRAYS = (*_NODES, "_slot", "_seed")
DETACHED = -2  #: split axis of nodes that are no longer part of the tree
FIRST_REACH = 0.1  #: share of the nodes of the first round that are searched
KNOWLEDGE = ("_margin", "_rows", "_row")
LEAST_INFLUENCE = 0.02  #: relative, of inputs that seem to have less
NO_SLOPE = ops.SLOPE_LEVELS + 1  #: stands for the slope that the engine chooses
FEWEST = 1000  #: nodes of a round from which slopes are searched
FRUITFUL, VAIN = 0.5, 0.35  #: shares of successful searches that widen or narrow their reach
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


class SplitTree:
    """Binary splits of one property's bounding box, with what is known of every leaf.

    Args:
        batch: exactly one property.
        slack: a leaf counts as proved when every clause has a row above this; positive, to leave
            room for rounding in the engine and in the checker's own arithmetic.
        first_search: slopes are optimized from the first round on in which so many nodes fail.
    """

    def __init__(
        self, batch: PropertyBatch, slack: float = 0.0, first_search: int = FEWEST
    ) -> None:
        self.batch = batch
        self.slack = slack
        n, k = batch.regions.lower.shape[1], batch.present.shape[1]
        self.count = 1
        self._lower = np.zeros((FIRST_CAPACITY, n))
        self._upper = np.zeros((FIRST_CAPACITY, n))
        self._lower[0] = batch.regions.lower[0].double().cpu().numpy()
        self._upper[0] = batch.regions.upper[0].double().cpu().numpy()
        self._dim = np.full(FIRST_CAPACITY, -1, dtype=np.int64)
        self._left = np.zeros(FIRST_CAPACITY, dtype=np.int64)
        self._rows = np.zeros((FIRST_CAPACITY, k), dtype=np.int64)
        self._margin = np.full(FIRST_CAPACITY, -np.inf)
        self._axis = np.zeros(FIRST_CAPACITY, dtype=np.int64)
        self._row = np.zeros(FIRST_CAPACITY, dtype=np.int64)
        self._slot = np.full(FIRST_CAPACITY, -1, dtype=np.int64)
        self._seed = np.full(FIRST_CAPACITY, -1, dtype=np.int64)
        self._slopes = np.zeros((0, 0), dtype=np.uint8)
        self._slots = 0
        self._reach: float | None = None
        self._first_search = first_search

    @property
    def leaves(self) -> Integers:
        """Positions of all leaves."""
        return np.flatnonzero(self._dim[: self.count] == -1)

    @property
    def open(self) -> Integers:
        """Positions of the leaves that are not proved, largest first in creation order."""
        dim, margin = self._dim[: self.count], self._margin[: self.count]
        return np.flatnonzero((dim == -1) & ~(margin > self.slack))

    @property
    def proved(self) -> bool:
        """Whether every leaf is."""
        return not len(self.open)

    def boxes(self, leaves: Integers) -> Interval:
        """Boxes (b, n) of nodes, float64."""
        return Interval(
            torch.from_numpy(self._lower[leaves]), torch.from_numpy(self._upper[leaves])
        )

    def margins(self, leaves: Integers) -> Floats:
        """Last lower bound of the safety margin of nodes; ``-inf`` where never bounded."""
        return self._margin[leaves]

    def volume(self, leaves: Integers) -> float:
        """Share of the region's volume (of its nondegenerate coordinates) in these leaves."""
        width = self._upper[0] - self._lower[0]
        wide = width > 0
        shares = (self._upper[leaves][:, wide] - self._lower[leaves][:, wide]) / width[wide]
        return float(shares.prod(axis=1).sum())

    def bound(self, engine: LeafEngine, leaves: Integers, chunk: int) -> None:
        """Bound leaves anew and remember their margins, best rows and splitting axes."""
        for part in np.array_split(leaves, max(1, -(-len(leaves) // chunk))):
            if not len(part):
                continue
            own = self._slot[part] >= 0
            if not isinstance(engine, SlopedEngine) or not own.any():
                self._note(part, engine(self.boxes(part)))
                continue
            if not own.all():
                self._note(part[~own], engine(self.boxes(part[~own])))
            part = part[own]
            given = self.shares(part, engine.slopes.size)
            self._note(part, engine.slopes.bound(self.boxes(part), given), axes=False)

    def _note(self, part: Integers, found: LeafBounds, axes: bool = True) -> None:
        """Remember what is known of nodes; without ``axes`` those to split stay as they are."""
        batch = _repeat(self.batch, len(part))
        values = found.values.double().cpu() + batch.offset
        margin = batch.margins(values)
        margin[torch.isnan(values).any(dim=1)] = -torch.inf
        rows = batch.best_rows(values)
        worst = batch.clause_margins(values).argmin(dim=1)
        row = rows.gather(1, worst[:, None])[:, 0]
        self._margin[part] = margin.numpy()
        self._rows[part] = rows.numpy()
        self._row[part] = row.numpy()
        if axes:
            self._axis[part] = self._longest(self.boxes(part), found.influence(row)).numpy()

    def _longest(self, boxes: Interval, influence: Tensor) -> Tensor:
        """The axis (b,) of each box along which the row of interest may change most.

        Influences (b, n) are estimates; an input of little influence is split at last as well.
        """
        whole = torch.from_numpy(self._upper[0] - self._lower[0])
        reach = influence.double().cpu().nan_to_num(0.0, 0.0, 0.0) * whole
        reach = torch.maximum(reach, LEAST_INFLUENCE * reach.amax(dim=1, keepdim=True) + 1e-300)
        share = boxes.width / whole.clamp_min(1e-300)
        return torch.where(boxes.width > 0, reach * share, -1.0).argmax(dim=1)

    def search(self, engine: SlopedEngine, nodes: Integers, spare: float) -> None:
        """Optimize the slopes of nodes that were bounded; worse ones are forgotten.

        A search begins with the slopes of the node, else of the nearest ancestor that has some.
        """
        if not len(nodes):
            return
        before = {name: getattr(self, name)[nodes] for name in KNOWLEDGE}
        row = torch.from_numpy(self._row[nodes])
        enough = self.slack + spare - self.batch.offset[0].double().cpu()[row]
        given = self._kept(self._seed[nodes], engine.slopes.size)
        found, bounds = engine.slopes.search(self.boxes(nodes), given, row, enough)
        self._note(nodes, bounds, axes=False)
        better = self._margin[nodes] > before["_margin"]
        for name, old in before.items():
            getattr(self, name)[nodes[~better]] = old[~better]
        fresh = self._store(found[torch.from_numpy(better)])
        self._slot[nodes[better]] = self._seed[nodes[better]] = fresh

    def _store(self, slopes: Tensor) -> Integers:
        """Slots for slopes (b, h), multiples of 1 / SLOPE_LEVELS or negative."""
        levels = torch.where(
            slopes < 0, torch.full_like(slopes, NO_SLOPE), slopes * ops.SLOPE_LEVELS
        )
        fresh = levels.round().to(torch.uint8).cpu().numpy()
        if not len(fresh):
            return np.zeros(0, dtype=np.int64)
        first, self._slots = self._slots, self._slots + len(fresh)
        if self._slots > len(self._slopes):
            more = np.zeros((max(FIRST_CAPACITY, 2 * self._slots), fresh.shape[1]), np.uint8)
            if first:
                more[:first] = self._slopes[:first]
            self._slopes = more
        self._slopes[first : self._slots] = fresh
        return np.arange(first, self._slots)

    def shares(self, nodes: Integers, size: int) -> Tensor:
        """Relaxation slopes (b, size) of nodes; negative where the engine chooses them."""
        return self._kept(self._slot[nodes], size)

    def _kept(self, slots: Integers, size: int) -> Tensor:
        """Slopes (b, size) stored in slots; -1 where there is no slot, or no slope of one's own."""
        if not self._slots:
            return torch.full((len(slots), size), -1.0)
        levels = torch.from_numpy(self._slopes[slots])
        shares = (levels.float() / ops.SLOPE_LEVELS).masked_fill(levels == NO_SLOPE, -1.0)
        shares[torch.from_numpy(slots < 0)] = -1.0
        return shares

    @property
    def has_slopes(self) -> bool:
        """Whether any leaf has slopes of its own."""
        return bool((self._slot[self.leaves] >= 0).any())

    def split(self, leaves: Integers) -> Integers:
        """Halve leaves along their axes; returns the children that could be made."""
        axis = self._axis[leaves]
        low, high = self._lower[leaves, axis], self._upper[leaves, axis]
        middle = low + (high - low) / 2
        thick = (middle > low) & (middle < high)
        leaves, axis, middle = leaves[thick], axis[thick], middle[thick]
        first = self.count
        self._reserve(2 * len(leaves))
        left = first + 2 * np.arange(len(leaves))
        self._dim[leaves], self._left[leaves] = axis, left
        for side, array, kept in (
            (left, self._upper, self._lower),
            (left + 1, self._lower, self._upper),
        ):
            array[side], kept[side] = array[leaves], kept[leaves]
            array[side, axis] = middle
            self._dim[side], self._margin[side] = -1, -np.inf
            self._slot[side], self._seed[side] = -1, self._seed[leaves]
        return np.concatenate([left, left + 1])

    def copy(self) -> SplitTree:
        """An independent tree with the same nodes."""
        other = copy.copy(self)
        for name in _ARRAYS:
            setattr(other, name, getattr(self, name)[: self.count].copy())
        other._slopes = self._slopes[: self._slots].copy()
        return other

    def coarsen(self, engine: LeafEngine, deadline: Deadline, chunk: int = 4096) -> None:
        """Undo splits that are no longer needed: a node proved whole becomes a leaf again.

        Weights that changed after the splits were made often need far fewer of them.
        """
        candidates = self._parents_of_leaves()
        untried = np.ones(self.count, dtype=bool)
        while len(candidates):
            untried[candidates] = False
            for first in range(0, len(candidates), chunk):
                if deadline.over:
                    return
                part = candidates[first : first + chunk]
                self.bound(engine, part, chunk)
                failing = part[~(self._margin[part] > self.slack)]
                if isinstance(engine, SlopedEngine) and len(failing):
                    self._search_near(engine, failing, 0.0)
                self._detach(part[self._margin[part] > self.slack])
            candidates = self._parents_of_leaves()
            candidates = candidates[untried[candidates]]

    def _detach(self, parents: Integers) -> None:
        """Make leaves of nodes whose children are leaves."""
        self._dim[self._left[parents]] = self._dim[self._left[parents] + 1] = DETACHED
        self._dim[parents] = -1

    def _parents_of_leaves(self) -> Integers:
        inner = np.flatnonzero(self._dim[: self.count] >= 0)
        left = self._left[inner]
        alone: Integers = inner[(self._dim[left] == -1) & (self._dim[left + 1] == -1)]
        return alone

    def links(self) -> tuple[Integers, Floats, Integers, Integers, Integers]:
        """``(split_dim, split_value, left, right, rows)`` by node, for a proof tree."""
        dim, left = self._dim[: self.count], self._left[: self.count]
        inner = dim >= 0
        value = np.zeros(self.count)
        value[inner] = self._upper[left[inner], dim[inner]]
        return dim, value, left, np.where(inner, left + 1, 0), self._rows[: self.count]

    def grow(
        self,
        engine: LeafEngine,
        deadline: Deadline,
        max_leaves: int,
        chunk: int = 4096,
        spare: float = 0.0,
    ) -> Iterator[tuple[int, Integers]]:
        """Bound and split breadth first until proved or out of budget.

        New leaves are split until their margin exceeds the slack by ``spare``, so that small
        changes of the weights do not open them again.

        Yields, chunk by chunk, how many nodes were bounded and those of them that were not proved,
        which have been split.
        """
        done, wanted = 0, self.slack + spare
        queue = self.open
        fresh = queue[~np.isfinite(self._margin[queue])]
        known = queue[np.isfinite(self._margin[queue])]
        queue = np.concatenate([fresh, self.split(known)])
        while len(queue) and done < max_leaves and not deadline.over:
            part, queue = queue[:chunk], queue[chunk:]
            self.bound(engine, part, chunk)
            done += len(part)
            failing = part[~(self._margin[part] > wanted)]
            if isinstance(engine, SlopedEngine) and len(failing):
                failing = self._search_near(engine, failing, spare)
            queue = np.concatenate([queue, self.split(failing)])
            yield len(part), failing

    def _search_near(self, engine: SlopedEngine, failing: Integers, spare: float) -> Integers:
        """Optimize slopes where that promises to prove; those that still fail.

        What promises is learned: the reach, by how much a margin may fall short, grows while the
        farther half of what was searched is often proved, and shrinks while it seldom is.
        """
        wanted = self.slack + spare
        lack = wanted - self._margin[failing]
        if self._reach is None:
            if len(failing) < self._first_search:
                return failing
            self._reach = float(np.quantile(lack, FIRST_REACH))
        near = lack <= self._reach
        far = near & (lack > 0.5 * self._reach)
        self.search(engine, failing[near], spare)
        proved = self._margin[failing] > wanted
        if not near.any() or (far.any() and proved[far].mean() > FRUITFUL):
            self._reach *= 2.0
        elif not far.any() or proved[far].mean() < VAIN:
            self._reach *= 0.5
        return failing[~proved]

    def _reserve(self, extra: int) -> None:
        self.count += extra
        size = len(self._dim)
        if self.count <= size:
            return
        more = max(size, self.count - size)
        for name in _ARRAYS:
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.zeros((more, *old.shape[1:]), old.dtype)]))


def _repeat(batch: PropertyBatch, count: int) -> PropertyBatch:
    """One property, ``count`` times, without its regions."""
    return PropertyBatch(
        batch.regions,
        batch.rows.expand(count, -1, -1),
        batch.offset.expand(count, -1).double().cpu(),
        batch.clause.expand(count, -1).cpu(),
        batch.present.expand(count, -1).cpu(),
    )
