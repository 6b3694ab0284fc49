"""Bounds of margins in the independent checker's arithmetic."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torch_prepared.bounds.crown import tightened_names
from torch_prepared.certify import ProofTree, PropertyRecord
from torch_prepared.certify.network import read_network
from torch_prepared.certify.operators import Arithmetic
from torch_prepared.certify.replay import TreeReplay
from torch_prepared.core.graph import Graph
from torch_prepared.specs import Box, InputSet

__all__ = ["MarginReplay"]


class MarginReplay:
    """Bounds of output rows over regions, all rounding covered by a-priori error terms.

    A property with one clause per row and side, and a proof of one leaf, is what the checker
    replays when it judges a certificate; here its bounds are read instead of its verdict.

    Args:
        graph: the network with weights as stored.
        tighten: backward passes for every value a nonlinear operator reads (CROWN); otherwise
            plain intervals before the last backward pass.
    """

    def __init__(self, graph: Graph, *, tighten: bool = True) -> None:
        self._graph, self._tighten = graph, tighten
        self._network = read_network(graph.record())
        self._arithmetic = Arithmetic(float32=False, activation_ulp=None)

    def __call__(self, region: InputSet, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds (s,) of ``rows`` (s, m), float64; NaN where none was found."""
        both = torch.cat([rows, -rows]).to(torch.float64).numpy()
        clauses = tuple((row[None].copy(), np.zeros(1)) for row in both)
        prop = PropertyRecord(region=region.record(), clauses=clauses, name="margins")
        names = tightened_names(self._graph, isinstance(region, Box)) if self._tighten else ()
        proof = ProofTree.leaf([0] * len(clauses), tighten=names)
        with np.errstate(all="ignore"):  # what is not finite is looked for below
            found = [b for _, b in TreeReplay(self._network, prop, proof, self._arithmetic).run()]
        lower, negated = torch.from_numpy(found[0][0].copy()).chunk(2)
        usable = torch.isfinite(lower) & torch.isfinite(negated)
        return torch.where(usable, lower, torch.nan), torch.where(usable, -negated, torch.nan)
