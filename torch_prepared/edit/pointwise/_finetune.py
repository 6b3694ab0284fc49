"""A proposal by gradient descent: reach the margins while the outputs on a reference stay.

Nothing here is a claim: what it leaves open is closed by an exact method, and all is checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from torch_prepared.certify import PointClaims
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.edit.pointwise._examples import best_rows, row_values
from torch_prepared.relax import evaluate_graph

__all__ = ["finetune"]

STEPS = 10_000
BATCH = 512
LOOK_EVERY = 20
OVERSHOOT = 3.0
RATE, LAST_RATE = 1e-3, 0.05
STAY = 10.0  #: weight of the change on the reference against the mean shortfall
IMPATIENCE = 100  #: steps after which the shortfall weighs twice as much, and so on
RECOVER = 100  #: steps at least after all margins are reached, to win back what was lost


def finetune(
    graph: Graph,
    claims: PointClaims,
    reference: Tensor,
    margin: float,
    *,
    layers: Sequence[str] | None,
    deadline: Deadline,
    seed: int,
) -> Graph:
    """A network whose rows of ``claims`` reach ``margin``, or came closer to it.

    Minimizes the mean shortfall of the rows (from a few times the margin) plus the mean squared
    change of the outputs on ``reference``, both in units of the outputs' spread there; the longer
    it takes the more the shortfall weighs. Once all
    rows are reached it goes on for as long again with falling step sizes, and returns the state
    with the least change among those that reach them.

    Args:
        graph: the network as stored; not changed.
        claims: examples.
        reference: (q, n) inputs on which outputs should stay.
        margin: to reach.
        layers: names of layers that may change; None for all.
        deadline: when to stop.
        seed: of the order of examples.
    """
    single = graph.to(torch.float32, "cpu")
    vector = ParameterVector.of(single, None if layers is None else tuple(layers))
    moving = {n: single.parameters[n].detach().clone().requires_grad_() for n in vector.names}
    generator = torch.Generator().manual_seed(seed)
    reference = reference.float()
    points = torch.from_numpy(claims.inputs).float()
    with torch.no_grad():
        kept = torch.cat([evaluate_graph(single, r).flatten(1) for r in reference.split(2048)])
    spread = max(float(kept.std(dim=0, correction=0).square().sum() ** 0.5), 1e-12)
    table = _RowTable(claims, _outputs(single, points, moving))
    adam = _Adam(list(moving.values()))
    best: tuple[float, dict[str, Tensor]] | None = None
    reached, last = 0, STEPS
    for step in range(STEPS):
        chosen = _batch(len(points), generator)
        other = _batch(len(reference), generator)
        x = torch.cat([points[chosen], reference[other]])
        y = evaluate_graph(single, x, moving).flatten(1)
        moved = (y[len(chosen) :] - kept[other]).square().sum(dim=1).mean() / spread**2
        if step % LOOK_EVERY == 0:
            lowest, lost = table.lowest(_outputs(single, points, moving)), float(moved.detach())
            if lowest >= margin:
                if best is None:
                    reached, last = step, step + max(step, RECOVER)
                if best is None or lost < best[0]:
                    best = lost, {n: v.detach().clone() for n, v in moving.items()}
            if step >= last or np.isnan(lowest) or deadline.over:
                break
        left = 1.0 if best is None else max(0.0, (last - step) / (last - reached))
        lack = table.shortfall(y[: len(chosen)], chosen, OVERSHOOT * margin)
        push = 1.0 + (step if best is None else reached) / IMPATIENCE
        loss = push * lack / spread + STAY * moved
        adam.step(torch.autograd.grad(loss, adam.tensors), RATE * max(LAST_RATE, left))
    found = {name: value.detach() for name, value in moving.items()} if best is None else best[1]
    if not all(bool(torch.isfinite(value).all()) for value in found.values()):
        return graph
    stored = {n: v.to(graph.parameters[n], copy=True) for n, v in found.items()}
    return graph.with_parameters(stored)


class _RowTable:
    """The rows of each point, padded to a rectangle: (b, rows, m)."""

    def __init__(self, claims: PointClaims, outputs: Tensor) -> None:
        chosen = best_rows(claims, row_values(claims, outputs.double().numpy()))
        count = np.bincount(claims.point[chosen], minlength=len(claims.inputs))
        starts = np.cumsum(count) - count
        place = np.minimum(np.arange(int(count.max())), count[:, None] - 1) + starts[:, None]
        self._rows = torch.from_numpy(claims.rows[chosen][place]).float()
        self._offset = torch.from_numpy(claims.offset[chosen][place]).float()

    def shortfall(self, y: Tensor, chosen: Tensor, margin: float) -> Tensor:
        """Mean over points of how far the lowest row stays below ``margin``."""
        values = torch.einsum("brm,bm->br", self._rows[chosen], y) + self._offset[chosen]
        return (margin - values.amin(dim=1)).clamp_min(0).mean()

    def lowest(self, outputs: Tensor) -> float:
        """The lowest row of all points."""
        values = torch.einsum("brm,bm->br", self._rows, outputs) + self._offset
        return float(values.min())


class _Adam:
    """Kingma and Ba, "Adam: a method for stochastic optimization" (2015), with usual constants.

    ``torch.optim`` loads the compiler on first use, which takes longer than most edits.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self._count = tensors, 0
        self._mean = [torch.zeros_like(t) for t in tensors]
        self._square = [torch.zeros_like(t) for t in tensors]

    def step(self, grads: Sequence[Tensor], rate: float) -> None:
        """Move all tensors against their gradients."""
        self._count += 1
        scale = rate * (1 - 0.999**self._count) ** 0.5 / (1 - 0.9**self._count)
        with torch.no_grad():
            for t, g, m, v in zip(self.tensors, grads, self._mean, self._square, strict=True):
                m.lerp_(g, 0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                t.addcdiv_(m, v.sqrt().add_(1e-8), value=-scale)


def _batch(count: int, generator: torch.Generator) -> Tensor:
    """All positions, or a random batch of them."""
    if count <= BATCH:
        return torch.arange(count)
    return torch.randint(count, (BATCH,), generator=generator)


def _outputs(graph: Graph, x: Tensor, moving: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([evaluate_graph(graph, p, moving).flatten(1) for p in x.split(2048)])
