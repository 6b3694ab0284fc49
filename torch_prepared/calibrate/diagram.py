"""Pictures: reliability with its certified envelope, and certified error against radius."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from torch_prepared.calibrate._bins import Floats
from torch_prepared.calibrate.envelope import Reliability, ReliabilityEnvelope

__all__ = ["Panel", "draw_reliability", "save_figure"]

_CLEAN, _BAND, _WORST, _INK = "#2b6ca3", "#f0c987", "#c8452f", "#3c4043"

Panel = tuple[str, Reliability, ReliabilityEnvelope | None, Reliability | None]
"""Title, clean diagram, certified envelope, worst case; the last two may be missing."""


def draw_reliability(axes: Axes, panel: Panel, *, legend: bool = True) -> None:
    """Accuracy against confidence, by bin.

    Bars are the clean network. The band holds every accuracy that a bin can show while each
    confidence moves within its interval; markers are the confidences and accuracies that attain
    the certified calibration error, sized by their number.

    Args:
        axes: where to draw.
        panel: see :data:`Panel`.
        legend: whether to explain the colors.
    """
    title, clean, envelope, worst = panel
    middle, width = (clean.edges[1:] + clean.edges[:-1]) / 2, np.diff(clean.edges)
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":", zorder=4)
    if envelope is not None:
        low, high = (
            np.nan_to_num(end) for end in (envelope.accuracy_lower, envelope.accuracy_upper)
        )
        label = "possible accuracy"
        axes.bar(middle, high - low, width, bottom=low, color=_BAND, label=label, zorder=1)
    axes.bar(
        middle, np.nan_to_num(clean.accuracy), 0.55 * width, color=_CLEAN, alpha=0.85,
        label="clean accuracy", zorder=2,
    )  # fmt: skip
    if worst is not None:
        sizes = 14 + 180 * worst.count / max(int(worst.count.sum()), 1)
        axes.scatter(
            worst.confidence, worst.accuracy, s=sizes, color=_WORST, edgecolor="white",
            linewidth=0.6, label="worst case, by bin", zorder=5,
        )  # fmt: skip
    axes.set(xlim=(-0.02, 1.04), ylim=(0, 1.06), xlabel="confidence", ylabel="accuracy")
    axes.set_title(title, fontsize=9, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=7, loc="lower left", framealpha=0.9, edgecolor="none")


def save_figure(
    path: Path, panels: Sequence[Panel], curve: Sequence[tuple[str, Floats, Floats]]
) -> None:
    """Write a PNG of reliability panels and, where there is one, curves against the radius.

    Args:
        path: where to; written in place.
        panels: at least one.
        curve: (label, radii, values) each; drawn in a last panel if there are two radii or more.
    """
    extra = int(any(len(radii) > 1 for _, radii, _ in curve))
    figure = Figure(figsize=(3.6 * (len(panels) + extra), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels) + extra, squeeze=False)[0]
    for position, panel in enumerate(panels):
        draw_reliability(axes[position], panel, legend=position == 0)
    if extra:
        for label, radii, values in curve:
            axes[-1].plot(radii, values, marker="o", markersize=3, label=label)
        axes[-1].set(xlabel="radius", ylim=(0, None))
        axes[-1].set_title("over all samples", fontsize=9, color=_INK)
        axes[-1].legend(fontsize=7, frameon=False)
        axes[-1].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
