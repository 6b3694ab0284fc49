"""What both trained baselines share: parameters, distillation, learning rate, verification."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.edit._base import Candidate, EditProblem
from torch_prepared.edit._certify import LOW_DIMENSION
from torch_prepared.edit._standing import Prover, attack_quickly
from torch_prepared.relax import evaluate_graph

__all__ = ["MOST_STEPS", "RESERVE", "Student", "Verdict"]

BATCH = 128
LEARNING_RATE = 1e-3
LAST_RATE = 0.05
MOST_STEPS = 50_000
RESERVE = 0.1
PROOF_SHARE = 0.3
ATTACK_SECONDS = 1.0


@dataclass(frozen=True)
class Verdict:
    """What verification of the present weights says.

    Args:
        candidate: the weights with their proofs, believed proved; else None.
        points: inputs (b, n) of low margin that the attack met, one per property.
        attacked: whether one of them violates.
    """

    candidate: Candidate | None
    points: Tensor
    attacked: bool


@dataclass
class Student:
    """Float32 copies of all editable parameters in training, and the network to stay close to.

    Args:
        problem: network, properties and reference inputs.
        graph: the network in float32 on its device.
        parameters: leaves by name.
        optimizer: Adam on the leaves.
        rates: first learning rate of every leaf.
        generator: of the reference batches.
        spread: mean squared deviation of the original outputs from their mean, the loss's unit.
        deadline: of training and its proofs.
        prover: keeps split trees from one proof to the next.
    """

    problem: EditProblem
    graph: Graph
    parameters: dict[str, Tensor]
    optimizer: torch.optim.Adam
    rates: list[float]
    generator: torch.Generator
    spread: float
    deadline: Deadline
    prover: Prover
    steps: int = 0
    tries: int = field(default=0)

    @classmethod
    def of(cls, problem: EditProblem, deadline: Deadline) -> Self:
        """A student equal to the original; rates are relative to each tensor's typical size."""
        graph = problem.graph.to(torch.float32)
        parameters = {
            name: graph.parameters[name].detach().clone().requires_grad_()
            for name in sorted(graph.editable)
        }
        rates = [
            LEARNING_RATE * max(float(p.detach().square().mean().sqrt()), 1e-3)
            for p in parameters.values()
        ]
        groups = [{"params": [p], "lr": r} for p, r in zip(parameters.values(), rates, strict=True)]
        outputs = problem.reference.outputs.double()
        spread = float((outputs - outputs.mean(dim=0)).square().sum(dim=1).mean())
        return cls(
            problem,
            graph,
            parameters,
            torch.optim.Adam(groups),
            rates,
            torch.Generator().manual_seed(problem.options.seed),
            max(spread, 1e-12),
            deadline,
            Prover(problem.properties),
        )

    @property
    def low_dimensional(self) -> bool:
        """Whether every region is worth splitting."""
        regions = self.problem.batch.regions
        return int((regions.upper > regions.lower).sum(dim=1).max()) <= LOW_DIMENSION

    @property
    def progress(self) -> float:
        """Share of the training that is over, from 0 to 1."""
        share = self.steps / MOST_STEPS
        if self.deadline.seconds is not None:
            limit = (1 - RESERVE) * self.deadline.seconds
            share = max(share, self.deadline.elapsed / limit)
        return min(share, 1.0)

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
        """One optimizer step; False, and no step, when the loss or a gradient is not finite.

        Rates fall along half a cosine from their first to a twentieth at the end of training.
        """
        fall = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * self.progress))))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (LAST_RATE + (1 - LAST_RATE) * fall)
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
        self.steps += 1
        return True

    def verify(self, note: str) -> Verdict:
        """Attack the weights as they would be stored, then prove, splitting where that helps."""
        self.tries += 1
        problem = self.problem
        copies = {name: leaf.detach().clone() for name, leaf in self.parameters.items()}
        stored = problem.store(copies)
        graph = problem.graph.with_parameters(stored)
        attack = attack_quickly(
            graph, problem.properties, problem.options.seed + self.tries, ATTACK_SECONDS
        )
        points = attack.inputs.to(torch.float32)
        if bool(attack.violated.any()):
            return Verdict(None, points, True)
        positions = range(len(problem.properties))
        found, _ = self.prover.prove(graph, positions, self.deadline.share(PROOF_SHARE))
        if len(found) < len(positions):
            return Verdict(None, points, False)
        proofs = tuple(found[i] for i in positions)
        return Verdict(Candidate(stored, note=note, proofs=proofs), points, False)
