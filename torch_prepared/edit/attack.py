"""Search for violating inputs. What it finds is a fact; what it does not find proves nothing.

Stages, for all properties at once: corners and samples of each region are screened, the most
promising ones descend along the margin's gradient, and in few dimensions a random local search
follows. Boxes take projected sign steps (Madry et al., "Towards deep learning models resistant to
adversarial attacks", 2018); other regions move toward the point of the region that the gradient
favors, a convex combination (Chen et al., "A Frank-Wolfe framework for efficient and effective
adversarial attacks", 2020), so every step stays inside without a projection.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.bounds import PropertyBatch
from torch_prepared.bounds.cost import graph_flops
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork, OnnxSession
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, InputSet, Property

__all__ = ["Attack", "confirm_with_onnx", "find_counterexamples", "is_violation"]

LOW_DIMENSION = 16
_MAX_CORNERS = 1024
_MEMORY_SCALARS = 2**24
_SCREEN_FLOPS = 1e11
_FIRST_STEP, _LAST_STEP = 0.3, 0.002
_SEARCHERS, _PROPOSALS, _ROUNDS = 16, 64, 48


@dataclass(frozen=True)
class Attack:
    """The worst input found for each of b properties.

    Args:
        inputs: (b, n) float64 on the CPU, each contained in its property's region.
        margins: (b,) float64 safety margins there, evaluated in float64 on the stored weights;
            NaN where the network's value is not finite.
        violated: (b,) bool: the margin is <= 0 (< 0 for a property that is not strict).
        representable: (b,) bool: all entries of the input are numbers of the network's float
            type; False only where a region holds no such point near the worst one.
        seconds: wall time.
    """

    inputs: Tensor
    margins: Tensor
    violated: Tensor
    representable: Tensor
    seconds: float


def find_counterexamples(
    graph: Graph,
    properties: Property | Sequence[Property],
    *,
    starts: Tensor | None = None,
    restarts: int = 64,
    steps: int = 100,
    samples: int = 200_000,
    time_limit: float | None = None,
    seed: int = 0,
) -> Attack:
    """Minimize every property's safety margin over its region.

    Args:
        graph: the network.
        properties: one or b of them.
        starts: points to begin with as well: (k, n) for every property or (b, k, n); those outside
            of a region are moved into it.
        restarts: points per property that take gradient steps.
        steps: gradient steps per point.
        samples: random inputs per property to screen when inputs have at most 16 scalars (a
            violated part may fill a thousandth of a region), fewer for costly networks; with
            more scalars ``restarts`` are drawn.
        time_limit: wall seconds; the best found by then is returned.
        seed: of all random choices.

    Returns:
        An :class:`Attack`.

    Raises:
        SpecError: no property, sizes that do not fit the network, or malformed ``starts``.
    """
    props = (properties,) if isinstance(properties, Property) else tuple(properties)
    if not props or restarts < 1 or steps < 0 or samples < 1:
        raise SpecError(
            "attack: expected at least one property, restart and sample, and steps >= 0"
        )
    for prop in props:
        prop.check_against(graph.input_size, graph.output_size)
    points = _given_starts(starts, len(props), graph.input_size)
    deadline = Deadline(time_limit)
    generator = torch.Generator().manual_seed(seed)
    width = sum(node.size for node in graph.nodes)
    size = max(1, _MEMORY_SCALARS // (restarts * width))
    groups = [slice(i, i + size) for i in range(0, len(props), size)]
    found = []
    for done, group in enumerate(groups):
        share = deadline.share(1 / (len(groups) - done))
        search = _Search(graph, props[group], generator, share, width)
        search.run(points[group], restarts, steps, samples)
        found.append(search.best.cpu())
    return _settle(graph, props, torch.cat(found), deadline)


def is_violation(prop: Property, margin: float) -> bool:
    """Whether an output of this margin is a definite violation; NaN is none."""
    return margin <= 0.0 if prop.safe.strict else margin < 0.0


def confirm_with_onnx(
    network: OnnxNetwork | OnnxSession | str | os.PathLike[str],
    prop: Property,
    x: Tensor | np.ndarray,
) -> float:
    """The safety margin of one input (n,) by the output of onnxruntime, the deployed computation.

    The input is rounded to the network's float type, the output's margin computed in float64. A
    counterexample counts only if this margin violates as well (:func:`is_violation`).
    """
    session = network if isinstance(network, OnnxSession) else OnnxSession(network)
    y = session(np.asarray(x, dtype=np.float64).reshape(1, -1))
    return float(prop.safe.margin(torch.from_numpy(y).to(torch.float64))[0])


class _Search:
    """The search for a group of b properties. Points are (q, b, n), margins (q, b)."""

    def __init__(
        self,
        graph: Graph,
        properties: Sequence[Property],
        generator: torch.Generator,
        deadline: Deadline,
        width: int,
    ) -> None:
        self.graph, self.generator, self.deadline = graph, generator, deadline
        self.regions: list[InputSet] = [prop.region for prop in properties]
        self.batch = PropertyBatch.of(properties, graph.dtype, graph.device)
        self.chunk = max(1, _MEMORY_SCALARS // (len(properties) * width))
        self.lower = torch.stack([r.lower for r in self.regions]).to(graph.device, graph.dtype)
        self.upper = torch.stack([r.upper for r in self.regions]).to(graph.device, graph.dtype)
        # Half of each side on its own, as lower - upper may overflow.
        self.half = self.upper / 2 - self.lower / 2
        self.best = torch.clamp(self.lower / 2 + self.upper / 2, self.lower, self.upper)
        self.value = torch.full((len(properties),), torch.inf).to(self.best)

    def run(self, starts: Sequence[Tensor], restarts: int, steps: int, samples: int) -> None:
        """All stages, until time is over."""
        low = self.lower.shape[1] <= LOW_DIMENSION
        affordable = int(_SCREEN_FLOPS / graph_flops(self.graph))
        drawn = max(restarts, min(samples, affordable)) if low else restarts
        pool = self._screen(starts, restarts, drawn)
        with torch.enable_grad():
            pool = self._descend(pool, steps)
        if low:
            self._search_locally(pool)

    def _screen(self, starts: Sequence[Tensor], restarts: int, samples: int) -> Tensor:
        """The ``restarts`` best of given starts, corners and samples: (restarts, b, n)."""
        kept: Tensor | None = None
        for points in self._first_points(starts, restarts, samples):
            for part in torch.split(points, self.chunk):
                with torch.no_grad():
                    margins = self._margins(part)
                if kept is None:
                    kept, values = part, margins
                else:
                    kept, values = torch.cat([kept, part]), torch.cat([values, margins])
                if len(kept) > restarts:
                    values, index = values.topk(restarts, dim=0, largest=False)
                    kept = kept.gather(0, index[..., None].expand(-1, -1, kept.shape[2]))
                if self.deadline.over:
                    return kept
        return self.best[None] if kept is None else kept

    def _first_points(
        self, starts: Sequence[Tensor], restarts: int, samples: int
    ) -> Iterator[Tensor]:
        """Parts (q, b, n) of the points to screen."""
        if starts:
            yield self._stack([_pull_in(r, s) for r, s in zip(self.regions, starts, strict=True)])
        size = self.lower.shape[1]
        if 2**size <= _MAX_CORNERS:
            signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=size)))
        else:
            # Uniform signs all lie near the middle; a common shift also reaches the two ends.
            signs = torch.randn(4 * restarts, size, generator=self.generator)
            signs += torch.linspace(-4, 4, 4 * restarts)[:, None]
        signs = signs.to(torch.float64)
        yield self._stack([region.corner(signs) for region in self.regions])
        for first in range(0, samples, self.chunk):
            count = min(self.chunk, samples - first)
            yield self._stack([r.sample(count, self.generator) for r in self.regions])

    def _descend(self, points: Tensor, steps: int) -> Tensor:
        """Gradient steps of falling size; returns the points (q, b, n), best first."""
        parts = []
        decay = (_LAST_STEP / _FIRST_STEP) ** (1 / max(1, steps - 1))
        order = torch.arange(len(points), device=points.device)
        for x, position in zip(
            torch.split(points, self.chunk), torch.split(order, self.chunk), strict=True
        ):
            for step in range(steps + 1):
                x = x.detach().requires_grad_()
                values = self._rows(x)
                margins = self._offer(x.detach(), self.batch.margins(values))
                if step == steps or self.deadline.over:
                    break
                (gradient,) = torch.autograd.grad(self._goal(values, position).sum(), x)
                x = self._move(x.detach(), gradient, _FIRST_STEP * decay**step)
            parts.append((x.detach(), margins))
        x = torch.cat([part for part, _ in parts])
        order = torch.cat([margins for _, margins in parts]).argsort(dim=0)
        return x.gather(0, order[..., None].expand_as(x))

    def _search_locally(self, points: Tensor) -> None:
        """Random moves, shorter after every failure, until every property is violated."""
        x = torch.cat([self.best[None], points[: _SEARCHERS - 1]])
        reach = torch.full(x.shape[:2], 0.2, dtype=x.dtype, device=x.device)
        with torch.no_grad():
            value = self._margins(x)
            for _ in range(_ROUNDS):
                if self.deadline.over or bool((self.value < 0).all()):
                    return
                trial = self._neighbors(x, reach)
                least, index = self._margins(trial).reshape(_PROPOSALS, *value.shape).min(dim=0)
                better = least < value
                picked = index[None, ..., None].expand(1, *x.shape)
                moved = trial.reshape(_PROPOSALS, *x.shape).gather(0, picked)[0]
                x = torch.where(better[..., None], moved, x)
                value = torch.minimum(least, value)
                reach = torch.where(better, reach, reach * 0.75)

    def _neighbors(self, x: Tensor, reach: Tensor) -> Tensor:
        """Points near x (q, b, n): (proposals * q, b, n), at most ``reach`` of a region away.

        In boxes a random choice of coordinates moves, and stops at the sides; elsewhere a point
        moves toward a sample of the region.
        """
        count = _PROPOSALS * len(x)
        shape = (count, *x.shape[1:])
        noise = torch.randn(shape, generator=self.generator)
        noise *= torch.rand(shape, generator=self.generator) < 0.5
        old, far = x.repeat(_PROPOSALS, 1, 1), reach.repeat(_PROPOSALS, 1)[..., None]
        new = torch.clamp(old + far * noise.to(x) * self.half, self.lower, self.upper)
        for i, region in enumerate(self.regions):
            if not isinstance(region, Box):
                goal = region.sample(count, self.generator).to(x)
                new[:, i] = old[:, i] + far[:, i] * (goal - old[:, i])
        return new

    def _move(self, x: Tensor, gradient: Tensor, size: float) -> Tensor:
        """One step against the gradient, inside every region."""
        step = 2 * size * self.half * torch.sign(gradient)
        moved = torch.clamp(x - step, self.lower, self.upper)
        for i, region in enumerate(self.regions):
            if not isinstance(region, Box):
                goal = region.corner(-gradient[:, i]).to(x)
                moved[:, i] = x[:, i] + size * (goal - x[:, i])
        return moved

    def _goal(self, values: Tensor, position: Tensor) -> Tensor:
        """What points (q,) minimize, from row values (q, b, s): (q, b).

        Every other point takes the margin itself. The rest aim at one fixed clause each, so that
        no disjunct of the unsafe set is forgotten, by the sum of its rows' positive parts, which
        unlike their maximum does not make steps zigzag where rows meet.
        """
        target = (position // 2) % self.batch.present.shape[1]
        mine = self.batch.clause == target[:, None, None]
        positive = torch.nn.functional.leaky_relu(values, 0.01)
        single = torch.where(mine & torch.isfinite(self.batch.offset), positive, 0.0).sum(-1)
        return torch.where((position % 2 == 1)[:, None], single, self.batch.margins(values))

    def _rows(self, points: Tensor) -> Tensor:
        """Values ``rows . f(x) + offset``: (q, b, n) to (q, b, s)."""
        y = evaluate_graph(self.graph, points.flatten(0, 1))
        y = y.reshape(*points.shape[:2], -1)
        return torch.einsum("qbm,bsm->qbs", y, self.batch.rows) + self.batch.offset

    def _margins(self, points: Tensor) -> Tensor:
        """Safety margins, remembered if they are the least so far: (q, b, n) to (q, b)."""
        parts = [self.batch.margins(self._rows(part)) for part in torch.split(points, self.chunk)]
        return self._offer(points, torch.cat(parts))

    def _offer(self, points: Tensor, margins: Tensor) -> Tensor:
        """Keep the least margin of each property; returns them with NaN as infinity."""
        margins = margins.detach().nan_to_num(torch.inf, torch.inf, -torch.inf)
        value, index = margins.min(dim=0)
        better = value < self.value
        every = torch.arange(len(index), device=index.device)
        self.best = torch.where(better[:, None], points[index, every], self.best)
        self.value = torch.minimum(value, self.value)
        return margins

    def _stack(self, points: Sequence[Tensor]) -> Tensor:
        """One (q, n) per property as one (q, b, n)."""
        return torch.stack(list(points), dim=1).to(self.graph.device, self.graph.dtype)


def _given_starts(starts: Tensor | None, count: int, size: int) -> list[Tensor]:
    """Starts (k, n) of every property; an empty list when there are none."""
    if starts is None or starts.numel() == 0:
        return []
    points = starts.detach().to("cpu", torch.float64)
    if points.dim() == 2:
        points = points.expand(count, *points.shape)
    if points.dim() != 3 or points.shape[0] != count or points.shape[2] != size:
        raise SpecError(
            f"starts: got shape {tuple(starts.shape)}; expected (k, {size}) or ({count}, k, {size})"
        )
    if not bool(torch.isfinite(points).all()):
        raise SpecError("starts: got NaN or infinite entries; expected finite ones")
    return list(points)


def _anchor(region: InputSet) -> Tensor:
    """A point (n,) well inside the region."""
    sampled = region.sample(64, torch.Generator().manual_seed(0)).mean(dim=0)
    return torch.clamp(sampled, region.lower, region.upper)


def _pull_in(region: InputSet, points: Tensor) -> Tensor:
    """Points (k, n) moved toward the region's inside until they are contained."""
    points = torch.clamp(points, region.lower, region.upper)
    if isinstance(region, Box):
        return points
    anchor = _anchor(region)
    for _ in range(60):
        outside = ~region.contains(points)
        if not bool(outside.any()):
            break
        points = torch.where(outside[:, None], anchor + 0.9 * (points - anchor), points)
    return points


def _settle(
    graph: Graph, properties: Sequence[Property], found: Tensor, deadline: Deadline
) -> Attack:
    """Round the best points to the network's float type inside the regions; judge in float64."""
    pairs = [
        _round_inside(prop.region, x, graph.dtype)
        for prop, x in zip(properties, found.to(torch.float64), strict=True)
    ]
    inputs = torch.stack([x for x, _ in pairs])
    with torch.no_grad():
        exact = graph.to(torch.float64)
        parts = [
            evaluate_graph(exact, p.to(graph.device)).flatten(1) for p in torch.split(inputs, 512)
        ]
    outputs = torch.cat(parts).cpu()
    margins = [float(p.safe.margin(y)) for p, y in zip(properties, outputs, strict=True)]
    violated = [is_violation(p, margin) for p, margin in zip(properties, margins, strict=True)]
    return Attack(
        inputs,
        torch.tensor(margins, dtype=torch.float64),
        torch.tensor(violated),
        torch.tensor([representable for _, representable in pairs]),
        deadline.elapsed,
    )


def _round_inside(region: InputSet, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """A contained float64 point next to x (n,), and whether ``dtype`` holds it exactly."""
    point = _nearest(torch.clamp(x, region.lower, region.upper), region, dtype)
    if not isinstance(region, Box):
        anchor = _anchor(region)
        for power in (*range(30, 2, -3), 1):
            if bool(region.contains(point[None])[0]):
                break
            point = _nearest(anchor + (1 - 2.0**-power) * (x - anchor), region, dtype)
        else:
            point = _pull_in(region, x[None])[0]
    return point, bool((point.to(dtype).to(torch.float64) == point).all())


def _nearest(x: Tensor, region: InputSet, dtype: torch.dtype) -> Tensor:
    """The point x (n,) rounded to ``dtype`` within the box, where the box has such numbers."""
    rounded = x.to(dtype)
    up = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    down = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
    rounded = torch.where(rounded.double() < region.lower, up, rounded)
    rounded = torch.where(rounded.double() > region.upper, down, rounded)
    near = rounded.to(torch.float64)
    inside = (near >= region.lower) & (near <= region.upper)
    return torch.where(inside, near, torch.clamp(x, region.lower, region.upper))
