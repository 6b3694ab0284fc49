"""The report page: one HTML file, pictures inside, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence

from torch_prepared.cli._report_view import View, ViewProperty

__all__ = ["render_page"]

MOST_ROWS = 1000
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22262a; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { margin: .3rem 0; } .note { color: #5f666d; font-size: .9rem; }
.state { display: inline-block; padding: 0 .5rem; border-radius: .3rem; color: #fff;
         font-size: .85rem; }
.certified, .holds { background: #2a7f62; } .violated { background: #c8452f; }
.unknown { background: #6b7280; }
.tiles { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1rem 0; }
.tile { border: 1px solid #d9dde1; border-radius: .4rem; padding: .5rem .8rem; min-width: 8rem; }
.tile b { display: block; font-size: 1.15rem; }
.tile span { color: #5f666d; font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid #e6e9ec;
         vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { max-width: 100%; } code { font-size: .85em; overflow-wrap: anywhere; }
"""


def render_page(view: View, pictures: Mapping[str, bytes], notes: Mapping[str, str]) -> str:
    """The whole page as text.

    Args:
        view: what to show; all its text is escaped.
        pictures: PNG bytes by section: ``margins``, ``layers``, ``locality``, ``map``,
            ``attempts``; absent ones are left out.
        notes: one line under a picture, by section.
    """
    sections = [
        _section("Margins before and after", "margins", pictures, notes),
        _section("The edited region", "map", pictures, notes),
        _section("Change by layer", "layers", pictures, notes),
        _section("Change by distance from the regions", "locality", pictures, notes),
        _section("Attempts and time", "attempts", pictures, notes),
        _properties(view.properties),
        _layers(view),
        _attempts(view),
        _files(view),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Edit of {_text(view.model.path.name)}: {_text(view.status)}</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n{_head(view)}\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _number(value: float, unit: str = "", factor: float = 1.0) -> str:
    return "&ndash;" if math.isnan(value) else f"{factor * value:.4g}{unit}"


def _state(state: str) -> str:
    return f'<span class="state {_text(state)}">{_text(state)}</span>' if state else "&ndash;"


def _head(view: View) -> str:
    proved = sum(p.after[0] == "certified" for p in view.properties)
    asked = sum(p.role != "holdout" for p in view.properties)
    tiles = [
        (f"{proved} of {asked}", "properties certified"),
        (_number(view.margin), "least margin proved"),
        (_number(view.delta["relative_l2"], " %", 100), "of the weights' norm moved"),
        (_number(view.seconds, " s"), "in all"),
    ]
    lost = view.drawdown
    if lost:
        before, after = lost["accuracy_before"], lost["accuracy_after"]
        if not (math.isnan(before) or math.isnan(after)):
            tiles.insert(2, (f"{100 * before:.2f} → {100 * after:.2f} %", "accuracy"))
        if not math.isnan(lost["agreement"]):
            tiles.insert(2, (_number(lost["agreement"], " %", 100), "same decisions"))
        tiles.insert(2, (_number(lost["relative"], " %", 100), "output change, of its spread"))
    if view.outside is not None:
        tiles.append((_number(view.outside.largest), "largest output change outside"))
    if view.cross_points:
        tiles.append((_number(view.cross_margin), "least margin met in onnxruntime"))
    cells = "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in tiles)
    where = ""
    if lost:
        count, source = f"{lost['samples']:.0f}", _text(view.drawdown_source)
        where = f'<p class="note">Behavior measured on {count} inputs ({source}).</p>'
    conflicts = "".join(f"<p>Contradict each other: {_text(c)}</p>" for c in view.conflicts)
    return (
        f"<h1>{_text(view.model.path.name)} {_state(view.status)}</h1>\n"
        f"<p>{_text(view.message)} (method {_text(view.method)})</p>\n{conflicts}"
        f'<div class="tiles">{cells}</div>\n' + (f'<p class="note">{where}</p>' if lost else "")
    )


def _section(title: str, name: str, pictures: Mapping[str, bytes], notes: Mapping[str, str]) -> str:
    note = f'<p class="note">{_text(notes[name])}</p>' if name in notes else ""
    if name not in pictures:
        return f"<h2>{_text(title)}</h2>\n{note}" if note else ""
    data = base64.b64encode(pictures[name]).decode("ascii")
    image = f'<img alt="{_text(title)}" src="data:image/png;base64,{data}">'
    return f"<h2>{_text(title)}</h2>\n{image}\n{note}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int]) -> str:
    """A table of cells that are HTML already."""
    kind = [' class="n"' if i in numeric else "" for i in range(len(heads))]
    head = "".join(f"<th{k}>{h}</th>" for h, k in zip(heads, kind, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{k}>{c}</td>" for c, k in zip(row, kind, strict=True)) + "</tr>"
        for row in rows[:MOST_ROWS]
    )
    cut = len(rows) - MOST_ROWS
    more = f'<p class="note">and {cut} more</p>' if cut > 0 else ""
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>{more}"


def _properties(properties: Sequence[ViewProperty]) -> str:
    heads = ("property", "role", "before", "proved ≥", "attacked", "after", "proved ≥", "attacked")
    rows = [
        (
            _text(p.name)
            + (f'<br><span class="note">{_text(p.reason)}</span>' if p.reason else ""),
            _text(p.role),
            _state(p.before[0]),
            _number(p.before[1]),
            _number(p.before[2]),
            _state(p.after[0]),
            _number(p.after[1]),
            _number(p.after[2]),
        )
        for p in properties
    ]
    note = (
        "certified: by the checker. holds: by bounds in floating point, not replayed. attacked: "
        "the smallest safety margin that an attack met."
    )
    table = _table(heads, rows, (3, 4, 6, 7))
    return f'<h2>Properties</h2>\n{table}\n<p class="note">{note}</p>'


def _layers(view: View) -> str:
    heads = ("layer", "operator", "parameters", "changed", "1-norm", "2-norm", "∞-norm", "relative")
    rows = [
        (
            _text(layer.name),
            _text(layer.op),
            f"{layer.size:,}",
            f"{layer.changed:,}",
            *(_number(layer.sizes[name]) for name in ("l1", "l2", "linf")),
            _number(layer.sizes["relative_l2"], " %", 100),
        )
        for layer in view.layers
    ]
    total = view.delta
    rows.append(
        (
            "<b>all</b>",
            "",
            f"{sum(layer.size for layer in view.layers):,}",
            f"{total['changed']:,.0f}",
            *(_number(total[name]) for name in ("l1", "l2", "linf")),
            _number(total["relative_l2"], " %", 100),
        )
    )
    return f"<h2>Weights</h2>\n{_table(heads, rows, range(2, 8))}"


def _attempts(view: View) -> str:
    if not view.attempts:
        return ""
    heads = ("seconds", "method", "candidate", "state", "margin", "output change", "not proved")
    rows = [
        (
            _number(a.seconds),
            _text(a.method),
            _text(a.note),
            _state("certified" if a.certified else "unknown"),
            _number(a.margin),
            _number(a.lost[1], " %", 100),
            _text(", ".join(a.failed)),
        )
        for a in view.attempts
    ]
    return f"<h2>Attempts</h2>\n{_table(heads, rows, (0, 4, 5))}"


def _files(view: View) -> str:
    files = [("model", view.model)]
    files += [] if view.output is None else [("output", view.output)]
    files += [("property", stamp) for stamp in view.property_files]
    files += list(view.other_files)
    rows = [
        (_text(role), _text(stamp.path.as_posix()), f"<code>{_text(stamp.sha256)}</code>")
        for role, stamp in files
    ]
    return f"<h2>Files</h2>\n{_table(('role', 'path', 'SHA-256'), rows, ())}"
