"""One tree of boxes per property, bounded for the weights where an edit stands."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.bounds.branch import LeafEngine, SlopedEngine, SplitTree
from torch_prepared.bounds.engine import leaf_engine
from torch_prepared.certify import ProofTree
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._certify import tree_proof
from torch_prepared.edit._leaves import PropertyRows
from torch_prepared.edit._walk import Walk

__all__ = ["Forest", "Integers"]

logger = logging.getLogger(__name__)

Integers = NDArray[np.int64]

CHUNK = 4096
FEW = 2000  #: nodes bounded in float64 to mend a proof
RECENT = 3  #: chunks of leaves by which growth is judged
THIN = 1e-4  #: share of the volume below which leaves are lifted rather than split ever more
FEW_OPEN = 10_000  #: leaves that lifts, which look at some of them, may close
MOST_ROWS, FEWEST_ROWS = 150, 20  #: leaves with gradients, of all trees and of each


@dataclass
class Forest:
    """The trees of all properties; they outlive every change of the weights.

    Args:
        walk: where the weights stand.
        rows: margins of each property as functions of the weights.
        trees: one per property.
        generator: of everything random.
    """

    walk: Walk
    rows: Sequence[PropertyRows]
    trees: list[SplitTree]
    generator: torch.Generator

    @property
    def proved(self) -> bool:
        """Whether every leaf of every tree is."""
        return all(tree.proved for tree in self.trees)

    @property
    def leaf_count(self) -> int:
        """Number of all leaves."""
        return sum(len(tree.leaves) for tree in self.trees)

    @property
    def open_count(self) -> int:
        """Number of leaves that are not proved."""
        return sum(len(tree.open) for tree in self.trees)

    @property
    def is_nearly_proved(self) -> bool:
        """Whether the open leaves are few and next to nothing."""
        little = all(tree.volume(tree.open) < THIN for tree in self.trees)
        return 0 < self.open_count <= FEW_OPEN and little

    def copy_of(self, trees: Sequence[SplitTree]) -> Forest:
        """A forest of copies of trees of these properties."""
        return replace(self, trees=[tree.copy() for tree in trees])

    def bound(self) -> bool:
        """Bound all leaves anew, in the stored dtype; whether they are proved."""
        for tree, engine in zip(self.trees, self._engines(self._stored), strict=True):
            tree.bound(engine, tree.leaves, CHUNK)
        return self.proved

    def bound_exactly(self, deadline: Deadline) -> bool:
        """Bound all leaves in float64; the few that float32 had taken for proved are split."""
        for tree, engine in zip(self.trees, self._engines(self._exact), strict=True):
            tree.bound(engine, tree.leaves, CHUNK)
            for _ in tree.grow(engine, deadline, FEW):
                pass
        return self.proved

    def grow(
        self,
        deadline: Deadline,
        budget: int,
        spare: float,
        collect: Callable[[int, Tensor], bool],
    ) -> bool:
        """Bound open leaves at the current weights, then split within the budget.

        Args:
            deadline: for all of it.
            budget: nodes to bound.
            spare: margin that new leaves must have in hand.
            collect: told the property and the centers of boxes that fail; True means that no
                splitting proves some of those, so that growth ends early.

        Returns:
            Whether ``collect`` said so.
        """
        found = False
        for i, engine in enumerate(self._engines(self._stored)):
            tree = self.trees[i]
            tree.bound(engine, tree.open, CHUNK)
            each = max(1000, budget // len(self.trees))
            found |= collect(i, tree.boxes(tree.open).center)
            recent: deque[tuple[int, int]] = deque(maxlen=RECENT)
            for bounded, failing in tree.grow(engine, deadline, each, spare=spare):
                recent.append((bounded, len(failing)))
                if collect(i, tree.boxes(failing).center):
                    found = True
                    break
                if _is_thin(tree, recent):
                    break
            fresh = tree.open
            tree.bound(engine, fresh[~np.isfinite(tree.margins(fresh))], CHUNK)
            logger.info(
                "grow: %d leaves, %d open, volume %g",
                len(tree.leaves), len(tree.open), tree.volume(tree.open),
            )  # fmt: skip
        return found

    def fell(self) -> None:
        """Begin anew, every region being one open leaf."""
        self.trees = [SplitTree(tree.batch, slack=tree.slack) for tree in self.trees]

    def coarsen(self, deadline: Deadline) -> None:
        """Drop splits that the edited network does not need."""
        before = self.leaf_count
        for tree, engine in zip(self.trees, self._engines(self._stored), strict=True):
            tree.coarsen(engine, deadline, CHUNK)
        logger.info("coarsen: %d of %d leaves remain", self.leaf_count, before)

    def close(self, opened: Sequence[Integers]) -> int:
        """Bound the leaves that were open; how many still are, slopes optimized for some."""
        for tree, engine, leaves in zip(
            self.trees, self._engines(self._stored), opened, strict=True
        ):
            tree.bound(engine, leaves, CHUNK)
            if isinstance(engine, SlopedEngine):
                chosen = torch.randperm(len(tree.open), generator=self.generator).numpy()
                tree.search(engine, tree.open[chosen[:CHUNK]], 0.0)
        return self.open_count

    def choose(self, nodes: Sequence[Integers], least: float, worst: bool) -> list[Integers]:
        """Some leaves of every tree, few enough for gradients.

        Args:
            nodes: leaves of every tree.
            least: leaves with lower margins are passed over.
            worst: take those of lowest margins, else random ones.
        """
        share, chosen = max(FEWEST_ROWS, MOST_ROWS // len(self.trees)), []
        for tree, rows, leaves in zip(self.trees, self.rows, nodes, strict=True):
            margins = tree.margins(leaves)
            leaves, margins = leaves[margins >= least], margins[margins >= least]
            order = np.argsort(margins)
            if not worst:
                order = torch.randperm(len(leaves), generator=self.generator).numpy()
            chosen.append(leaves[order[: min(share, rows.most_rows)]])
        return chosen

    def leaf_rows(self, chosen: Sequence[Integers]) -> tuple[Tensor, Tensor]:
        """Gradients (m, p) and margins (m,) of chosen leaves of every tree."""
        theta = self.walk.theta
        found, values = [theta.new_zeros(0, len(theta))], [theta.new_zeros(0)]
        engines = self._engines(self._exact)
        for tree, engine, rows, leaves in zip(self.trees, engines, self.rows, chosen, strict=True):
            if not len(leaves):
                continue
            boxes, alphas = tree.boxes(leaves), None
            if isinstance(engine, SlopedEngine):
                slopes = engine.slopes.chosen(boxes, tree.shares(leaves, engine.slopes.size))
                alphas = engine.slopes.by_node(slopes.double())
            jacobian, value = rows.leaf_rows(theta, boxes, alphas)
            found.append(jacobian)
            values.append(value)
        return torch.cat(found), torch.cat(values)

    def proofs(self) -> tuple[ProofTree, ...]:
        """The trees as proofs about the current weights."""
        return tuple(
            tree_proof(tree, engine, self._exact)
            for tree, engine in zip(self.trees, self._engines(self._exact), strict=True)
        )

    def what_is_open(self) -> str:
        """Properties with open leaves, for people."""
        parts = []
        for tree, prop in zip(self.trees, self.walk.problem.properties, strict=True):
            if len(tree.open):
                share = tree.volume(tree.open)
                parts.append(f"{prop.name}: {len(tree.open)} leaves, {share:.2g} of the volume")
        return "; ".join(parts)

    @property
    def _stored(self) -> Graph:
        return self.walk.problem.graph

    @property
    def _exact(self) -> Graph:
        return self.walk.problem.exact

    def _engines(self, graph: Graph) -> list[LeafEngine]:
        """Engines for the current weights, as they would be stored, in the graph's dtype."""
        changed = {name: value.to(graph.dtype) for name, value in self.walk.stored().items()}
        return [leaf_engine(graph, rows.batch, changed) for rows in self.rows]


def _is_thin(tree: SplitTree, recent: Sequence[tuple[int, int]]) -> bool:
    """Whether what is open is next to nothing, yet grows: then lifting is cheap."""
    bounded, failing = (sum(counts) for counts in zip(*recent, strict=True))
    exploding = len(recent) == RECENT and 2 * failing > bounded
    return exploding and tree.volume(tree.open) < THIN
