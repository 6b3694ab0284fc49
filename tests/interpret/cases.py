"""Small networks with properties that their bounds prove, and some they do not."""

from __future__ import annotations

import torch

from tests.helpers import NETWORKS, mlp
from torch_prepared.core.graph import Graph
from torch_prepared.interpret import ProofFeatures, proof_features
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, Property, SafeSet

METHODS = ("ibp", "zonotope", "crown")


def property_at_center(graph: Graph, seed: int = 0, radius: float = 0.01) -> Property:
    """The class at a random center stays the largest on a box around it."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(graph.input_size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        y = evaluate_graph(graph.to(torch.float64), center[None]).flatten()
    safe = SafeSet.argmax(int(y.argmax()), graph.output_size)
    return Property(Box(center - radius, center + radius), safe)


def network(name: str, seed: int = 0) -> Graph:
    """A network of the shared table."""
    return NETWORKS[name](seed=seed)


def proved_cases(count: int, method: str, hidden: int = 8) -> list[ProofFeatures]:
    """Proofs of random perceptrons with ``hidden`` features in the last layer.

    The output bias is removed, so that the empty set seldom suffices.
    """
    found: list[ProofFeatures] = []
    seed = 0
    while len(found) < count:
        graph = mlp((4, 10, hidden, 4), seed=seed)
        last = graph.nodes[-1].params["bias"].name
        graph = graph.with_parameters({last: torch.zeros_like(graph.parameters[last])})
        features = proof_features(graph, property_at_center(graph, seed, 0.03), method)
        if features.proved:
            found.append(features)
        seed += 1
    return found
