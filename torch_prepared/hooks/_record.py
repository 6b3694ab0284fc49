"""What a hook did, as plain data that survives a checkpoint."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch_prepared.errors import SpecError

__all__ = ["HookRecord", "OnFailure", "OptimizerState", "Outcome"]

_E = TypeVar("_E", bound=enum.Enum)


class Outcome(enum.Enum):
    """What came of looking at the model."""

    HELD = "held"  #: margins were large enough; nothing changed
    EDITED = "edited"  #: weights were moved to a provable point
    FAILED = "failed"  #: no such point was found; weights are bit-identical to before


class OnFailure(enum.Enum):
    """What a failed edit during training does besides being recorded."""

    WARN = "warn"
    RAISE = "raise"
    IGNORE = "ignore"

    @classmethod
    def named(cls, name: str | OnFailure) -> OnFailure:
        """The policy called ``name``."""
        return _named(cls, name, "on_failure")


class OptimizerState(enum.Enum):
    """What becomes of the optimizer's state for weights that an edit moved.

    ``KEEP``: momentum and second moments stay; an edit moves weights by a percent or so, about
    what the optimizer itself does between two edits, so its averages stay valid. ``PROJECT``: also
    the part of the momentum that would lower an edited margin again is removed, so that the next
    steps do not walk straight back. ``RESET``: the state is dropped and starts anew.
    """

    KEEP = "keep"
    PROJECT = "project"
    RESET = "reset"

    @classmethod
    def named(cls, name: str | OptimizerState) -> OptimizerState:
        """The policy called ``name``."""
        return _named(cls, name, "optimizer_state")


def _named(kind: type[_E], name: str | _E, where: str) -> _E:
    try:
        return kind(name)
    except ValueError:
        known = ", ".join(str(member.value) for member in kind)
        raise SpecError(f"{where}: got {name!r}; expected one of {known}") from None


@dataclass(frozen=True)
class HookRecord:
    """One look at the model.

    Args:
        step: optimizer steps taken so far.
        outcome: what came of it.
        margin_before: lowest certified margin, output units, working precision; NaN if unknown.
        margin_after: likewise for the weights as the hook left them.
        distance: 2-norm of the weight change; 0 unless edited.
        relative_distance: the same over the 2-norm of the weights that may move.
        rounds: projections tried.
        gradients: backward passes for rows.
        seconds: wall time.
        cpu_seconds: process time.
        message: why it failed, else empty.
    """

    step: int
    outcome: Outcome
    margin_before: float
    margin_after: float
    distance: float
    relative_distance: float
    rounds: int
    gradients: int
    seconds: float
    cpu_seconds: float
    message: str = ""

    def to_json(self) -> dict[str, object]:
        """Plain data; numbers that are not finite become None."""
        plain = {**dataclasses.asdict(self), "outcome": self.outcome.value}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in plain.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> HookRecord:
        """The record that :meth:`to_json` wrote.

        Raises:
            SpecError: other keys, or values of other kinds.
        """
        kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        if set(data) != set(kinds):
            raise SpecError(f"hook record: got keys {sorted(data)}; expected {sorted(kinds)}")
        values: dict[str, object] = {}
        for name, kind in kinds.items():
            value = data[name]
            if kind == "float":
                value = math.nan if value is None else value
                good = isinstance(value, (int, float)) and not isinstance(value, bool)
            elif kind == "int":
                good = isinstance(value, int) and not isinstance(value, bool)
            else:
                good = isinstance(value, str)
            if not good:
                raise SpecError(f"hook record: got {name}={value!r}; expected {kind}")
            values[name] = value
        try:
            return cls(**{**values, "outcome": Outcome(values["outcome"])})  # type: ignore[arg-type]
        except ValueError as error:
            raise SpecError(f"hook record: {error}; expected held, edited or failed") from None
