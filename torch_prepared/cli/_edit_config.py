"""What the ``edit`` command is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch_prepared.cli._options import Settings

__all__ = ["EditConfig"]


@dataclass(frozen=True)
class EditConfig:
    """What ``edit`` is asked to do; see the command's options."""

    model: Path
    properties: tuple[Path, ...]
    output: Path
    certificate: Path
    method: str | None = None
    preserve: Path | None = None
    domain: tuple[float, float] | None = None
    norm: str | None = None
    time_limit: float | None = None
    margin: float | None = None
    layers: tuple[str, ...] | None = None
    keep: tuple[Path, ...] = ()
    holdout: tuple[Path, ...] = ()
    report: Path | None = None
    checkpoint: Path | None = None
    settings: Settings = field(default_factory=Settings)

    @property
    def sources(self) -> list[Path]:
        """Every file that is read."""
        files = [self.model, *self.properties, *self.keep, *self.holdout]
        return files if self.preserve is None else [*files, self.preserve]
