"""Certified calibration on real networks: clean, attacked, certified; exact against heuristics.

``python -m benchmarks.fig_calibration run [--parts a,b] [--smoke]`` writes
``benchmarks/results/calibration.json``, part by part, so that parts can be run one by one;
``... plot`` draws it from the JSON alone.

========  =========================================================================================
part      what is measured
========  =========================================================================================
mnist     mnist_fc 256x2, test images: clean, attacked and certified (checked) calibration error
          and Brier score at several radii, at temperature 1 and at two fitted temperatures
oval      oval21 base, the unselected exact test images of CIFAR-10; radii in units of
          pixels / 255, checked
cifar     sri_resnet_a, likewise the first of these images. Bounds in float64, not replayed by the
          checker (which takes seconds a sample on this network)
smooth    mnist_fc 256x2 smoothed by Gaussian noise, 2-norm radii, failures accounted for
methods   exact certified error next to the alternating direction method's value and other
          heuristics, on the same intervals: those of the parts above and synthetic ones
speed     the exact algorithm's seconds against the number of samples
training  a small network fine-tuned for the same number of steps: plainly, by adversarial
          calibration training (Brier, ECE), and on certified bounds; several seeds
edit      mnist_fc 256x2 before and after a provable edit of a violated property
========  =========================================================================================
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import _figure
from benchmarks._calibration_plot import plot
from benchmarks._calibration_training import TRAIN_RADIUS, fine_tune_seeds
from benchmarks._common import SCHEMA, environment, write_json
from benchmarks._reference import NORMALIZATION, _mnist
from torch_prepared.calibrate import (
    ConfidenceInterval,
    calibration_error,
    certified_ece,
    certified_temperature,
    certify_calibration,
    certify_confidence,
    certify_smoothed_calibration,
)
from torch_prepared.calibrate.api import CalibrationReport
from torch_prepared.core.onnx import load_onnx
from torch_prepared.edit import edit_network
from torch_prepared.specs import load_vnnlib

PARTS = ("mnist", "oval", "cifar", "smooth", "methods", "speed", "training", "edit")
MNIST_RADII = (0.005, 0.01, 0.02)
CIFAR_RADII = (0.25,)
OVAL_RADII = (0.25, 0.5, 1.0)
SMOOTH_RADII = (0.1, 0.25, 0.5)
SIGMA = 0.25
METHODS = ("ends", "alternating", "admm", "dp")

Samples = tuple[Tensor, Tensor]
Part = dict[str, object]


def _mnist_net(data: Path) -> Path:
    return data / "vnncomp2022" / "mnist_fc" / "onnx" / "mnist-net_256x2.onnx.gz"


def _mnist_samples(data: Path, test: int, train: int) -> tuple[Samples, Samples]:
    """The first test images, and random training images, with labels."""
    found = _mnist(data / "mnist", np.random.default_rng(0), 1.0)
    judged = found.evaluate
    if judged.labels is None or found.labels is None:
        raise ValueError("MNIST without labels; download it again")
    return (
        (torch.from_numpy(judged.inputs[:test]), torch.from_numpy(judged.labels[:test])),
        (torch.from_numpy(found.preserve[:train]), torch.from_numpy(found.labels[:train])),
    )


def _cifar_samples(data: Path, benchmark: str, count: int) -> tuple[Samples, Tensor]:
    """Unselected exact test images as the networks want them; pixels / 255 in their unit."""
    mean, deviation = (np.array(v, np.float32) for v in NORMALIZATION[benchmark])
    with np.load(data / "cifar10" / "cifar10_test_exact.npz", allow_pickle=False) as stored:
        images = stored["images"][:count].astype(np.float32) / 255
        labels = torch.from_numpy(stored["labels"][:count].astype(np.int64))
    x = torch.from_numpy(((images - mean) / deviation).transpose(0, 3, 1, 2).copy())
    unit = torch.from_numpy(1.0 / (255 * deviation)).double().reshape(3, 1, 1).expand(x.shape[1:])
    return (x, labels), unit


def _intervals(report: CalibrationReport) -> list[dict[str, object]]:
    """Certified intervals of every radius, for the comparison of methods."""
    rows = []
    for one in report.radii:
        keep = one.interval.certified
        rows.append(
            {
                "radius": one.radius,
                "lower": one.interval.lower[keep].tolist(),
                "upper": one.interval.upper[keep].tolist(),
                "correct": report.correct[keep].tolist(),
                "confidence": report.confidence[keep].tolist(),
            }
        )
    return rows


def _scored(report: CalibrationReport) -> dict[str, object]:
    """A report's numbers, the same of the certified samples alone included."""
    data = report.to_json()
    for one, row in zip(report.radii, data["radii"], strict=True):  # type: ignore[call-overload]
        keep = one.interval.certified
        if bool(keep.any()):
            row["clean_ece_certified"] = calibration_error(
                report.confidence[keep], report.correct[keep]
            )
        if bool(keep.any()) and one.attacked_ece is not None:
            row["attacked_ece_certified"] = calibration_error(
                one.attacked_ece.confidence[keep.numpy()], report.correct[keep]
            )
    return data


def run_mnist(data: Path, smoke: bool) -> Part:
    """Temperatures are fitted on training images, everything else is on test images."""
    count = 12 if smoke else 300
    (x, y), (train_x, train_y) = _mnist_samples(data, count, count)
    network, radii = load_onnx(_mnist_net(data)), MNIST_RADII[:1] if smoke else MNIST_RADII
    fitted = certify_confidence(
        network, train_x, radii[len(radii) // 2], clip=(0.0, 1.0), checked=False
    )
    clean = certify_confidence(network, train_x, 0.0, checked=False)
    temperatures = {"none": 1.0}
    for name, interval in (("fitted to clean", clean), ("fitted to certified", fitted)):
        temperatures[name] = _best_temperature(interval, train_y)
    settings, intervals = {}, []
    for name, temperature in temperatures.items():
        report = certify_calibration(
            network,
            x,
            y,
            radii,
            clip=(0.0, 1.0),
            temperature=temperature,
            checked=name == "fitted to clean",
        )
        settings[name] = {"temperature": temperature, **_scored(report)}
        if name == "fitted to clean":
            intervals = _intervals(report)
        print("mnist", name, settings[name], flush=True)
    return {"settings": settings, "intervals": intervals}


def _best_temperature(interval: ConfidenceInterval, labels: Tensor) -> float:
    if interval.margins is None:
        raise ValueError("intervals without margins; expected those of certify_confidence")
    found = certified_temperature(
        interval.margins.lower, interval.margins.upper, interval.prediction, labels
    )
    return found.temperature


def run_cifar(data: Path, smoke: bool) -> Part:
    """At temperature 1, bounds not replayed."""
    file = next((data / "vnncomp2022" / "sri_resnet_a" / "onnx").iterdir())
    return _run_images(data, "sri_resnet_a", file, 2 if smoke else 40, CIFAR_RADII, False)


def run_oval(data: Path, smoke: bool) -> Part:
    """At temperature 1, checked."""
    file = data / "vnncomp2022" / "oval21" / "onnx" / "cifar_base_kw.onnx.gz"
    return _run_images(data, "oval21", file, 2 if smoke else 100, OVAL_RADII, not smoke)


def _run_images(
    data: Path, benchmark: str, file: Path, count: int, radii: Sequence[float], checked: bool
) -> Part:
    (x, y), unit = _cifar_samples(data, benchmark, count)
    report = certify_calibration(load_onnx(file), x, y, radii, scale=unit, checked=checked)
    settings = {"none": {"temperature": 1.0, **_scored(report)}}
    print(benchmark, settings, flush=True)
    return {"network": file.name, "settings": settings, "intervals": _intervals(report)}


def run_smooth(data: Path, smoke: bool) -> Part:
    """Both bounds, from the same noise."""
    (x, y), _ = _mnist_samples(data, 5 if smoke else 200, 1)
    network, found = load_onnx(_mnist_net(data)), {}
    intervals: list[dict[str, object]] = []
    for method in ("standard", "cdf"):
        report = certify_smoothed_calibration(
            network, x, y, SMOOTH_RADII, SIGMA, n=200 if smoke else 5000, temperature=0.1,
            method=method,
        )  # fmt: skip
        found[method] = report.to_json()
        intervals = _intervals(report)
        print("smooth", method, found[method], flush=True)
    return {"sigma": SIGMA, "temperature": 0.1, "settings": found, "intervals": intervals}


def run_methods(parts: dict[str, Part], smoke: bool) -> Part:
    """All methods on the same intervals."""
    cases: list[tuple[str, Sequence[float], Sequence[float], Sequence[bool]]] = []
    for name in ("mnist", "oval", "cifar", "smooth"):
        for one in parts.get(name, {}).get("intervals", []):  # type: ignore[attr-defined]
            if one["lower"]:
                label = f"{name} {one['radius']:g}"
                cases.append((label, one["lower"], one["upper"], one["correct"]))
    for seed in range(1 if smoke else 3):
        random = np.random.default_rng(seed)
        middle = 0.4 + 0.6 * random.random(60 if smoke else 400)
        width = 0.3 * random.random(len(middle))
        right = random.random(len(middle)) < middle
        cases.append(
            (
                f"synthetic {seed}",
                np.clip(middle - width, 0, 1),
                np.clip(middle + width, 0, 1),
                right,
            )
        )
    rows = []
    for case, lower, upper, correct in cases:
        row: dict[str, object] = {"case": case, "samples": len(correct)}
        for method in METHODS:
            clock = time.perf_counter()
            bound = certified_ece(lower, upper, correct, method=method)
            row[method] = bound.value
            row[f"{method}_seconds"] = time.perf_counter() - clock
        rows.append(row)
        print("methods", row, flush=True)
    return {"rows": rows}


def run_speed(smoke: bool) -> Part:
    """Median of five warmed runs, 15 bins; includes the worst case's confidences and bins."""
    rows = []
    for count in (100, 1000) if smoke else (1000, 10_000, 100_000, 1_000_000):
        random = np.random.default_rng(0)
        lower, upper = np.sort(random.random((2, count)), axis=0)
        correct = random.random(count) < 0.7
        seconds = []
        for _ in range(6):
            clock = time.perf_counter()
            certified_ece(lower, upper, correct)
            seconds.append(time.perf_counter() - clock)
        rows.append({"samples": count, "seconds": float(np.median(seconds[1:]))})
        print("speed", rows[-1], flush=True)
    return {"bins": 15, "rows": rows}


def run_training(data: Path, smoke: bool) -> Part:
    """Fine-tune a small network in five ways, certify on the same test images."""
    (test_x, test_y), _ = _mnist_samples(data, 20 if smoke else 300, 1)
    rows = []
    for seed, name, seconds, model in fine_tune_seeds(data, smoke):
        report = certify_calibration(
            model.double().eval(), test_x.double(), test_y, (0.01, TRAIN_RADIUS),
            clip=(0.0, 1.0), checked=False,
        )  # fmt: skip
        rows.append({"seed": seed, "method": name, "seconds": seconds, **_scored(report)})
        print("training", rows[-1], flush=True)
    return {"radius": TRAIN_RADIUS, "rows": rows}


def run_edit(data: Path, smoke: bool) -> Part:
    """One violated property edited; calibration on test images before and after."""
    count = 6 if smoke else 200
    (x, y), (train_x, train_y) = _mnist_samples(data, count, 1000)
    network = load_onnx(_mnist_net(data))
    prop = load_vnnlib(data / "vnncomp2022" / "mnist_fc" / "vnnlib" / "prop_0_0.05.vnnlib.gz")
    clock = time.perf_counter()
    result = edit_network(
        network, prop, preserve=train_x, labels=train_y, time_limit=20 if smoke else 60,
        raise_on_failure=False,
    )  # fmt: skip
    row: Part = {
        "property": "prop_0_0.05",
        "status": result.status.value,
        "edit_seconds": time.perf_counter() - clock,
        "relative_l2": result.report.delta.relative_l2,
    }
    for name, model in (("before", network), ("after", result.model)):
        report = certify_calibration(
            model, x, y, (0.01,), clip=(0.0, 1.0), temperature=0.1, checked=not smoke
        )
        row[name] = _scored(report)
    print("edit", row, flush=True)
    return row


def run(parts: Sequence[str], data: Path, threads: int, smoke: bool, output: Path) -> None:
    """Run parts and write each into the JSON as it ends."""
    torch.set_num_threads(threads)
    known = _read(output)
    for name in parts:
        clock = time.perf_counter()
        if name == "methods":
            part = run_methods(known, smoke)
        elif name == "speed":
            part = run_speed(smoke)
        else:
            part = {
                "mnist": run_mnist, "oval": run_oval,
                "cifar": run_cifar, "smooth": run_smooth,
                "training": run_training, "edit": run_edit,
            }[name](data, smoke)  # fmt: skip
        part |= {"seconds": time.perf_counter() - clock, "load_average": os.getloadavg()}
        known = {**_read(output), name: part}  # another process may have added its part
        record = {
            "schema": SCHEMA, **environment(), "dtype": "float64", "seed": 0, "threads": threads,
            "smoke": smoke, "parts": known,
        }  # fmt: skip
        write_json(output, record)
        print(f"wrote {name} to {output}", flush=True)


def _read(path: Path) -> dict[str, Part]:
    parts: dict[str, Part] = json.loads(path.read_text())["parts"] if path.exists() else {}
    return parts


def main() -> None:
    """Parse the command line."""
    parser = _figure.make_parser(__doc__, threads=2, data="mnist")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated")
    options = _figure.parse(parser, "calibration")
    parts = options.parts.split(",")
    strange = sorted(set(parts) - set(PARTS))
    if strange:
        parser.error(f"--parts: got {strange[0]!r}; expected some of {', '.join(PARTS)}")
    if options.command != "plot":
        run(parts, options.data, options.threads, options.smoke, options.output)
    if options.command != "run":
        plot(options.output)


if __name__ == "__main__":
    main()
