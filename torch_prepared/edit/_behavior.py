"""What an edit does to a network's behavior on reference inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from torch_prepared.bounds.cost import graph_flops
from torch_prepared.core.graph import Graph
from torch_prepared.errors import SpecError
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Property

__all__ = ["Drawdown", "Reference", "evaluate_on"]

_CHUNK = 512
BLENDS, ENOUGH = 3, 4000  #: for each input, and inputs that need none
BLEND_FLOPS = 2e10  #: that evaluating all of them may take


@dataclass(frozen=True)
class Drawdown:
    """What was lost on the reference inputs, original against edited network.

    Args:
        agreement: share of inputs with the same largest output (None for a single output).
        accuracy_before: share of right labels, when labels are known.
        accuracy_after: likewise for the edited network.
        distance: mean squared output change, the behavior distance.
        relative: root of ``distance`` over the outputs' standard deviation on the reference.
        largest: largest absolute output change.
        samples: number of reference inputs.
        source: ``"preserve"`` (the user's data), ``"domain"`` or ``"regions"`` (samples).
    """

    agreement: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    distance: float
    relative: float
    largest: float
    samples: int
    source: str

    @property
    def score(self) -> tuple[float, float]:
        """Share of decisions lost, and relative output change."""
        return 0.0 if self.agreement is None else 1.0 - self.agreement, self.relative

    @property
    def total(self) -> float:
        """The sum of both, to compare edits by: less is better.

        Neither alone: outputs need not be scores of decisions, and decisions may survive outputs
        that are a hundred times too large.
        """
        return sum(self.score)


@dataclass(frozen=True)
class Reference:
    """Inputs (q, n) on which the network should stay as it is, with its outputs there (q, m).

    Args:
        inputs: those that were given or sampled, then blends of them if there are any.
        outputs: of the original network.
        labels: the right classes (q,) where they are known; of blends the original's decisions.
        source: see :class:`Drawdown`.
        blends: how many of the last inputs are blends.
        decides: whether it is the order of outputs that counts, rather than their values.
    """

    inputs: Tensor
    outputs: Tensor
    labels: Tensor | None
    source: str
    blends: int = 0
    decides: bool = True

    @classmethod
    def of(
        cls,
        graph: Graph,
        inputs: Tensor | None,
        labels: Tensor | None,
        domain: tuple[Tensor, Tensor] | None,
        properties: Sequence[Property],
        seed: int,
        samples: int = 10_000,
    ) -> Reference:
        """The user's inputs, else samples of the stated domain, else samples of the regions."""
        generator = torch.Generator().manual_seed(seed)
        source = "preserve"
        if inputs is None and domain is not None:
            source = "domain"
            low, high = domain
            share = torch.rand(samples, graph.input_size, generator=generator, dtype=torch.float64)
            inputs = low + (high - low) * share
        elif inputs is None:
            source = "regions"
            each = max(1, samples // len(properties))
            inputs = torch.cat([p.region.sample(each, generator) for p in properties])
        inputs = inputs.reshape(len(inputs), -1).to(graph.dtype)
        if not len(inputs) or inputs.shape[1] != graph.input_size:
            raise SpecError(
                f"reference inputs: got shape {tuple(inputs.shape)}; expected at least one input "
                f"of {graph.input_size} numbers"
            )
        if not bool(torch.isfinite(inputs).all()):
            raise SpecError("reference inputs: got NaN or infinite entries; expected finite ones")
        if labels is not None and len(labels) != len(inputs):
            raise SpecError(
                f"reference labels: got {len(labels)} for {len(inputs)} inputs; expected one each"
            )
        decides = labels is not None or any(_compares_outputs(prop) for prop in properties)
        return cls(inputs, evaluate_on(graph, inputs), labels, source, decides=decides)

    def that_may_stay(self, properties: Sequence[Property]) -> Reference:
        """Without the inputs of a region whose outputs its property forbids: these have to change.

        Everything where nothing else would remain.
        """
        free = torch.ones(len(self.inputs), dtype=torch.bool)
        for prop in properties:
            inside = prop.region.contains(self.inputs, rounding=True)
            free &= ~inside | prop.safe.contains(self.outputs)
        if bool(free.all()) or not bool(free.any()):
            return self
        labels = None if self.labels is None else self.labels[free]
        blends = int(free[len(free) - self.blends :].sum())
        return replace(
            self, inputs=self.inputs[free], outputs=self.outputs[free], labels=labels, blends=blends
        )

    def blended(self, graph: Graph, seed: int) -> Reference:
        """With inputs between pairs of the user's few, where more are quickly evaluated.

        An edit that fits these alone may forget others like them, and nobody needs labels to know
        what the original network says in between. A blend lies between one input and its middle
        with another.

        Source: mixup, Zhang et al., "mixup: Beyond Empirical Risk Minimization" (ICLR 2018).
        """
        given = len(self.inputs)
        most = min(ENOUGH, int(BLEND_FLOPS / graph_flops(graph)))
        count = min(BLENDS * given, most - given)
        if self.source != "preserve" or given < 2 or count <= 0:
            return self
        generator = torch.Generator().manual_seed(seed)
        first, second = torch.randint(given, (2, count), generator=generator)
        share = 0.5 + 0.5 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
        ends = self.inputs.double()
        mixed = (share * ends[first] + (1 - share) * ends[second]).to(self.inputs)
        outputs = evaluate_on(graph, mixed)
        labels = None
        if self.labels is not None:
            labels = torch.cat([self.labels, outputs.argmax(dim=1).to(self.labels)])
        return replace(
            self,
            inputs=torch.cat([self.inputs, mixed]),
            outputs=torch.cat([self.outputs, outputs]),
            labels=labels,
            blends=count,
        )

    def choose(self, count: int, generator: torch.Generator) -> Tensor:
        """Positions of so many inputs; no blends where not even all the others fit."""
        total = len(self.inputs)
        given = total - self.blends
        return torch.randperm(total if count >= given else given, generator=generator)[:count]

    @cached_property
    def spread(self) -> float:
        """Variance of the original outputs on these inputs, summed over outputs; positive."""
        known = self.outputs.double()
        spread = float(known.std(dim=0).square().sum()) if len(known) > 1 else 0.0
        return max(spread, 1e-12 * max(1.0, float(known.square().mean())))

    def drawdown(self, graph: Graph) -> Drawdown:
        """Compare ``graph`` with the original on these inputs."""
        after = evaluate_on(graph, self.inputs)
        change = (after - self.outputs).double()
        distance = float(change.square().sum(dim=1).mean())
        agreement = before = now = None
        if after.shape[1] > 1:
            agreement = float((after.argmax(1) == self.outputs.argmax(1)).double().mean())
            if self.labels is not None:
                before = float((self.outputs.argmax(1) == self.labels).double().mean())
                now = float((after.argmax(1) == self.labels).double().mean())
        return Drawdown(
            agreement=agreement,
            accuracy_before=before,
            accuracy_after=now,
            distance=distance,
            relative=(distance / self.spread) ** 0.5,
            largest=float(change.abs().max()),
            samples=len(after),
            source=self.source,
        )


def _compares_outputs(prop: Property) -> bool:
    """Whether a property speaks of differences of outputs, as those of decisions do."""
    return any(
        bool(((rows > 0).any(dim=1) & (rows < 0).any(dim=1)).any()) for rows, _ in prop.safe.clauses
    )


def evaluate_on(
    graph: Graph, inputs: Tensor, parameters: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Outputs (q, m) on inputs (q, n) of the graph's dtype, on the CPU."""
    with torch.no_grad():
        parts = [
            evaluate_graph(graph, part.to(graph.device), parameters).flatten(1).cpu()
            for part in inputs.split(_CHUNK)
        ]
    return torch.cat(parts)
