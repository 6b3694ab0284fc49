"""The relaxation of a network that a proof uses, kept so that reduced proofs can be recomputed."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.bounds import RegionBatch, RowBound, bound_nodes, bound_rows
from torch_prepared.bounds.crown import tightened_names
from torch_prepared.certify import Slopes
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.errors import SpecError, UnsupportedOperationError
from torch_prepared.relax import lookup
from torch_prepared.relax.relu import TwoPiece
from torch_prepared.specs import InputSet

__all__ = ["ProofMethod", "Relaxed", "relax_batch", "relax_network"]

_ROW_BYTES = 1 << 28


class ProofMethod(enum.Enum):
    """How the proof that is interpreted bounds the network.

    ``IBP`` intervals up to the last hidden layer. ``CROWN`` lines with adaptive slopes, backward
    passes for every unstable scalar. ``ZONOTOPE`` parallel lines, which is DeepZ: backward passes
    over them give the zonotope's own bounds (Salman et al., "A Convex Relaxation Barrier to Tight
    Robustness Verification of Neural Networks", NeurIPS 2019, section 4).
    """

    IBP = "ibp"
    ZONOTOPE = "zonotope"
    CROWN = "crown"

    @classmethod
    def named(cls, name: str | ProofMethod) -> ProofMethod:
        """The method called ``name``."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(m.value for m in cls)
            raise SpecError(f"proof method: got {name!r}; expected one of {known}") from None


@dataclass(frozen=True)
class Relaxed:
    """A network over one region with every relaxation fixed.

    Args:
        graph: the network in float64.
        regions: the region, a batch of one.
        boxes: intervals (1, *shape) of every node's value.
        alphas: relaxation parameters by node where they are not the default.
        method: how the boxes were found.
    """

    graph: Graph
    regions: RegionBatch
    boxes: Mapping[str, Interval]
    alphas: Mapping[str, Tensor] | None
    method: ProofMethod

    def bound(self, node: str, rows: Tensor) -> RowBound:
        """Lower bounds (r,) of ``rows`` (r, n) on a node's value; inputs (r, n0), const (r,)."""
        largest = max(n.size for n in self.graph.nodes)
        chunk = max(1, _ROW_BYTES // (6 * largest * rows.element_size()))
        if not len(rows):
            empty = rows.new_zeros(0)
            return RowBound(empty, empty.reshape(0, self.graph.input_size), empty)
        parts = [self._bound(node, part) for part in torch.split(rows, chunk)]
        return RowBound(*(torch.cat([p[i] for p in parts]) for i in range(3)))

    def _bound(self, node: str, rows: Tensor) -> RowBound:
        found = bound_rows(
            self.graph,
            self.regions,
            self.boxes,
            rows.unsqueeze(0),
            node=node,
            alphas=self.alphas,
            cuts=self.method is not ProofMethod.ZONOTOPE,  # else no concave function of the rows
        )
        return RowBound(found.lower[0], found.inputs[0], found.const[0])

    def plan(self) -> tuple[str, ...]:
        """Values that the checker must tighten to repeat this relaxation."""
        if self.method is ProofMethod.IBP:
            return ()
        return tightened_names(self.graph, self.regions.is_box)

    def slopes(self) -> dict[str, Slopes]:
        """Slopes that the checker must use to repeat this relaxation, by operator."""
        found = {}
        for name, alpha in (self.alphas or {}).items():
            node = self.graph.node(name)
            lines = _two_piece(self.graph, name).affine(
                node, self.boxes[node.inputs[0]], alpha.squeeze(1)
            )
            array = lines.lower_slope.reshape(1, -1).detach().cpu().numpy()
            found[name] = Slopes(lower=np.ascontiguousarray(array, dtype=np.float64))
        return found


def relax_network(graph: Graph, region: InputSet, method: ProofMethod) -> Relaxed:
    """Bound every value of a network over a region.

    Args:
        graph: the network; computed in float64 on its own device.
        region: the inputs.
        method: how.

    Raises:
        UnsupportedOperationError: a zonotope of a network with other nonlinear operators than
            relu and leaky_relu.

    Soundness: in exact arithmetic; what is claimed from it is replayed by the checker.
    """
    exact = graph.to(torch.float64)
    with torch.no_grad():
        return relax_batch(exact, RegionBatch.of(region, torch.float64, exact.device), method)


def relax_batch(graph: Graph, regions: RegionBatch, method: ProofMethod) -> Relaxed:
    """The same for a float64 graph and a batch of one region; differentiable in its ends."""
    if method is ProofMethod.ZONOTOPE:
        return _zonotope(graph, regions)
    boxes = bound_nodes(graph, regions, tighten=method is ProofMethod.CROWN)
    return Relaxed(graph, regions, boxes, None, method)


def _zonotope(graph: Graph, regions: RegionBatch) -> Relaxed:
    """Parallel lines everywhere; intervals layer by layer from those before them."""
    curved = [n.name for n in graph.nodes[1:] if not lookup(n.op).traits.affine]
    known: dict[str, Interval] = {}
    for name in (*tightened_names(graph, regions.is_box), None):
        boxes = bound_nodes(graph, regions, tighten=False, known=known)
        alphas = {c: _parallel(graph, c, boxes) for c in curved}
        relaxed = Relaxed(graph, regions, boxes, alphas, ProofMethod.ZONOTOPE)
        if name is None:
            break
        units = torch.eye(graph.node(name).size, dtype=torch.float64, device=graph.device)
        shape = boxes[name].lower.shape
        lower = relaxed.bound(name, units).lower.reshape(shape)
        upper = -relaxed.bound(name, -units).lower.reshape(shape)
        known[name] = Interval(lower, upper)
    return relaxed


def _two_piece(graph: Graph, name: str) -> TwoPiece:
    node = graph.node(name)
    operator = lookup(node.op)
    if not isinstance(operator, TwoPiece):
        raise UnsupportedOperationError(
            f"{name}: operator '{node.op}' has no parallel lines here, so no zonotope; use proof "
            "method 'crown' instead of 'zonotope'"
        )
    return operator


def _parallel(graph: Graph, name: str, boxes: Mapping[str, Interval]) -> Tensor:
    """The ``alpha`` that makes a two-piece operator's lower line parallel to its upper one."""
    operator, node = _two_piece(graph, name), graph.node(name)
    box = boxes[node.inputs[0]]
    unstable = (box.lower < 0) & (box.upper > 0)
    width = torch.where(unstable, box.upper - box.lower, torch.ones_like(box.upper))
    share = torch.where(unstable, box.upper / width, operator.alpha_start(node, box))
    return share.unsqueeze(1)
