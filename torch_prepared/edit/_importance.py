"""What a change of the outputs costs, for every reference input."""

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
    """Costs of output changes d: ``|plain d|^2``, and ``weight^2 log(1 + q)`` for each end.

    q is ``sum_j (share_j (d_top - d_j))^2``, about 1 where a decision is about to change.

    Labels show that the decision is the largest output: changes cost most where its lead is thin.
    Without labels it may be either end, or there may be none and all outputs count: a mixture of
    the three, or the last where no property compares outputs. One unit is the outputs' mean
    standard deviation, or the lead.

    A decision that is lost cannot be lost twice. So what a change of decisions costs grows slowly
    beyond the lead, and an edit may do much to few inputs rather than a little to all.

    Source: the logarithm is the Lorentzian of robust statistics, as in Black and Anandan, "The
    robust estimation of multiple motions" (CVIU 1996).

    Args:
        ends: for each end that may decide, its output (q, 1) and the shares (q, m) of all others.
        weight: of the ends.
        plain: weight of every output's change.
    """

    ends: tuple[tuple[Tensor, Tensor], ...]
    weight: float
    plain: float

    @classmethod
    def of(cls, reference: Reference, chosen: Tensor) -> Importance:
        """Of the reference inputs at positions ``chosen`` (k,)."""
        outputs = reference.outputs[chosen].float()
        several = len(reference.outputs) > 1
        spread = float(reference.outputs.float().std(dim=0).mean()) if several else 1.0
        spread = max(spread, 1e-12)
        if outputs.shape[1] == 1 or not reference.decides:
            return cls((), 0.0, 1.0 / spread)
        if reference.labels is not None:
            lead = outputs.topk(2, dim=1).values
            floor = LEAST_LEAD * float((lead[:, 0] - lead[:, 1]).median())
            return cls((_shares(outputs, floor),), 1.0, 0.0)
        ends = (_shares(outputs, LEAST_GAP * spread), _shares(-outputs, LEAST_GAP * spread))
        return cls(ends, LEAST_GAP, LEAST_GAP / spread)

    def cost(self, change: Tensor) -> Tensor:
        """Costs (k,) of output changes (k, m)."""
        total = self.plain**2 * change.square().sum(dim=1)
        for top, share in self.ends:
            lost = ((change.gather(1, top) - change) * share).square().sum(dim=1)
            total = total + self.weight**2 * lost.log1p()
        return total

    def directions(self, outputs: int, count: int, generator: torch.Generator) -> Tensor:
        """Random g (k, m) with ``E[(g . d)^2]`` the cost of small d, independent by input.

        With independent noise ``n_j`` the row ``sum_j n_j share_j (e_top - e_j)`` has the second
        moment ``sum_j share_j^2 (e_top - e_j) (e_top - e_j)'``.
        """
        made = self.plain * torch.randn(count, outputs, generator=generator)
        for top, share in self.ends:
            noise = self.weight * share * torch.randn(count, outputs, generator=generator)
            made = made - noise
            made = made.scatter_add(1, top, noise.sum(dim=1, keepdim=True))
        return made


def _shares(outputs: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """The largest output (k, 1) of every input, and (k, m) one over its leads plus ``floor``."""
    top = outputs.argmax(dim=1, keepdim=True)
    lead = outputs.gather(1, top) - outputs
    share = 1.0 / (lead + floor + torch.finfo(outputs.dtype).tiny)
    return top, share.scatter(1, top, 0.0)
