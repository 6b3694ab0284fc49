"""What one network does on all test images of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from torch_prepared.certify import Verdict
from torch_prepared.cli._demo_network import Digits
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.onnx import OnnxNetwork, run_onnx
from torch_prepared.edit.attack import find_counterexamples
from torch_prepared.edit.verify import prove_or_refute
from torch_prepared.specs import Property

__all__ = ["State", "examine"]


@dataclass(frozen=True)
class State:
    """One network on q test images.

    Args:
        right: (q,) bool: the image itself is read rightly.
        certified: (q,) bool: the certificate checker's verdict on its robustness.
        proved: (q,) margin that the checker proved, a lower bound.
        worst: (q, n) the attack's worst perturbed image.
        reached: (q,) margin there, an upper bound.
    """

    right: np.ndarray
    certified: np.ndarray
    proved: np.ndarray
    worst: np.ndarray
    reached: np.ndarray

    @property
    def violated(self) -> np.ndarray:
        """(q,) bool: the attack found a violating image."""
        return self.reached <= 0

    @property
    def accuracy(self) -> float:
        """Share of images read rightly."""
        return float(self.right.mean())

    def count(self, chosen: Sequence[int]) -> dict[str, float]:
        """Numbers on the chosen images and on all."""
        return {
            "certified": int(self.certified[chosen].sum()),
            "violated": int(self.violated[chosen].sum()),
            "certified_all": int(self.certified.sum()),
            "violated_all": int(self.violated.sum()),
            "test_accuracy": self.accuracy,
        }


def examine(
    network: OnnxNetwork, properties: Sequence[Property], digits: Digits, seed: int
) -> State:
    """Classify, attack and try to certify every test image; one property per image."""
    decisions = run_onnx(network, digits.test_images.numpy()).argmax(axis=1)
    attack = find_counterexamples(
        network.graph, properties, restarts=16, steps=40, seed=seed, time_limit=10.0
    )
    certified, _ = prove_or_refute(network.graph, properties, Deadline(None))
    checks = certified.check.per_property
    return State(
        right=decisions == digits.test_labels.numpy(),
        certified=np.array([check.status is Verdict.CERTIFIED for check in checks]),
        proved=np.array([check.margin for check in checks]),
        worst=attack.inputs.to(torch.float32).numpy(),
        reached=attack.margins.numpy(),
    )
