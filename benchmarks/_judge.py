"""Judges an edited network in its own process: what it lost, and whether an attack breaks it.

``python -m benchmarks._judge CASE.json`` prints one JSON object. Nothing the editor said is used:
both networks and the properties are read from their files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxSession, load_onnx
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Property, load_vnnlib

__all__ = ["Attack", "Drawdown", "PropertyAttack", "attack_network", "compare_networks"]

CHUNK = 4096
RANDOM_POINTS = 2000
RESTARTS = 32
STEPS = 30
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Drawdown:
    """What an edit lost on inputs outside the edited regions.

    Args:
        kind: what is compared: ``accuracy``, ``decision`` (largest output), ``ranking`` (largest
            and smallest output) or ``relative``.
        percent: the headline: accuracy points lost, percent of inputs whose largest output (for
            ``ranking``: largest or smallest, whichever suffers more) changes, or percent of
            relative output change.
        before: accuracy in percent of the original network, when labels are known.
        after: likewise of the edited network.
        agreement_argmax: share of inputs with the same largest output.
        agreement_argmin: share of inputs with the same smallest output.
        relative: root mean square output change over the outputs' deviation from their mean.
        samples: inputs compared.
        outside: whether inputs of the edited regions were left out.
        demanded: the least ``relative`` change, in percent, of any network with the properties on
            samples of the region where that is most.
    """

    kind: str
    percent: float
    before: float | None
    after: float | None
    agreement_argmax: float | None
    agreement_argmin: float | None
    relative: float
    samples: int
    outside: bool
    demanded: float


@dataclass(frozen=True)
class PropertyAttack:
    """Smallest safety margin of one property, and whether it violates beyond float32 rounding."""

    name: str
    violated: bool
    margin: float


@dataclass(frozen=True)
class Attack:
    """Worst point that was found; a violation must exceed float32 rounding.

    ``points`` were evaluated by onnxruntime. ``margin`` is the smallest safety margin there,
    ``properties`` are the single ones, in the order of the files.
    """

    violated: bool
    margin: float
    points: int
    engine_difference: float
    properties: tuple[PropertyAttack, ...]


def compare_networks(
    before: Graph,
    after: Graph,
    properties: Sequence[Property],
    inputs: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    kind: str,
) -> Drawdown:
    """Evaluate both networks on inputs (q, n)."""
    points = torch.from_numpy(inputs)
    outside = torch.ones(len(points), dtype=torch.bool)
    for prop in properties:
        outside &= ~prop.region.contains(points, rounding=True)
    enough = 100 * int(outside.sum()) >= len(points)
    if enough:
        points = points[outside]
        labels = None if labels is None else labels[outside.numpy()]
    old, new = _outputs(before, points).double(), _outputs(after, points).double()
    spread = float((old - old.mean(dim=0)).norm())
    scale = max(spread, 1e-12 * max(1.0, float(old.norm())))
    relative = float((new - old).norm()) / scale
    several = old.shape[1] > 1
    highest = float((old.argmax(1) == new.argmax(1)).double().mean()) if several else None
    lowest = float((old.argmin(1) == new.argmin(1)).double().mean()) if several else None
    was = now = None
    if labels is not None:
        truth = torch.from_numpy(labels)
        was, now = (100 * float((y.argmax(1) == truth).double().mean()) for y in (old, new))
    if kind == "accuracy" and was is not None and now is not None:
        percent = was - now
    elif kind == "relative" or highest is None or lowest is None:
        percent = 100 * relative
    else:
        percent = 100 * (1 - (min(lowest, highest) if kind == "ranking" else highest))
    deviation = scale / max(len(points), 1) ** 0.5
    demanded = 100 * max((_demanded(before, prop) for prop in properties), default=0.0) / deviation
    return Drawdown(
        kind, percent, was, now, highest, lowest, relative, len(points), enough, demanded
    )


def _demanded(graph: Graph, prop: Property) -> float:
    """Root mean square of a lower bound on how far outputs on a region are from the safe set."""
    points = prop.region.sample(RANDOM_POINTS, torch.Generator().manual_seed(0))
    y = _outputs(graph, points.to(graph.dtype)).double()
    away = torch.stack(
        [
            (-(y @ rows.T + offset) / rows.norm(dim=1)).amin(dim=1).clamp_min(0.0)
            for rows, offset in prop.safe.clauses
        ]
    )
    return float(away.amax(dim=0).square().mean().sqrt())


def attack_network(
    session: OnnxSession,
    graph: Graph,
    properties: Sequence[Property],
    counterexamples: NDArray[np.float32],
    seed: int,
) -> Attack:
    """Look for violations: known counterexamples, samples, corners and projected gradients.

    Points are found with the imported graph and judged by onnxruntime.
    """
    generator = torch.Generator().manual_seed(seed)
    singles, count, difference = [], 0, 0.0
    for prop in properties:
        start = prop.region.sample(RANDOM_POINTS, generator)
        corners = prop.region.corner(
            torch.randn(RANDOM_POINTS // 4, prop.region.size, generator=generator).double()
        )
        known = torch.from_numpy(counterexamples).double().reshape(-1, prop.region.size)
        points = _clip(torch.cat([known, start, corners]), prop)
        scored = prop.safe.margin(_outputs(graph, points))
        first = points[scored.argsort()[:RESTARTS]]
        found = torch.cat([_clip(known.double(), prop), first, _descend(graph, prop, first)])
        y = torch.from_numpy(session(found.numpy())).double()
        margins = prop.safe.margin(y)
        slack = TOLERANCE * (1 + y.abs().amax(dim=1))
        violated = bool((~(margins >= -slack)).any())
        singles.append(PropertyAttack(prop.name, violated, float(margins.min())))
        count += len(found)
        gap = (y - _outputs(graph, found).double()).abs() / (1 + y.abs())
        difference = max(difference, float(gap.max()))
    worst = min([float("inf"), *(single.margin for single in singles)])
    violated = any(single.violated for single in singles)
    return Attack(violated, worst, count, difference, tuple(singles))


def _descend(graph: Graph, prop: Property, points: Tensor) -> Tensor:
    """Projected sign gradients on the margin, with a shrinking step."""
    width = (prop.region.upper - prop.region.lower).float()
    best, lowest = points.clone(), torch.full((len(points),), torch.inf)
    for step in range(STEPS + 1):
        x = points.clone().requires_grad_(step < STEPS)
        margin = prop.safe.margin(evaluate_graph(graph, x).flatten(1))
        better = margin.detach() < lowest
        best[better], lowest[better] = points[better], margin.detach()[better]
        if step == STEPS:
            break
        (gradient,) = torch.autograd.grad(margin.sum(), x)
        points = _clip((points - 0.25 * 0.9**step * width * gradient.sign()).double(), prop)
    return best


def _clip(points: Tensor, prop: Property) -> Tensor:
    """Nearest float32 points that are inside the region's box, where float32 has one."""
    lower, upper = prop.region.lower, prop.region.upper
    single = points.clamp(lower, upper).float()
    up = torch.nextafter(single, torch.full_like(single, torch.inf))
    single = torch.where(single.double() < lower, up, single)
    down = torch.nextafter(single, torch.full_like(single, -torch.inf))
    return torch.where(single.double() > upper, down, single)


def _outputs(graph: Graph, points: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [evaluate_graph(graph, p).flatten(1) for p in torch.split(points, CHUNK)]
    return torch.cat(parts)


def judge(task: dict[str, object]) -> dict[str, object]:
    """Everything about one edited file; ``task`` names the files."""
    torch.set_num_threads(int(str(task["threads"])))
    properties, keep = (_load(task, role) for role in ("properties", "keep"))
    before = load_onnx(str(task["original"])).graph
    edited = load_onnx(str(task["edited"]))
    with np.load(str(task["evaluate"]), allow_pickle=False) as stored:
        inputs, labels = stored["inputs"], stored["labels"] if "labels" in stored else None
    with np.load(str(task["counterexamples"]), allow_pickle=False) as stored:
        known = stored["inputs"]
    drawdown = compare_networks(before, edited.graph, properties, inputs, labels, str(task["kind"]))
    session = OnnxSession(edited, threads=int(str(task["threads"])))
    every = [*properties, *keep]
    attack = attack_network(session, edited.graph, every, known, int(str(task["seed"])))
    return {"drawdown": asdict(drawdown), "attack": asdict(attack)}


def _load(task: dict[str, object], role: str) -> list[Property]:
    files = task.get(role) or []
    return [p for name in files for p in load_vnnlib(str(name))]  # type: ignore[attr-defined]


if __name__ == "__main__":
    print(json.dumps(judge(json.loads(Path(sys.argv[1]).read_text()))))
