"""The picture of ``fig_geodynamics``, from its JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure, FigureBase
from numpy.typing import NDArray

from benchmarks import _figure
from benchmarks.examples._stokes_solver import gaussian_plume

__all__ = ["TITLES", "draw"]

TITLES = {
    "plain": "plain training",
    "physics": "physics-informed",
    "penalty": "DL2 penalty",
    "provable": "provable",
}
COLORS = {"plain": "#9aa0a6", "physics": "#3b7dbf", "penalty": "#d98e04", "provable": "#1b7f4d"}
SIDES = ("south", "east", "north", "west")
Row = Mapping[str, Any]


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw the first seed's maps and the mean numbers of all seeds.

    Args:
        record: what ``fig_geodynamics run`` wrote.
        path: of the PNG.
    """
    rows: dict[str, Row] = {
        row["method"]: row for row in record["rows"] if "maps" in row and row["method"] in TITLES
    }
    settings = record["settings"]
    figure = Figure(figsize=(15, 14), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[1, 2.15])
    above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    top = above.subplots(1, 2, width_ratios=[1, 1.45])
    _flow(above, top[0], record["reference"])
    _walls(top[1], rows, settings)
    axes = below.subplots(3, 4)
    _errors(below, axes[0], rows)
    _outflow(below, axes[1], rows, settings["continuity"])
    _regions(below, axes[2], rows, settings)
    below.supxlabel("frames of the last row: green where all walls are certified too", fontsize=10)
    figure.suptitle(
        "Provable training of a network for buoyant Stokes flow", fontsize=16, fontweight="bold"
    )
    _figure.save(figure, path, dpi=110)


def _flow(figure: FigureBase, axis: Axes, reference: Mapping[str, Any]) -> None:
    u, v = np.array(reference["u"]), np.array(reference["v"])
    middle = (np.arange(len(u)) + 0.5) / len(u)
    fine = np.linspace(0, 1, 300)
    heat = gaussian_plume(*np.meshgrid(fine, fine, indexing="xy"))
    image = axis.imshow(
        heat, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r", norm=TwoSlopeNorm(0, -1, 1)
    )
    speed = np.hypot(u, v).T
    axis.streamplot(
        middle, middle, u.T, v.T, density=1.5, color="#222222", linewidth=0.4 + 0.9 * speed / 2,
        arrowsize=0.9,
    )  # fmt: skip
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[], yticks=[])
    axis.set_title("the solver's flow and the temperature anomaly that drives it")
    figure.colorbar(image, ax=axis, shrink=0.85, label="temperature anomaly")


def _walls(axis: Axes, rows: Mapping[str, Row], settings: Mapping[str, Any]) -> None:
    """Velocity through the walls along the perimeter, on a scale linear near zero."""
    for method, row in rows.items():
        parts = [np.array(row["maps"]["walls"][side]) for side in SIDES]
        parts[2], parts[3] = parts[2][::-1], parts[3][::-1]
        for side, part in enumerate(parts):
            place = side + np.linspace(0, 1, len(part))
            label = TITLES[method] if side == 0 else None
            axis.plot(place, part, color=COLORS[method], lw=1.6, label=label)
    tolerance = settings["wall"]
    axis.axhspan(-tolerance, tolerance, color=COLORS["provable"], alpha=0.13, lw=0)
    axis.set_yscale("symlog", linthresh=2 * tolerance, linscale=1.5)
    ticks = [-0.2, -0.1, -tolerance, 0, tolerance, 0.1, 0.2]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xticks([0.5, 1.5, 2.5, 3.5], SIDES)
    for corner in range(1, 4):
        axis.axvline(corner, color="#cccccc", lw=0.8, zorder=0)
    axis.set(xlim=(0, 4), ylabel="velocity through the wall / mean speed")
    axis.set_title(f"velocity through the walls; shaded: the tolerance of {tolerance:g}")
    axis.legend(frameon=False, ncol=2, fontsize=9)


def _errors(figure: FigureBase, axes: Sequence[Axes], rows: Mapping[str, Row]) -> None:
    maps = [np.array(row["maps"]["speed_error"]) for row in rows.values()]
    _maps(figure, axes, maps, "magma_r", Normalize(0, 0.2), "max", "mean speeds")
    axes[0].set_ylabel("velocity error")
    for axis, (method, row) in zip(axes, rows.items(), strict=True):
        axis.set_title(f"{TITLES[method]}: error {100 * row['relative_error']:.1f} %", fontsize=11)


def _outflow(
    figure: FigureBase, axes: Sequence[Axes], rows: Mapping[str, Row], tolerance: float
) -> None:
    maps = [np.array(row["maps"]["outflow"]) / tolerance for row in rows.values()]
    _maps(figure, axes, maps, "PuOr_r", TwoSlopeNorm(0, -1.5, 1.5), "both", "tolerances")
    axes[0].set_ylabel("net outflow of cells")
    for axis, (method, row) in zip(axes, rows.items(), strict=True):
        largest = row["cell_largest"] / tolerance
        axis.set_title(f"{TITLES[method]}: largest {largest:.2f}", fontsize=11)


def _regions(
    figure: FigureBase, axes: Sequence[Axes], rows: Mapping[str, Row], settings: Mapping[str, Any]
) -> None:
    """Bounds over boxes that cover all cell centers, and walls drawn by what is proved of them."""
    shades = LinearSegmentedColormap.from_list(
        "proved", ["#0b5d36", "#8fd3ae", "#fff3d6", "#e07b39", "#8c1c13"]
    )
    maps = [np.array(row["maps"]["proved"]) / settings["continuity"] for row in rows.values()]
    _maps(figure, axes, maps, shades, Normalize(0, 2), "max", "tolerances")
    axes[0].set_ylabel("proved bound, all cells")
    for axis, row, bound in zip(axes, rows.values(), maps, strict=True):
        share = 100 * float((bound <= 1).mean())
        walls = row["wall_certified"]
        good = walls is not None and walls <= settings["wall"]
        for spine in axis.spines.values():
            spine.set(color="#0b5d36" if good else "#8c1c13", linewidth=4)
        verdict = "CERTIFIED" if row["certified"] else "not certified"
        axis.set_title(f"{verdict}: {share:.0f} % of boxes proved", fontsize=11)


def _maps(
    figure: FigureBase, axes: Sequence[Axes], maps: Sequence[NDArray[np.float64]], cmap: Any,
    norm: Normalize, extend: str, label: str,
) -> None:  # fmt: skip
    """One map per panel, and the color bar of them all."""
    for axis, values in zip(axes, maps, strict=True):
        axis.set(xticks=[], yticks=[])
        image = axis.imshow(values.T, origin="lower", extent=(0, 1, 0, 1), cmap=cmap, norm=norm)
    figure.colorbar(image, ax=axes, shrink=0.85, pad=0.01, extend=extend, label=label)
