"""The networks of the invertibility study: trained here, from data generated here."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

__all__ = [
    "brusselator",
    "brusselator_map",
    "image_classifier",
    "mnist_images",
    "one_dimensional",
    "pruned",
    "published_brusselator",
    "van_der_pol",
]

STEP = 0.15
_BATCH = 1024


def _mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _fit(model: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int, classes: bool) -> None:
    """Adam with a cosine schedule; pruned weights stay zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = nn.functional.cross_entropy if classes else nn.functional.mse_loss
    for _ in range(steps):
        pick = torch.randint(len(x), (_BATCH,), generator=generator)
        optimizer.zero_grad()
        loss(model(x[pick]), y[pick]).backward()
        optimizer.step()
        schedule.step()


def one_dimensional(seed: int) -> nn.Module:
    """A random 1-10-10-1 network."""
    torch.manual_seed(seed)
    model = _mlp(1, 10, 10, 1)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5 * 1.6)
        nn.init.normal_(layer.bias, std=0.8)
    return model.double()


def brusselator_map(state: Tensor, b: Tensor, step: float = STEP) -> Tensor:
    """One Euler step (k, 2) of the Brusselator with a = 1."""
    x, y = state.T
    return torch.stack(
        [x + step * (1 + x * x * y - (b + 1) * x), y + step * (b * x - x * x * y)], dim=1
    )


def brusselator(seed: int, steps: int, width: int = 64) -> nn.Module:
    """3-w-w-2, from (x, y, b) to the next state; states in [-1, 5] x [-1, 5], b in [1.9, 2.3]."""
    torch.manual_seed(seed)
    state = 6 * torch.rand(40_000, 2) - 1
    b = 1.9 + 0.4 * torch.rand(len(state))
    model = _mlp(3, width, width, 2)
    inputs = torch.cat([state, b[:, None]], dim=1)
    _fit(model, inputs, brusselator_map(state, b), steps, seed, classes=False)
    return model


def published_brusselator(folder: Path) -> nn.Module:
    """The 3-64-64-2 network of Bertalan et al.; text files w1 to w3, b1 to b3, column-major.

    Source: the folder ``para_dep_bru`` of the public project ``noninvertibility``.
    """
    model = _mlp(3, 64, 64, 2).double()
    with torch.no_grad():
        for position, layer in enumerate(model[::2], start=1):
            shape = layer.weight.shape[::-1]
            weight = np.loadtxt(folder / f"w{position}.txt").reshape(tuple(shape)).T
            layer.weight.copy_(torch.from_numpy(weight.copy()))
            layer.bias.copy_(torch.from_numpy(np.loadtxt(folder / f"b{position}.txt").ravel()))
    return model


def _flow(state: Tensor, seconds: float = 0.2, pieces: int = 20) -> Tensor:
    """Runge-Kutta steps of the Van der Pol oscillator with mu = 1."""

    def slope(s: Tensor) -> Tensor:
        x, v = s.T
        return torch.stack([v, (1 - x * x) * v - x], dim=1)

    h = seconds / pieces
    for _ in range(pieces):
        k1 = slope(state)
        k2 = slope(state + h / 2 * k1)
        k3 = slope(state + h / 2 * k2)
        k4 = slope(state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def van_der_pol(seed: int, steps: int, width: int = 32) -> tuple[nn.Module, Tensor, Tensor]:
    """2-w-w-2 time-0.2 flow map on trajectories from [-3, 3]^2, and its training data."""
    torch.manual_seed(seed)
    state = (6 * torch.rand(1000, 2) - 3).double()
    before, after = [], []
    for _ in range(20):
        following = _flow(state)
        before.append(state)
        after.append(following)
        state = following
    x, y = torch.cat(before).float(), torch.cat(after).float()
    model = _mlp(2, width, width, 2)
    _fit(model, x, y, steps, seed, classes=False)
    return model, x, y


def pruned(
    model: nn.Module, x: Tensor, y: Tensor, sparsity: float, steps: int, seed: int
) -> nn.Module:
    """A copy with the smallest weights of each layer removed, trained further."""
    import copy

    clone = copy.deepcopy(model)
    layers = [layer for layer in clone.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", amount=sparsity)
    _fit(clone, x, y, steps, seed, classes=False)
    for layer in layers:
        prune.remove(layer, "weight")
    return clone


def mnist_images(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Pixels (k, 784) in [0, 1] and labels (k,) of ``"train"`` or ``"t10k"``."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as stream:
        pixels = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 784)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as stream:
        labels = np.frombuffer(stream.read(), np.uint8, offset=8)
    return torch.from_numpy(pixels / np.float32(255)), torch.from_numpy(labels.astype(np.int64))


def image_classifier(folder: Path, seed: int, steps: int) -> tuple[nn.Module, float]:
    """784-24-24-10 on MNIST, and its accuracy on the 10,000 test images."""
    torch.manual_seed(seed)
    model = _mlp(784, 24, 24, 10)
    _fit(model, *mnist_images(folder, "train"), steps, seed, classes=True)
    x, y = mnist_images(folder, "t10k")
    with torch.no_grad():
        return model, float((model(x).argmax(dim=1) == y).float().mean())
