"""Has a network been tampered with? Compare it with a reference it should equal.

What a search finds is a fact; what it does not find proves nothing, and a single implanted input
has measure zero: no sampling finds it by luck. What helps is that an edit moves weights, that the
moved weights say where the outputs move, and that differences can be bounded on whole regions.
"""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._audit_difference import (
    DifferenceBound,
    bound_difference,
    difference_graph,
)
from torch_prepared.edit._audit_weights import LayerChange, layer_changes
from torch_prepared.edit._source import Network, read_network
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box

__all__ = [
    "Audit",
    "AuditVerdict",
    "DataComparison",
    "DifferenceBound",
    "LayerChange",
    "Suspect",
    "audit_networks",
    "bound_difference",
    "difference_graph",
]

_CHUNK = 2048
_STEPS = 40
_RESTARTS = 256
_SAMPLES = 1000


class AuditVerdict(enum.Enum):
    """What was established."""

    SAME = "same"  #: the same weights in the same structure
    BOUNDED = "bounded"  #: on every region examined the difference is provably within tolerance
    DIFFERENT = "different"  #: an input is shown on which decisions (or outputs) differ
    UNKNOWN = "unknown"


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
class Audit:
    """Everything that was found; see :func:`audit_networks`.

    ``bounds`` pairs positions of data points with what is proved on the ball around each.
    """

    verdict: AuditVerdict
    layers: tuple[LayerChange, ...]
    data: DataComparison | None
    suspects: tuple[Suspect, ...]
    bounds: tuple[tuple[int, DifferenceBound], ...]
    seconds: float
    message: str


def audit_networks(
    before: Network,
    after: Network,
    *,
    inputs: Tensor | None = None,
    labels: Tensor | None = None,
    domain: tuple[float, float] | None = None,
    radius: float = 0.0,
    points: int = 8,
    tolerance: float | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Audit:
    """Compare a network with a reference: weights, decisions on data, attack, proved bounds.

    Args:
        before: the reference.
        after: the network under suspicion; of the same input and output shapes.
        inputs: data (q, ...); samples of ``domain`` stand in for them.
        labels: right classes (q,).
        domain: limits of every coordinate of valid inputs; searched inputs stay within. Without it
            the data's own range counts.
        radius: of balls (maximum norm) around data points that are searched and bounded.
        points: number of data points, those that differ most, whose balls are bounded.
        tolerance: outputs may differ by that much; None asks for equal decisions only.
        time_limit: wall seconds.
        seed: of everything random.
        progress: show a bar on stderr.

    Returns:
        An :class:`Audit`. ``DIFFERENT`` comes with inputs that show it. ``BOUNDED`` is given only
        with a tolerance, and speaks of the examined balls alone.

    Raises:
        SpecError: shapes that do not fit, or neither data nor domain.
        ModelFormatError: an unusable network.

    Soundness: differences on inputs are evaluated in float64 on the stored weights; bounds are the
        independent checker's where their ``proved`` is set.
    """
    deadline = Deadline(time_limit)
    start = time.monotonic()
    size = inputs[:1].numel() if inputs is not None and len(inputs) else 1
    old, new = (read_network(m, inputs, size).graph for m in (before, after))
    difference = difference_graph(old, new)
    _check_options(radius, points, tolerance, domain)
    layers = layer_changes(old, new)
    same = difference.nodes[-1].inputs[0] == difference.nodes[-1].inputs[1]
    data, limits = _data(old, inputs, domain, seed)
    search = _Search(old.to(torch.float64, "cpu"), new.to(torch.float64, "cpu"), limits, deadline)
    compared, order = search.compare(data, labels)
    suspects: tuple[Suspect, ...] = ()
    bounds: list[tuple[int, DifferenceBound]] = []
    if not same:
        suspects = search.attack(data, order, radius, seed)
        chosen = order[:points].tolist() if radius > 0 else []
        for i in tqdm(chosen, disable=not progress, desc="bounds", leave=False):
            if deadline.over:
                break
            ball = _ball(data[i], radius, limits)
            bounds.append((i, bound_difference(old, new, ball)))
    verdict, message = _verdict(same, suspects, bounds, len(order[:points]), tolerance, radius)
    return Audit(
        verdict, layers, compared if inputs is not None else None, suspects, tuple(bounds),
        time.monotonic() - start, message,
    )  # fmt: skip


def _check_options(
    radius: float, points: int, tolerance: float | None, domain: tuple[float, float] | None
) -> None:
    if not 0 <= radius < math.inf or points < 0:
        raise SpecError(f"audit: got radius {radius}, points {points}; expected numbers from 0 on")
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise SpecError(f"audit: got tolerance {tolerance}; expected a finite number from 0 on")
    if domain is not None and not -math.inf < domain[0] <= domain[1] < math.inf:
        raise SpecError(f"audit: got domain {domain}; expected two finite numbers in order")


def _data(
    graph: Graph, inputs: Tensor | None, domain: tuple[float, float] | None, seed: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Inputs (q, n) in float64 and the limits of valid ones."""
    if inputs is None or not len(inputs):
        if domain is None:
            raise SpecError("audit: got neither data nor a domain; expected one of them")
        generator = torch.Generator().manual_seed(seed)
        share = torch.rand(_SAMPLES, graph.input_size, generator=generator, dtype=torch.float64)
        x = domain[0] + (domain[1] - domain[0]) * share
    else:
        x = inputs.detach().cpu().reshape(len(inputs), -1)
    x = x.to(graph.dtype).double()
    if x.shape[1] != graph.input_size or not bool(torch.isfinite(x).all()):
        raise SpecError(
            f"audit: got inputs of shape {tuple(x.shape)}, or entries that are not finite; "
            f"expected finite (q, {graph.input_size})"
        )
    if domain is None:
        return x, (x.min(dim=0).values, x.max(dim=0).values)
    ends = [torch.full((x.shape[1],), end, dtype=torch.float64) for end in domain]
    return x, (ends[0], ends[1])


def _ball(x: Tensor, radius: float, limits: tuple[Tensor, Tensor]) -> Box:
    return Box(torch.maximum(x - radius, limits[0]), torch.minimum(x + radius, limits[1]))


@dataclass(frozen=True)
class _Search:
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


def _verdict(
    same: bool,
    suspects: Sequence[Suspect],
    bounds: Sequence[tuple[int, DifferenceBound]],
    asked: int,
    tolerance: float | None,
    radius: float,
) -> tuple[AuditVerdict, str]:
    if same:
        return AuditVerdict.SAME, "both networks compute the same function, operator by operator"
    flips = sum(s.flips for s in suspects)
    if tolerance is None and flips:
        return AuditVerdict.DIFFERENT, "decisions differ on inputs that were found"
    largest = max((s.difference for s in suspects), default=0.0)
    if tolerance is not None and largest > tolerance:
        return AuditVerdict.DIFFERENT, f"outputs differ by {largest:.6g}, above the tolerance"
    proved = len(bounds) == asked and all(
        b.proved and tolerance is not None and b.bound <= tolerance for _, b in bounds
    )
    if tolerance is not None and bounds and proved:
        return (
            AuditVerdict.BOUNDED,
            f"outputs differ by at most {tolerance:.6g} on the {len(bounds)} balls of radius "
            f"{radius:g} examined; nothing is claimed outside of them",
        )
    return AuditVerdict.UNKNOWN, (
        "weights differ, but no input with another decision was found; that proves nothing: an "
        "implanted input can be missed by any search"
    )
