"""How one network stands to properties, before and after an edit: quick bounds and an attack."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_prepared.bounds import PropertyBatch
from torch_prepared.bounds.branch import SplitTree
from torch_prepared.certify import ProofTree
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._certify import LOW_DIMENSION, SLACK, prove, prove_by_splitting
from torch_prepared.edit.attack import Attack, find_counterexamples
from torch_prepared.edit.report import Standing, State
from torch_prepared.specs import Property

__all__ = ["Prover", "attack_quickly", "judge"]

RESTARTS, STEPS, SAMPLES = 32, 50, 100_000


def attack_quickly(
    graph: Graph,
    properties: Sequence[Property],
    seed: int,
    seconds: float,
    starts: Tensor | None = None,
) -> Attack:
    """A short attack; ``starts`` (b, n) are tried first."""
    return find_counterexamples(
        graph,
        properties,
        starts=None if starts is None else starts[:, None],
        restarts=RESTARTS,
        steps=STEPS,
        samples=SAMPLES,
        time_limit=seconds,
        seed=seed,
    )


@dataclass
class Prover:
    """Proves properties of ever other weights; split trees outlive each change of weights.

    Args:
        properties: those to prove.
        trees: splits made so far, by position.
    """

    properties: tuple[Property, ...]
    trees: dict[int, SplitTree] = field(default_factory=dict)

    def prove(
        self, graph: Graph, positions: Sequence[int], deadline: Deadline
    ) -> tuple[dict[int, ProofTree], Tensor]:
        """Single-leaf proofs, and branch and bound where a region has few dimensions.

        Args:
            graph: the network as stored.
            positions: of the properties to prove.
            deadline: for branch and bound.

        Returns:
            Proofs that bounds in float64 believe in, by position, and the lower bounds (b,) of
            the margins of the properties asked for.
        """
        if not positions:
            return {}, torch.zeros(0, dtype=torch.float64)
        leaves, margins = prove(graph, [self.properties[i] for i in positions])
        found = {i: leaf for i, leaf, m in zip(positions, leaves, margins, strict=True) if m > 0}
        left = [k for k, i in enumerate(positions) if i not in found]
        for done, k in enumerate(left):
            prop = self.properties[positions[k]]
            if int((prop.region.upper > prop.region.lower).sum()) > LOW_DIMENSION:
                continue
            tree = self.trees.get(positions[k]) or SplitTree(PropertyBatch.of([prop]), slack=SLACK)
            kept = tree.copy()
            share = deadline.share(1 / (len(left) - done))
            proof, _ = prove_by_splitting(graph, prop, share, tree=kept)
            if proof is not None:
                self.trees[positions[k]] = kept
                found[positions[k]] = proof
                margins[k] = float(kept.margins(kept.leaves).min())
        return found, margins

    @property
    def leaves(self) -> int:
        """Leaves of all split trees, what the checker would have to replay."""
        return sum(len(tree.leaves) for tree in self.trees.values())


def judge(attack: Attack, lower: Sequence[float], proved: Container[int]) -> list[Standing]:
    """Standings of b properties.

    Args:
        attack: what an attack met.
        lower: (b,) lower bounds of the margins.
        proved: positions of the properties that bounds prove.
    """
    standings = []
    for i, bound in enumerate(lower):
        if bool(attack.violated[i]):
            state = State.VIOLATED
        else:
            state = State.HOLDS if i in proved else State.UNKNOWN
        standings.append(Standing(state, float(bound), float(attack.margins[i])))
    return standings
