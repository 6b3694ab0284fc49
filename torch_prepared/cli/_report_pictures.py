"""Pictures of a report page, as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from torch_prepared.cli._report_map import PlaneMap
from torch_prepared.cli._report_view import View, ViewProperty

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_attempts", "draw_layers", "draw_locality", "draw_map", "draw_margins"]

RED, GREEN, GRAY, INK, BLUE = "#c8452f", "#2a7f62", "#9aa0a6", "#22262a", "#3b6ea8"
CLASSES = (
    "#8ecae6", "#f6bd60", "#b5c99a", "#e5989b", "#b8a9d9", "#ced4da", "#84dcc6", "#ffd6a5",
    "#a0c4ff", "#d4a373",
)  # fmt: skip
SINGLE = 60  #: properties or layers shown one by one
NAME = 28
_EXTREME = 1e12


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=130, format="png")
    return stream.getvalue()


def _drawn(values: Iterable[float]) -> np.ndarray:
    """Numbers that axes can show; NaN stays, and is not drawn."""
    made: np.ndarray = np.clip(np.array(list(values), dtype=np.float64), -_EXTREME, _EXTREME)
    return made


def _short(name: str) -> str:
    """A name that fits beside an axis and means itself, not mathematics."""
    cut = name if len(name) <= NAME else name[: NAME - 1] + "…"
    return cut.replace("$", r"\$")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def draw_margins(view: View) -> bytes:
    """Lower bounds of and attacks on every property's margin, before and after."""
    shown = sorted(view.properties, key=lambda p: (p.role, _order(p.before[1])))
    single = len(shown) <= SINGLE
    figure = _figure(9.5, 1.4 + 0.27 * len(shown) if single else 4.2)
    axes = figure.add_subplot()
    if single:
        _margins_by_name(axes, shown)
    else:
        _margins_sorted(axes, shown)
    values = np.abs(_drawn(v for p in shown for v in (*p.before[1:], *p.after[1:])))
    positive = values[values > 1e-12]
    # The margins proved after an edit are small against those missed before it.
    fine = float(np.quantile(positive, 0.25)) if positive.size else 1.0
    if positive.size and positive.max() > 20 * fine:
        scale = {"linthresh": 10.0 ** math.floor(math.log10(fine)), "linscale": 1.0}
        (axes.set_xscale if single else axes.set_yscale)("symlog", **scale)
    axes.legend(frameon=False, fontsize=8, loc="best")
    _plain(axes)
    return _png(figure)


def _order(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def _margins_by_name(axes: Axes, shown: Sequence[ViewProperty]) -> None:
    rows = np.arange(len(shown))[::-1]
    columns = {
        "before: lower bound": (_drawn(p.before[1] for p in shown), RED, "o"),
        "before: found by an attack": (_drawn(p.before[2] for p in shown), RED, "x"),
        "after: lower bound": (_drawn(p.after[1] for p in shown), GREEN, "o"),
        "after: found by an attack": (_drawn(p.after[2] for p in shown), GREEN, "x"),
    }
    starts, ends = columns["before: lower bound"][0], columns["after: lower bound"][0]
    axes.hlines(rows, starts, ends, color=GRAY, lw=1, zorder=1)
    axes.axvline(0, color=INK, lw=1)
    for label, (values, color, marker) in columns.items():
        if np.isfinite(values).any():
            axes.scatter(values, rows, s=30, color=color, marker=marker, label=label, zorder=3)
    role = {"edit": "", "keep": " (kept)", "holdout": " (held out)"}
    axes.set_yticks(rows, [_short(p.name) + role[p.role] for p in shown])
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_xlabel("safety margin: above zero the property holds", fontsize=9)


def _margins_sorted(axes: Axes, shown: Sequence[ViewProperty]) -> None:
    axes.axhline(0, color=INK, lw=1)
    for label, column, color in (
        ("before: lower bound", _drawn(p.before[1] for p in shown), RED),
        ("after: lower bound", _drawn(p.after[1] for p in shown), GREEN),
    ):
        values = np.sort(column[np.isfinite(column)])
        axes.plot(np.arange(len(values)), values, color=color, label=label)
    axes.set_xlabel("properties, sorted by their margin", fontsize=9)
    axes.set_ylabel("safety margin", fontsize=9)


def draw_layers(view: View) -> bytes:
    """Relative change of every layer; of very many those that changed most, in order."""
    layers = view.layers
    if len(layers) > SINGLE:
        least = sorted((_order(a.sizes["relative_l2"]) for a in layers), reverse=True)[SINGLE - 1]
        layers = tuple(a for a in layers if _order(a.sizes["relative_l2"]) >= least)[:SINGLE]
    figure = _figure(9.5, 1.1 + 0.3 * len(layers))
    axes = figure.add_subplot()
    rows = np.arange(len(layers))[::-1]
    change = _drawn(100 * layer.sizes["relative_l2"] for layer in layers)
    axes.barh(rows, change, height=0.6, color=BLUE)
    for row, layer, value in zip(rows, layers, change, strict=True):
        text = f" {value:.3g} %, {layer.changed:,} of {layer.size:,} changed"
        axes.text(value, row, text, va="center", fontsize=8, color=INK)
    axes.set_yticks(rows, [_short(layer.name) for layer in layers])
    axes.set_xlim(0, 1.6 * change[np.isfinite(change)].max(initial=0.0) or 1.0)
    axes.set_xlabel("change of the layer's parameters, percent of their 2-norm", fontsize=9)
    _plain(axes)
    return _png(figure)


def draw_locality(view: View) -> bytes:
    """Output change against the distance from the regions."""
    figure = _figure(9.5, 3.0)
    axes = figure.add_subplot()
    least = min([b.nearest for b in view.bands if b.nearest > 0], default=1.0)
    for kind, label, color, style in (
        ("shell", "samples around the regions", BLUE, "o-"),
        ("reference", "reference inputs", INK, "s"),
    ):
        bands = [b for b in view.bands if b.kind == kind]
        low, high = _drawn(b.nearest for b in bands), _drawn(b.farthest for b in bands)
        change = _drawn(100 * b.relative for b in bands)
        middle, reach = (low + high) / 2, np.abs(high - low) / 2
        if bands:
            axes.errorbar(
                middle, change, xerr=reach, fmt=style, color=color, ms=5, lw=1, label=label
            )
    if view.inside is not None:
        value = 100 * view.inside.relative
        axes.scatter([0], [value], color=RED, s=40, zorder=3, label="inside the regions")
    axes.set_xscale("symlog", linthresh=least, linscale=0.3)
    axes.set_xlim(left=-0.1 * least)
    axes.set_xlabel("distance from the nearest region, in its largest coordinate", fontsize=9)
    axes.set_ylabel("output change, % of spread", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return _png(figure)


def draw_attempts(view: View) -> bytes:
    """Every candidate against the clock, and the seconds of each phase."""
    figure = _figure(9.5, 3.0)
    left, right = figure.subplots(1, 2, width_ratios=[1.4, 1.0])
    good = [a for a in view.attempts if a.certified and math.isfinite(a.lost[1])]
    bad = [a for a in view.attempts if not a.certified]
    left.scatter(
        [a.seconds for a in good], [100 * a.lost[1] for a in good], color=GREEN, s=36,
        label="certified",
    )  # fmt: skip
    if bad:
        place = [0.97] * len(bad)
        left.scatter(
            [a.seconds for a in bad], place, color=RED, marker="x", s=36, label="not certified",
            transform=left.get_xaxis_transform(),
        )  # fmt: skip
    left.set_xlabel("seconds", fontsize=9)
    left.set_ylabel("output change, % of spread", fontsize=9)
    left.set_xlim(left=0)
    left.set_ylim(0, max([130 * a.lost[1] for a in good], default=0.0) or 1.0)
    if view.attempts:
        left.legend(frameon=False, fontsize=8)
    _plain(left)
    phases = {k: v for k, v in view.phases.items() if k != "total" and math.isfinite(v)}
    phases = dict(list(phases.items())[:SINGLE])
    rows = np.arange(len(phases))[::-1]
    right.barh(rows, list(phases.values()), height=0.6, color=GRAY)
    right.set_yticks(rows, [_short(name) for name in phases])
    for row, value in zip(rows, phases.values(), strict=True):
        right.text(value, row, f" {value:.2f} s", va="center", fontsize=8, color=INK)
    right.set_xlim(0, 1.3 * max([*phases.values(), 1e-3]))
    right.set_xlabel("seconds by phase", fontsize=9)
    _plain(right)
    return _png(figure)


def draw_map(plane: PlaneMap) -> bytes:
    """Safety margin and decision on the plane, before and after."""
    figure = _figure(9.5, 8.2)
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    extent = (plane.a[0], plane.a[-1], plane.b[0], plane.b[-1])
    finite = np.concatenate([m[np.isfinite(m)].ravel() for m in plane.margins])
    top = float(np.quantile(np.abs(finite), 0.98)) if finite.size else 1.0
    norm = TwoSlopeNorm(0.0, -max(top, 1e-30), max(top, 1e-30))
    for column, when in enumerate(("before", "after")):
        axes = grid[0, column]
        shade = axes.imshow(
            plane.margins[column], extent=extent, origin="lower", cmap="RdYlGn", norm=norm,
            aspect="auto",
        )  # fmt: skip
        _zero_line(axes, plane, column)
        axes.set_title(f"{when}: safety margin", fontsize=10, color=INK)
        _decisions(grid[1, column], plane, column, extent)
        grid[1, column].set_title(f"{when}: {_kind(plane)}", fontsize=10, color=INK)
        for axes in grid[:, column]:
            axes.plot(*plane.outline.T, color=INK, lw=1.4)
            for (x, y), color in zip(plane.worst, (RED, GREEN), strict=True):
                axes.plot(x, y, marker="x", color=color, ms=8, mew=2)
            axes.tick_params(labelsize=8)
    figure.colorbar(shade, ax=grid[0, :].tolist(), shrink=0.9).ax.tick_params(labelsize=8)
    figure.supxlabel("half-widths of the region, toward the original's worst input", fontsize=9)
    figure.supylabel("toward the edited network's worst input", fontsize=9)
    return _png(figure)


def _zero_line(axes: Axes, plane: PlaneMap, column: int) -> None:
    values = plane.margins[column]
    if np.isfinite(values).all() and values.min() < 0 < values.max():
        axes.contour(plane.a, plane.b, values, levels=[0.0], colors=[RED], linewidths=1.4)


def _kind(plane: PlaneMap) -> str:
    return "largest output" if plane.outputs[0].shape[2] > 1 else "output"


def _decisions(
    axes: Axes, plane: PlaneMap, column: int, extent: tuple[float, float, float, float]
) -> None:
    """Largest output in one color per class; a single output as it is."""
    if plane.outputs[0].shape[2] == 1:
        both = np.concatenate([y[np.isfinite(y)].ravel() for y in plane.outputs])
        low, high = (both.min(), both.max()) if both.size else (0.0, 1.0)
        axes.imshow(
            plane.outputs[column][:, :, 0], extent=extent, origin="lower", cmap="viridis",
            vmin=low, vmax=high, aspect="auto",
        )  # fmt: skip
        return
    chosen = [y.argmax(axis=2) for y in plane.outputs]
    present = np.unique(np.concatenate([c.ravel() for c in chosen]))
    colors = [CLASSES[i % len(CLASSES)] for i in range(len(present))]
    axes.imshow(
        np.searchsorted(present, chosen[column]), extent=extent, origin="lower",
        cmap=ListedColormap(colors), vmin=-0.5, vmax=len(present) - 0.5, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    if column == 1 and len(present) <= 2 * len(CLASSES):
        marks = [Patch(color=c, label=str(k)) for c, k in zip(colors, present, strict=True)]
        axes.legend(handles=marks, fontsize=8, title="output", title_fontsize=8, loc="upper right")
