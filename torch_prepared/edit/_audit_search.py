"""Inputs on which two networks differ: on data, and by ascent near them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph

__all__ = ["DataComparison", "Search", "Suspect"]

_CHUNK = 2048
_STEPS = 40
_RESTARTS = 256


@dataclass(frozen=True)
class Suspect:
    """An input on which the two networks differ.

    Args:
        x: (n,).
        origin: position of the data point it is or was found from; -1 for a random start.
        distance: largest coordinate's distance from that point; 0 for the point itself.
        before: (m,) outputs.
        after: (m,) outputs.
        difference: largest absolute difference of an output.
        flips: whether the largest output is another one.
    """

    x: np.ndarray
    origin: int
    distance: float
    before: np.ndarray
    after: np.ndarray
    difference: float
    flips: bool


@dataclass(frozen=True)
class DataComparison:
    """Both networks on the data.

    Args:
        samples: number of inputs.
        agreement: share of equal decisions.
        disagreeing: positions of inputs with other decisions, at most 1000.
        accuracy_before: share of right labels; None without labels.
        accuracy_after: likewise.
        mean_difference: mean over inputs of the largest output difference.
        largest_difference: its maximum.
    """

    samples: int
    agreement: float
    disagreeing: tuple[int, ...]
    accuracy_before: float | None
    accuracy_after: float | None
    mean_difference: float
    largest_difference: float


@dataclass(frozen=True)
class Search:
    """Both networks in float64, and where inputs may lie."""

    before: Graph
    after: Graph
    limits: tuple[Tensor, Tensor]
    deadline: Deadline

    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Flattened outputs of both."""
        parts = [
            [evaluate_graph(g, p).flatten(1) for p in x.split(_CHUNK)]
            for g in (self.before, self.after)
        ]
        return torch.cat(parts[0]), torch.cat(parts[1])

    def compare(self, x: Tensor, labels: Tensor | None) -> tuple[DataComparison, Tensor]:
        """Decisions and differences on the data; positions by how suspicious they are."""
        with torch.no_grad():
            a, b = self.outputs(x)
        if labels is not None and len(labels) != len(x):
            raise SpecError(
                f"audit: got {len(labels)} labels for {len(x)} inputs; expected one each"
            )
        gap = (b - a).abs().amax(dim=1)
        flips = (
            (a.argmax(1) != b.argmax(1))
            if a.shape[1] > 1
            else torch.zeros_like(gap, dtype=torch.bool)
        )
        right = None if labels is None else labels.cpu().reshape(-1)
        compared = DataComparison(
            len(x),
            float((~flips).double().mean()),
            tuple(flips.nonzero().flatten()[:1000].tolist()),
            None if right is None else float((a.argmax(1) == right).double().mean()),
            None if right is None else float((b.argmax(1) == right).double().mean()),
            float(gap.mean()),
            float(gap.max()),
        )
        score = gap + flips * (float(gap.max()) + 1.0)
        return compared, score.argsort(descending=True)

    def suspect(self, x: Tensor, origin: int, distance: float) -> Suspect:
        """One input (n,)."""
        with torch.no_grad():
            a, b = self.outputs(x[None])
        return _suspect(x, origin, distance, a[0], b[0])

    def attack(self, data: Tensor, order: Tensor, radius: float, seed: int) -> tuple[Suspect, ...]:
        """The most different data points, then inputs near them and near random ones."""
        with torch.no_grad():
            a, b = self.outputs(data[order[:32]])
        found = [
            _suspect(data[i], int(i), 0.0, a[k], b[k]) for k, i in enumerate(order[:32].tolist())
        ]
        if radius > 0:
            generator = torch.Generator().manual_seed(seed)
            random = torch.randperm(len(data), generator=generator)
            starts = torch.cat([order[: _RESTARTS // 2], random[: _RESTARTS // 2]])
            found += self._climb(data, starts, radius)
        found.sort(key=lambda s: (not s.flips, -s.difference))
        return tuple(found[:32])

    def _climb(self, data: Tensor, starts: Tensor, radius: float) -> list[Suspect]:
        """Sign-gradient ascent of the difference (and toward another decision) within balls."""
        center = data[starts]
        low = torch.maximum(center - radius, self.limits[0])
        high = torch.minimum(center + radius, self.limits[1])
        x, best = center.clone(), torch.full((len(center),), -torch.inf, dtype=torch.float64)
        kept = center.clone()
        for step in range(_STEPS):
            if self.deadline.over:
                break
            at = x.clone().requires_grad_()
            a, b = self.outputs(at)
            value = _objective(a, b)
            (slope,) = torch.autograd.grad(value.sum(), at)
            better = value.detach() > best
            best = torch.where(better, value.detach(), best)
            kept[better] = x[better]
            length = radius * max(0.05, 0.5 * (1 - step / _STEPS))
            x = torch.minimum(torch.maximum(x + length * slope.sign(), low), high)
        with torch.no_grad():
            a, b = self.outputs(kept)
        far = (kept - center).abs().amax(dim=1)
        return [
            _suspect(kept[k], int(starts[k]), float(far[k]), a[k], b[k]) for k in range(len(kept))
        ]


def _objective(a: Tensor, b: Tensor) -> Tensor:
    """How far ``b`` prefers another class than ``a`` does, plus a little of any difference."""
    gap = (b - a).abs().amax(dim=1)
    if a.shape[1] < 2:
        return gap
    first = a.argmax(dim=1, keepdim=True)
    rival = b.scatter(1, first, -torch.inf).amax(dim=1)
    decided = a.gather(1, first)[:, 0] - a.scatter(1, first, -torch.inf).amax(dim=1)
    return torch.minimum(rival - b.gather(1, first)[:, 0], decided) + 0.1 * gap


def _suspect(x: Tensor, origin: int, distance: float, a: Tensor, b: Tensor) -> Suspect:
    flips = len(a) > 1 and int(a.argmax()) != int(b.argmax())
    return Suspect(
        x.numpy().copy(), origin, distance, a.numpy().copy(), b.numpy().copy(),
        float((b - a).abs().max()), flips,
    )  # fmt: skip
