"""What both trained baselines share: parameters, the distillation loss, rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from torch_prepared.core.graph import Graph
from torch_prepared.edit._base import Candidate, EditProblem
from torch_prepared.relax import evaluate_graph

__all__ = ["Student"]

BATCH = 128


@dataclass
class Student:
    """Float32 copies of all editable parameters in training, and the network to stay close to.

    Args:
        problem: network, properties and reference inputs.
        graph: the network in float32 on its device.
        parameters: leaves by name.
        optimizer: Adam on the leaves.
        generator: of the reference batches.
        spread: mean squared deviation of the original outputs from their mean, the loss's unit.
    """

    problem: EditProblem
    graph: Graph
    parameters: dict[str, Tensor]
    optimizer: torch.optim.Adam
    generator: torch.Generator
    spread: float

    @classmethod
    def of(cls, problem: EditProblem, learning_rate: float) -> Self:
        """A student equal to the original; the rate is relative to the weights' typical size."""
        graph = problem.graph.to(torch.float32)
        parameters = {
            name: graph.parameters[name].detach().clone().requires_grad_()
            for name in sorted(graph.editable)
        }
        groups = [
            {
                "params": [p],
                "lr": learning_rate * max(float(p.detach().square().mean().sqrt()), 1e-3),
            }
            for p in parameters.values()
        ]
        outputs = problem.reference.outputs.double()
        spread = float((outputs - outputs.mean(dim=0)).square().sum(dim=1).mean())
        generator = torch.Generator().manual_seed(problem.options.seed)
        return cls(
            problem, graph, parameters, torch.optim.Adam(groups), generator, max(spread, 1e-12)
        )

    def distillation(self) -> Tensor:
        """Mean squared output change on a batch of reference inputs, over ``spread``."""
        reference = self.problem.reference
        pick = torch.randint(len(reference.inputs), (BATCH,), generator=self.generator)
        inputs = reference.inputs[pick].to(self.graph.device, torch.float32)
        target = reference.outputs[pick].to(self.graph.device, torch.float32)
        change = self(inputs) - target
        return change.square().sum(dim=1).mean() / self.spread

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (b, m)."""
        return evaluate_graph(self.graph, x, self.parameters).flatten(1)

    def step(self, loss: Tensor) -> bool:
        """One optimizer step; False, and no step, when the loss or a gradient is not finite."""
        self.optimizer.zero_grad()
        leaves = list(self.parameters.values())
        for leaf, slope in zip(
            leaves, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True
        ):
            leaf.grad = slope
        norm = torch.nn.utils.clip_grad_norm_(leaves, 1e3)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            return False
        self.optimizer.step()
        return True

    def candidate(self, note: str) -> Candidate:
        """A copy of the present weights, rounded to how they are stored."""
        copies = {name: leaf.detach().clone() for name, leaf in self.parameters.items()}
        return Candidate(self.problem.store(copies), note=note)
