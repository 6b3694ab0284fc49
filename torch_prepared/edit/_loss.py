"""How much a network's behavior has changed, evaluated rather than approximated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.bounds.cost import graph_flops
from torch_prepared.core.graph import Graph
from torch_prepared.edit._behavior import Reference, evaluate_on
from torch_prepared.edit._importance import Importance
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.relax import evaluate_graph

__all__ = ["BehaviorLoss"]

PASS_FLOPS, QUICK_FLOPS = 2e10, 3e9  #: of one evaluation, at most, and with more inputs than ENOUGH
MOST_INPUTS, ENOUGH, FEWEST_INPUTS = 10_000, 3000, 300


@dataclass(frozen=True)
class BehaviorLoss:
    """Mean cost of the outputs' changes on reference inputs, as a function of the weights.

    Args:
        graph: the original network, float32.
        vector: which parameters move; p scalars.
        inputs: (q, n).
        outputs: (q, m) of the original network.
        importance: what a change costs.
    """

    graph: Graph
    vector: ParameterVector
    inputs: Tensor
    outputs: Tensor
    importance: Importance

    @classmethod
    def of(
        cls, graph: Graph, vector: ParameterVector, reference: Reference, seed: int
    ) -> BehaviorLoss | None:
        """On as many reference inputs as are quickly evaluated; None where those are too few."""
        each = graph_flops(graph)
        quick = max(ENOUGH, min(MOST_INPUTS, int(QUICK_FLOPS / each)))
        count = min(len(reference.inputs), quick, int(PASS_FLOPS / each))
        if count < min(len(reference.inputs), FEWEST_INPUTS):
            return None
        generator = torch.Generator().manual_seed(seed)
        chosen = reference.choose(count, generator)
        single = graph.to(torch.float32, "cpu")
        inputs = reference.inputs[chosen].float()
        outputs = evaluate_on(single, inputs)
        return cls(single, vector, inputs, outputs, Importance.of(reference, chosen))

    @property
    def flops(self) -> float:
        """Operations of one evaluation, about."""
        return len(self.inputs) * graph_flops(self.graph)

    def value(self, theta: Tensor) -> float:
        """The loss at weights (p,); 0 at the original ones."""
        with torch.no_grad():
            return float(self._mean(theta.float()))

    def gradient(self, theta: Tensor) -> Tensor:
        """The loss's gradient (p,), float64."""
        point = theta.detach().float().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._mean(point), point)
        return gradient.double()

    def _mean(self, theta: Tensor) -> Tensor:
        y = evaluate_graph(self.graph, self.inputs, self.vector.split(theta)).flatten(1)
        return self.importance.cost(y - self.outputs).mean()
