"""``torch-prepared report``: a page of pictures and tables from the report file of an edit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish
from torch_prepared.cli._staging import staged_files

if TYPE_CHECKING:
    from torch_prepared.cli._report_view import View

__all__ = ["ReportConfig", "command", "run_report"]


@dataclass(frozen=True)
class ReportConfig:
    """What ``report`` is asked to do; see the command's options."""

    result: Path
    output: Path
    draw_map: bool = True
    settings: Settings = field(default_factory=Settings)


def run_report(config: ReportConfig) -> Outcome:
    """Read, verify, draw and write.

    Raises:
        ReportError: a malformed report, or files that changed since.
        click.UsageError: an output that cannot be written.
    """
    # Imported here so that help and usage errors come without the delay of loading torch.
    from torch_prepared.cli._report_file import load_record
    from torch_prepared.cli._report_page import render_page
    from torch_prepared.cli._report_view import read_view

    view = read_view(*load_record(config.result))
    with staged_files([config.output], [config.result]) as staged:
        pictures, notes = _draw(config, view)
        staged.paths[0].write_text(render_page(view, pictures, notes), encoding="utf-8")
        size = staged.paths[0].stat().st_size
        staged.commit()
    data = {
        "status": "written",
        "page": config.output,
        "bytes": size,
        "pictures": sorted(pictures),
        "edit": view.status,
    }
    text = f"wrote {config.output} ({size / 1024:.0f} KiB): {view.status}, {view.message}"
    return Outcome(ExitCode.PROVED, data, text)


def _draw(config: ReportConfig, view: View) -> tuple[Mapping[str, bytes], Mapping[str, str]]:
    """Pictures and a line under each, by section."""
    from torch_prepared.cli import _report_pictures as pictures

    made: dict[str, bytes] = {}
    notes: dict[str, str] = {}
    if config.draw_map:
        found = _map(config, view)
        if isinstance(found, str):
            notes["map"] = found
        else:
            made["map"], notes["map"] = found
    if view.properties:
        made["margins"] = pictures.draw_margins(view)
    if view.layers:
        made["layers"] = pictures.draw_layers(view)
    if view.bands:
        made["locality"] = pictures.draw_locality(view)
        notes["locality"] = _locality_note(view)
    if view.attempts or view.phases:
        made["attempts"] = pictures.draw_attempts(view)
        notes["attempts"] = "Left: what each candidate costs in behavior. Right: where time went."
    return made, notes


def _map(config: ReportConfig, view: View) -> tuple[bytes, str] | str:
    """The map with its note, or why there is none."""
    from torch_prepared.cli._inputs import load_network, load_properties
    from torch_prepared.cli._report_map import choose_property, map_plane
    from torch_prepared.cli._report_pictures import draw_map

    if view.output is None:
        return "No map: the edit wrote no network."
    folder = config.result.resolve().parent
    before = load_network(view.model.verified(folder))
    after = load_network(view.output.verified(folder))
    files = [stamp.verified(folder) for stamp in view.property_files]
    properties = load_properties(files, before)
    load_properties(files, after)
    margins = [p.before[2] for p in view.properties if p.role == "edit"]
    prop = choose_property(properties, margins)
    plane = map_plane(before.graph, after.graph, prop, progress=config.settings.progress)
    if plane is None:
        return f"No map: the region of {prop.name} has fewer than two free coordinates."
    note = (
        f"{prop.name}: the plane through the region's center, the original's worst input (red "
        "cross) and the edited network's worst input (green cross). Black: the region. Red line: "
        "margin zero."
    )
    return draw_map(plane), note


def _locality_note(view: View) -> str:
    parts = []
    for name, band in (("inside", view.inside), ("outside", view.outside)):
        if band is not None:
            same = "" if math.isnan(band.agreement) else f", same decision {band.agreement:.2%}"
            parts.append(
                f"{name}: {band.samples} inputs, largest output change {band.largest:.4g}{same}"
            )
    return "; ".join(parts) + ". Reference inputs and samples around the regions."


@click.command("report")
@click.argument("result", type=FILE)
@click.option("-o", "--output", type=FILE, help="Page to write; RESULT with .html by default.")
@click.option(
    "--map/--no-map",
    "with_map",
    default=True,
    help="Draw the edited region before and after; reads the networks and properties.",
)
@common_options
def command(settings: Settings, result: Path, output: Path | None, with_map: bool) -> None:
    """Write a self-contained HTML page of RESULT (.json), the file of ``edit --report``.

    The networks and properties named in RESULT must be those of the edit, byte for byte.
    """
    stem = result.name.removesuffix(".gz").removesuffix(".json")
    page = result.with_name(f"{stem}.html") if output is None else output
    finish(run_report(ReportConfig(result, page, with_map, settings)), settings.json)
