"""A proposal by gradient descent: reach the margins while the outputs on a reference stay.

Nothing here is a claim: what it leaves open is closed by an exact method, and all is checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.certify import PointClaims
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.edit.pointwise._curved import raise_rows
from torch_prepared.edit.pointwise._examples import best_rows, point_margins, row_values
from torch_prepared.relax import evaluate_graph

__all__ = ["finetune"]

BATCH = 512
LOOK_EVERY = 20
OVERSHOOT = 3.0
LIFTED = 5e-3  #: of the outputs' spread, what rows of many examples aim at
LAST_RATE = 0.05
LEAD = 0.1  #: of the outputs' spread; decisions on the reference are kept with at most this lead
MANY = 300  #: examples from which on haste costs more decisions than it saves time


@dataclass(frozen=True)
class _Pace:
    """How fast examples are pressed.

    Attributes:
        rate: step size, in units of a tensor's size.
        settled: least share of it while few examples are left.
        decay: of the step size until the end of the time or of the steps.
        stay: price of the mean squared change on the reference.
        keep: price of decisions lost there.
        aim: least value that rows aim at, in units of the outputs' spread.
        grow: of an example's price while it falls short, every 20 steps; 1 keeps all prices equal.
        impatience: steps after which all shortfalls weigh twice as much, and so on.
        points: examples up to which every step sees them all.
        steps: at most.
        recover: steps, at least and once more as many as before, to win back what was lost.
        share: of the time.
    """

    rate: float
    settled: float
    decay: float
    stay: float
    keep: float
    aim: float
    grow: float
    impatience: float
    points: int
    steps: int
    recover: int
    share: float


_FEW = _Pace(0.016, 0.2, 1.0, 20.0, 1.0, 0.02, 1.3, 50, 1024, 10_000, 150, 1.0)
_CROWD = _Pace(0.02, 1.0, 0.1, 10.0, 0.0, LIFTED, 1.0, 100, BATCH, 4000, 150, 0.5)
_AFTER = _Pace(0.005, 0.2, 1.0, 20.0, 1.0, LIFTED, 1.3, 50, 1024, 10_000, 1000, 1.0)
_ALONE = _Pace(0.016, 0.2, 0.02, 0.0, 0.0, 0.02, 1.3, 50, 1024, 2000, 0, 1.0)
_SHRINK, _LEAST_PRICE, _LARGEST_PRICE = 0.9, 0.3, 30.0


def finetune(
    graph: Graph,
    claims: PointClaims,
    reference: Tensor | None,
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
    each batch of the reference is drawn where it was last seen to change. Once all rows are reached
    it goes on with falling step sizes, and returns the state with the least change among those that
    reach them, else that with the least shortfall.

    Beyond 300 examples prices stay equal, batches are drawn evenly, only outputs count, and step
    sizes fall from the start; what is then left is closed by :func:`raise_rows`.

    Args:
        graph: the network as stored; not changed.
        claims: examples.
        reference: (q, n) inputs on which outputs should stay; None when nothing is to stay.
        margin: to reach.
        layers: names of layers that may change; None for all.
        deadline: when to stop.
        seed: of the order of examples.
    """
    many = len(claims.inputs) > MANY
    pace = _ALONE if reference is None else _CROWD if many else _FEW
    points = torch.from_numpy(claims.inputs).float()
    stay = _Stay(
        graph.to(torch.float32, "cpu"), points if reference is None else reference.float(), pace
    )
    found = _descend(graph, claims, stay, pace, margin, layers, deadline.share(pace.share), seed)
    if not many or reference is None:
        return found
    aim = max(OVERSHOOT * margin, LIFTED * stay.spread)
    found = raise_rows(found, claims, reference, margin, aim, layers=layers, deadline=deadline)
    outputs = _outputs(found.to(torch.float32, "cpu"), points)
    reached = point_margins(claims, row_values(claims, outputs.double().numpy()))
    if deadline.over or bool((reached < margin).any()):
        return found
    return _descend(found, claims, stay, _AFTER, margin, layers, deadline, seed)


def _descend(
    graph: Graph,
    claims: PointClaims,
    stay: _Stay,
    pace: _Pace,
    margin: float,
    layers: Sequence[str] | None,
    deadline: Deadline,
    seed: int,
) -> Graph:
    """Gradient descent; see :func:`finetune`."""
    single = graph.to(torch.float32, "cpu")
    vector = ParameterVector.of(single, None if layers is None else tuple(layers))
    moving = {n: single.parameters[n].detach().clone().requires_grad_() for n in vector.names}
    generator = torch.Generator().manual_seed(seed)
    points = torch.from_numpy(claims.inputs).float()
    table = _RowTable(claims, _outputs(single, points, moving))
    adam = _Adam(list(moving.values()))
    aim = max(OVERSHOOT * margin, pace.aim * stay.spread)
    prices, short = torch.ones(len(points)), torch.ones(len(points))
    best, rate, even = _Best(margin, pace), 1.0, pace.grow <= 1.0
    for step in range(pace.steps):
        if step % LOOK_EVERY == 0:
            values = table.values(_outputs(single, points, moving))
            best.look(step, values, stay.price, moving)
            short = (aim - values).clamp_min(0)
            if not even:
                prices = torch.where(short > 0, pace.grow * prices, _SHRINK * prices)
                prices = prices.clamp(_LEAST_PRICE, _LARGEST_PRICE)
            rate = best.rate(step, values, deadline)
            if step >= best.last or bool(values.isnan().any()) or deadline.over:
                break
        chosen = _batch(torch.ones_like(short) if even else short + aim, pace.points, generator)
        other = _batch(torch.ones_like(stay.seen) if even else stay.seen, BATCH, generator)
        y = evaluate_graph(single, torch.cat([points[chosen], stay.inputs[other]]), moving)
        y = y.flatten(1)
        lack = table.shortfall(y[: len(chosen)], chosen, aim)
        push = 1.0 + min(step, best.reached) / pace.impatience
        loss = push * (prices[chosen] * lack).mean() / stay.spread
        loss = loss + stay.cost(y[len(chosen) :], other)
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

    def __init__(self, margin: float, pace: _Pace) -> None:
        self._margin, self._pace = margin, pace
        self.state: dict[str, Tensor] | None = None
        self.reached = self.last = pace.steps  #: when all rows were reached; when to end
        self._price = self._missing = np.inf

    def look(self, step: int, values: Tensor, price: float, moving: dict[str, Tensor]) -> None:
        """Keep a state whose points' lowest rows are ``values`` (b,) if it is the best so far."""
        missing = float((self._margin - values).clamp_min(0).sum())
        if missing == 0.0 and self._missing > 0.0:
            more = max(step, self._pace.recover) if self._pace.recover else 0
            self.reached, self.last = step, step + more
        if missing < self._missing or (missing == 0.0 and price < self._price):
            self._missing, self._price = missing, price
            self.state = {n: v.detach().clone() for n, v in moving.items()}

    def rate(self, step: int, values: Tensor, deadline: Deadline) -> float:
        """Share of the full step size: less when few examples are left, falling at the end."""
        if self._missing > 0.0:
            left = float((values < self._margin).float().mean())
            spent = 0.0 if deadline.seconds is None else deadline.elapsed / deadline.seconds
            fallen: float = self._pace.decay ** max(spent, step / self._pace.steps)
            return fallen * min(1.0, max(self._pace.settled, 10.0 * left))
        return max(LAST_RATE, (self.last - step) / max(self.last - self.reached, 1))


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


def _outputs(graph: Graph, x: Tensor, moving: Mapping[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return torch.cat([evaluate_graph(graph, p, moving).flatten(1) for p in x.split(2048)])
