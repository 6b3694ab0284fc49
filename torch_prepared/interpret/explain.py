"""``explain_proof``: features, a sufficient few of them, and what they look at, in one call."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._source import Network, read_network
from torch_prepared.errors import SpecError
from torch_prepared.interpret._query import ReductionMode
from torch_prepared.interpret._relaxed import ProofMethod
from torch_prepared.interpret._search import Extractor, FeatureOrder
from torch_prepared.interpret.extract import FeatureSet, extract_sufficient
from torch_prepared.interpret.features import ProofFeatures, proof_features
from torch_prepared.interpret.maps import MapStyle, feature_maps, total_map
from torch_prepared.specs import Box, InputSet, Property

__all__ = ["Choices", "Explanation", "explain_proof", "explain_with", "widen_region"]


@dataclass(frozen=True)
class Choices:
    """How a proof is interpreted.

    Args:
        method: how the network is bounded, see :class:`ProofMethod`.
        extract: how a sufficient set is searched, see :class:`Extractor`.
        mode: what becomes of features that are not kept, see :class:`ReductionMode`.
        order: what features are sorted by, see :class:`FeatureOrder`.
        maps: which derivative is shown, see :class:`MapStyle`.
        domain: for mode ``coarsen``: the inputs over which other features are bounded; None takes
            the region at twice its size.
        seed: of a random order.

    Raises:
        SpecError: an unknown name.
    """

    method: str | ProofMethod = ProofMethod.CROWN
    extract: str | Extractor = Extractor.GREEDY
    mode: str | ReductionMode = ReductionMode.PRUNE
    order: str | FeatureOrder = FeatureOrder.PRIORITY
    maps: str | MapStyle = MapStyle.FROZEN
    domain: InputSet | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ProofMethod.named(self.method)
        Extractor.named(self.extract)
        ReductionMode.named(self.mode)
        FeatureOrder.named(self.order)
        MapStyle.named(self.maps)


@dataclass(frozen=True, eq=False)
class Explanation:
    """One proof, interpreted.

    Args:
        features: all features of the proof.
        selected: the kept ones, with the checker's word on whether they suffice.
        shown: (k,) the features in ``maps``: those kept, or, when nothing is proved, the first by
            priority.
        maps: (k, *input_shape) what each of them looks at.
        total: (*input_shape) their sum weighted by the binding row.
        seconds: wall time by phase.
    """

    features: ProofFeatures
    selected: FeatureSet
    shown: Tensor
    maps: Tensor
    total: Tensor
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, object]:
        """Plain data; the maps, which are large, are left out."""
        features, chosen = self.features, self.selected
        share = features.contributions[features.binding].cpu()
        return {
            "property": features.prop.name,
            "outcome": chosen.outcome.value,
            "statement": chosen.statement,
            "method": features.method.value,
            "mode": chosen.mode.value,
            "extract": chosen.method.value,
            "order": chosen.order.value,
            "layer": features.cut.hidden,
            "features": features.size,
            "features_in_use": chosen.candidates,
            "margin": features.margin,
            "kept": chosen.kept.tolist(),
            "kept_margin": chosen.margin,
            "claimed_margin": chosen.claimed,
            "irreducible": chosen.irreducible,
            "minimum": chosen.minimum,
            "fewest": chosen.fewest,
            "complete": chosen.complete,
            "calls": chosen.calls,
            "clause": features.binding,
            "shown": [
                {
                    "feature": i,
                    "lower": float(features.lower[i]),
                    "upper": float(features.upper[i]),
                    "priority": float(features.priority[i]),
                    "contribution": float(share[i]),
                }
                for i in self.shown.tolist()
            ],
            "seconds": dict(self.seconds),
        }


def explain_proof(
    model: Network,
    prop: Property,
    *,
    method: str | ProofMethod = ProofMethod.CROWN,
    extract: str | Extractor = Extractor.GREEDY,
    mode: str | ReductionMode = ReductionMode.PRUNE,
    order: str | FeatureOrder = FeatureOrder.PRIORITY,
    maps: str | MapStyle = MapStyle.FROZEN,
    domain: InputSet | None = None,
    example_input: Tensor | None = None,
    time_limit: float | None = None,
    seed: int = 0,
) -> Explanation:
    """Interpret the proof that a network satisfies a property.

    Args:
        model: a module, an ONNX network or its path, or a graph. Never changed.
        prop: the property.
        method: how the network is bounded: ``"crown"``, ``"zonotope"`` or ``"ibp"``.
        extract: how a sufficient set is searched: ``"prefix"``, ``"greedy"`` or ``"exact"``.
        mode: ``"prune"``: the reduced proof is about the network with all other features zeroed;
            ``"coarsen"``: about the network itself, knowing less of the other features.
        order: what features are sorted by.
        maps: which derivative is shown: ``"frozen"``, ``"moving"`` or ``"alpha"``.
        domain: for ``"coarsen"``, see :class:`Choices`.
        example_input: (1, ...) an input to trace a module with.
        time_limit: wall seconds for the search and the replay.
        seed: of a random order.

    Returns:
        An :class:`Explanation`, also when the property is not proved: then its outcome says so.

    Raises:
        SpecError: a property that does not fit the network, or an unknown choice.
        ModelFormatError: an unusable network.
        UnsupportedOperationError: an affine network, or an operator the method cannot treat.

    Soundness: ``selected.sufficient`` is the certificate checker's verdict on the reduced proof.

    Example:
        >>> import torch
        >>> from torch_prepared.specs import local_robustness
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = [p.fill_(0.5) for p in net.parameters()]
        ...     _ = net[2].bias.copy_(torch.tensor([1.0, 0.0]))
        >>> prop = local_robustness(torch.tensor([0.5, 0.5]), 0, 0.1, classes=2)
        >>> explain_proof(net, prop).selected.outcome.value
        'sufficient'
    """
    choices = Choices(method, extract, mode, order, maps, domain, seed)
    return explain_with(choices, model, prop, example_input=example_input, time_limit=time_limit)


def explain_with(
    choices: Choices,
    model: Network,
    prop: Property,
    *,
    example_input: Tensor | None = None,
    time_limit: float | None = None,
) -> Explanation:
    """:func:`explain_proof` with its choices in one object."""
    clock = time.monotonic()
    if time_limit is not None and not time_limit > 0:
        raise SpecError(f"time_limit: got {time_limit}; expected seconds above 0 or None")
    deadline = Deadline(time_limit)
    graph = read_network(model, example_input, prop.region.size).graph
    features = proof_features(graph, prop, choices.method)
    seconds = {"bounds": time.monotonic() - clock}
    mode, domain = ReductionMode.named(choices.mode), choices.domain
    if mode is ReductionMode.COARSEN and domain is None:
        domain = widen_region(prop.region, 2.0)
    chosen = extract_sufficient(
        features,
        method=choices.extract,
        mode=mode,
        order=choices.order,
        domain=domain,
        time_limit=deadline.limit(),
        seed=choices.seed,
    )
    seconds["extraction"] = chosen.seconds
    clock = time.monotonic()
    shown = chosen.kept if len(chosen.kept) else _leading(features)
    maps = feature_maps(features, shown, style=choices.maps)
    total = total_map(features, shown, maps)
    seconds["maps"] = time.monotonic() - clock
    return Explanation(features, chosen, shown, maps, total, seconds)


def widen_region(region: InputSet, factor: float) -> Box:
    """The box around a region, ``factor`` >= 1 times as wide about the same center."""
    center, radius = (region.lower + region.upper) / 2, (region.upper - region.lower) / 2
    lower = torch.minimum(center - factor * radius, region.lower)
    upper = torch.maximum(center + factor * radius, region.upper)
    return Box(lower, upper)


def _leading(features: ProofFeatures, count: int = 6) -> Tensor:
    """The first features by priority, to be shown where no set was kept."""
    used = int((features.priority > 0).sum())
    order = features.priority.nan_to_num().argsort(descending=True, stable=True)
    return order[: min(count, used)].cpu()
