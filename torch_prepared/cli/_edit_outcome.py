"""What ``edit`` says of its outcome, to people and to programs."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

from torch_prepared.cli._outcome import ExitCode, Outcome

if TYPE_CHECKING:
    from torch_prepared.cli._edit_config import EditConfig
    from torch_prepared.cli.check import Replay
    from torch_prepared.edit import EditReport
    from torch_prepared.edit.verify import CrossCheck

__all__ = ["edit_outcome"]


def edit_outcome(
    config: EditConfig,
    report: EditReport,
    clock: float,
    status: str,
    message: str,
    *,
    replay: Replay | None = None,
    cross: CrossCheck | None = None,
) -> Outcome:
    """What ``edit`` prints and returns.

    Args:
        config: what was asked.
        report: the edit's numbers.
        clock: when the command started.
        status: ``"certified"`` or ``"unknown"``.
        message: one line for people.
        replay: of the certificate, on the files as written.
        cross: the attack in onnxruntime.
    """
    certified = status == "certified"
    checks = () if replay is None else replay.check.per_property
    properties = [
        {
            **dataclasses.asdict(prop if certified else dataclasses.replace(prop, after=None)),
            "status": checks[i].status if i < len(checks) else "unknown",
            "margin": checks[i].margin if i < len(checks) else math.nan,
            "leaves": checks[i].leaves if i < len(checks) else 0,
        }
        for i, prop in enumerate(report.properties)
    ]
    data = {
        "status": status,
        "method": report.method,
        "message": message,
        "seconds": time.monotonic() - clock,
        "phases": report.seconds,
        "margin": math.nan if replay is None else replay.check.margin,
        "delta": report.delta,
        "drawdown": report.drawdown,
        "certificate": config.certificate if certified else None,
        "output": config.output if certified else None,
        "locality": report.locality if certified else None,
        "properties": properties,
        "generalization": report.generalization if certified else None,
        "conflicts": report.conflicts,
        "attempts": report.attempts,
        "cross_check": cross,
    }
    code = ExitCode.PROVED if certified else ExitCode.UNKNOWN
    seconds = time.monotonic() - clock
    if not certified:
        text = f"UNKNOWN after {seconds:.1f} s: {message}; no network was written"
        return Outcome(code, data, text)
    lines = [f"CERTIFIED in {seconds:.1f} s: {message}", *_describe(config, report, replay, cross)]
    return Outcome(code, data, "\n".join(lines))


def _describe(
    config: EditConfig, report: EditReport, replay: Replay | None, cross: CrossCheck | None
) -> list[str]:
    """Lines about a certified edit."""
    delta, lost = report.delta, report.drawdown
    lines = []
    if replay is not None:
        kept = sum(prop.role == "keep" for prop in report.properties)
        count = len(replay.check.per_property)
        lines.append(
            f"  properties   {count}{f' ({kept} of them kept)' if kept else ''} proved by the "
            f"checker, margin at least {replay.check.margin:.6g}"
        )
    lines.append(
        f"  weights      {delta.changed:,} changed; l1 {delta.l1:.4g}, l2 {delta.l2:.4g}, "
        f"linf {delta.linf:.4g}, relative {100 * delta.relative_l2:.3g} %"
    )
    if lost is not None:
        parts = [f"output change {100 * lost.relative:.3g} % of its spread"]
        if lost.agreement is not None:
            parts.insert(0, f"same decision {100 * lost.agreement:.2f} %")
        if lost.accuracy_before is not None and lost.accuracy_after is not None:
            change = f"{100 * lost.accuracy_before:.2f} % -> {100 * lost.accuracy_after:.2f} %"
            parts.insert(0, f"accuracy {change}")
        lines.append(f"  behavior     {', '.join(parts)} ({lost.samples} inputs, {lost.source})")
    if report.locality is not None and report.locality.outside is not None:
        outside = report.locality.outside
        lines.append(
            f"  locality     largest output change {outside.largest:.4g} on {outside.samples} "
            "inputs outside of the regions"
        )
    other = report.generalization
    if other is not None:
        lines.append(
            f"  holdout      of {other.properties}: hold {other.holds_before} -> "
            f"{other.holds_after}, violated {other.violated_before} -> {other.violated_after}"
        )
    if cross is not None:
        lines.append(
            f"  cross-check  onnxruntime on {cross.points} worst, corner and random inputs: "
            f"least margin {cross.smallest_margin:.6g}, no violation"
        )
    phases = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    written = [config.output, config.certificate]
    written += [] if config.report is None else [config.report]
    return [
        *lines,
        f"  seconds      {phases}",
        f"  written      {', '.join(map(str, written))}",
    ]
