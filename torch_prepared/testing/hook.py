"""What every way to drive an :class:`~torch_prepared.hooks.EditHook` must do, to inherit.

Example:
    class TestMyLoop(HookSuite):
        def train(self, hook, model, data, steps, accumulate, folder):
            my_loop(model, data, hook, steps)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from torch_prepared.certify import Verdict
from torch_prepared.edit import EditResult
from torch_prepared.errors import InfeasibleEditError
from torch_prepared.hooks import AtEnd, EditHook, EverySteps, Outcome
from torch_prepared.specs import Box, Property, SafeSet

__all__ = ["HookSuite", "flipped_corner", "impossible", "small_network", "two_moons_like"]

BATCH = 16


def two_moons_like(count: int = 128) -> tuple[Tensor, Tensor]:
    """Points (count, 2) of two classes, split by a curve, and their labels; always the same."""
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.rand(count, 2, generator=generator) - 1
    return x, (x[:, 1] > torch.sin(3 * x[:, 0]) / 2).long()


def flipped_corner() -> Property:
    """A property that training on :func:`two_moons_like` violates."""
    return Property(Box([0.5, -0.9], [0.7, -0.7]), SafeSet.argmax(1, classes=2), "flipped corner")


def impossible() -> tuple[Property, Property]:
    """Two properties that no network satisfies together."""
    box = Box([0.0, 0.0], [0.1, 0.1])
    first, second = (Property(box, SafeSet.argmax(k, 2), f"class {k}") for k in (0, 1))
    return first, second


def small_network() -> nn.Sequential:
    """A fresh network of 2 inputs and 2 outputs, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))


class HookSuite(ABC):
    """Inherit, and say how to train."""

    @abstractmethod
    def train(
        self,
        hook: EditHook,
        model: nn.Sequential,
        data: tuple[Tensor, Tensor],
        steps: int,
        accumulate: int,
        folder: Path,
    ) -> EditResult[object]:
        """Train ``model`` itself by SGD with learning rate 0.1, cross-entropy and batches of 16.

        Args:
            hook: driven by what is tested, which also calls ``finish``.
            model: trained in place.
            data: inputs (q, 2) and labels (q,).
            steps: optimizer steps to take.
            accumulate: batches per optimizer step.
            folder: the only place to write to.

        Returns:
            What ``finish`` returned.
        """

    @pytest.mark.parametrize("accumulate", [1, 3])
    def test_looks_follow_optimizer_steps(self, accumulate: int, tmp_path: Path) -> None:
        """Micro-batches of gradient accumulation are not steps."""
        hook = EditHook(flipped_corner(), schedule=EverySteps(2), time_limit=1)
        self.train(hook, small_network(), two_moons_like(), 6, accumulate, tmp_path)
        assert [record.step for record in hook.records] == [2, 4, 6]

    def test_weights_are_certified_and_stay_the_same_objects(self, tmp_path: Path) -> None:
        """Edits are in place; ``finish`` loads the certified weights."""
        model = small_network()
        before = list(model.parameters())
        hook = EditHook(flipped_corner(), schedule=EverySteps(3), time_limit=4)
        result = self.train(hook, model, two_moons_like(), 6, 1, tmp_path)
        assert any(record.outcome is Outcome.EDITED for record in hook.records)
        assert result.status is Verdict.CERTIFIED
        assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
        assert isinstance(result.model, nn.Module)
        for mine, certified in zip(model.parameters(), result.model.parameters(), strict=True):
            assert torch.equal(mine.cpu(), certified.cpu())
        assert float(hook.certified_margins(model).min()) > 0

    def test_a_hook_that_never_edits_changes_nothing(self, tmp_path: Path) -> None:
        """Failed edits leave training bit-identical to training without a hook."""
        found = []
        for name, properties in (("a", flipped_corner()), ("b", impossible())):
            model = small_network()
            schedule = AtEnd() if name == "a" else EverySteps(2)
            hook = EditHook(properties, schedule=schedule, on_failure="ignore")
            hook.finish = lambda model: None  # type: ignore[method-assign,assignment,return-value]
            self.train(hook, model, two_moons_like(), 6, 1, tmp_path)
            assert all(record.outcome is Outcome.FAILED for record in hook.records)
            assert len(hook.records) == (0 if name == "a" else 3)
            found.append([parameter.detach().clone() for parameter in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_failure_can_stop_training(self, tmp_path: Path) -> None:
        """``on_failure="raise"`` reaches the caller of the loop."""
        hook = EditHook(impossible(), schedule=EverySteps(2), on_failure="raise")
        with pytest.raises(InfeasibleEditError, match="step 2"):
            self.train(hook, small_network(), two_moons_like(), 6, 1, tmp_path)
