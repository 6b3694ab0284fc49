"""What a report page shows, read from a report file field by field."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch_prepared.cli._report_file import Fields, FileStamp
from torch_prepared.errors import ReportError

__all__ = ["View", "ViewAttempt", "ViewBand", "ViewLayer", "ViewProperty", "read_view"]

ROLES = ("edit", "keep", "holdout")
STATES = ("certified", "holds", "violated", "unknown")


@dataclass(frozen=True)
class ViewProperty:
    """A property's name, role, and state, lower and upper margin before and after ('' if none)."""

    name: str
    role: str
    before: tuple[str, float, float]
    after: tuple[str, float, float]
    reason: str


@dataclass(frozen=True)
class ViewLayer:
    """Change of one layer."""

    name: str
    op: str
    size: int
    changed: int
    sizes: dict[str, float]


@dataclass(frozen=True)
class ViewBand:
    """Output change at some distances from the regions."""

    kind: str
    nearest: float
    farthest: float
    samples: int
    largest: float
    relative: float
    agreement: float


@dataclass(frozen=True)
class ViewAttempt:
    """One candidate."""

    method: str
    note: str
    seconds: float
    certified: bool
    margin: float
    lost: tuple[float, float]
    failed: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """Everything on the page; ``drawdown`` is empty where nothing was measured."""

    status: str
    method: str
    message: str
    seconds: float
    margin: float
    phases: dict[str, float]
    delta: dict[str, float]
    layers: tuple[ViewLayer, ...]
    drawdown: dict[str, float]
    drawdown_source: str
    inside: ViewBand | None
    outside: ViewBand | None
    bands: tuple[ViewBand, ...]
    properties: tuple[ViewProperty, ...]
    conflicts: tuple[str, ...]
    attempts: tuple[ViewAttempt, ...]
    cross_points: int
    cross_margin: float
    model: FileStamp
    output: FileStamp | None
    property_files: tuple[FileStamp, ...]
    other_files: tuple[tuple[str, FileStamp], ...]


def read_view(files: Fields, result: Fields) -> View:
    """Check and read all that the page needs.

    Raises:
        ReportError: a field is missing or of another kind.
    """
    delta, drawdown = result.inner("delta"), result.optional("drawdown")
    locality, cross = result.optional("locality"), result.optional("cross_check")
    sizes = ("l1", "l2", "linf", "relative_l2", "changed")
    status = _one_of(result, "status", ("certified", "unknown"))
    kept = ("agreement", "accuracy_before", "accuracy_after", "relative", "largest", "samples")
    return View(
        status=status,
        method=result.text("method"),
        message=result.text("message"),
        seconds=result.number("seconds"),
        margin=result.number("margin"),
        phases=result.inner("phases").numbers(),
        delta={name: delta.number(name) for name in sizes},
        layers=tuple(_layer(item) for item in delta.items("by_layer")),
        drawdown={} if drawdown is None else {name: drawdown.number(name) for name in kept},
        drawdown_source="" if drawdown is None else drawdown.text("source"),
        inside=_band(locality, "inside"),
        outside=_band(locality, "outside"),
        bands=() if locality is None else tuple(_read_band(b) for b in locality.items("bands")),
        properties=tuple(_property(item) for item in result.items("properties")),
        conflicts=_conflicts(result),
        attempts=tuple(_attempt(item) for item in result.items("attempts")),
        cross_points=0 if cross is None else cross.count("points"),
        cross_margin=math.nan if cross is None else cross.number("smallest_margin"),
        model=files.stamp("model"),
        output=None if files.optional("output") is None else files.stamp("output"),
        property_files=tuple(item.as_stamp() for item in files.items("properties")),
        other_files=tuple(
            (role, item.as_stamp()) for role in ("keep", "holdout") for item in files.items(role)
        ),
    )


def _one_of(fields: Fields, name: str, allowed: tuple[str, ...]) -> str:
    value = fields.text(name)
    if value not in allowed:
        raise ReportError(
            f"{fields.where}: field {name!r}: got {value!r}; expected one of {', '.join(allowed)}"
        )
    return value


def _standing(fields: Fields | None) -> tuple[str, float, float]:
    if fields is None:
        return "", math.nan, math.nan
    return _one_of(fields, "state", STATES), fields.number("lower"), fields.number("upper")


def _property(item: Fields) -> ViewProperty:
    return ViewProperty(
        name=item.text("name"),
        role=_one_of(item, "role", ROLES),
        before=_standing(item.inner("before")),
        after=_standing(item.optional("after")),
        reason=item.text("reason"),
    )


def _layer(item: Fields) -> ViewLayer:
    names = ("l1", "l2", "linf", "relative_l2")
    return ViewLayer(
        name=item.text("name"),
        op=item.text("op"),
        size=item.count("size"),
        changed=item.count("changed"),
        sizes={name: item.number(name) for name in names},
    )


def _band(locality: Fields | None, name: str) -> ViewBand | None:
    fields = None if locality is None else locality.optional(name)
    return None if fields is None else _read_band(fields)


def _read_band(item: Fields) -> ViewBand:
    return ViewBand(
        kind=item.text("kind"),
        nearest=item.number("nearest"),
        farthest=item.number("farthest"),
        samples=item.count("samples"),
        largest=item.number("largest"),
        relative=item.number("relative"),
        agreement=item.number("agreement"),
    )


def _conflicts(result: Fields) -> tuple[str, ...]:
    """One line of names per group."""
    groups = result.data.get("conflicts")
    wrapped = Fields({str(i): g for i, g in enumerate(groups if isinstance(groups, list) else [])},
                     f"{result.where}: conflicts")  # fmt: skip
    return tuple(", ".join(wrapped.texts(name)) for name in wrapped.data)


def _attempt(item: Fields) -> ViewAttempt:
    score = item.data.get("score")
    lost = (math.nan, math.nan)
    if isinstance(score, list) and len(score) == 2:
        pair = Fields({"a": score[0], "b": score[1]}, f"{item.where}: score")
        lost = (pair.number("a"), pair.number("b"))
    return ViewAttempt(
        method=item.text("method"),
        note=item.text("note"),
        seconds=item.number("seconds"),
        certified=item.flag("certified"),
        margin=item.number("margin"),
        lost=lost,
        failed=tuple(item.texts("failed")),
    )
