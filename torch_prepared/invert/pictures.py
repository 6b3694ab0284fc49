"""Pictures of answers: collisions in the plane, radii over a grid, radii along a parameter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Polygon, Rectangle

from torch_prepared.core.rows import Floats
from torch_prepared.errors import SpecError
from torch_prepared.invert._exact import jacobian
from torch_prepared.invert._network import Network, PiecewiseNetwork
from torch_prepared.invert._result import RadiusBound

__all__ = ["draw_answer", "draw_curve", "draw_map", "save_answer"]

_GRID = 241
_LOWER, _UPPER = "tab:blue", "tab:red"


def save_answer(path: Path, network: Network, center: Floats, answer: RadiusBound) -> None:
    """Write a picture of one answer: see :func:`draw_answer`. The format follows the suffix.

    Raises:
        SpecError: a suffix that matplotlib does not write.
    """
    drawing, axes = pyplot.subplots(figsize=(5.5, 5.0))
    try:
        draw_answer(axes, network, center, answer)
        drawing.tight_layout()
        drawing.savefig(path, dpi=150)
    except ValueError as error:
        raise SpecError(f"{path}: cannot be drawn ({error}); expected a name ending in .png") from (
            error
        )
    finally:
        pyplot.close(drawing)


def draw_answer(axes: Axes, network: Network, center: Floats, answer: RadiusBound) -> None:
    """The ball that is free of collisions, the ball that is not, and the pair that shows it.

    One input: the graph of the first output. Two: the plane, with the curve where the determinant
    of the Jacobian changes sign if there are two outputs. More: the two inputs that differ most.
    """
    net = PiecewiseNetwork.of(network, len(center))
    reach = 1.2 * (answer.upper if math.isfinite(answer.upper) else max(answer.lower, 1e-6))
    reach = reach or 1.0
    if net.input_size == 1:
        _draw_line(axes, net, center, answer, reach)
        return
    i, j = 0, 1
    if net.input_size > 2 and answer.witness is not None:
        x, y = answer.witness.floats
        i, j = sorted(np.argsort(-np.abs(x - y), kind="stable")[:2].tolist())
    if net.input_size == 2 and net.output_size == 2:
        _draw_folds(axes, net, center, reach)
    for radius, color, label in (
        (answer.lower, _LOWER, f"no collision ({answer.evidence.value}): {answer.lower:.4g}"),
        (answer.upper, _UPPER, f"collision: {answer.upper:.4g}"),
    ):
        if 0.0 < radius < math.inf:
            axes.add_patch(_outline(center[[i, j]], radius, answer.norm, color, label))
    axes.plot(*center[[i, j]], "k+", label="center")
    if answer.witness is not None:
        x, y = answer.witness.floats
        axes.plot([x[i], y[i]], [x[j], y[j]], "o--", color=_UPPER, markersize=4, label="the pair")
    axes.set(
        xlim=(center[i] - reach, center[i] + reach),
        ylim=(center[j] - reach, center[j] + reach),
        xlabel=f"input {i}",
        ylabel=f"input {j}",
        aspect="equal",
    )
    axes.legend(fontsize=7)


def draw_map(axes: Axes, centers: Floats, values: Floats, label: str) -> None:
    """Radii (k,) at centers (k, 2), as colored squares."""
    dots = axes.scatter(centers[:, 0], centers[:, 1], c=values, marker="s", cmap="viridis")
    axes.figure.colorbar(dots, ax=axes, label=label)
    axes.set(xlabel="input 0", ylabel="input 1", aspect="equal")


def draw_curve(
    axes: Axes, parameter: Sequence[float], lower: Sequence[float], upper: Sequence[float]
) -> None:
    """Lower and upper radii along a parameter; open ends where there is no collision."""
    top = [u if math.isfinite(u) else np.nan for u in upper]
    axes.plot(parameter, top, "v-", color=_UPPER, label="collision", markersize=4)
    axes.plot(parameter, lower, "^-", color=_LOWER, label="no collision", markersize=4)
    axes.set(ylabel="radius")
    axes.legend(fontsize=7)


def _draw_line(
    axes: Axes, net: PiecewiseNetwork, center: Floats, answer: RadiusBound, reach: float
) -> None:
    x = np.linspace(center[0] - reach, center[0] + reach, 2001)
    axes.plot(x, net.values(x[:, None])[:, 0], "k", linewidth=1)
    for radius, color in ((answer.upper, _UPPER), (answer.lower, _LOWER)):
        if 0.0 < radius < math.inf:
            axes.axvspan(center[0] - radius, center[0] + radius, color=color, alpha=0.15)
    if answer.witness is not None:
        pair = np.concatenate(answer.witness.floats)
        axes.plot(pair, net.values(pair[:, None])[:, 0], "o--", color=_UPPER, label="the pair")
    axes.axvline(center[0], color="k", linewidth=0.5)
    axes.set(xlabel="input", ylabel="output 0")


def _draw_folds(axes: Axes, net: PiecewiseNetwork, center: Floats, reach: float) -> None:
    """Where the determinant of the Jacobian changes sign."""
    ticks = np.linspace(-reach, reach, _GRID)
    first, second = np.meshgrid(center[0] + ticks, center[1] + ticks)
    points = np.stack([first.ravel(), second.ravel()], axis=1)
    sign = np.sign(np.linalg.det(jacobian(net, points))).reshape(first.shape)
    if sign.min() < 0 < sign.max():
        axes.contour(first, second, sign, levels=[0.0], colors="gray", linewidths=0.7)


def _outline(
    center: Floats, radius: float, norm: float, color: str, label: str
) -> Circle | Polygon | Rectangle:
    shape: Circle | Polygon | Rectangle
    if norm == 2:
        shape = Circle((center[0], center[1]), radius)
    elif norm == 1:
        shape = Polygon(center + radius * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]))
    else:
        low = center - radius
        shape = Rectangle((low[0], low[1]), 2 * radius, 2 * radius)
    shape.set(fill=False, edgecolor=color, label=label)
    return shape
