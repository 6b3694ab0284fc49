"""Engines of ``fig_leaves``: bounds of one property's rows over a batch of boxes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_prepared.bounds import AlphaOptions, PropertyBatch
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds.alpha_crown import bound_rows_alpha
from torch_prepared.bounds.branch import LeafBounds, LeafEngine, SlopedEngine
from torch_prepared.bounds.chain import Chain
from torch_prepared.bounds.engine import chain_engine, general_engine, leaf_engine
from torch_prepared.core.interval import Interval

__all__ = ["CHUNKS", "ENGINES", "USUAL_CHUNK", "Inheriting", "make_engine", "search_slopes"]

ENGINES = ("general", "chain", "inherit", "slopes", "alpha")
CHUNKS = {"alpha": 256}  # boxes at once; alpha-CROWN's slopes of 4,096 take gigabytes
USUAL_CHUNK = 4096


@dataclass
class Inheriting:
    """A leaf engine that intersects with ``known`` (None: nothing) and keeps what it found."""

    chain: Chain
    batch: PropertyBatch
    known: Interval | None = None
    found: Interval | None = None

    def __call__(self, box: Interval) -> LeafBounds:
        """Bounds of the property's rows."""
        bounds = self.chain.bounds(box, self.batch.rows[0], self.known)
        self.found = bounds.hidden
        return bounds


@dataclass(frozen=True)
class Optimizing:
    """alpha-CROWN, every inner value included; axes to split are those of CROWN."""

    chain: Chain
    batch: PropertyBatch
    options: AlphaOptions

    def __call__(self, box: Interval) -> LeafBounds:
        """Bounds of the property's rows."""
        plain = self.chain.bounds(box, self.batch.rows[0])
        tight = box.map(lambda end: end.to(self.chain.dtype))
        rows = self.batch.rows.to(self.chain.dtype)
        regions = RegionBatch(tight.lower, tight.upper)
        lower, _ = bound_rows_alpha(self.chain.graph, regions, rows, options=self.options)
        return replace(plain, values=torch.maximum(plain.values, lower))


def make_engine(name: str, chain: Chain, batch: PropertyBatch, iterations: int) -> LeafEngine:
    """The engine called ``name``; ``iterations`` are those of alpha-CROWN."""
    if name == "general":
        return general_engine(chain.graph, batch)
    if name == "chain":
        return chain_engine(chain, batch)
    if name == "inherit":
        return Inheriting(chain, batch)
    if name == "alpha":
        return Optimizing(chain, batch, AlphaOptions(iterations))
    return leaf_engine(chain.graph, batch)


def search_slopes(
    engine: SlopedEngine, box: Interval, batch: PropertyBatch, slack: float
) -> Tensor:
    """Bound boxes and search slopes for all of them; the bounds (b, s) found."""
    values = engine.plain(box).values
    offset = batch.offset[0].to(values)
    row = (values + offset).argmax(dim=1)
    given = torch.full((len(values), engine.slopes.size), -1.0)
    enough = slack - offset[row].double()
    return engine.slopes.search(box, given, row, enough)[1].values
