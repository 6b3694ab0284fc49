"""A proposal by gradient descent: reach the margins while the outputs on a reference stay.

Nothing here is a claim: what it leaves open is closed by an exact method, and all is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
LAST_RATE = 0.05
LEAD = 0.1  #: of the outputs' spread; decisions on the reference are kept with at most this lead
RECOVER = 150  #: steps, at least and once more as many as before, to win back what was lost
MANY = 300  #: examples from which on haste costs more decisions than it saves time


@dataclass(frozen=True)
class _Pace:
    """How fast examples are pressed.

    Attributes:
        rate: step size, in units of a tensor's size.
        settled: least share of it while few examples are left.
        stay: price of the mean squared change on the reference.
        keep: price of decisions lost there.
        aim: least value that rows aim at, in units of the outputs' spread.
        grow: of an example's price while it falls short, every 20 steps; 1 keeps all prices equal.
        impatience: steps after which all shortfalls weigh twice as much, and so on.
        points: examples up to which every step sees them all.
    """

    rate: float
    settled: float
    stay: float
    keep: float
    aim: float
    grow: float
    impatience: float
    points: int


_FEW = _Pace(0.016, 0.2, 20.0, 1.0, 0.02, 1.3, 50, 1024)
_CROWD = _Pace(0.02, 1.0, 10.0, 0.0, 0.0, 1.0, 100, BATCH)
_SHRINK, _LEAST_PRICE, _LARGEST_PRICE = 0.9, 0.3, 30.0


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

    Minimizes the shortfall of the rows, from a few times the margin on, plus what changes on
    ``reference``: outputs, and decisions. Every example has its own price, which grows while it
    falls short, as in an augmented Lagrangian: the last few are not outweighed by the rest. Half of
    each batch of the reference is drawn where it was last seen to change. (Beyond 300 examples
    prices stay equal, batches are drawn evenly, and only outputs count.) Once all rows are reached
    it goes on with falling step sizes, and returns the state with the least change among those that
    reach them, else that with the least shortfall.

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
    points = torch.from_numpy(claims.inputs).float()
    pace = _FEW if len(points) <= MANY else _CROWD
    stay = _Stay(single, reference.float(), pace)
    table = _RowTable(claims, _outputs(single, points, moving))
    adam = _Adam(list(moving.values()))
    aim = max(OVERSHOOT * margin, pace.aim * stay.spread)
    prices, short, best = torch.ones(len(points)), torch.ones(len(points)), _Best(margin)
    rate = 1.0
    for step in range(STEPS):
        if step % LOOK_EVERY == 0:
            values = table.values(_outputs(single, points, moving))
            best.look(step, values, stay.price, moving)
            short = (aim - values).clamp_min(0)
            if pace.grow > 1.0:
                prices = torch.where(short > 0, pace.grow * prices, _SHRINK * prices)
                prices = prices.clamp(_LEAST_PRICE, _LARGEST_PRICE)
            rate = best.rate(step, values, pace.settled)
            if step >= best.last or bool(values.isnan().any()) or deadline.over:
                break
        even = pace.grow <= 1.0
        chosen = _batch(torch.ones_like(short) if even else short + aim, pace.points, generator)
        other = _batch(torch.ones_like(stay.seen) if even else stay.seen, BATCH, generator)
        x = torch.cat([points[chosen], stay.inputs[other]])
        y = evaluate_graph(single, x, moving).flatten(1)
        lack = table.shortfall(y[: len(chosen)], chosen, aim)
        push = 1.0 + min(step, best.reached) / pace.impatience
        loss = push * (prices[chosen] * lack).mean() / stay.spread + stay.cost(
            y[len(chosen) :], other
        )
        adam.step(torch.autograd.grad(loss, adam.tensors), pace.rate * rate)
    found = best.state or {name: value.detach() for name, value in moving.items()}
    if not all(bool(torch.isfinite(value).all()) for value in found.values()):
        return graph
    stored = {n: v.to(graph.parameters[n], copy=True) for n, v in found.items()}
    return graph.with_parameters(stored)


class _Stay:
    """What changes on the reference, in units of the outputs' spread there."""

    def __init__(self, graph: Graph, inputs: Tensor, pace: _Pace) -> None:
        self.inputs, self._pace = inputs, pace
        with torch.no_grad():
            self._kept = torch.cat(
                [evaluate_graph(graph, r).flatten(1) for r in inputs.split(2048)]
            )
        spread = float(self._kept.std(dim=0, correction=0).square().sum() ** 0.5)
        self.spread = max(spread, 1e-12)
        self.seen = torch.full((len(inputs),), 1e-3)  #: change when last looked at, by input
        self.price = np.inf  #: running mean of the cost
        self._top = self._kept.argmax(dim=1)

    def cost(self, outputs: Tensor, chosen: Tensor) -> Tensor:
        """Price of the outputs (b, m) at inputs ``chosen``."""
        before, top = self._kept[chosen], self._top[chosen]
        change = (outputs - before).square().sum(dim=1) / self.spread**2
        lost = torch.zeros(())
        if outputs.shape[1] > 1:
            wanted = _lead(before, top).clamp_max(LEAD * self.spread)
            lost = (wanted - _lead(outputs, top)).clamp_min(0) / self.spread
        each = self._pace.stay * change + self._pace.keep * lost
        self.seen[chosen] = each.detach() / self._pace.stay
        total = each.mean()
        now = float(total.detach())
        self.price = now if self.price == np.inf else 0.9 * self.price + 0.1 * now
        return total


def _lead(outputs: Tensor, top: Tensor) -> Tensor:
    """How far output ``top`` is above all others (b,)."""
    rivals = outputs.scatter(1, top[:, None], -np.inf).amax(dim=1)
    return outputs.gather(1, top[:, None])[:, 0] - rivals


class _Best:
    """The state to return, and when to stop."""

    def __init__(self, margin: float) -> None:
        self._margin = margin
        self.state: dict[str, Tensor] | None = None
        self.reached, self.last = (
            STEPS,
            STEPS,
        )  #: steps at which all rows were reached; at which to end
        self._price = self._missing = np.inf

    def look(self, step: int, values: Tensor, price: float, moving: dict[str, Tensor]) -> None:
        """Keep a state whose points' lowest rows are ``values`` (b,) if it is the best so far."""
        missing = float((self._margin - values).clamp_min(0).sum())
        if missing == 0.0 and self._missing > 0.0:
            self.reached, self.last = step, step + max(step, RECOVER)
        if missing < self._missing or (missing == 0.0 and price < self._price):
            self._missing, self._price = missing, price
            self.state = {n: v.detach().clone() for n, v in moving.items()}

    def rate(self, step: int, values: Tensor, settled: float) -> float:
        """Share of the full step size: less when few examples are left, falling at the end."""
        if self._missing > 0.0:
            left = float((values < self._margin).float().mean())
            return min(1.0, max(settled, 10.0 * left))
        return max(LAST_RATE, (self.last - step) / (self.last - self.reached))


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
        """How far the lowest row of each point (b,) stays below ``margin``."""
        values = torch.einsum("brm,bm->br", self._rows[chosen], y) + self._offset[chosen]
        return (margin - values.amin(dim=1)).clamp_min(0)

    def values(self, outputs: Tensor) -> Tensor:
        """The lowest row of each point (b,)."""
        values = torch.einsum("brm,bm->br", self._rows, outputs) + self._offset
        return values.amin(dim=1)


class _Adam:
    """Kingma and Ba, "Adam: a method for stochastic optimization" (2015), with usual constants.

    ``torch.optim`` loads the compiler on first use, which takes longer than most edits.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self._count = tensors, 0
        self._mean = [torch.zeros_like(t) for t in tensors]
        self._square = [torch.zeros_like(t) for t in tensors]
        sizes = [float(t.detach().square().mean().sqrt()) for t in tensors]
        usual = max(sizes) or 1.0  # tensors of zeros shall move too
        self._sizes = [max(size, 0.1 * usual) for size in sizes]

    def step(self, grads: Sequence[Tensor], rate: float) -> None:
        """Move all tensors against their gradients."""
        self._count += 1
        scale = rate * (1 - 0.999**self._count) ** 0.5 / (1 - 0.9**self._count)
        with torch.no_grad():
            state = zip(self.tensors, grads, self._mean, self._square, self._sizes, strict=True)
            for t, g, m, v, size in state:
                m.lerp_(g, 0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                t.addcdiv_(m, v.sqrt().add_(1e-8), value=-scale * size)


def _batch(weights: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """All positions, or a random batch: half evenly, half in proportion to ``weights`` (b,)."""
    count = len(weights)
    if count <= size:
        return torch.arange(count)
    even = torch.randint(count, (size // 2,), generator=generator)
    steps = weights.double().cumsum(0)
    drawn = torch.rand(size // 2, generator=generator, dtype=torch.float64) * steps[-1]
    return torch.cat([even, torch.searchsorted(steps, drawn).clamp_max(count - 1)])


def _outputs(graph: Graph, x: Tensor, moving: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([evaluate_graph(graph, p, moving).flatten(1) for p in x.split(2048)])
