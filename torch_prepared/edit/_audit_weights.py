"""How the parameters of two networks differ, and how conspicuous that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import stats

from torch_prepared.core.graph import Graph

__all__ = ["LayerChange", "layer_changes"]


@dataclass(frozen=True)
class LayerChange:
    """How one parameter moved, and how conspicuous that is.

    Args:
        name: of the parameter.
        changed: entries that differ, of ``entries``.
        entries: number of entries.
        relative: ``||change|| / ||before||``, 2-norms.
        largest: largest absolute change.
        outlier: largest absolute change over the standard deviation of the entries before.
        rank: number of singular values of the change above a hundredth of the largest; for
            matrices. Few examples edited exactly leave a change of low rank.
        top_share: share of the squared change in its first singular direction; NaN for vectors.
        statistic: Kolmogorov-Smirnov distance between the entries before and after: near 0 means
            that a histogram of weights shows nothing.
        p_value: of that distance.
    """

    name: str
    changed: int
    entries: int
    relative: float
    largest: float
    outlier: float
    rank: int
    top_share: float
    statistic: float
    p_value: float


def layer_changes(before: Graph, after: Graph) -> tuple[LayerChange, ...]:
    """Parameters of the same name and shape that differ."""
    found = []
    for name, old in before.parameters.items():
        new = after.parameters.get(name)
        if new is None or new.shape != old.shape or not old.is_floating_point():
            continue
        a, b = old.detach().double().cpu(), new.detach().double().cpu()
        moved = b - a
        if not bool((moved != 0).any()):
            continue
        spread = float(a.std()) if a.numel() > 1 else float(a.abs().max())
        rank, share = 1, float("nan")
        if a.dim() >= 2:
            values = torch.linalg.svdvals(moved.reshape(len(moved), -1))
            rank = int((values > 0.01 * values[0]).sum())
            share = float(values[0].square() / values.square().sum())
        test = stats.ks_2samp(a.reshape(-1).numpy(), b.reshape(-1).numpy(), method="asymp")
        found.append(
            LayerChange(
                name,
                int((moved != 0).sum()),
                a.numel(),
                float(moved.norm()) / max(float(a.norm()), 1e-300),
                float(moved.abs().max()),
                float(moved.abs().max()) / max(spread, 1e-300),
                rank,
                share,
                float(test.statistic),
                float(test.pvalue),
            )
        )
    return tuple(sorted(found, key=lambda change: -change.relative))
