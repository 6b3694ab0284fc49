"""Pictures of features as PNG bytes. Uses matplotlib's objects only, never its global state."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["draw_bars", "draw_histogram", "draw_maps", "image_shape", "show_input", "show_map"]

_PER_ROW = 6
_DPI = 110
_KEPT, _OTHER = "#d95f02", "#9aa5b1"

Array = NDArray[np.float64]


def image_shape(shape: Sequence[int]) -> tuple[int, int, int] | None:
    """(channels, height, width) if inputs of this shape look like images, else None.

    Axes of size 1 are ignored; a single axis counts as a square image of one channel when its
    size is a square of at least 16 pixels a side.
    """
    axes = [n for n in shape if n != 1]
    if len(axes) == 3 and axes[0] == 3:
        return (3, axes[1], axes[2])
    if len(axes) == 2 and min(axes) >= 4:
        return (1, axes[0], axes[1])
    if len(axes) == 1 and math.isqrt(axes[0]) ** 2 == axes[0] and axes[0] >= 256:
        return (1, math.isqrt(axes[0]), math.isqrt(axes[0]))
    return None


def show_map(axes: Axes, values: Tensor) -> None:
    """One signed map: red raises the feature, blue lowers it; scaled by its largest value."""
    array, shape = _array(values), image_shape(values.shape)
    scale = float(np.abs(array).max(initial=0.0)) or 1.0
    if shape is None:
        colors = np.where(array.ravel() >= 0, "#b2182b", "#2166ac")
        axes.bar(np.arange(array.size), array.ravel() / scale, color=colors, width=1.0)
        axes.set_ylim(-1.05, 1.05)
    elif shape[0] == 1:
        picture = array.reshape(shape[1:]) / scale
        axes.imshow(picture, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    else:  # each channel centered at gray
        axes.imshow(0.5 + 0.5 * array.reshape(shape).transpose(1, 2, 0) / scale)
    axes.set_xticks([])
    axes.set_yticks([])


def show_input(axes: Axes, values: Tensor) -> None:
    """The center of a region."""
    array, shape = _array(values), image_shape(values.shape)
    low, high = float(array.min()), float(array.max())
    if shape is None:
        axes.bar(np.arange(array.size), array.ravel(), color="#444444", width=1.0)
    elif shape[0] == 1:
        axes.imshow(array.reshape(shape[1:]), cmap="gray", interpolation="nearest")
    else:
        picture = (array - low) / ((high - low) or 1.0)
        axes.imshow(picture.reshape(shape).transpose(1, 2, 0))
    axes.set_xticks([])
    axes.set_yticks([])


def draw_maps(center: Tensor, maps: Sequence[tuple[str, Tensor]]) -> bytes:
    """The input and maps with their titles, in rows."""
    count = 1 + len(maps)
    columns = min(_PER_ROW, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.75 * columns, 2.05 * rows), dpi=_DPI)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    show_input(grid[0], center)
    grid[0].set_title("center of the region", fontsize=8)
    for axes, (title, values) in zip(grid[1:], maps, strict=False):
        show_map(axes, values)
        axes.set_title(title, fontsize=8)
    for axes in grid[count:]:
        axes.set_axis_off()
    return _png(figure)


def draw_histogram(priority: Tensor, kept: Tensor) -> bytes:
    """Priorities of all features in use, largest first; those kept stand out."""
    values, chosen = _array(priority), set(kept.tolist())
    used = [i for i in np.argsort(-values, kind="stable").tolist() if values[i] > 0]
    figure = Figure(figsize=(7.5, 2.4), dpi=_DPI)
    axes = figure.subplots()
    colors = [_KEPT if i in chosen else _OTHER for i in used]
    axes.bar(np.arange(len(used)), values[used], color=colors, width=0.9)
    axes.set_xlabel("features in use, by priority (kept ones in orange)", fontsize=8)
    axes.set_ylabel("priority", fontsize=8)
    axes.tick_params(labelsize=7)
    return _png(figure)


def draw_bars(labels: Sequence[str], values: Sequence[float], title: str) -> bytes:
    """Signed horizontal bars, the first on top."""
    figure = Figure(figsize=(7.5, 0.6 + 0.24 * len(labels)), dpi=_DPI)
    axes = figure.subplots()
    places = np.arange(len(labels))[::-1]
    colors = ["#b2182b" if v < 0 else "#1b7837" for v in values]
    axes.barh(places, values, color=colors)
    axes.set_yticks(places, labels, fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_title(title, fontsize=8)
    return _png(figure)


def _array(values: Tensor) -> Array:
    array: Array = np.nan_to_num(values.detach().cpu().double().numpy())
    return array


def _png(figure: Figure) -> bytes:
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
