"""Pictures of ``fig_interpretation``, drawn from the cells of its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks._interpretation_nets import TRAININGS

__all__ = ["draw_edit", "draw_maps", "draw_sizes"]

Cells = Mapping[str, Any]
SEARCHES = ("random", "weight", "prefix", "greedy", "exact")
COLORS = dict(zip(SEARCHES, ("#bbbbbb", "#8da0cb", "#fc8d62", "#66c2a5", "#1b7837"), strict=True))
LABELS = {
    "random": "random order",
    "weight": "weight order",
    "prefix": "priority order (paper)",
    "greedy": "greedy (ours)",
    "exact": "exact (ours)",
}


def draw_sizes(cells: Cells) -> Figure:
    """Kept features by training and search, and priorities."""
    figure = Figure(figsize=(12, 6.4))
    grid = figure.subplots(2, 2)
    for axes, eps in zip(grid[0], (0.02, 0.1), strict=True):
        _bars(axes, cells, f"crown {eps}", f"CROWN proofs, eps = {eps}")
    _bars(grid[1][0], cells, "ibp 0.02", "interval proofs, eps = 0.02")
    patches = [Patch(color=COLORS[search], label=LABELS[search]) for search in SEARCHES]
    grid[1][0].legend(handles=patches, fontsize=7, frameon=False, loc="upper left")
    axes = grid[1][1]
    for kind in TRAININGS:
        cell = cells.get(f"{kind} crown 0.02")
        if cell is None or not sum(cell["histogram"]):
            continue
        counts = np.array(cell["histogram"], float)
        places = (np.arange(len(counts)) + 0.5) / len(counts)
        axes.plot(places, counts / counts.sum(), label=kind)
    axes.set_yscale("log")
    axes.set_xlabel("priority, as share of the proof's largest", fontsize=8)
    axes.set_ylabel("share of features in use", fontsize=8)
    axes.set_title("priorities, CROWN proofs, eps = 0.02", fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    return figure


def _bars(axes: Axes, cells: Cells, suffix: str, title: str) -> None:
    kinds = list(TRAININGS)
    for position, search in enumerate(SEARCHES):
        for place, kind in enumerate(kinds):
            sizes = cells.get(f"{kind} {suffix}", {}).get("sizes", {}).get(search, [])
            if not sizes:
                continue
            x, mean = place + 0.16 * (position - 2), float(np.mean(sizes))
            axes.bar(x, mean, 0.15, color=COLORS[search])
            axes.text(x, mean, f"{mean:.1f}", ha="center", va="bottom", fontsize=6)
    names = [
        f"{k}\n{len(cells.get(f'{k} {suffix}', {}).get('sizes', {}).get('prefix', []))} proofs"
        for k in kinds
    ]
    axes.set_xticks(range(len(kinds)), names, fontsize=8)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 2 * axes.get_ylim()[1])
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    axes.set_ylabel("features kept (mean)", fontsize=8)
    axes.set_title(title, fontsize=9)


def draw_maps(cells: Cells) -> Figure | None:
    """The leading feature of each network on a few images; alpha below frozen."""
    kinds = [kind for kind in TRAININGS if kind in cells]
    if not kinds:
        return None
    count = len(cells[kinds[0]]["maps"])
    figure = Figure(figsize=(1.5 * (1 + 2 * len(kinds)), 1.6 * count + 0.5))
    grid = figure.subplots(count, 1 + 2 * len(kinds), squeeze=False)
    for row in range(count):
        pixels = cells[kinds[0]]["maps"][row]["pixels"]
        grid[row][0].imshow(_square(pixels), cmap="gray")
        for place, kind in enumerate(kinds):
            entry = cells[kind]["maps"][row]
            for shift, style in enumerate(("frozen", "alpha")):
                axes = grid[row][1 + 2 * place + shift]
                axes.imshow(_square(entry[style]), cmap="RdBu_r", vmin=-1, vmax=1)
                if row == 0:
                    axes.set_title(f"{kind}\n{style}", fontsize=8)
                if entry["outcome"] != "sufficient" and shift == 0:
                    axes.set_ylabel("not proved", fontsize=7)
    _bare(grid)
    figure.tight_layout()
    return figure


def draw_edit(cell: Mapping[str, Any] | None) -> Figure | None:
    """Leading features before and after an edit, and where the margin came from."""
    if cell is None:
        return None
    figure = Figure(figsize=(11, 3.4))
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    grid = left.subplots(2, 5, squeeze=False)
    left.subplots_adjust(left=0.03, right=0.97, top=0.78, bottom=0.03)
    for row, name in enumerate(("before", "after")):
        grid[row][0].imshow(_square(cell["center"]), cmap="gray")
        grid[row][0].set_title(name, fontsize=9)
        for axes, entry in zip(grid[row][1:], cell["maps"][name], strict=False):
            axes.imshow(_square(entry["map"]), cmap="RdBu_r", vmin=-1, vmax=1)
            color = "#d95f02" if entry["kept"] else "black"
            axes.set_title(f"feature {entry['feature']}", fontsize=8, color=color)
        for axes in grid[row][1 + len(cell["maps"][name]) :]:
            axes.set_axis_off()
    _bare(grid)
    outcome = {k: cell["comparison"][k]["outcome"] for k in ("before", "after")}
    left.suptitle(
        f"{cell['network']}, {cell['property']}: before {outcome['before']}, after "
        f"{outcome['after']}\nleading features, those kept in orange",
        fontsize=8,
    )
    change = cell["comparison"]["margin_change"]
    if change is not None:
        axes = right.subplots()
        right.subplots_adjust(left=0.2, right=0.97, bottom=0.1)
        names = ["biases", *(f"feature {e['feature']}" for e in change["largest"])]
        values = [change["constant"], *(e["change"] for e in change["largest"])]
        names.append("all others")
        values.append(change["features"] - sum(values[1:]))
        places = np.arange(len(names))[::-1]
        axes.barh(places, values, color=["#b2182b" if v < 0 else "#1b7837" for v in values])
        axes.set_yticks(places, names, fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_title(
            f"margin bound {change['before']:.3g} before, {change['after']:.3g} after: change by",
            fontsize=8,
        )
    return figure


def _square(text: str) -> np.ndarray:
    """A picture stored as one byte a pixel, 128 for zero, in hexadecimal."""
    return (np.frombuffer(bytes.fromhex(text), np.uint8).reshape(28, 28) - 128.0) / 127.0


def _bare(grid: np.ndarray) -> None:
    for axes in np.asarray(grid).ravel():
        axes.set_xticks([])
        axes.set_yticks([])
