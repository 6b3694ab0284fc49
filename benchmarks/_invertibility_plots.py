"""Figures of the invertibility study, drawn from its JSON alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks import _figure
from torch_prepared.invert.pictures import draw_curve, draw_map

__all__ = ["plot"]

Row = Mapping[str, object]
_LOWER, _UPPER = "tab:blue", "tab:red"


def _value(row: Row, key: str) -> float:
    found = row[key]
    return math.inf if found is None else float(found)  # type: ignore[arg-type]


def _select(rows: Sequence[Row], metric: str, case: str = "") -> list[Row]:
    return [r for r in rows if str(r["metric"]) == metric and case in str(r["case"])]


def plot(record: Mapping[str, object], folder: Path, stem: str) -> None:
    """Write ``<stem>.png`` (pairs, map, curve), ``_matching.png`` and ``_mnist.png``."""
    by_case: Mapping[str, Sequence[Row]] = record["rows_by_case"]  # type: ignore[assignment]
    rows = [row for part in by_case.values() for row in part]
    drawing, axes = _figure.new(2, 2, (11, 9))
    _line(axes[0, 0], rows)
    _plane(axes[0, 1], rows)
    _map(axes[1, 0], rows)
    _curve(axes[1, 1], rows)
    drawing.suptitle(f"{record['device']}, {record['threads']} threads", fontsize=9)
    _figure.save(drawing, folder / f"{stem}.png", dpi=130)
    if _select(rows, "r_AB"):
        drawing, axis = _figure.new(1, 1, (6, 4))
        _matching(axis, rows)
        _figure.save(drawing, folder / f"{stem}_matching.png", dpi=130)
    pictures = [r for r in _select(rows, "same outputs") if r.get("picture")]
    if pictures:
        _figure.save(_images(pictures), folder / f"{stem}_mnist.png", dpi=130)


def _line(axes: Axes, rows: Sequence[Row]) -> None:
    """The one-input network, with the injective intervals and the pairs."""
    for row in _select(rows, "graph"):
        axes.plot(row["x"], row["y"], "k", linewidth=1)
    for metric, color in (("R", _UPPER), ("r", _LOWER)):
        for row in _select(rows, metric, "one-dimensional"):
            center = float(row["center"][0])  # type: ignore[index]
            radius = float(row["lower"])  # type: ignore[arg-type]
            axes.axvspan(center - radius, center + radius, color=color, alpha=0.12)
            axes.axvline(center, color="k", linewidth=0.4)
    axes.set(title="1-10-10-1: R (red) and r (blue) at three points", xlabel="x", ylabel="f(x)")


def _plane(axes: Axes, rows: Sequence[Row]) -> None:
    """Both points of the Brusselator with their squares and nearest preimages."""
    case = "published" if _select(rows, "R auto crown", "published") else "brusselator"
    for row in _select(rows, "R auto crown", case):
        center = np.array(row["center"])
        axes.plot(*center, "k+")
        for other, color in ((row, _UPPER), *((r, _LOWER) for r in _inner(rows, row))):
            radius = float(other["lower"])  # type: ignore[arg-type]
            corner = tuple(center - radius)
            style = {"fill": False, "edgecolor": color}
            axes.add_patch(Rectangle(corner, 2 * radius, 2 * radius, **style))
        if row["witness"] is not None:
            x = np.array(row["witness"])
            axes.plot(x[:, 0], x[:, 1], "o--", color=_UPPER, markersize=4)
    axes.set(title=f"{case}: R (red), r (blue), nearest preimages", xlabel="x", ylabel="y")
    axes.autoscale_view()
    axes.set_aspect("equal")


def _inner(rows: Sequence[Row], row: Row) -> list[Row]:
    found = _select(rows, "r norm inf", str(row["case"]))
    return [r for r in found if r["center"] == row["center"]]


def _map(axes: Axes, rows: Sequence[Row]) -> None:
    found = _select(rows, "R map")
    if found:
        centers = np.array([r["center"] for r in found], dtype=float)
        draw_map(axes, centers, np.array([float(r["lower"]) for r in found]), "certified R")  # type: ignore[arg-type]
    axes.set_title("certified radius without another preimage")


def _curve(axes: Axes, rows: Sequence[Row]) -> None:
    for metric in ("R curve", "r curve"):
        found = _select(rows, metric)
        if found:
            draw_curve(
                axes,
                [float(r["parameter"]) for r in found],  # type: ignore[arg-type]
                [_value(r, "lower") for r in found],
                [_value(r, "upper") for r in found],
            )
    axes.set(title="R (above) and r (below) along the parameter", xlabel="b")


def _matching(axes: Axes, rows: Sequence[Row]) -> None:
    for metric, color in (("r_AB", _LOWER), ("r_BA", _UPPER)):
        found = _select(rows, metric)
        place = np.array([float(r["sparsity"]) for r in found])  # type: ignore[arg-type]
        low = np.array([_value(r, "lower") for r in found])
        high = np.array([_value(r, "upper") for r in found])
        top = np.where(np.isfinite(high), high, np.nan)
        axes.plot(place, low, "^-", color=color, label=f"{metric}, no information lost")
        axes.plot(place, top, "v:", color=color, label=f"{metric}, lost")
    axes.set(xlabel="share of weights removed", ylabel="radius around the origin")
    axes.legend(fontsize=7)


def _images(found: Sequence[Row]) -> Figure:
    drawing, axes = _figure.new(len(found), 3, (6, 2.1 * len(found)), squeeze=False)
    for line, row in zip(axes, found, strict=True):
        center, goal = row["images"]  # type: ignore[misc]
        titles = ("center", f"same outputs, {_value(row, 'upper'):.3f} away", "as this image")
        for axis, picture, title in zip(line, (center, row["picture"], goal), titles, strict=True):
            axis.imshow(np.reshape(picture, (28, 28)), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=8)
            axis.axis("off")
    return drawing
