"""Inputs per benchmark on which an edit should change nothing, to edit with and to judge with.

============================  =====================================================================
benchmark                     what is kept (``preserve``) and what is judged (``evaluate``)
============================  =====================================================================
mnist_fc                      1,000 training images with labels; accuracy on all 10,000 test images
oval21, sri_resnet_a, _b      1,000 training images (JPEG) with labels; accuracy on the 100
                              unselected exact test images and 1,000 test images (JPEG), in each
                              network's own normalization
acasxu                        samples of the domain; same decisions on 100,000 other samples. The
                              network scores costs, so the advice it gives is the smallest output;
                              properties 1 and 2 speak of the largest, and an edit that moves only
                              that one would look free. Both are recorded, the headline is the
                              worse. The domain is the smallest box around the regions of all
                              properties: property 7 has the whole input space but for the top 2 %
                              of the distance, which property 6 adds
rl_benchmarks,                samples of the domain; same largest output on 20,000 other samples.
cifar_biasfield               The domain is the smallest box around the regions of all properties of
                              networks of this size, one tenth wider in every direction
reach_prob_density,           likewise, 20,000 (collins: 5,000) samples; relative output change
tllverifybench,               ``||y' - y|| / ||y - mean y||``. For collins_rul_cnn half the samples
collins_rul_cnn               come from the properties' own regions, since a box around all windows
                              in 400 dimensions holds few plausible sensor readings
============================  =====================================================================

Samples inside the edited regions are left out when judging, as long as a hundredth remains.
"""

from __future__ import annotations

import gzip
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks._vnncomp import Case, read_instances
from torch_prepared.specs import Property, load_vnnlib

__all__ = ["EvaluationData", "Reference", "build_reference"]

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]

PRESERVE = 1000
PRESERVED_SAMPLES = 10_000
CIFAR_TEST = 1000
SAMPLES = {"acasxu": 100_000, "collins_rul_cnn": 5_000}
DEFAULT_SAMPLES = 20_000
WIDEN = 0.1
KINDS = {
    "mnist_fc": "accuracy",
    "oval21": "accuracy",
    "sri_resnet_a": "accuracy",
    "sri_resnet_b": "accuracy",
    "acasxu": "ranking",
    "rl_benchmarks": "decision",
    "cifar_biasfield": "decision",
    "reach_prob_density": "relative",
    "tllverifybench": "relative",
    "collins_rul_cnn": "relative",
}
NORMALIZATION = {
    "oval21": ((0.485, 0.456, 0.406), (0.225, 0.225, 0.225)),
    "sri_resnet_a": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "sri_resnet_b": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}


@dataclass(frozen=True)
class EvaluationData:
    """Inputs (q, n) to judge on, labels (q,) where known, and what to compare (``KINDS``)."""

    inputs: Floats
    labels: Labels | None
    kind: str


@dataclass(frozen=True)
class Reference:
    """What an editor is given and what its edit is judged on; never the same inputs."""

    preserve: Floats
    labels: Labels | None
    evaluate: EvaluationData

    def save(self, preserve: Path, evaluate: Path) -> None:
        """Write both as ``.npz``: ``inputs``, and ``labels`` where known."""
        for path, inputs, labels in (
            (preserve, self.preserve, self.labels),
            (evaluate, self.evaluate.inputs, self.evaluate.labels),
        ):
            arrays = {"inputs": inputs} if labels is None else {"inputs": inputs, "labels": labels}
            np.savez(path, **arrays)


def build_reference(case: Case, root: Path, seed: int, fraction: float = 1.0) -> Reference:
    """Reference data of a case.

    Args:
        case: the case.
        root: folder that holds ``mnist`` and ``cifar10``.
        seed: of the preserved inputs; those to judge with come from ``seed + 1``.
        fraction: share of the usual numbers of inputs, for smoke tests.

    Raises:
        FileNotFoundError: image files that are not there.
        KeyError: a benchmark without a rule.
    """
    kind = KINDS[case.benchmark]
    keep, judge = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    if case.benchmark == "mnist_fc":
        return _mnist(root / "mnist", keep, fraction)
    if case.benchmark in NORMALIZATION:
        return _cifar(root / "cifar10", case.benchmark, keep, judge, fraction)
    regions = _all_properties(case)
    count = int(fraction * SAMPLES.get(case.benchmark, DEFAULT_SAMPLES))
    widen = 0.0 if case.benchmark == "acasxu" else WIDEN
    mixed = case.benchmark == "collins_rul_cnn"
    return Reference(
        _samples(regions, max(10, int(fraction * PRESERVED_SAMPLES)), widen, mixed, keep),
        None,
        EvaluationData(_samples(regions, max(10, count), widen, mixed, judge), None, kind),
    )


def _all_properties(case: Case) -> list[Property]:
    """Properties of the benchmark for networks with this case's numbers of inputs and outputs."""
    mine = case.properties[0]
    found = []
    for name in sorted({row["vnnlib"] for row in read_instances(case.folder)}):
        for prop in load_vnnlib(case.folder / name):
            if (prop.region.size, prop.safe.size) == (mine.region.size, mine.safe.size):
                found.append(prop)
    return found


def _samples(
    properties: list[Property], count: int, widen: float, mixed: bool, random: np.random.Generator
) -> Floats:
    lower = np.stack([p.region.lower.numpy() for p in properties])
    upper = np.stack([p.region.upper.numpy() for p in properties])
    low, high = lower.min(axis=0), upper.max(axis=0)
    low, high = low - widen * (high - low), high + widen * (high - low)
    points = low + (high - low) * random.random((count, len(low)))
    if mixed:
        pick = random.integers(len(properties), size=count // 2)
        inside = lower[pick] + (upper - lower)[pick] * random.random((len(pick), len(low)))
        points[: len(pick)] = inside
    single: Floats = points.astype(np.float32)
    return single


def _mnist(folder: Path, random: np.random.Generator, fraction: float) -> Reference:
    train, test = (
        _idx(folder / "train-images-idx3-ubyte.gz"),
        _idx(folder / "t10k-images-idx3-ubyte.gz"),
    )
    labels = _idx(folder / "train-labels-idx1-ubyte.gz").astype(np.int64)
    pick = np.sort(random.choice(len(train), int(fraction * PRESERVE), replace=False))
    test = test[: int(fraction * len(test))]
    return Reference(
        _pixels(train[pick]),
        labels[pick],
        EvaluationData(
            _pixels(test),
            _idx(folder / "t10k-labels-idx1-ubyte.gz").astype(np.int64)[: len(test)],
            "accuracy",
        ),
    )


def _pixels(images: NDArray[np.uint8]) -> Floats:
    flat: Floats = (images.reshape(len(images), -1) / 255).astype(np.float32)
    return flat


def _idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: not an idx file of bytes; download it again")
    axes = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(axes)


def _cifar(
    folder: Path,
    benchmark: str,
    keep: np.random.Generator,
    judge: np.random.Generator,
    fraction: float,
) -> Reference:
    mean, deviation = (np.array(v, np.float32) for v in NORMALIZATION[benchmark])

    def network_input(images: NDArray[np.uint8]) -> Floats:
        scaled = (images.astype(np.float32) / 255 - mean) / deviation
        flat: Floats = scaled.transpose(0, 3, 1, 2).reshape(len(images), -1).astype(np.float32)
        return flat

    train = _jpegs(folder / "cifar10_train_jpeg.npz", int(fraction * PRESERVE), keep)
    test = _jpegs(folder / "cifar10_test_jpeg.npz", int(fraction * CIFAR_TEST), judge)
    with np.load(folder / "cifar10_test_exact.npz", allow_pickle=False) as exact:
        images, labels = exact["images"][:100], exact["labels"][:100].astype(np.int64)
    return Reference(
        network_input(train[0]),
        train[1],
        EvaluationData(
            network_input(np.concatenate([images, test[0]])),
            np.concatenate([labels, test[1]]),
            "accuracy",
        ),
    )


def _jpegs(path: Path, count: int, random: np.random.Generator) -> tuple[NDArray[np.uint8], Labels]:
    """``count`` random images (q, 32, 32, 3) and labels."""
    with np.load(path, allow_pickle=False) as stored:
        stream, offsets, labels = stored["jpeg"], stored["offsets"], stored["labels"]
    pick = np.sort(random.choice(len(labels), count, replace=False))
    images = []
    for i in pick:
        with Image.open(io.BytesIO(stream[offsets[i] : offsets[i + 1]].tobytes())) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images), labels[pick].astype(np.int64)
