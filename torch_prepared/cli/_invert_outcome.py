"""What ``torch-prepared invert`` prints, and its exit codes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from torch_prepared.cli._outcome import ExitCode, Outcome

if TYPE_CHECKING:
    from torch_prepared.cli.invert import InvertConfig
    from torch_prepared.invert import CollisionBound, Pair, RadiusBound

__all__ = ["distance_outcome", "radius_outcome"]


def radius_outcome(config: InvertConfig, answer: RadiusBound, kept: list[Path]) -> Outcome:
    """What was found of a radius; ``kept`` are the files that were written."""
    witness = None
    if answer.witness is not None:
        x, y = answer.witness.floats
        witness = {"x": x, "y": y, "distance": answer.witness.distance(answer.norm)}
    proved = answer.evidence.value in ("certified", "interval")
    if answer.interrupted:
        code = ExitCode.INTERRUPTED
    elif answer.witness is not None or answer.upper == 0.0:
        code = ExitCode.REFUTED
    elif answer.outcome.value == "excluded" and proved:
        code = ExitCode.PROVED
    else:
        code = ExitCode.UNKNOWN
    data = {
        "status": answer.outcome,
        "problem": "matching" if config.match is not None else config.problem,
        "norm": config.norm,
        "lower": answer.lower,
        "upper": answer.upper,
        "proved": answer.proved,
        "evidence": answer.evidence,
        "separation": answer.separation,
        "output_tolerance": answer.output_tolerance,
        "witness": witness,
        "integers": answer.integers,
        "seconds": answer.seconds,
        "message": answer.message,
        "steps": answer.steps,
        "written": kept,
    }
    return Outcome(code, data, _describe(answer, kept))


def _describe(answer: RadiusBound, kept: list[Path]) -> str:
    near = answer.output_tolerance
    top = f"{answer.upper:.8g}" if math.isfinite(answer.upper) else "none found"
    lines = [
        f"{answer.outcome.value.upper()} in {answer.seconds:.1f} s: {answer.message}",
        f"  no collision  within {answer.lower:.8g}, {answer.evidence.value}"
        + (f", for pairs at least {answer.separation:g} apart" if answer.separation else ""),
        f"  proved        within {answer.proved:.8g}, without trust in a solver",
        f"  collision     at {top}" + (f", of outputs within {near:g}" if near else ""),
        *_describe_pair(answer.witness),
    ]
    lines += [f"  {step}" for step in answer.steps]
    if kept:
        lines.append(f"  written       {', '.join(map(str, kept))}")
    return "\n".join(lines)


def _describe_pair(pair: Pair | None) -> list[str]:
    lines = []
    for name, point in zip("xy", pair.floats if pair is not None else (), strict=False):
        numbers = ", ".join(f"{v:.17g}" for v in point[:8])
        lines.append(f"    {name} = [{numbers}{', ...' if len(point) > 8 else ''}]")
    return lines


def distance_outcome(config: InvertConfig, answer: CollisionBound) -> Outcome:
    """Never a proof: the upper bound is a solver's claim."""
    code = ExitCode.UNKNOWN if answer.witness is None else ExitCode.REFUTED
    problem = "matching" if config.match is not None else config.problem
    data = {
        "status": answer.outcome,
        "problem": f"{problem} distance",
        "norm": config.norm,
        "radius": config.radius,
        "lower": answer.lower,
        "upper": answer.upper,
        "evidence": "claimed",
        "output_tolerance": answer.output_tolerance,
        "witness": None
        if answer.witness is None
        else dict(zip("xy", answer.witness.floats, strict=True)),
        "integers": answer.integers,
        "seconds": answer.seconds,
        "message": answer.message,
    }
    what = "outputs of the second network differ" if config.match else "inputs are apart"
    lines = [
        f"{answer.outcome.value.upper()} in {answer.seconds:.1f} s: {answer.message}",
        f"  where outputs are the same within radius {config.radius:g}, {what}",
        f"  by at most    {answer.upper:.8g}, claimed",
        f"  by at least   {answer.lower:.8g}, of this exact pair"
        if answer.witness is not None
        else "  by at least   0, no pair was found",
        *_describe_pair(answer.witness),
    ]
    return Outcome(ExitCode.INTERRUPTED if answer.interrupted else code, data, "\n".join(lines))
