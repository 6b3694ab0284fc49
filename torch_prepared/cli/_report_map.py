"""A plane through an edited region, seen by the original and the edited network.

The plane goes through the region's center, the input that violates the original network most and
the one that comes closest to violating the edited network, in coordinates that make the region's
box a cube of half-width one. So the violated part is always in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from torch_prepared.bounds.cost import graph_flops
from torch_prepared.core.graph import Graph
from torch_prepared.edit.attack import find_counterexamples
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Property

__all__ = ["PlaneMap", "choose_property", "map_plane"]

MOST_FLOPS = 2e11
LEAST_SIDE, MOST_SIDE = 31, 141
ATTACK_SECONDS = 3.0
BEYOND = 1.5  #: how far the map reaches, in units of the region's cross-section
CHUNK = 1024


@dataclass(frozen=True)
class PlaneMap:
    """Both networks on a grid of k x l inputs.

    Args:
        name: of the property.
        a: (k,) coordinates along the first axis, b: (l,) along the second, in half-widths.
        b: see above.
        margins: safety margins (l, k) before and after.
        outputs: outputs (l, k, m) before and after.
        outline: (q, 2) border of the region in the plane.
        worst: the two inputs that span the plane, in it: before and after.
    """

    name: str
    a: np.ndarray
    b: np.ndarray
    margins: tuple[np.ndarray, np.ndarray]
    outputs: tuple[np.ndarray, np.ndarray]
    outline: np.ndarray
    worst: tuple[tuple[float, float], tuple[float, float]]


def choose_property(properties: Sequence[Property], margins: Sequence[float]) -> Property:
    """The one violated most before the edit, by the attack's margins (NaN counts least)."""
    order = [math.inf if math.isnan(margin) else margin for margin in margins]
    order += [math.inf] * (len(properties) - len(order))
    return properties[min(range(len(properties)), key=order.__getitem__)]


def map_plane(before: Graph, after: Graph, prop: Property, *, progress: bool) -> PlaneMap | None:
    """Evaluate both networks on the plane; None when the region has fewer than two dimensions."""
    lower, upper = prop.region.lower, prop.region.upper
    center, half = (lower + upper) / 2, (upper - lower) / 2
    wide = half > 0
    if int(wide.sum()) < 2:
        return None
    spots = [_worst(graph, prop, center, half, wide) for graph in (before, after)]
    first, second = _span(spots, int(wide.sum()))
    worst = [(float(s @ first), float(s @ second)) for s in spots]
    outline = _outline(first, second)
    flops = graph_flops(before)
    side = int(min(MOST_SIDE, max(LEAST_SIDE, (MOST_FLOPS / (2 * flops)) ** 0.5)))
    reach = BEYOND * outline.abs().amax(dim=0)
    a, b = (torch.linspace(-float(r), float(r), side, dtype=torch.float64) for r in reach)
    grid = b[:, None, None] * second + a[None, :, None] * first
    points = center.expand(side * side, -1).clone()
    points[:, wide] = center[wide] + half[wide] * grid.reshape(side * side, -1)
    outputs = []
    parts = points.split(CHUNK)
    with tqdm(total=2 * len(parts), disable=not progress, desc="map", leave=False) as bar:
        for graph in (before, after):
            made = []
            for part in parts:
                with torch.no_grad():
                    y = evaluate_graph(graph, part.to(graph.dtype)).flatten(1)
                made.append(y.double())
                bar.update()
            outputs.append(torch.cat(made))
    margins = [prop.safe.margin(y).reshape(side, side).numpy() for y in outputs]
    values = [y.reshape(side, side, -1).numpy() for y in outputs]
    return PlaneMap(
        prop.name, a.numpy(), b.numpy(), (margins[0], margins[1]), (values[0], values[1]),
        outline.numpy(), (worst[0], worst[1]),
    )  # fmt: skip


def _worst(graph: Graph, prop: Property, center: Tensor, half: Tensor, wide: Tensor) -> Tensor:
    """The input of least margin that a short attack meets, in the cube's coordinates."""
    found = find_counterexamples(
        graph, prop, restarts=16, steps=40, samples=20_000, time_limit=ATTACK_SECONDS
    ).inputs[0]
    return ((found - center) / torch.where(wide, half, 1.0))[wide]


def _span(spots: Sequence[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Two orthonormal directions (size,), toward the spots as far as these are independent."""
    generator = torch.Generator().manual_seed(0)
    other = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2)]
    made: list[Tensor] = []
    for direction in (*spots, *other):
        rest = direction.clone()
        for _ in range(2):
            for known in made:
                rest = rest - (rest @ known) * known
        if float(rest.norm()) > 1e-3 * max(1.0, float(direction.norm())):
            made.append(rest / rest.norm())
        if len(made) == 2:
            break
    return made[0], made[1]


def _outline(first: Tensor, second: Tensor) -> Tensor:
    """Border (q, 2) of the cube's cross-section, a star around the center."""
    angle = torch.linspace(0, 2 * math.pi, 1441, dtype=torch.float64)
    rays = torch.stack([angle.cos(), angle.sin()], dim=1)
    size = (rays[:, :1] * first + rays[:, 1:] * second).abs().amax(dim=1)
    return rays / size[:, None]
