"""Intervals of confidences that hold for every input of a region."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from torch_prepared.bounds import Method, compute_bounds
from torch_prepared.calibrate._replay import MarginReplay
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.edit._source import Network, read_network
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import InputSet, local_robustness

__all__ = [
    "ConfidenceInterval",
    "bound_margins",
    "certify_confidence",
    "confidence_bounds",
    "margin_rows",
]

Clip = tuple[float | Tensor, float | Tensor]
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class ConfidenceInterval:
    """Confidences of N predictions, over a region around each input.

    Args:
        lower: (N,) confidence of the predicted class from below; 0 where nothing is known.
        upper: (N,) from above; 1 where nothing is known.
        certified: (N,) bool: the predicted class is the largest for every input of the region.
        prediction: (N,) int64 predicted class at the input itself.
        confidence: (N,) confidence there, NaN where not asked for.
        failure: probability that one sample's statement is wrong; 0 for bounds that always hold.
        checked: whether all rounding is accounted for (the certificate checker's arithmetic, or a
            statistical statement about a network as it is run); otherwise the statement holds for
            bounds evaluated in exact arithmetic.
        margins: bounds (N, K) of ``f_k - f_j`` for the predicted class k that the interval was made
            from; None for smoothed classifiers.
        complete: False when time was over before all samples were bounded; the others are then
            trivial, so every statement still holds.
    """

    lower: Tensor
    upper: Tensor
    certified: Tensor
    prediction: Tensor
    confidence: Tensor
    failure: float = 0.0
    checked: bool = False
    complete: bool = True
    margins: Interval | None = None

    def __len__(self) -> int:
        return len(self.lower)

    def correct(self, labels: Tensor) -> Tensor:
        """(N,) bool: predictions equal to ``labels`` (N,).

        Raises:
            SpecError: another number of labels.
        """
        if labels.shape != self.prediction.shape:
            raise SpecError(
                f"labels: got shape {tuple(labels.shape)}; expected ({len(self)},), one for each "
                "sample"
            )
        return self.prediction == labels.to(self.prediction)


def confidence_bounds(
    margin_lower: Tensor, margin_upper: Tensor, prediction: Tensor
) -> ConfidenceInterval:
    r"""Softmax confidence of the predicted class from bounds of its margins.

    With :math:`m_j = f_k - f_j` for the predicted class k,
    :math:`p_k = 1 / (1 + \sum_{j \ne k} e^{-m_j})`, which grows with every margin; so the ends of
    the margins give the ends of the confidence, and ``m_j > 0`` for all j keeps the prediction.

    Args:
        margin_lower: (N, K) bounds of ``f_k - f_j``; the own class's column is ignored.
        margin_upper: (N, K); may be infinite, as may ``margin_lower``.
        prediction: (N,) integers k.

    Returns:
        Intervals in the margins' dtype, differentiable in them. A sample with NaN gets [0, 1] and
        is not certified. ``confidence`` is NaN.

    Raises:
        SpecError: shapes that do not fit, lower > upper, or classes outside of 0 to K - 1.

    Soundness:
        A relative slack above the a-priori error of log-sum-exp and sigmoid is taken off below
        and added above.
    """
    _check_margins(margin_lower, margin_upper, prediction)
    count, classes = margin_lower.shape
    own = torch.zeros(count, classes, dtype=torch.bool, device=margin_lower.device)
    own[torch.arange(count, device=own.device), prediction.long()] = True
    broken = (torch.isnan(margin_lower) | torch.isnan(margin_upper)) & ~own
    bad = broken.any(dim=1)
    low = torch.where(own | broken, torch.inf, margin_lower)
    high = torch.where(own | broken, torch.inf, margin_upper)
    lower = _sigmoid_of_margins(low, classes, -1.0).masked_fill(bad, 0.0)
    upper = _sigmoid_of_margins(high, classes, 1.0).masked_fill(bad, 1.0)
    certified = (low > 0).all(dim=1) & ~bad
    missing = torch.full_like(lower.detach(), torch.nan)
    margins = Interval(margin_lower, margin_upper)
    return ConfidenceInterval(lower, upper, certified, prediction.long(), missing, margins=margins)


def certify_confidence(
    model: Network,
    x: Tensor,
    eps: float | Tensor,
    *,
    p: float = math.inf,
    clip: Clip | None = None,
    method: str | Method = Method.CROWN,
    temperature: float = 1.0,
    checked: bool = True,
    time_limit: float | None = None,
    progress: bool = False,
) -> ConfidenceInterval:
    r"""Bound the confidence of every prediction over :math:`\|x' - x\|_p \le` eps.

    Args:
        model: a module, an ONNX network or its path, or a graph; its outputs are logits (at least
            two). Judged in evaluation mode with its weights as stored; never mutated.
        x: (N, ...) inputs.
        eps: radius in the unit of x; for p = inf also one per scalar of an input.
        p: 1, 2 or inf.
        clip: limits of valid inputs, see ``specs.local_robustness``.
        method: of the bounds, see ``bounds.Method``.
        temperature: the logits are divided by it, > 0.
        checked: bound again, in the independent checker's arithmetic with its own account of
            rounding, the samples whose prediction the fast bounds keep. Costs about 25 times as
            much as the bounds.
        time_limit: wall seconds; samples not bounded by then get [0, 1] and are not certified.
        progress: show a bar on stderr.

    Returns:
        A :class:`ConfidenceInterval` with float64 tensors on the CPU.

    Raises:
        SpecError: inputs that do not fit the network, NaN, a single output, bad options.
        ModelFormatError: an unusable network.
        UnsupportedOperationError: an operator without a sound treatment.

    Soundness:
        With ``checked`` for the network in exact arithmetic on its stored weights, the checker's
        and the softmax's rounding accounted for. Otherwise for bounds in exact arithmetic; they
        are evaluated in float64.
    """
    if not isinstance(x, Tensor) or x.dim() < 2 or not len(x) or not x.is_floating_point():
        raise SpecError("inputs: expected a floating tensor (N, ...) with N >= 1")
    if not (math.isfinite(temperature) and temperature > 0):
        raise SpecError(f"temperature: got {temperature}; expected a finite number > 0")
    deadline = Deadline(time_limit)
    graph = read_network(model, x[:1], x[:1].numel()).graph
    if x[:1].numel() != graph.input_size or graph.output_size < 2:
        raise SpecError(
            f"network: got inputs of {x[:1].numel()} scalars for a network from "
            f"{graph.input_size} to {graph.output_size}; expected equal sizes and two or more "
            "outputs, its logits"
        )
    exact = graph.to(torch.float64, "cpu")
    points = x.detach().to("cpu", torch.float64)
    logits = _logits(exact, points)
    prediction = logits.argmax(dim=1)
    regions = [local_robustness(one, 0, eps, graph.output_size, p, clip).region for one in points]
    found = bound_margins(
        exact, regions, prediction, method=method, deadline=deadline, progress=progress
    )
    if checked:
        found = _replay_margins(graph, regions, prediction, found, method, deadline, progress)
    interval = confidence_bounds(found.lower / temperature, found.upper / temperature, prediction)
    keep = torch.softmax(logits / temperature, dim=1).amax(dim=1)
    return ConfidenceInterval(
        interval.lower,
        interval.upper,
        interval.certified,
        prediction,
        keep,
        checked=checked,
        complete=not bool(torch.isneginf(found.lower).all(dim=1).any()),
        margins=found,
    )


def margin_rows(prediction: Tensor, classes: int) -> Tensor:
    """Rows (N, K, K) with ``rows[n, j] . y = y[k] - y[j]`` for the predicted class k; float64."""
    unit = torch.eye(classes, dtype=torch.float64)
    rows: Tensor = unit[prediction.cpu()][:, None, :] - unit
    return rows


def bound_margins(
    graph: Graph,
    regions: Sequence[InputSet],
    prediction: Tensor,
    *,
    method: str | Method = Method.CROWN,
    parameters: Mapping[str, Tensor] | None = None,
    deadline: Deadline | None = None,
    progress: bool = False,
) -> Interval:
    """Bounds (N, K) of ``f_k - f_j`` for the predicted class k over each region.

    Args:
        graph: the network; its dtype is computed in.
        regions: N input sets.
        prediction: (N,) integers.
        method: see ``bounds.Method``.
        parameters: tensors that replace the graph's own; the result is differentiable in them.
        deadline: samples not bounded by then get ``[-inf, inf]``.
        progress: show a bar on stderr.
    """
    parts = []
    with torch.set_grad_enabled(torch.is_grad_enabled() and parameters is not None):
        for part in _chunks(len(regions), _CHUNK, "bounds", progress):
            chosen = prediction[part]
            if deadline is not None and deadline.over:
                infinite = torch.full((len(chosen), graph.output_size), torch.inf)
                parts.append(Interval(-infinite.to(graph.dtype), infinite.to(graph.dtype)))
                continue
            rows = margin_rows(chosen, graph.output_size)
            parts.append(
                compute_bounds(graph, regions[part], rows, method=method, parameters=parameters)
            )
    lower, upper = torch.cat([b.lower for b in parts]), torch.cat([b.upper for b in parts])
    # The ends come from two sums; over a single point rounding may exchange them.
    return Interval(torch.minimum(lower, upper), torch.maximum(lower, upper))


def _replay_margins(
    graph: Graph,
    regions: Sequence[InputSet],
    prediction: Tensor,
    found: Interval,
    method: str | Method,
    deadline: Deadline,
    progress: bool,
) -> Interval:
    """Replace the bounds by the checker's where they keep the prediction, by nothing elsewhere."""
    promising = confidence_bounds(found.lower, found.upper, prediction).certified
    tried = ~torch.isneginf(found.lower).all(dim=1)
    lower = torch.full_like(found.lower, -torch.inf)
    lower[tried] = torch.nan
    upper = -lower
    replay = MarginReplay(graph, tighten=Method.named(method) is Method.CROWN)
    chosen, classes = promising.nonzero()[:, 0].tolist(), graph.output_size
    for i in tqdm(chosen, desc="check", unit="sample", disable=not progress, leave=False):
        if deadline.over:
            lower[i], upper[i] = -torch.inf, torch.inf
            continue
        lower[i], upper[i] = replay(regions[i], margin_rows(prediction[i : i + 1], classes)[0])
    return Interval(lower, upper)


def _logits(graph: Graph, points: Tensor) -> Tensor:
    """Outputs (N, K) in the graph's dtype.

    Raises:
        SpecError: an output that is not finite.
    """
    with torch.no_grad():
        parts = [evaluate_graph(graph, part).flatten(1) for part in points.split(256)]
    logits = torch.cat(parts)
    if not bool(torch.isfinite(logits).all()):
        raise SpecError("network: got NaN or infinite outputs; expected finite logits")
    return logits


def _chunks(count: int, size: int, what: str, progress: bool) -> Iterator[slice]:
    starts = range(0, count, size)
    for first in tqdm(starts, desc=what, unit="batch", disable=not progress, leave=False):
        yield slice(first, min(first + size, count))


def _sigmoid_of_margins(margins: Tensor, classes: int, side: float) -> Tensor:
    """``1 / (1 + sum exp(-margins))`` rounded down (side -1) or up (+1); +inf margins add 0."""
    terms = torch.cat([torch.zeros_like(margins[:, :1]), -margins], dim=1)
    total = torch.logsumexp(terms, dim=1)
    value = torch.exp(-total)
    error = 16 * torch.finfo(margins.dtype).eps * (classes + 16 + total.detach().abs())
    rounded = torch.where(torch.isinf(total), value, value * (1 + side * error))
    tiny = torch.finfo(margins.dtype).tiny if side > 0 else 0.0
    return (rounded + tiny).clamp(0.0, 1.0)


def _check_margins(lower: Tensor, upper: Tensor, prediction: Tensor) -> None:
    if lower.dim() != 2 or lower.shape != upper.shape or prediction.shape != lower.shape[:1]:
        raise SpecError(
            f"margins: got lower {tuple(lower.shape)}, upper {tuple(upper.shape)}, prediction "
            f"{tuple(prediction.shape)}; expected (N, K), (N, K), (N,)"
        )
    classes = lower.shape[1]
    if not bool(((prediction >= 0) & (prediction < classes)).all()):
        raise SpecError(f"prediction: expected classes 0 to {classes - 1}; got others")
    own = torch.nn.functional.one_hot(prediction.long(), classes).bool()
    if bool(((lower > upper) & ~own).any()):
        raise SpecError("margins: got lower > upper; expected bounds in order")
