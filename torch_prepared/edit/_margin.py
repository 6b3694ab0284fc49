"""The safety margin an editor aims at."""

from __future__ import annotations

import torch

from torch_prepared.edit._base import EditProblem
from torch_prepared.relax import evaluate_graph

__all__ = ["aimed_margin"]

RELATIVE_MARGIN = 1e-3


def aimed_margin(problem: EditProblem) -> float:
    """The user's margin, or a thousandth of the output rows' usual size on the regions.

    Large against rounding of float32 weights and the checker's outward rounding, small against
    the network's own output differences. Editors enlarge it when a rounded edit misses.
    """
    if problem.options.margin is not None:
        return problem.options.margin
    generator = torch.Generator().manual_seed(problem.options.seed)
    sizes = []
    with torch.no_grad():
        for i, prop in enumerate(problem.properties):
            y = evaluate_graph(problem.exact, prop.region.sample(16, generator)).flatten(1)
            sizes.append((y @ problem.batch.rows[i].T).abs().max())
    return max(RELATIVE_MARGIN * float(torch.stack(sizes).median()), 1e-9)
