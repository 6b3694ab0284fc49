"""Digits, classified robustly: local robustness of chosen images enforced while training.

    python -m benchmarks.examples.robust_digits [--smoke] [--data DIR]

A plain network is fine-tuned twice from the same start: without and with an ``EditHook``. At the
end the hook's network is certified: on the whole box of radius eps around every chosen image its
label is the largest output. Data: scikit-learn's 8 x 8 digits, or MNIST from ``--data``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks._invertibility_systems import mnist_images
from torch_prepared.hooks import EditHook, EverySteps
from torch_prepared.specs import Property, local_robustness_batch

__all__ = ["Digits", "Fit", "accuracy", "fit", "load_digits", "network", "properties", "run"]

CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Images (q, n) in [0, 1] and labels (q,), to train and to test on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Fit:
    """What a training cost: steps, and wall and process seconds with and within the hook."""

    steps: int
    wall: float
    cpu: float
    hook_wall: float = 0.0
    hook_cpu: float = 0.0


def load_digits(data: Path | None, seed: int = 0) -> Digits:
    """MNIST from ``data``/mnist, or scikit-learn's digits, a quarter of them to test on."""
    if data is not None:
        folder = data / "mnist"
        return Digits(mnist_images(folder, "train"), mnist_images(folder, "t10k"))
    from sklearn.datasets import load_digits as bundled

    images, labels = bundled(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    x = torch.from_numpy(images / 16.0).float()[order]
    y = torch.from_numpy(labels).long()[order]
    held = len(y) // 4
    return Digits((x[held:], y[held:]), (x[:held], y[:held]))


def network(inputs: int, hidden: Sequence[int], seed: int = 0) -> nn.Sequential:
    """A fully connected ReLU network with ten outputs."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip((inputs, *hidden), hidden, strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], CLASSES))


def properties(digits: Digits, count: int, eps: float) -> tuple[Property, ...]:
    """Robustness of the first ``count`` test images, whatever a network says about them now."""
    x, y = digits.test
    return local_robustness_batch(x[:count], y[:count], eps, CLASSES, clip=(0.0, 1.0))


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Share of right labels, in percent."""
    return 100.0 * float((model(data[0]).argmax(1) == data[1]).double().mean())


def fit(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    epochs: int,
    rate: float,
    *,
    hook: EditHook | None = None,
    batch: int = 128,
    most: int | None = None,
    seed: int = 0,
) -> Fit:
    """Train in place with AdamW and cross-entropy, at most ``most`` steps."""
    x, y = data
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    generator = torch.Generator().manual_seed(seed)
    taken, spent = 0, np.zeros(2)
    start = np.array([time.perf_counter(), time.process_time()])
    for _ in tqdm(range(epochs), "epochs", leave=False, disable=None):
        for part in torch.randperm(len(x), generator=generator).split(batch):
            if taken == most:
                break
            optimizer.zero_grad()
            F.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
            taken += 1
            if hook is not None:
                before = np.array([time.perf_counter(), time.process_time()])
                hook.after_step(model, taken, optimizer=optimizer)
                spent += np.array([time.perf_counter(), time.process_time()]) - before
    wall, cpu = np.array([time.perf_counter(), time.process_time()]) - start
    return Fit(taken, float(wall), float(cpu), float(spent[0]), float(spent[1]))


def run(
    digits: Digits, hidden: Sequence[int], epochs: int, count: int, eps: float, every: int
) -> dict[str, object]:
    """Both trainings and the certificate, as plain data; prints a table."""
    start = network(digits.train[0].shape[1], hidden)
    batch = 128 if len(digits.train[0]) > 10_000 else 32
    fit(start, digits.train, epochs, 1e-3, batch=batch)
    plain, edited = copy.deepcopy(start), copy.deepcopy(start)
    wanted = properties(digits, count, eps)
    chosen = digits.train[0][:1000], digits.train[1][:1000]
    hook = EditHook(
        wanted, schedule=EverySteps(every), preserve=chosen[0], labels=chosen[1], threads=1
    )
    cost = fit(plain, digits.train, epochs, 1e-4, batch=batch, seed=1)
    kept = fit(edited, digits.train, epochs, 1e-4, batch=batch, seed=1, hook=hook)
    clock = time.perf_counter()
    result = hook.finish(edited)
    found: dict[str, object] = {
        "accuracy_plain": accuracy(plain, digits.test),
        "accuracy_hook": accuracy(edited, digits.test),
        "margin_plain": float(hook.certified_margins(plain).min()),
        "margin_hook": result.report.margin,
        "seconds_plain": cost.wall,
        "seconds_hook": kept.wall,
        "seconds_finish": time.perf_counter() - clock,
        "looks": len(hook.records),
        "edits": sum(record.distance > 0 for record in hook.records),
        "status": result.status.value,
    }
    print(f"{count} images, eps {eps:g}: {found['status']} with {found['edits']} edits")
    print(f"{'':14}{'accuracy':>10}{'lowest margin':>15}{'seconds':>10}")
    for name in ("plain", "hook"):
        columns = (found[f"accuracy_{name}"], found[f"margin_{name}"], found[f"seconds_{name}"])
        print(f"{name:14}{columns[0]:9.2f}%{columns[1]:15.3f}{columns[2]:10.2f}")
    print(f"{'certificate':14}{'':25}{found['seconds_finish']:10.2f}")
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small network, few epochs")
    parser.add_argument("--data", type=Path, help="folder that holds mnist/")
    parser.add_argument("--eps", type=float, default=0.03, help="radius, pixels in [0, 1]")
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    digits = load_digits(options.data)
    if options.smoke:
        return run(digits, (32, 32), 6, 3, options.eps, every=10)
    every = 100 if options.data is not None else 20
    return run(digits, (256, 256), options.epochs, options.images, options.eps, every)


if __name__ == "__main__":
    main()
