"""What a change of the outputs costs: a quadratic form for every reference input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.edit._behavior import Reference

__all__ = ["Importance"]

LEAST_LEAD = 0.3  #: of the median lead of a decision; thinner ones weigh no more than this
LEAST_GAP = 0.1  #: of the outputs' spread; likewise where no labels tell what decides


@dataclass(frozen=True)
class Importance:
    """Costs ``|plain d|^2 + sum_ends sum_j (share_j (d_top - d_j))^2`` of output changes d.

    Labels show that the decision is the largest output: changes cost most where its lead is thin.
    Without labels it may be either end, or there may be none and all outputs count: a mixture of
    the three. One unit is the outputs' mean standard deviation, or the lead.

    Args:
        ends: for each end that may decide, its output (q, 1) and the shares (q, m) of all others.
        plain: weight of every output's change.
    """

    ends: tuple[tuple[Tensor, Tensor], ...]
    plain: float

    @classmethod
    def of(cls, reference: Reference, chosen: Tensor) -> Importance:
        """Of the reference inputs at positions ``chosen`` (k,)."""
        outputs = reference.outputs[chosen].float()
        several = len(reference.outputs) > 1
        spread = float(reference.outputs.float().std(dim=0).mean()) if several else 1.0
        spread = max(spread, 1e-12)
        if outputs.shape[1] == 1:
            return cls((), 1.0 / spread)
        if reference.labels is not None:
            lead = outputs.topk(2, dim=1).values
            floor = LEAST_LEAD * float((lead[:, 0] - lead[:, 1]).median())
            return cls((_shares(outputs, floor),), 0.0)
        ends = (_shares(outputs, LEAST_GAP * spread), _shares(-outputs, LEAST_GAP * spread))
        return cls(tuple((top, LEAST_GAP * share) for top, share in ends), LEAST_GAP / spread)

    def cost(self, change: Tensor) -> Tensor:
        """Costs (k,) of output changes (k, m)."""
        total = self.plain**2 * change.square().sum(dim=1)
        for top, share in self.ends:
            total = total + ((change.gather(1, top) - change) * share).square().sum(dim=1)
        return total

    def directions(self, outputs: int, count: int, generator: torch.Generator) -> Tensor:
        """Random g (k, m) with ``E[(g . d)^2]`` the cost of d, independent by input.

        With independent noise ``n_j`` the row ``sum_j n_j share_j (e_top - e_j)`` has the second
        moment ``sum_j share_j^2 (e_top - e_j) (e_top - e_j)'``.
        """
        made = self.plain * torch.randn(count, outputs, generator=generator)
        for top, share in self.ends:
            noise = share * torch.randn(count, outputs, generator=generator)
            made = made - noise
            made = made.scatter_add(1, top, noise.sum(dim=1, keepdim=True))
        return made


def _shares(outputs: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The largest output (k, 1) of every input, and (k, m) one over its leads plus ``floor``."""
    top = outputs.argmax(dim=1, keepdim=True)
    lead = outputs.gather(1, top) - outputs
    share = 1.0 / (lead + floor + torch.finfo(outputs.dtype).tiny)
    return top, share.scatter(1, top, 0.0)
