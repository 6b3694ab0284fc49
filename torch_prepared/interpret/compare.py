"""Two networks' proofs of one property side by side, such as before and after an edit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import spearmanr
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._source import Network, read_network
from torch_prepared.interpret.explain import Choices, Explanation, explain_with
from torch_prepared.interpret.features import proof_features
from torch_prepared.specs import Box, Property

__all__ = ["MarginChange", "ProofComparison", "compare_proofs"]

_HALVINGS = 8


@dataclass(frozen=True, eq=False)
class MarginChange:
    """Where the margin of one clause came from: ``after - before = constant + sum(features)``.

    Args:
        clause: the clause, binding after.
        before: margin bound before.
        after: margin bound after.
        constant: change of the row's constant, the last layers' biases.
        features: (n,) change of every feature's contribution.
    """

    clause: int
    before: float
    after: float
    constant: float
    features: Tensor


@dataclass(frozen=True, eq=False)
class ProofComparison:
    """What distinguishes two proofs.

    Args:
        before: the first network's explanation.
        after: the second's.
        fraction: (before, after) share of the region's radius about its center on which each is
            proved; 1 is all of it, NaN where the region is no box.
        shared: explanations of both on the largest of these smaller regions on which both are
            proved; None when there is none, or when it is the region itself.
        jaccard: common features over all features of the two kept sets, on the region where both
            are proved; NaN when the networks' features do not correspond or nothing is proved.
        rank_correlation: Spearman's, of the priorities; NaN likewise.
        map_cosine: cosine between the total maps.
        change: where the margin came from; None when features do not correspond, or the proofs use
            different rows of a disjunction.
    """

    before: Explanation
    after: Explanation
    fraction: tuple[float, float]
    shared: tuple[Explanation, Explanation] | None
    jaccard: float
    rank_correlation: float
    map_cosine: float
    change: MarginChange | None

    def to_json(self) -> dict[str, object]:
        """Plain data."""
        leading = [] if self.change is None else _largest(self.change.features)
        change = self.change
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "proved_fraction": {"before": self.fraction[0], "after": self.fraction[1]},
            "jaccard": self.jaccard,
            "rank_correlation": self.rank_correlation,
            "map_cosine": self.map_cosine,
            "shared_kept": None
            if self.shared is None
            else [e.selected.kept.tolist() for e in self.shared],
            "margin_change": None
            if change is None
            else {
                "clause": change.clause,
                "before": change.before,
                "after": change.after,
                "constant": change.constant,
                "features": float(change.features.sum()),
                "largest": [{"feature": i, "change": float(change.features[i])} for i in leading],
            },
        }


def compare_proofs(
    before: Network,
    after: Network,
    prop: Property,
    choices: Choices | None = None,
    *,
    example_input: Tensor | None = None,
    time_limit: float | None = None,
) -> ProofComparison:
    """Interpret two networks' proofs of one property and compare them.

    Features correspond when both networks have the same hidden layer by name and size, as an
    edited network and its original do. A network that violates the property has no proof; what
    can be said of it is said on the part of the region where it is proved, and by the change of
    every feature's contribution to the margin on the whole region.

    Args:
        before: the first network.
        after: the second.
        prop: the property.
        choices: how both are interpreted.
        example_input: (1, ...) an input to trace modules with.
        time_limit: wall seconds for everything.

    Raises:
        PreparedError: as :func:`explain_proof` does.
    """
    how = choices or Choices()
    deadline = Deadline(time_limit)
    size = prop.region.size
    graphs = [read_network(m, example_input, size).graph for m in (before, after)]

    def share(parts: float) -> float | None:
        return deadline.limit(1 / parts)

    whole = [explain_with(how, g, prop, time_limit=share(4 - i)) for i, g in enumerate(graphs)]
    fractions = [_proved_fraction(prop, how, e, deadline) for e in whole]
    shared, both = None, all(e.selected.sufficient for e in whole)
    least = min(fractions)
    if not both and 0 < least < 1:
        small = _scaled(prop, least)
        pair = [explain_with(how, g, small, time_limit=share(2 - i)) for i, g in enumerate(graphs)]
        if all(e.selected.sufficient for e in pair):
            shared = (pair[0], pair[1])
    first, second = whole[0], whole[1]
    kept = (first, second) if both else shared
    alike = _correspond(first, second)
    return ProofComparison(
        before=first,
        after=second,
        fraction=(fractions[0], fractions[1]),
        shared=shared,
        jaccard=_jaccard(kept) if alike and kept is not None else math.nan,
        rank_correlation=_rank_correlation(first, second) if alike else math.nan,
        map_cosine=_cosine(first.total, second.total),
        change=_margin_change(first, second) if alike else None,
    )


def _proved_fraction(prop: Property, how: Choices, whole: Explanation, deadline: Deadline) -> float:
    """Largest share of the radius on which the bounds prove the property, by bisection."""
    if whole.features.proved:
        return 1.0
    if not isinstance(prop.region, Box):
        return math.nan
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        if deadline.over:
            break
        middle = (low + high) / 2
        proved = proof_features(whole.features.cut.graph, _scaled(prop, middle), how.method).proved
        low, high = (middle, high) if proved else (low, middle)
    return low


def _scaled(prop: Property, fraction: float) -> Property:
    """The same property on a part of the region about its center."""
    region = prop.region
    center, radius = (region.lower + region.upper) / 2, (region.upper - region.lower) / 2
    lower = torch.maximum(center - fraction * radius, region.lower)
    upper = torch.minimum(center + fraction * radius, region.upper)
    return Property(Box(lower, upper), prop.safe, f"{prop.name}, {fraction:.4g} of the radius")


def _jaccard(pair: tuple[Explanation, Explanation]) -> float:
    first, second = (set(e.selected.kept.tolist()) for e in pair)
    return len(first & second) / len(first | second) if first | second else 1.0


def _correspond(first: Explanation, second: Explanation) -> bool:
    """Whether both networks have the same hidden layer by name and size."""
    a, b = first.features, second.features
    return (a.cut.hidden, a.size) == (b.cut.hidden, b.size)


def _rank_correlation(first: Explanation, second: Explanation) -> float:
    """Spearman's correlation of the priorities; NaN where it is not defined."""
    a, b = (e.features.priority.cpu() for e in (first, second))
    if len(a) < 2 or not (float(a.std()) > 0 and float(b.std()) > 0):
        return math.nan
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def _cosine(first: Tensor, second: Tensor) -> float:
    a, b = first.flatten(), second.flatten()
    if a.shape != b.shape or not float(a.norm() * b.norm()) > 0:
        return math.nan
    return float(a @ b / (a.norm() * b.norm()))


def _margin_change(first: Explanation, second: Explanation) -> MarginChange | None:
    before, after = first.features, second.features
    k = after.binding
    if before.chosen[k] != after.chosen[k]:
        return None  # the proofs use other rows of a disjunction
    return MarginChange(
        clause=k,
        before=float(before.row_margins[k]),
        after=float(after.row_margins[k]),
        constant=float(after.offset[k] - before.offset[k]),
        features=(after.contributions[k] - before.contributions[k]).cpu(),
    )


def _largest(change: Tensor, count: int = 10) -> list[int]:
    return change.abs().argsort(descending=True, stable=True)[:count].tolist()
