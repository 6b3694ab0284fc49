"""The training part of ``fig_calibration``: one start, five ways to go on from it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._reference import _idx, _pixels
from torch_prepared.calibrate import (
    AttackBudget,
    calibration_training_step,
    certified_calibration_loss,
)
from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph

__all__ = ["TRAIN_RADIUS", "fine_tune_seeds"]

TRAIN_RADIUS = 0.02
CLASSES = 10

Samples = tuple[Tensor, Tensor]
Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], object]


def fine_tune_seeds(data: Path, smoke: bool) -> Iterator[tuple[int, str, float, nn.Module]]:
    """Seed, method, seconds and network: trained once per seed, then fine-tuned in each way."""
    pool, labels = _train_images(data, 500 if smoke else 12_000)
    before, after = (4, 2) if smoke else (300, 200)
    for seed in range(1 if smoke else 3):
        torch.manual_seed(seed)
        start = _network()
        _train(start, _plain_step, pool, labels, before, 1e-3, seed)
        for name, step in _fine_tuners().items():
            model = copy.deepcopy(start)
            clock = time.perf_counter()
            _train(model, step, pool, labels, after, 5e-4, seed + 100)
            yield seed, name, time.perf_counter() - clock, model


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES)
    )


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def _fine_tuners() -> dict[
    str, Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], object]
]:
    """Training steps by name, all at the same radius."""
    budget = AttackBudget(TRAIN_RADIUS, clip=(0.0, 1.0), steps=5)
    graphs: dict[int, Graph] = {}

    def certified(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        if id(model) not in graphs:
            graphs[id(model)] = capture_module(model, x[:1])
        graph = graphs[id(model)]
        optimizer.zero_grad()
        certified_calibration_loss(
            graph, dict(model.named_parameters()), x, y, TRAIN_RADIUS, clip=(0.0, 1.0)
        ).loss.backward()
        optimizer.step()

    return {
        "standard": _plain_step,
        "adversarial": lambda m, o, x, y: calibration_training_step(m, o, x, y, budget, weight=0.0),
        "Brier-ACT": lambda m, o, x, y: calibration_training_step(m, o, x, y, budget),
        "ACCE-ACT": lambda m, o, x, y: calibration_training_step(m, o, x, y, budget, metric="ece"),
        "certified": certified,
    }


def _train_images(data: Path, count: int) -> Samples:
    """Training images in their order."""
    images = _idx(data / "mnist" / "train-images-idx3-ubyte.gz")[:count]
    labels = _idx(data / "mnist" / "train-labels-idx1-ubyte.gz")[:count].astype(np.int64)
    return torch.from_numpy(_pixels(images)), torch.from_numpy(labels)


def _train(
    model: nn.Module,
    step: Callable[[nn.Module, torch.optim.Optimizer, Tensor, Tensor], object],
    x: Tensor,
    y: Tensor,
    steps: int,
    rate: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        pick = torch.randint(len(x), (128,), generator=generator)
        step(model, optimizer, x[pick], y[pick])
