"""What a trained network is worth: accuracy, sampled violations, and what the checker certifies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.examples._stokes_case import (
    WALLS,
    Measurements,
    Settings,
    StencilNetwork,
    continuity_row,
    required_properties,
    wall_box,
    wall_row,
)
from torch_prepared.bounds import PropertyBatch, compute_bounds
from torch_prepared.bounds.branch import SplitTree
from torch_prepared.certify import ProofTree
from torch_prepared.core.capture import capture_module
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._certify import Certified, certify_network, prove_by_splitting
from torch_prepared.specs import Box, Property

__all__ = ["Maps", "Quality", "certify_within", "judge", "map_flow"]

SAMPLES = 200_000  #: cells; a quarter as many points on each wall
ABOVE = (1.15, 1.6)  #: certified bounds tried, over the sampled largest value
SLACKS = (0.03, 0.12)  #: of the tolerance, by which the search for a proof goes beyond
MOST_LEAVES = 60_000


@dataclass(frozen=True)
class Quality:
    """Numbers of one network.

    Args:
        relative_error: 2-norm of the error on held-out face velocities over their 2-norm.
        cell_largest: sampled largest outflow per area, mean speeds per side.
        cell_mean: its mean size.
        cell_certified: proved bound over every cell; NaN where none was proved in time.
        wall_largest: sampled largest velocity through a wall, mean speeds.
        wall_mean: its mean size.
        wall_certified: proved bound over all walls.
        certified: whether the checker proves every required property within its tolerance.
        leaves: of the proofs of the required properties; 0 without.
        judge_cpu: process seconds of all this.
    """

    relative_error: float
    cell_largest: float
    cell_mean: float
    cell_certified: float
    wall_largest: float
    wall_mean: float
    wall_certified: float
    certified: bool
    leaves: int
    judge_cpu: float

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Maps:
    """Fields for pictures, first index x.

    Args:
        speed_error: (n, n) ``|velocity - solver's|`` in cell centers.
        outflow: (n, n) outflow per area of the grid's own cells.
        u: (n, n) in cell centers; ``v`` likewise.
        walls: by name (q,) normal velocity along the wall, every ``1 / (q - 1)``.
        proved: (k, k) certified bound of the outflow's size on equal boxes; empty unless asked for.
    """

    speed_error: NDArray[np.float64]
    outflow: NDArray[np.float64]
    u: NDArray[np.float64]
    v: NDArray[np.float64]
    walls: dict[str, NDArray[np.float64]]
    proved: NDArray[np.float64]

    def to_json(self) -> dict[str, object]:
        """Plain data, three significant digits."""
        fields = ("speed_error", "outflow", "u", "v", "proved")
        return {
            **{name: _short(getattr(self, name)) for name in fields},
            "walls": {name: _short(values[None])[0] for name, values in self.walls.items()},
        }


def _short(values: NDArray[np.float64]) -> list[list[float]]:
    return [[float(f"{x:.3g}") for x in row] for row in values]


def judge(
    settings: Settings,
    model: StencilNetwork,
    held_out: Measurements,
    *,
    known: Certified | None = None,
    seconds: float = 120.0,
) -> Quality:
    """Accuracy, sampled and certified violations.

    Certified bounds are the least of a few multiples of the sampled maximum, and the tolerance
    itself, that the checker accepts a proof of.

    Args:
        settings: grid and tolerances.
        model: what to judge; not changed.
        held_out: exact velocities not trained on.
        known: a certificate of the required properties for these weights, when there is one.
        seconds: wall limit of each proof.
    """
    start = time.process_time()
    generator = torch.Generator().manual_seed(settings.seed + 2)
    with torch.no_grad():
        error = held_out.residual(model.net).norm() / held_out.value.norm()
    cells, walls = _sampled(settings, model, generator)
    graph = capture_module(model, torch.zeros(1, 2))
    cell_bound, cell_leaves = _bound(settings, graph, float(cells.max()), False, seconds, known)
    wall_bound, wall_leaves = _bound(settings, graph, float(walls.max()), True, seconds, known)
    return Quality(
        float(error), float(cells.max()), float(cells.mean()), cell_bound,
        float(walls.max()), float(walls.mean()), wall_bound,
        cell_bound <= settings.continuity and wall_bound <= settings.wall,
        cell_leaves + wall_leaves, time.process_time() - start,
    )  # fmt: skip


def _sampled(
    settings: Settings, model: StencilNetwork, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sizes of outflows and of velocities through walls at random places."""
    found = []
    for name, prop in zip(("", *WALLS), required_properties(settings), strict=True):
        row = wall_row(name) if name else continuity_row(settings.spacing)
        points = prop.region.sample(SAMPLES // 4 if name else SAMPLES, generator).float()
        with torch.no_grad():
            found.append((model(points).double() @ row.T).abs()[:, 0])
    return found[0], torch.cat(found[1:])


def _bound(
    settings: Settings,
    graph: Graph,
    largest: float,
    walls: bool,
    seconds: float,
    known: Certified | None,
) -> tuple[float, int]:
    """The least bound tried that the checker certifies, and its leaves; NaN and 0 without any."""
    tolerance = settings.wall if walls else settings.continuity
    tried = sorted({factor * largest for factor in ABOVE} | {tolerance})
    for bound in tried:
        if bound <= largest:
            continue
        part = slice(1, None) if walls else slice(1)
        if bound == tolerance and known is not None:
            return bound, sum(proof.leaves for proof in known.certificate.proofs[part])
        wanted = required_properties(settings, continuity=bound, wall=bound)
        found = certify_within(graph, wanted[part], seconds)
        if found is not None:
            return bound, sum(proof.leaves for proof in found.certificate.proofs)
    return float("nan"), 0


def certify_within(
    graph: Graph, properties: Sequence[Property], seconds: float
) -> Certified | None:
    """Branch and bound, then the checker; None when a property is not proved in time.

    The checker chooses tangents of tanh on a coarser grid than the engine, so its bounds may be
    looser; hence the slack, more where the first is too little.

    Args:
        graph: the network as stored.
        properties: of margins in shares of their tolerances.
        seconds: wall limit of the search.
    """
    deadline = Deadline(seconds)
    for slack in SLACKS:
        proofs = list[ProofTree]()
        for prop in properties:
            tree = SplitTree(PropertyBatch.of([prop]), slack=slack)
            proof, _ = prove_by_splitting(graph, prop, deadline, MOST_LEAVES, tree)
            if proof is None:
                return None
            proofs.append(proof)
        found = certify_network(graph, properties, proofs, {"generator": "stokes_flow"})
        if found.holds:
            return found
    return None


def map_flow(
    settings: Settings, model: StencilNetwork, reference: tuple[Tensor, Tensor], boxes: int = 0
) -> Maps:
    """Fields on the solver's grid.

    Args:
        settings: grid.
        model: the composite.
        reference: the solver's (n, n) velocities in cell centers.
        boxes: along a side, over which outflow is bounded by CROWN (float64, not replayed).
    """
    n, h = settings.cells, settings.spacing
    middle = (torch.arange(n) + 0.5) * h
    centers = torch.stack(torch.meshgrid(middle, middle, indexing="ij"), dim=-1).reshape(-1, 2)
    along = torch.linspace(0.0, 1.0, 8 * n + 1)
    walls = {}
    with torch.no_grad():
        velocity = model.net(centers).double().reshape(n, n, 2)
        outflow = (model(centers).double() @ continuity_row(h).T).reshape(n, n)
        for name in WALLS:
            start, end = wall_box(name, h).lower.float(), wall_box(name, h).upper.float()
            y = model(start + along[:, None] * (end - start)).double()
            walls[name] = (y @ wall_row(name).T)[:, 0].numpy()
    error = torch.hypot(velocity[..., 0] - reference[0], velocity[..., 1] - reference[1])
    return Maps(
        error.numpy(), outflow.numpy(), velocity[..., 0].numpy(), velocity[..., 1].numpy(), walls,
        _proved(settings, model, boxes),
    )  # fmt: skip


def _proved(settings: Settings, model: StencilNetwork, boxes: int) -> NDArray[np.float64]:
    """Bounds (k, k) of the outflow's size over a grid of boxes that covers all centers."""
    if not boxes:
        return np.zeros((0, 0))
    graph = capture_module(model, torch.zeros(1, 2)).to(torch.float64)
    h = settings.spacing
    ends = torch.linspace(h / 2, 1 - h / 2, boxes + 1, dtype=torch.float64).tolist()
    regions = [
        Box([ends[i], ends[j]], [ends[i + 1], ends[j + 1]])
        for i in range(boxes)
        for j in range(boxes)
    ]
    found = []
    with torch.no_grad():
        for first in range(0, len(regions), 512):
            bound = compute_bounds(graph, regions[first : first + 512], continuity_row(h))
            found.append(torch.maximum(bound.upper, -bound.lower)[:, 0])
    result: NDArray[np.float64] = torch.cat(found).reshape(boxes, boxes).numpy()
    return result
