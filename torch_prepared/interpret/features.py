"""Proof features: the last hidden layer of a robustness proof, neuron by neuron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torch_prepared.certify import ProofTree
from torch_prepared.core.graph import Graph
from torch_prepared.interpret._confirmation import Confirmation
from torch_prepared.interpret._cut import HiddenCut, cut_network
from torch_prepared.interpret._relaxed import ProofMethod, Relaxed, relax_network
from torch_prepared.specs import Property

__all__ = ["ProofFeatures", "feature_box", "proof_features"]

ROUNDING, LEAST = 1e-9, 2.0**-500
"""Margins are compared with this share of the terms they are sums of, not with zero; at least with
what underflow may hide."""


@dataclass(frozen=True, eq=False)
class ProofFeatures:
    r"""A proof of one property, seen at the last hidden value z (n,) of the network.

    In clause k the proof uses the row :math:`v_k \cdot z + \beta_k > 0`. Feature i is the interval
    ``[lower_i, upper_i]`` of :math:`z_i` over the region.

    Args:
        prop: the property.
        cut: the network.
        relaxed: the bounds behind the proof.
        lower: (n,) float64.
        upper: (n,) float64.
        rows: (s, n) coefficients v, one row per clause of the property.
        offset: (s,) constants beta.
        chosen: which row of each clause is used.
        row_margins: (s,) lower bounds of the rows, the whole proof's outcome.

    Source: Banerjee, Singh and Singh, "Interpreting Robustness Proofs of Deep Neural Networks"
        (ICLR 2024). Ours: safe sets in conjunctive form, of which the proof fixes a row a clause.
    """

    prop: Property
    cut: HiddenCut
    relaxed: Relaxed
    lower: Tensor
    upper: Tensor
    rows: Tensor
    offset: Tensor
    chosen: tuple[int, ...]
    row_margins: Tensor

    @property
    def method(self) -> ProofMethod:
        """How the network was bounded."""
        return self.relaxed.method

    @property
    def size(self) -> int:
        """Number n of features."""
        return self.lower.numel()

    @property
    def margin(self) -> float:
        """Lower bound of the safety margin: the least of ``row_margins``; NaN proves nothing."""
        return float(self.row_margins.min())

    @property
    def proved(self) -> bool:
        """Whether the bounds promise a proof, rounding allowed for. The checker has the say."""
        return self.margin >= self.slack

    @property
    def binding(self) -> int:
        """The clause with the least margin."""
        return int(self.row_margins.argmin())

    @cached_property
    def priority(self) -> Tensor:
        r"""(n,) :math:`\max_k |v_{ki}| \cdot \max(|l_i|, |u_i|)`.

        No margin of a box or zonotope proof moves by more when feature i is pruned.
        """
        return self.rows.abs().amax(dim=0) * torch.maximum(self.lower.abs(), self.upper.abs())

    @cached_property
    def slack(self) -> float:
        """What a margin must exceed to survive rounding, in output units."""
        terms = self.rows.abs() @ torch.maximum(self.lower.abs(), self.upper.abs())
        return max(ROUNDING * float((terms + self.offset.abs()).max()), LEAST)

    @cached_property
    def contributions(self) -> Tensor:
        """(s, n) what each feature adds to each row's margin; rows sum to margin - offset.

        For intervals ``min(v l, v u)``. Else the bound is a positively homogeneous, piecewise
        linear function of v; by Euler's identity it is the product of v with its gradient.
        """
        return self.rows * self.support(self.rows)[1]

    @cached_property
    def replays(self) -> dict[tuple[int, ...], Confirmation]:
        """Verdicts of the checker on pruned networks, by kept features; filled by extractions."""
        return {}

    def pruned_margins(self, masks: Tensor) -> Tensor:
        """Margins (q, s) of every row when only the features in ``masks`` (q, n) bool are kept.

        Exactly what the same bounds say of the network whose other columns are zero.
        """
        if self.method is ProofMethod.IBP:
            ends = torch.minimum(self.rows * self.lower, self.rows * self.upper)
            return masks.to(ends.dtype) @ ends.T + self.offset
        rows = torch.where(masks.unsqueeze(1), self.rows, 0.0)  # (q, s, n)
        with torch.no_grad():
            bound = self.relaxed.bound(self.cut.hidden, rows.flatten(0, 1))
        return bound.lower.reshape(len(masks), len(self.rows)) + self.offset

    def support(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Lower bounds (r,) of ``rows @ z`` and points (r, n) of the relaxation that attain them.

        Args:
            rows: (r, n) float64.
        """
        if self.method is ProofMethod.IBP:
            points = torch.where(rows > 0, self.lower, self.upper)
            return (rows * points).sum(dim=1), points
        with torch.enable_grad():
            leaf = rows.detach().clone().requires_grad_(True)
            bound = self.relaxed.bound(self.cut.hidden, leaf).lower
            (points,) = torch.autograd.grad(bound.sum(), leaf)
        return bound.detach(), points

    def worst_inputs(self, rows: Tensor) -> Tensor:
        """Inputs (r, n0) of the region that the affine bounds of ``rows`` (r, n) point at."""
        with torch.no_grad():
            bound = self.relaxed.bound(self.cut.hidden, rows)
        return self.prop.region.corner(-bound.inputs)

    def proof_tree(self, graph: Graph) -> ProofTree:
        """The proof as the checker replays it, on this network or a pruned one ``graph``."""
        plan, slopes = self.relaxed.plan(), self.relaxed.slopes()
        there = {node.name for node in graph.nodes}
        slopes = {name: pair for name, pair in slopes.items() if name in there}
        plan = tuple(name for name in plan if name in there)
        return ProofTree.leaf(self.chosen, tighten=plan, slopes=slopes, tighten_slopes=slopes)


def proof_features(
    graph: Graph, prop: Property, method: str | ProofMethod = ProofMethod.CROWN
) -> ProofFeatures:
    """Bound a network over a property's region and read off the features of the proof.

    Args:
        graph: the network.
        prop: the property. Of every clause the row with the best bound is used.
        method: how to bound, see :class:`ProofMethod`.

    Returns:
        :class:`ProofFeatures`, whether or not the property is proved.

    Raises:
        SpecError: a property that does not fit the network, or an unknown method.
        UnsupportedOperationError: an affine network; an operator that the method cannot treat.
    """
    kind = ProofMethod.named(method)
    prop.check_against(graph.input_size, graph.output_size)
    cut = cut_network(graph)
    relaxed = relax_network(graph, prop.region, kind)
    rows, offset, sizes = _hidden_rows(prop, cut)
    with torch.no_grad():
        lower, upper = feature_box(relaxed, cut)
    whole = ProofFeatures(prop, cut, relaxed, lower, upper, rows, offset, (), offset)
    everything = torch.ones(1, cut.size, dtype=torch.bool, device=rows.device)
    margins = whole.pruned_margins(everything)[0]
    chosen = _best_rows(margins, sizes)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    pick = torch.tensor([a + b for a, b in zip(starts, chosen, strict=True)], device=rows.device)
    return ProofFeatures(
        prop, cut, relaxed, lower, upper, rows[pick], offset[pick], chosen, margins[pick]
    )


def _hidden_rows(prop: Property, cut: HiddenCut) -> tuple[Tensor, Tensor, list[int]]:
    """All rows of all clauses on z, constants, and the number of rows of each clause."""
    stacked = torch.cat([rows for rows, _ in prop.safe.clauses])
    constants = torch.cat([offset for _, offset in prop.safe.clauses])
    rows, const = cut.pull_back(stacked)
    return rows, const + constants.to(const), [len(o) for _, o in prop.safe.clauses]


def feature_box(relaxed: Relaxed, cut: HiddenCut) -> tuple[Tensor, Tensor]:
    """Ends (n,) of the features; differentiable like the relaxation."""
    box = relaxed.boxes[cut.hidden]
    lower, upper = box.lower.flatten(), box.upper.flatten()
    if relaxed.method is ProofMethod.IBP:
        return lower, upper
    units = torch.eye(cut.size, dtype=lower.dtype, device=lower.device)
    low = relaxed.bound(cut.hidden, units).lower
    high = -relaxed.bound(cut.hidden, -units).lower
    if relaxed.method is ProofMethod.ZONOTOPE:
        return low, high  # the zonotope's own hull, which rows over it may need
    return torch.maximum(low, lower), torch.minimum(high, upper)


def _best_rows(margins: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
    """Position of the best row in each clause."""
    if bool(torch.isnan(margins).any()):  # argmax would choose it anyway; be explicit
        return (0,) * len(sizes)
    return tuple(int(part.argmax()) for part in torch.split(margins, list(sizes)))
