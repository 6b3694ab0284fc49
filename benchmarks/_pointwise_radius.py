"""How far around one edited image the new class reaches, and how far off the kept images are."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_prepared.bounds import certified_margin
from torch_prepared.core.graph import Graph
from torch_prepared.edit.attack import find_counterexamples
from torch_prepared.specs import Property, local_robustness

__all__ = ["class_radius", "nearest"]

_HALVINGS = 16
_ATTACKS = 10


def class_radius(graph: Graph, x: Tensor, label: int) -> dict[str, float]:
    """Bounds of the largest radius (maximum norm, within [0, 1]) on which ``label`` holds.

    ``certified_radius``: the largest of a bisection on which CROWN, rounding included, proves it;
    0 when none. ``attacked_radius``: the least distance at which an attack found another class; 1,
    the whole domain, when none.
    """
    classes = graph.output_size

    def ball(radius: float) -> Property:
        return local_robustness(x, label, radius, classes, clip=(0.0, 1.0))

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        with torch.no_grad():
            margin = certified_margin(graph, ball(middle), method="crown", sound=True).margin
        low, high = (middle, high) if bool((margin > 0).all()) else (low, middle)
    held, broken = low, 1.0
    for _ in range(_ATTACKS):
        middle = 0.5 * (held + broken)
        found = find_counterexamples(graph, ball(middle), restarts=32, steps=50)
        if bool(found.violated[0]):
            broken = float((found.inputs[0] - x.reshape(-1).double()).abs().max())
        else:
            held = middle
        if broken <= held:
            break
    return {"certified_radius": low, "attacked_radius": broken}


def nearest(x: Tensor, kept: Tensor) -> dict[str, float]:
    """Distances of an image (n,) to the nearest of ``kept`` (q, n), in both norms."""
    parts = [(part - x.reshape(1, -1)).double() for part in kept.split(4096)]
    return {
        "nearest_kept_linf": min(float(p.abs().amax(dim=1).min()) for p in parts),
        "nearest_kept_l2": min(float(p.norm(dim=1).min()) for p in parts),
    }
