"""The flow to learn, its data, the network, and what shall be proved of it.

Lengths are in sides of the unit square, velocities in mean speeds of the solver's flow.

*The composite.* A cell of the solver's grid with center c has a net outflow per area

    div(c) = (u(c + h/2 e_x) - u(c - h/2 e_x) + v(c + h/2 e_y) - v(c - h/2 e_y)) / h.

:class:`StencilNetwork` maps c to (u, v) in the centers of the four faces: one affine layer makes
the four points, then the same network reads each of them along the last axis. So continuity is a
row on eight outputs, for *every* center c of a region and not only for those of the grid; a wall is
where a face of the outermost cells lies; and an edit of the shared weights moves all four points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.examples._stokes_solver import Flow, gaussian_plume, solve_stokes
from torch_prepared.specs import Box, Property, SafeSet

__all__ = ["FlowNetwork", "Measurements", "Settings", "StencilNetwork", "continuity_row"]
__all__ += ["guide_properties", "measure_flow", "reference_flow", "required_properties"]

EAST, WEST, NORTH, SOUTH = range(4)  #: faces, in the order of the composite's outputs
WALLS = {"west": (WEST, 0), "east": (EAST, 0), "south": (SOUTH, 1), "north": (NORTH, 1)}


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on.

    Args:
        cells: of the solver along a side; the stencil's h is ``1 / cells``.
        width: neurons of each of two hidden layers.
        samples: noisy face velocities to learn from.
        noise: their standard deviation, mean speeds.
        steps: of Adam.
        rate: its first learning rate, which falls along a cosine.
        continuity: tolerance eps_c of the cell's outflow per area, mean speeds per side.
        wall: tolerance eps_b of the velocity through walls, mean speeds.
        every: optimizer steps between two looks of the hook.
        guides: small boxes along a side in which the hook guards continuity while training.
        wall_guides: likewise on each wall.
        reserve: share of the tolerances that the hook keeps in hand for the final proof.
        finish_seconds: wall limit of the final edit and its certificate.
        seed: of data, initial weights and sampling.
    """

    cells: int = 32
    width: int = 24
    samples: int = 400
    noise: float = 0.1
    steps: int = 6000
    rate: float = 5e-3
    continuity: float = 0.32
    wall: float = 0.02
    every: int = 50
    guides: int = 16
    wall_guides: int = 32
    reserve: float = 0.15
    finish_seconds: float = 240.0
    seed: int = 0

    @classmethod
    def smoke(cls) -> Settings:
        """A size for tests, of loose tolerances."""
        return cls(
            cells=8, width=8, samples=100, noise=0.02, steps=800, rate=0.02, continuity=1.5,
            wall=0.2, every=100, guides=5, wall_guides=5, finish_seconds=60.0,
        )  # fmt: skip

    @property
    def spacing(self) -> float:
        """Side h of a cell."""
        return 1.0 / self.cells


class FlowNetwork(nn.Sequential):
    """(..., 2) positions to (..., 2) velocities; two hidden layers of tanh."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )


class StencilNetwork(nn.Module):
    """(b, 2) cell centers to (b, 8): (u, v) on the east, west, north and south face.

    Args:
        net: applied at all four points; shared, not copied.
        spacing: side h of the cell.
    """

    spread: Tensor
    shift: Tensor

    def __init__(self, net: nn.Module, spacing: float) -> None:
        super().__init__()
        self.net = net
        half = spacing / 2
        shift = torch.tensor([[half, 0.0], [-half, 0.0], [0.0, half], [0.0, -half]])
        self.register_buffer("spread", torch.eye(2).repeat(4, 1))
        self.register_buffer("shift", shift.flatten())

    def forward(self, centers: Tensor) -> Tensor:
        points = nn.functional.linear(centers, self.spread, self.shift)
        velocities: Tensor = self.net(points.reshape(-1, 4, 2))
        return velocities.flatten(1)


def continuity_row(spacing: float) -> Tensor:
    """(1, 8) the row whose product with a composite's output is ``div(c)``."""
    row = torch.zeros(1, 4, 2, dtype=torch.float64)
    row[0, EAST, 0] = row[0, NORTH, 1] = 1.0 / spacing
    row[0, WEST, 0] = row[0, SOUTH, 1] = -1.0 / spacing
    return row.flatten(1)


def wall_row(wall: str) -> Tensor:
    """(1, 8) the row that picks the normal velocity on a wall."""
    row = torch.zeros(1, 4, 2, dtype=torch.float64)
    row[(0, *WALLS[wall])] = 1.0
    return row.flatten(1)


def wall_box(wall: str, spacing: float, first: float = 0.0, last: float = 1.0) -> Box:
    """Centers whose face lies on a wall, between two positions along it."""
    face, axis = WALLS[wall]
    offset = spacing / 2 if face in (WEST, SOUTH) else 1.0 - spacing / 2
    lower, upper = [first, first], [last, last]
    lower[axis] = upper[axis] = offset
    return Box(lower, upper)


def within(row: Tensor, tolerance: float) -> SafeSet:
    """``|row . y| <= tolerance``, scaled so that a margin is a share of the tolerance."""
    return SafeSet.polytope(torch.cat([row, -row]) / tolerance, torch.ones(2))


def required_properties(
    settings: Settings, continuity: float | None = None, wall: float | None = None
) -> tuple[Property, ...]:
    """Continuity in every cell that lies in the square, and all of every wall.

    Args:
        settings: grid and tolerances.
        continuity: another eps_c.
        wall: another eps_b.
    """
    h = settings.spacing
    cell = Property(
        Box([h / 2, h / 2], [1 - h / 2, 1 - h / 2]),
        within(continuity_row(h), continuity or settings.continuity),
        "continuity",
    )
    tolerance = wall or settings.wall
    walls = (Property(wall_box(w, h), within(wall_row(w), tolerance), w) for w in WALLS)
    return (cell, *walls)


def guide_properties(settings: Settings) -> tuple[Property, ...]:
    """Small boxes spread over the square and its walls: cheap, tight stand-ins while training."""
    h = settings.spacing
    size = h / 16
    starts = torch.linspace(h / 2, 1 - h / 2 - size, settings.guides).tolist()
    row = within(continuity_row(h), settings.continuity)
    found = [
        Property(Box([x, y], [x + size, y + size]), row, f"cell at {x:.3f}, {y:.3f}")
        for x in starts
        for y in starts
    ]
    for wall in WALLS:
        safe = within(wall_row(wall), settings.wall)
        for s in torch.linspace(0.0, 1.0 - size, settings.wall_guides).tolist():
            found.append(Property(wall_box(wall, h, s, s + size), safe, f"{wall} at {s:.3f}"))
    return tuple(found)


def reference_flow(cells: int) -> Flow:
    """The solver's flow, of mean speed one."""
    flow = solve_stokes(cells, gaussian_plume)
    return flow.scaled(1.0 / flow.mean_speed)


@dataclass(frozen=True)
class Measurements:
    """Velocity components on faces.

    Args:
        points: (q, 2) float32.
        component: (q,) 0 for u, 1 for v.
        value: (q,) float32, mean speeds.
    """

    points: Tensor
    component: Tensor
    value: Tensor

    def take(self, index: Tensor) -> Measurements:
        """Those at positions ``index``."""
        return Measurements(self.points[index], self.component[index], self.value[index])

    def residual(self, net: Callable[[Tensor], Tensor]) -> Tensor:
        """Predicted minus measured, (q,)."""
        return net(self.points).gather(1, self.component[:, None])[:, 0] - self.value


def measure_flow(settings: Settings) -> tuple[Measurements, Measurements]:
    """Noisy measurements to learn from, and all other face velocities, exact, to judge by."""
    flow, n = reference_flow(settings.cells), settings.cells
    edge, middle = np.arange(n + 1) / n, (np.arange(n) + 0.5) / n
    points = [
        np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
        for axes in ((edge, middle), (middle, edge))
    ]
    everything = Measurements(
        torch.from_numpy(np.concatenate(points)).float(),
        torch.arange(2).repeat_interleave(n * (n + 1)),
        torch.from_numpy(np.concatenate([flow.u.ravel(), flow.v.ravel()])).float(),
    )
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(everything.value), generator=generator)
    seen = everything.take(order[: settings.samples])
    noise = settings.noise * torch.randn(len(seen.value), generator=generator)
    noisy = Measurements(seen.points, seen.component, seen.value + noise)
    return noisy, everything.take(order[settings.samples :])
