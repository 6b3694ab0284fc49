"""What every figure's script shares: its command line, and pictures drawn without a display."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._common import DATA, FIGURES, RESULTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["make_parser", "new", "parse", "save"]


def make_parser(
    doc: str | None,
    *,
    commands: Sequence[str] = ("run", "plot", "all"),
    default: str = "all",
    threads: int | None = None,
    data: str = "",
) -> argparse.ArgumentParser:
    """The options that figures share.

    Args:
        doc: of the script.
        commands: ``run`` measures and writes JSON, the others read it.
        default: of them.
        threads: default of ``--threads``; None for a script without.
        data: what the folder ``--data`` holds; empty for a script without.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("command", nargs="?", choices=commands, default=default)
    if threads is not None:
        parser.add_argument("--threads", type=int, default=threads, help="of each process")
    if data:
        parser.add_argument("--data", type=Path, default=DATA, help=f"folder that holds {data}")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to test the script")
    parser.add_argument("--output", type=Path, help="JSON file to write or read")
    return parser


def parse(parser: argparse.ArgumentParser, stem: str) -> argparse.Namespace:
    """Parse the command line, with ``output`` and ``figure`` filled in from the files' stem.

    ``stem`` may name options in braces.
    """
    options = parser.parse_args()
    name = stem.format(**vars(options)) + ("_smoke" if options.smoke else "")
    options.output = options.output or RESULTS / f"{name}.json"
    chosen = getattr(options, "figure", None)
    options.figure = chosen or FIGURES / f"{options.output.stem}.png"
    return options


def new(rows: int, columns: int, size: tuple[float, float], **axes: Any) -> tuple[Figure, Any]:
    """An empty figure in inches and its axes (see ``Figure.subplots``); needs no display."""
    from matplotlib.figure import Figure  # only those who draw need it

    drawing = Figure(figsize=size)
    return drawing, drawing.subplots(rows, columns, **axes)


def save(drawing: Figure, path: Path, dpi: int = 150) -> None:
    """Write a picture, its panels arranged to fit unless it has a layout of its own."""
    if drawing.get_layout_engine() is None:
        drawing.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=dpi)
    print(f"wrote {path}")
