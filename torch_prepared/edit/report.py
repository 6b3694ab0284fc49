"""What is reported of every property: how the original and the edited network stand to it."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch_prepared.specs import Property

__all__ = [
    "Generalization",
    "PropertyReport",
    "Role",
    "Standing",
    "State",
    "report_properties",
]


class Role(enum.StrEnum):
    """What a property is to an edit."""

    EDIT = "edit"  #: must hold afterwards
    KEEP = "keep"  #: holds before and must still hold
    HOLDOUT = "holdout"  #: asked of no one; shows how far the edit generalizes


class State(enum.StrEnum):
    """How one network stands to one property."""

    CERTIFIED = "certified"  #: the checker's verdict
    HOLDS = "holds"  #: bounds in float64 say so; not replayed by the checker
    VIOLATED = "violated"  #: an input was found
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Standing:
    """How one network stands to one property.

    Args:
        state: see :class:`State`.
        lower: lower bound of the safety margin, NaN where there is none. The checker's when
            certified, else of bounds in float64.
        upper: smallest safety margin that an attack met, NaN without an attack.
    """

    state: State
    lower: float
    upper: float


@dataclass(frozen=True)
class PropertyReport:
    """One property before and after.

    Args:
        name: of the property.
        role: see :class:`Role`.
        before: the original network.
        after: the edited network; None when there is none.
        reason: why it is not certified; empty when it is or need not be.
    """

    name: str
    role: Role
    before: Standing
    after: Standing | None
    reason: str = ""


@dataclass(frozen=True)
class Generalization:
    """How properties outside of the edit fare; ``holds`` by bounds, ``violated`` by attack."""

    properties: int
    holds_before: int
    holds_after: int
    violated_before: int
    violated_after: int

    @classmethod
    def of(cls, properties: Sequence[PropertyReport]) -> Generalization | None:
        """Counts over the properties held out; None when there are none, or no edit."""
        held = [p for p in properties if p.role is Role.HOLDOUT]
        after = [p.after.state for p in held if p.after is not None]
        if not held or len(after) < len(held):
            return None
        before = [p.before.state for p in held]
        return cls(
            properties=len(held),
            holds_before=before.count(State.HOLDS),
            holds_after=after.count(State.HOLDS),
            violated_before=before.count(State.VIOLATED),
            violated_after=after.count(State.VIOLATED),
        )


def report_properties(
    by_role: Mapping[Role, Sequence[Property]],
    before: Sequence[Standing],
    after: Sequence[Standing] | None,
    reasons: Mapping[int, str],
) -> tuple[PropertyReport, ...]:
    """One report per property.

    Args:
        by_role: the properties, in the order of the other arguments.
        before: standings of the original network.
        after: of the edited one; None without an edit.
        reasons: why a property is not certified, by position.
    """
    pairs = [(role, prop) for role, props in by_role.items() for prop in props]
    return tuple(
        PropertyReport(
            prop.name, role, before[i], None if after is None else after[i], reasons.get(i, "")
        )
        for i, (role, prop) in enumerate(pairs)
    )
