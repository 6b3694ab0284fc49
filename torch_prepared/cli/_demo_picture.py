"""The demo's picture: certified margins before and after, and images that used to fool the net."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torch_prepared.cli._demo_network import Digits
from torch_prepared.cli._demo_state import State
from torch_prepared.core.onnx import run_onnx

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

__all__ = ["draw"]

_RED, _GREEN, _GRAY, _INK = "#c8452f", "#2a7f62", "#9aa0a6", "#22262a"
_SHOWN = 6


def draw(
    path: Path,
    digits: Digits,
    eps: float,
    states: tuple[State, State],
    chosen: Sequence[int],
    networks: tuple[Path, Path],
) -> None:
    """Write the picture.

    Args:
        path: where to, a PNG.
        digits: the images.
        eps: radius of the certified boxes.
        states: before and after the edit.
        chosen: positions of the repaired test images.
        networks: ONNX files before and after.
    """
    # Not at the top: loading matplotlib takes a second, and only the demo draws.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 7.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1, height_ratios=[1.1, 1.0], hspace=0.06)
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    _draw_margins(top, states, chosen, eps)
    order = sorted(chosen, key=lambda i: float(states[0].reached[i]))
    _draw_images(bottom, digits, states[0], order[:_SHOWN], networks)
    figure.savefig(path, dpi=160)


def _draw_margins(
    figure: SubFigure, states: tuple[State, State], chosen: Sequence[int], eps: float
) -> None:
    before, after = states
    order = sorted(chosen, key=lambda i: float(before.proved[i]))
    places = np.arange(len(order))
    axes = figure.add_subplot()
    axes.axhspan(min(before.proved[order].min() * 1.1, -1), 0, color=_RED, alpha=0.06, lw=0)
    axes.axhline(0, color=_INK, lw=1)
    axes.vlines(places, before.proved[order], after.proved[order], color=_GRAY, lw=1.2, alpha=0.6)
    axes.scatter(
        places, before.proved[order], s=46, color=_RED, zorder=3, label="before: proved margin"
    )
    axes.scatter(
        places,
        before.reached[order],
        s=34,
        marker="x",
        color=_RED,
        zorder=3,
        label="before: margin of the attack's worst image",
    )
    axes.scatter(
        places, after.proved[order], s=46, color=_GREEN, zorder=3, label="after: proved margin"
    )
    axes.set_xticks(places, [str(i) for i in order], fontsize=8)
    axes.set_xlabel("test image", color=_INK)
    axes.set_ylabel("right class ahead of the next by", color=_INK)
    axes.set_ylim(bottom=before.proved[order].min() * 1.1)
    axes.set_title(
        f"Every pixel may change by up to {eps:g}: above zero, no such change fools the network",
        loc="left",
        fontsize=12,
        color=_INK,
        fontweight="bold",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    text = (
        f"certified {before.certified[chosen].sum()} → {after.certified[chosen].sum()} of "
        f"{len(chosen)}   ·   test accuracy {100 * before.accuracy:.1f} % → "
        f"{100 * after.accuracy:.1f} %"
    )
    axes.text(0.01, 0.97, text, transform=axes.transAxes, va="top", fontsize=10, color=_INK)


def _draw_images(
    figure: SubFigure,
    digits: Digits,
    before: State,
    shown: Sequence[int],
    networks: tuple[Path, Path],
) -> None:
    """Pairs of an image and its worst perturbation, with what both networks read."""
    fooled, repaired = (
        run_onnx(network, before.worst[list(shown)]).argmax(axis=1) for network in networks
    )
    figure.suptitle(
        "Perturbed images that fooled the original network, read by both",
        x=0.01,
        ha="left",
        fontsize=12,
        color=_INK,
        fontweight="bold",
    )
    grid = figure.subplots(2, len(shown), squeeze=False)
    for column, i in enumerate(shown):
        label = int(digits.test_labels[i])
        _show(grid[0, column], digits.test_images[i].numpy())
        _show(grid[1, column], before.worst[i])
        grid[0, column].set_title(f"image {i}: a {label}", fontsize=10, color=_INK)
        for position, (name, read) in enumerate(
            (("before", int(fooled[column])), ("after", int(repaired[column])))
        ):
            color = _GREEN if read == label else _RED
            grid[1, column].text(
                0.5,
                -0.05 - 0.15 * position,
                f"{name}: {read}",
                ha="center",
                va="top",
                transform=grid[1, column].transAxes,
                fontsize=10,
                color=color,
                fontweight="bold",
            )
    grid[0, 0].set_ylabel("original", fontsize=10, color=_INK)
    grid[1, 0].set_ylabel("perturbed", fontsize=10, color=_INK)


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(_GRAY)
