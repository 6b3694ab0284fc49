"""Figures of ``fig_calibration``, from its JSON alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import _figure
from benchmarks._common import FIGURES
from torch_prepared.calibrate import certified_ece, reliability, reliability_envelope
from torch_prepared.calibrate.diagram import draw_reliability

__all__ = ["plot"]

_GRAY, _BLUE, _RED, _ORANGE = "#8a9099", "#2b6ca3", "#c8452f", "#e39b3b"
_METHODS = {"ends": _GRAY, "alternating": _ORANGE, "admm": _RED, "dp": _BLUE}
_NAMES = {
    "ends": "Brier ends", "alternating": "alternating", "admm": "ADMM (attack)", "dp": "exact",
}  # fmt: skip
_TUNERS = ("standard", "adversarial", "Brier-ACT", "ACCE-ACT", "certified")

Data = Mapping[str, Any]


def plot(source: Path) -> None:
    """Draw what the JSON has: values, methods and training; and reliability diagrams."""
    parts = json.loads(source.read_text())["parts"]
    figure = Figure(figsize=(17, 7.6), layout="constrained")
    axes = figure.subplots(2, 4)
    tuned = "MNIST 256x2 at the clean temperature, max-norm, pixels in [0, 1]"
    _radii(axes[0, 0], parts.get("mnist"), "fitted to clean", tuned)
    _radii(axes[0, 1], parts.get("oval"), "none", "CIFAR-10 oval21 base, max-norm, pixels / 255")
    title = "CIFAR-10 sri_resnet_a, max-norm, pixels / 255 (not replayed)"
    _radii(axes[0, 2], parts.get("cifar"), "none", title)
    title = "MNIST 256x2 smoothed, 2-norm, probability 0.999"
    _radii(axes[0, 3], parts.get("smooth"), "cdf", title)
    _methods(axes[1, 0], parts.get("methods"))
    _training(axes[1, 1], parts.get("training"))
    _edit(axes[1, 2], parts.get("edit"))
    _speed(axes[1, 3], parts.get("speed"))
    _figure.save(figure, FIGURES / f"{source.stem}.png", dpi=130)
    _diagrams(parts, FIGURES / f"{source.stem}_reliability.png")


def _title(axes: Axes, text: str, part: Data | None) -> bool:
    """Title and plain spines; says so when there is nothing to draw."""
    axes.set_title(text, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    if part is None:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=_GRAY)
        axes.set(xticks=[], yticks=[])
    return part is not None


def _radii(axes: Axes, part: Data | None, setting: str, title: str) -> None:
    """Clean, attacked and certified error against the radius; all and certified samples."""
    if not _title(axes, title, part) or part is None:
        return
    data = part["settings"][setting]
    rows = data["radii"]
    x = np.arange(len(rows))
    bars = (
        ("clean", [data["ece"]] * len(rows), _GRAY),
        ("attacked", [_number(row["attacked_ece"]) for row in rows], _ORANGE),
        ("certified", [row["certified_ece_all"] for row in rows], _BLUE),
        ("certified, on certified samples", [_number(row["certified_ece"]) for row in rows], _RED),
    )
    for position, (label, values, color) in enumerate(bars):
        places = x + 0.2 * (position - 1.5)
        axes.bar(places, values, 0.19, color=color, label=label)
        for place, value in zip(places, values, strict=True):
            axes.text(
                place, value, f" {value:.3f}", rotation=90, ha="center", va="bottom", fontsize=6
            )
    share = [f"{row['radius']:g}\n{row['certified_predictions']}/{row['samples']}" for row in rows]
    axes.set_xticks(x, share, fontsize=8)
    axes.set(xlabel="radius, certified predictions", ylabel="calibration error")
    axes.set_ylim(0, 1.45 * float(np.nanmax([values for _, values, _ in bars])))
    axes.legend(fontsize=7, frameon=False, loc="upper left")


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _edit(axes: Axes, part: Data | None) -> None:
    """Before and after the edit."""
    title = "provable edit of prop_0_0.05, MNIST 256x2, radius 0.01"
    if not _title(axes, title, part) or part is None:
        return
    names = ("clean\nECE", "attacked\nECE", "certified\nECE", "certified\nECE, own",
             "certified\nBrier")  # fmt: skip
    for shift, when, color in ((-0.2, "before", _GRAY), (0.2, "after", _BLUE)):
        data, row = part[when], part[when]["radii"][0]
        values = [data["ece"], row["attacked_ece"], row["certified_ece_all"], row["certified_ece"],
                  row["certified_brier_all"]]  # fmt: skip
        label = f"{when}: accuracy {100 * data['accuracy']:.1f} %"
        axes.bar(np.arange(5) + shift, values, 0.38, color=color, label=label)
        for place, value in enumerate(values):
            axes.text(place + shift, value, f"{value:.3f}", ha="center", va="bottom", fontsize=6)
    axes.set_xticks(range(5), names, fontsize=7)
    axes.legend(fontsize=7, frameon=False, loc="upper left")
    axes.margins(y=0.2)


def _methods(axes: Axes, part: Data | None) -> None:
    """What heuristics reach of the exact value, case by case."""
    if (
        not _title(axes, "worst calibration error found, over the exact value", part)
        or part is None
    ):
        return
    rows = part["rows"]
    x = np.arange(len(rows))
    for position, (method, color) in enumerate(_METHODS.items()):
        values = [row[method] / max(row["dp"], 1e-300) for row in rows]
        axes.bar(x + 0.2 * (position - 1.5), values, 0.19, color=color, label=_NAMES[method])
    axes.set_xticks(x, [f"{r['case']}\n{r['dp']:.3f}" for r in rows], fontsize=7, rotation=60)
    axes.set(ylim=(0, 1.25), ylabel="share of the exact value")
    axes.legend(fontsize=7, frameon=False, ncols=4, loc="upper left")


def _training(axes: Axes, part: Data | None) -> None:
    """Mean over seeds, each seed a point."""
    title = "fine-tuned MNIST network, calibration error over all samples"
    if not _title(axes, title, part) or part is None:
        return
    for position, (label, color) in enumerate(
        (("clean", _GRAY), ("attacked", _ORANGE), ("certified", _BLUE))
    ):
        for x, name in enumerate(_TUNERS):
            values = [_value(row, label) for row in part["rows"] if row["method"] == name]
            if not values:
                continue
            place = x + 0.27 * (position - 1)
            axes.bar(place, np.mean(values), 0.25, color=color, label=label if x == 0 else None)
            axes.scatter([place] * len(values), values, s=6, color="black", zorder=3)
    rows = part["rows"]
    accuracy = [100 * np.mean([r["accuracy"] for r in rows if r["method"] == n]) for n in _TUNERS]
    ticks = [f"{name}\n{value:.1f} %" for name, value in zip(_TUNERS, accuracy, strict=True)]
    axes.set_xticks(range(len(_TUNERS)), ticks, fontsize=7)
    axes.set(xlabel=f"clean accuracy below; radius {part['radius']:g}")
    axes.legend(fontsize=7, frameon=False)


def _value(row: Data, label: str) -> float:
    last = row["radii"][-1]
    found = {
        "clean": row["ece"],
        "attacked": last["attacked_ece"],
        "certified": last["certified_ece_all"],
    }
    return float(found[label])


def _speed(axes: Axes, part: Data | None) -> None:
    """Seconds against samples."""
    if not _title(axes, "exact certified error, 15 bins, one thread", part) or part is None:
        return
    count = [row["samples"] for row in part["rows"]]
    seconds = [row["seconds"] for row in part["rows"]]
    axes.loglog(count, seconds, marker="o", color=_BLUE)
    for x, y in zip(count, seconds, strict=True):
        axes.annotate(f"{y:.2g} s", (x, y), fontsize=7, xytext=(4, -10), textcoords="offset points")
    axes.set(xlabel="samples", ylabel="seconds")


def _diagrams(parts: Data, path: Path) -> None:
    """Reliability with envelopes, drawn from the stored intervals."""
    cases: list[tuple[str, Data]] = []
    for name, most in (("mnist", 2), ("oval", 3), ("cifar", 1), ("smooth", 1)):
        stored: Sequence[Data] = parts.get(name, {}).get("intervals", [])
        cases += [(name, one) for one in stored if one["lower"]][-most:]
    if not cases:
        return
    columns = min(len(cases), 4)
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(3.9 * columns, 3.7 * lines), layout="constrained")
    for position, (name, one) in enumerate(cases):
        lower, upper = np.array(one["lower"]), np.array(one["upper"])
        correct = np.array(one["correct"])
        clean = np.array(one["confidence"])
        bound = certified_ece(lower, upper, correct)
        if bound.confidence is None:
            continue
        title = f"{name}, radius {one['radius']:g}: ECE at most {bound.value:.3f}"
        panel = (
            title,
            reliability(clean, correct),
            reliability_envelope(lower, upper, correct),
            reliability(bound.confidence, correct, bins=bound.bin),
        )
        axes = figure.add_subplot(lines, columns, position + 1)
        draw_reliability(axes, panel, legend=position == 0)
    _figure.save(figure, path, dpi=130)
