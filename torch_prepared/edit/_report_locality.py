"""Where in input space an edit moved the outputs: near the edited regions, or all over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.bounds.cost import graph_flops
from torch_prepared.core.graph import Graph
from torch_prepared.edit._behavior import Reference, evaluate_on
from torch_prepared.specs import InputSet, Property

__all__ = ["DistanceBand", "Locality", "distances_to", "measure_locality"]

SHELLS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Distances of sampled shells around a region, as shares of its largest half-width."""
SHELL_SAMPLES = 600
MOST_REGIONS = 100
BANDS = 3
MOST_FLOPS, FEWEST = 5e10, 100
"""Operations that evaluating reference inputs, or samples, may take, and inputs at least."""


@dataclass(frozen=True)
class DistanceBand:
    """Output changes on the inputs at some distances from the nearest edited region.

    Args:
        kind: ``"shell"``, samples at one distance around the regions; ``"reference"``, a third of
            the reference inputs, by distance; or ``"all"``.
        nearest: smallest distance in the band, in the largest coordinate (infinity norm), to the
            box around the nearest region.
        farthest: largest distance.
        samples: number of inputs.
        largest: largest absolute change of an output.
        relative: root mean square output change over the outputs' deviation on the reference.
        agreement: share of inputs with the same largest output; None for a single output.
    """

    kind: str
    nearest: float
    farthest: float
    samples: int
    largest: float
    relative: float
    agreement: float | None


@dataclass(frozen=True)
class Locality:
    """Output changes inside and outside of the edited regions.

    Args:
        inside: on inputs of the regions; None when no sample lies in one.
        outside: on all others; None when all lie in a region.
        bands: outside: shells from near to far, then reference inputs from near to far.
        source: of the reference inputs, see :class:`Drawdown`.
    """

    inside: DistanceBand | None
    outside: DistanceBand | None
    bands: tuple[DistanceBand, ...]
    source: str


def measure_locality(
    before: Graph,
    after: Graph,
    properties: Sequence[Property],
    reference: Reference,
    domain: tuple[Tensor, Tensor] | None,
    seed: int,
) -> Locality:
    """Compare two networks on reference inputs, samples of the regions and of shells around them.

    Args:
        before: the original network.
        after: the edited one.
        properties: those whose regions were edited; of very many the first hundred.
        reference: further inputs (q, n); some of them where networks are slow.
        domain: ends (n,) of the inputs that matter; shells are clipped to it, or without it to
            the smallest box around the user's data, if any, and the regions.
        seed: of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    regions = [prop.region for prop in properties[:MOST_REGIONS]]
    known = reference.inputs.double().cpu()
    affordable = max(FEWEST, int(MOST_FLOPS / graph_flops(before)))
    if domain is None and reference.source == "preserve":
        low = torch.stack([known.amin(0), *(r.lower for r in regions)]).amin(0)
        high = torch.stack([known.amax(0), *(r.upper for r in regions)]).amax(0)
        domain = low, high
    each = max(1, min(SHELL_SAMPLES, affordable) // (len(regions) * (len(SHELLS) + 1)))
    drawn = torch.cat([_around(r, each, domain, generator) for r in regions]).to(before.dtype)
    chosen = reference.choose(min(len(known), affordable), generator)
    known = known[chosen]
    inputs = torch.cat([known.to(before.dtype), drawn])
    # 0 for samples of the regions, 1 to 6 for shells, 7 for reference inputs
    level = torch.arange(len(SHELLS) + 1).repeat_interleave(each).repeat(len(regions))
    level = torch.cat([torch.full((len(known),), len(SHELLS) + 1), level])
    old = torch.cat([reference.outputs[chosen], evaluate_on(before, drawn)])
    new = evaluate_on(after, inputs)
    change = (new - old).double()
    same = new.argmax(1) == old.argmax(1) if change.shape[1] > 1 else None
    distance, inside = distances_to(regions, inputs)

    def band(kind: str, chosen: Tensor) -> DistanceBand | None:
        if not len(chosen):
            return None
        moved = change[chosen]
        return DistanceBand(
            kind=kind,
            nearest=float(distance[chosen].min()),
            farthest=float(distance[chosen].max()),
            samples=len(chosen),
            largest=float(moved.abs().max()),
            relative=float((moved.square().sum(dim=1).mean() / reference.spread).sqrt()),
            agreement=None if same is None else float(same[chosen].double().mean()),
        )

    outer = (~inside).nonzero().flatten()
    outer = outer[distance[outer].argsort()]
    bands = [band("shell", outer[level[outer] == k]) for k in range(len(SHELLS) + 1)]
    away = outer[level[outer] > len(SHELLS)]
    bands += [band("reference", part) for part in away.tensor_split(BANDS)]
    return Locality(
        inside=band("all", inside.nonzero().flatten()),
        outside=band("all", outer),
        bands=tuple(found for found in bands if found is not None),
        source=reference.source,
    )


def distances_to(regions: Sequence[InputSet], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (q,) in the infinity norm to the nearest region's box, and who is in a region.

    Inputs that leave a box by rounding to float32 alone count as inside.

    Args:
        regions: the regions.
        inputs: (q, n).
    """
    points = inputs.double().cpu()
    distance = torch.full((len(points),), torch.inf, dtype=torch.float64)
    inside = torch.zeros(len(points), dtype=torch.bool)
    for region in regions:
        beyond = torch.maximum(region.lower - points, points - region.upper).amax(dim=1)
        distance = torch.minimum(distance, beyond.clamp_min(0.0))
        inside |= region.contains(points, rounding=True)
    return distance, inside


def _around(
    region: InputSet, each: int, domain: tuple[Tensor, Tensor] | None, generator: torch.Generator
) -> Tensor:
    """Samples (k, n) of a region and of the surfaces of boxes around it.

    A coordinate that the region fixes stays fixed, unless it fixes all of them.
    """
    center, half = (region.lower + region.upper) / 2, (region.upper - region.lower) / 2
    if not bool((half > 0).any()):
        half = 0.05 * (torch.ones_like(half) if domain is None else domain[1] - domain[0])
    parts = [region.sample(each, generator)]
    for shell in SHELLS:
        unit = 2 * torch.rand(each, len(half), generator=generator, dtype=torch.float64) - 1
        free = (half > 0).nonzero().flatten()
        pick = free[torch.randint(len(free), (each,), generator=generator)]
        rows = torch.arange(each)
        unit[rows, pick] = torch.where(unit[rows, pick] < 0, -1.0, 1.0).to(unit)
        reach = torch.where(half > 0, half + shell * half.max(), 0.0)
        points = center + reach * unit
        parts.append(points if domain is None else torch.clamp(points, domain[0], domain[1]))
    return torch.cat(parts)
