"""Four MNIST networks of one small architecture, trained in four ways, for ``fig_interpretation``.

==========  ======================================================================================
training    loss on a batch, eps = 0.1 in the maximum norm
==========  ======================================================================================
standard    cross-entropy
pgd         cross-entropy at the end of 5 gradient-sign steps
certified   cross-entropy of interval bounds (IBP, through ``bounds.certified_margin``), eps growing
            from zero and the share of the plain loss falling to a half
combined    half of ``pgd``, half of ``certified``: adversarial and certified training together
==========  ======================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks._reference import _idx, _pixels
from torch_prepared.bounds import PropertyBatch, RegionBatch, certified_margin
from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph

__all__ = ["TRAININGS", "Digits", "load_digits", "make_network", "train_network"]

EPS = 0.1
BATCH = 128
STEPS = 5
CLASSES = 10
TRAININGS = {"standard": 3, "pgd": 3, "certified": 8, "combined": 3}
"""Epochs by training."""


@dataclass(frozen=True)
class Digits:
    """MNIST: images (q, 784) float32 in [0, 1] and labels (q,) int64, to train and to test with."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_digits(folder: Path) -> Digits:
    """Read the four idx files."""

    def images(name: str) -> Tensor:
        return torch.from_numpy(_pixels(_idx(folder / f"{name}-images-idx3-ubyte.gz")))

    def labels(name: str) -> Tensor:
        found = _idx(folder / f"{name}-labels-idx1-ubyte.gz").astype(np.int64)
        return torch.from_numpy(found)

    return Digits(images("train"), labels("train"), images("t10k"), labels("t10k"))


def make_network(seed: int = 0) -> nn.Module:
    """Two convolutions and a hidden layer of 100 neurons, 81,710 parameters, input (b, 784)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, CLASSES),
    )


def train_network(
    kind: str, digits: Digits, cache: Path | None, seed: int = 0, epochs: int | None = None
) -> tuple[nn.Module, float]:
    """A trained network and the seconds it took; read from ``cache`` if it lies there.

    Args:
        kind: a key of ``TRAININGS``.
        digits: the data.
        cache: folder for trained weights (``.npz``), or None.
        seed: of weights and batches.
        epochs: other than usual.
    """
    count = TRAININGS[kind] if epochs is None else epochs
    model = make_network(seed)
    path = None if cache is None else cache / f"{kind}-{count}-{seed}.npz"
    if path is not None and path.exists():
        with np.load(path, allow_pickle=False) as stored:
            state = {name: torch.from_numpy(stored[name]) for name in model.state_dict()}
            model.load_state_dict(state)
            return model.eval(), float(stored["seconds"])
    start = time.perf_counter()
    _train(model, kind, digits, count, seed)
    seconds = time.perf_counter() - start
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: value.numpy() for name, value in model.state_dict().items()}
        np.savez(path, seconds=np.array(seconds), **arrays)
    return model.eval(), seconds


def _train(model: nn.Module, kind: str, digits: Digits, epochs: int, seed: int) -> None:
    graph = capture_module(model, digits.train[:1])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    per_epoch = -(-len(digits.train) // BATCH)
    total = epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=total)
    loss_of = _losses(graph, model)[kind]
    with tqdm(total=total, desc=kind, leave=False) as bar:
        for step in range(total):
            if step % per_epoch == 0:
                order = torch.randperm(len(digits.train), generator=generator)
            pick = order[step % per_epoch * BATCH :][:BATCH]
            optimizer.zero_grad()
            loss_of(digits.train[pick], digits.train_labels[pick], step / total).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            bar.update()


Loss = Callable[[Tensor, Tensor, float], Tensor]


def _losses(graph: Graph, model: nn.Module) -> dict[str, Loss]:
    """Loss of images (b, 784) and labels (b,) at a point of time from 0 to 1, by training."""

    def standard(x: Tensor, y: Tensor, progress: float) -> Tensor:
        del progress
        return F.cross_entropy(model(x), y)

    def pgd(x: Tensor, y: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(model(attack(model, x, y, EPS * min(1.0, 4 * progress))), y)

    def certified(x: Tensor, y: Tensor, progress: float) -> Tensor:
        ramp = min(1.0, max(0.0, (progress - 0.05) / 0.55))
        bounds = _certified_loss(graph, model, x, y, EPS * ramp)
        return (1 - 0.5 * ramp) * F.cross_entropy(model(x), y) + 0.5 * ramp * bounds

    def combined(x: Tensor, y: Tensor, progress: float) -> Tensor:
        return 0.5 * pgd(x, y, progress) + 0.5 * certified(x, y, progress)

    return {"standard": standard, "pgd": pgd, "certified": certified, "combined": combined}


def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int = STEPS) -> Tensor:
    """The end (b, n) of projected gradient-sign steps that raise the loss."""
    lower, upper = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    at = torch.clamp(x + eps * (2 * torch.rand_like(x) - 1), lower, upper)
    for _ in range(steps):
        at = at.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(model(at), y), at)
        at = torch.clamp(at.detach() + 2.5 * eps / steps * slope.sign(), lower, upper)
    return at.detach()


def _certified_loss(graph: Graph, model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Cross-entropy of the worst margins that intervals allow."""
    count, others = len(x), CLASSES - 1
    index = torch.arange(others).expand(count, others)
    rows = torch.zeros(count, others, CLASSES)
    rows.scatter_(2, (index + (index >= y[:, None])).unsqueeze(2), -1.0)
    rows.scatter_(2, y[:, None, None].expand(count, others, 1), 1.0)
    batch = PropertyBatch(
        RegionBatch((x - eps).clamp(0, 1), (x + eps).clamp(0, 1)),
        rows,
        torch.zeros(count, others),
        index,
        torch.ones(count, others, dtype=torch.bool),
    )
    parameters = dict(model.named_parameters())
    margins = certified_margin(graph, batch, method="ibp", parameters=parameters).rows
    logits = torch.cat([torch.zeros(count, 1), -margins], dim=1)
    return F.cross_entropy(logits, torch.zeros(count, dtype=torch.int64))
