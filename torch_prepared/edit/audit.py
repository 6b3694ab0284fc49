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
from torch_prepared.edit._audit_exact import LargestDifference, largest_difference
from torch_prepared.edit._audit_search import DataComparison, Search, Suspect
from torch_prepared.edit._audit_weights import LayerChange, layer_changes
from torch_prepared.edit._source import Network, read_network
from torch_prepared.errors import SpecError
from torch_prepared.specs import Box

__all__ = [
    "Audit",
    "AuditVerdict",
    "DataComparison",
    "DifferenceBound",
    "LargestDifference",
    "LayerChange",
    "Suspect",
    "audit_networks",
    "bound_difference",
    "difference_graph",
    "largest_difference",
]

_SAMPLES = 1000


class AuditVerdict(enum.Enum):
    """What was established."""

    SAME = "same"  #: the same weights in the same structure
    BOUNDED = "bounded"  #: on every region examined the difference is provably within tolerance
    DIFFERENT = "different"  #: an input is shown on which decisions (or outputs) differ
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Audit:
    """Everything that was found; see :func:`audit_networks`.

    ``bounds`` pairs positions of data points with what is proved on the ball around each,
    ``largest`` with the largest difference there as branch and bound claims it.
    """

    verdict: AuditVerdict
    layers: tuple[LayerChange, ...]
    data: DataComparison | None
    suspects: tuple[Suspect, ...]
    bounds: tuple[tuple[int, DifferenceBound], ...]
    seconds: float
    message: str
    largest: tuple[tuple[int, LargestDifference], ...] = ()


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
    exact: bool = False,
    time_limit: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Audit:
    """Compare a network with a reference: weights, decisions on data, attack, proved bounds.

    Args:
        before: the reference.
        after: the network under suspicion; of the same input and output shapes.
        inputs: data (q, ...); samples of ``domain`` stand in for them. With neither only weights
            are compared: no region of valid inputs can be read off a network.
        labels: right classes (q,).
        domain: limits of every coordinate of valid inputs; searched inputs stay within. Without it
            the data's own range counts.
        radius: of balls (maximum norm) around data points that are searched and bounded.
        points: number of data points, those that differ most, whose balls are bounded.
        tolerance: outputs may differ by that much; None asks for equal decisions only.
        exact: search each of these balls for the largest difference by branch and bound, which
            ends for tiny ReLU networks only; set a time limit.
        time_limit: wall seconds.
        seed: of everything random.
        progress: show a bar on stderr.

    Returns:
        An :class:`Audit`. ``DIFFERENT`` comes with inputs that show it. ``BOUNDED`` is given only
        with a tolerance, and speaks of the examined balls alone.

    Raises:
        SpecError: shapes that do not fit, or a radius with neither data nor domain.
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
    if domain is None and (inputs is None or not len(inputs)):
        if radius > 0:
            raise SpecError(
                f"audit: got radius {radius}, but neither data nor a domain; expected one of them "
                "to put balls in"
            )
        return _weights_only(same, layers, old, start)
    data, limits = _data(old, inputs, domain, seed)
    search = Search(old.to(torch.float64, "cpu"), new.to(torch.float64, "cpu"), limits, deadline)
    compared, order = search.compare(data, labels)
    suspects: tuple[Suspect, ...] = ()
    bounds: list[tuple[int, DifferenceBound]] = []
    largest: list[tuple[int, LargestDifference]] = []
    if not same:
        suspects = search.attack(data, order, radius, seed)
        chosen = order[:points].tolist() if radius > 0 else []
        for i in tqdm(chosen, disable=not progress, desc="bounds", leave=False):
            if deadline.over:
                break
            ball = _ball(data[i], radius, limits)
            bounds.append((i, bound_difference(old, new, ball)))
            if exact:
                share = deadline.limit(1 / (len(chosen) - len(largest)))
                largest.append((i, largest_difference(old, new, ball, time_limit=share)))
                x = largest[-1][1].x
                far = float((x - data[i]).abs().max())
                suspects = (search.suspect(x, i, far), *suspects)
    suspects = tuple(sorted(suspects, key=lambda s: (not s.flips, -s.difference)))
    verdict, message = _verdict(same, suspects, bounds, len(order[:points]), tolerance, radius)
    return Audit(
        verdict, layers, compared if inputs is not None else None, suspects, tuple(bounds),
        time.monotonic() - start, message, tuple(largest),
    )  # fmt: skip


def _weights_only(
    same: bool, layers: tuple[LayerChange, ...], before: Graph, start: float
) -> Audit:
    """What can be said without any input."""
    verdict, message = AuditVerdict.UNKNOWN, "the structures differ"
    if same:
        verdict, message = _verdict(same, (), (), 0, None, 0.0)
    elif layers:
        largest = layers[0]
        message = (
            f"{len(layers)} of {len(before.parameters)} parameters differ, most of all "
            f"{largest.name} (relative {100 * largest.relative:.3g} %)"
        )
    message += "; no data and no domain were given, so only weights were compared"
    if not same:
        message += ": what the change does is not known"
    return Audit(verdict, layers, None, (), (), time.monotonic() - start, message)


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
