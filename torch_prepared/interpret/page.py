"""One HTML page about proofs, self-contained: pictures are inside, nothing is fetched or run."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from torch import Tensor

from torch_prepared.interpret._pictures import draw_bars, draw_histogram, draw_maps
from torch_prepared.interpret.compare import MarginChange, ProofComparison
from torch_prepared.interpret.explain import Explanation

__all__ = ["render_page"]

_MOST_MAPS = 23
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}
h2{font-size:1.2rem;margin-top:2.2rem;border-top:1px solid #ccc;padding-top:1rem}
h3{font-size:1rem;margin-top:1.4rem}table{border-collapse:collapse;font-size:13px}
td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left}img{max-width:100%;display:block;margin:.6rem 0}
.sufficient{color:#1b7837;font-weight:600}.open{color:#b2182b;font-weight:600}
.note{color:#555;font-size:13px}
"""
_MAPS = {
    "frozen": "with the relaxation held fixed",
    "moving": "through all bounds, the relaxation moving with the region",
    "alpha": "with relaxation slopes optimized for each feature",
}


def render_page(
    title: str,
    explanations: Sequence[Explanation],
    comparisons: Sequence[ProofComparison] = (),
    *,
    names: tuple[str, str] = ("before", "after"),
    maps: str = "frozen",
) -> str:
    """The page.

    Args:
        title: heading.
        explanations: one section each.
        comparisons: for each explanation, in the same order, with another network; or none.
        names: what the two networks of a comparison are called.
        maps: the style of the maps, to be described.
    """
    parts = [f"<h1>{escape(title)}</h1>", _introduction(maps)]
    for position, explanation in enumerate(explanations):
        parts.append(f"<h2>{escape(explanation.features.prop.name)}</h2>")
        parts.append(_explanation(explanation))
        if position < len(comparisons):
            parts.append(_comparison(comparisons[position], names))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _introduction(maps: str) -> str:
    return (
        '<p class="note">A <i>feature</i> is the interval that the proof gives one scalar of the '
        "last hidden layer. A map is the gradient of the middle of that interval with respect to "
        f"the center of the input region, {escape(_MAPS[maps])}: red where a larger input raises "
        "the feature, blue where it lowers it, each map scaled by its largest value.</p>"
    )


def _explanation(explanation: Explanation) -> str:
    features, chosen = explanation.features, explanation.selected
    state = "sufficient" if chosen.sufficient else "open"
    numbers = {
        "bounds": features.method.value,
        "hidden layer": f"{features.cut.hidden}, {features.size} scalars",
        "margin with all features": f"{features.margin:.6g}",
        "features in use": str(chosen.candidates),
        "kept": f"{len(chosen.kept)} ({_how_small(explanation)})",
        "margin of the reduced proof (checker)": f"{chosen.margin:.6g}",
        "reduced proofs tried": str(chosen.calls),
        "seconds": ", ".join(f"{k} {v:.2f}" for k, v in explanation.seconds.items()),
    }
    rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in numbers.items())
    return "\n".join(
        [
            f'<p><span class="{state}">{chosen.outcome.value.upper()}.</span> '
            f"{escape(chosen.statement)}</p>",
            f"<table>{rows}</table>",
            _map_pictures(explanation),
            _image(draw_histogram(features.priority, chosen.kept), "priorities"),
            _table(explanation),
        ]
    )


def _how_small(explanation: Explanation) -> str:
    chosen = explanation.selected
    if not chosen.sufficient:
        return "nothing proved"
    if chosen.minimum:
        return "the fewest possible"
    words = "no single one can be dropped" if chosen.irreducible else "not reduced further"
    return f"{words}; at least {chosen.fewest} needed" if chosen.fewest > 1 else words


def _map_pictures(explanation: Explanation) -> str:
    features = explanation.features
    region, shape = features.prop.region, features.cut.graph.input_shape
    center = ((region.lower + region.upper) / 2).reshape(shape)
    titled: list[tuple[str, Tensor]] = [("weighted sum", explanation.total)]
    for index, values in zip(explanation.shown.tolist(), explanation.maps, strict=True):
        titled.append((f"feature {index}", values))
    what = "leading features (none is kept)"
    if explanation.selected.sufficient and len(explanation.selected.kept):
        what = "kept features"
    more = len(titled) - 1 - _MOST_MAPS
    note = f'<p class="note">{more} more are not shown.</p>' if more > 0 else ""
    picture = draw_maps(center, titled[: _MOST_MAPS + 1])
    return f"<h3>What the {what} look at</h3>{_image(picture, 'feature maps')}{note}"


def _table(explanation: Explanation) -> str:
    features = explanation.features
    clause = features.binding
    shares = features.contributions[clause]
    rows = "".join(
        f"<tr><td>{i}</td><td>{float(features.lower[i]):.5g}</td>"
        f"<td>{float(features.upper[i]):.5g}</td><td>{float(features.rows[clause, i]):+.5g}</td>"
        f"<td>{float(features.priority[i]):.5g}</td><td>{float(shares[i]):+.5g}</td></tr>"
        for i in explanation.shown.tolist()
    )
    constant = float(features.offset[clause])
    return (
        "<table><tr><th>feature</th><th>lower</th><th>upper</th><th>coefficient</th>"
        f"<th>priority</th><th>adds to the margin</th></tr>{rows}</table>"
        f'<p class="note">Coefficient and share in the margin of clause {clause}, the one with the '
        f"least margin; its constant is {constant:+.5g}. Shares of all features and the constant "
        "add up to the margin with all features.</p>"
    )


def _comparison(found: ProofComparison, names: tuple[str, str]) -> str:
    first, second = (escape(name) for name in names)
    rows = [
        ("margin with all features", *(f"{e.features.margin:.6g}" for e in _pair(found))),
        ("part of the radius proved", *(f"{f:.3g}" for f in found.fraction)),
        ("features in use", *(str(e.selected.candidates) for e in _pair(found))),
        ("kept", *(_kept(e) for e in _pair(found))),
    ]
    if found.shared is not None:
        where = f"kept on {min(found.fraction):.3g} of the radius, where both are proved"
        rows.append((where, *(_kept(e) for e in found.shared)))
    body = "".join(f"<tr><td>{a}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows)
    return "\n".join(
        [
            f"<h3>{first} and {second}</h3>",
            f"<table><tr><th></th><th>{first}</th><th>{second}</th></tr>{body}</table>",
            f"<p>Common kept features (Jaccard) {found.jaccard:.3g}; rank correlation of "
            f"priorities {found.rank_correlation:.3g}; cosine of the weighted maps "
            f"{found.map_cosine:.3g}.</p>",
            f"<p>Maps of {first}:</p>",
            _map_pictures(found.before),
            "" if found.change is None else _margin_change(found.change, first, second),
        ]
    )


def _pair(found: ProofComparison) -> tuple[Explanation, Explanation]:
    return found.before, found.after


def _kept(explanation: Explanation) -> str:
    chosen = explanation.selected
    if not chosen.sufficient:
        return chosen.outcome.value
    listed = ", ".join(map(str, chosen.kept.tolist()[:12]))
    return f"{len(chosen.kept)}: {listed}" if len(chosen.kept) else "0"


def _margin_change(change: MarginChange, first: str, second: str) -> str:
    leading = change.features.abs().argsort(descending=True, stable=True)[:12].tolist()
    values = [change.constant, *(float(change.features[i]) for i in leading)]
    labels = ["constant (biases)", *(f"feature {i}" for i in leading)]
    rest = float(change.features.sum()) - sum(values[1:])
    values.append(rest)
    labels.append("all other features")
    picture = draw_bars(labels, values, "change of the margin bound")
    return (
        f"<p>The margin bound of clause {change.clause} is {change.before:.6g} for {first} and "
        f"{change.after:.6g} for {second}. Where the difference comes from:</p>"
        + _image(picture, "change of the margin")
    )


def _image(png: bytes, what: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{escape(what)}" src="data:image/png;base64,{data}">'
