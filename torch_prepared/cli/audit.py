"""``torch-prepared audit``: has a network been changed, where, and what does the change do?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_prepared.cli._number import Number
from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish

if TYPE_CHECKING:
    from torch_prepared.edit.audit import Audit

__all__ = ["AuditConfig", "command", "run_audit"]

_CODES = {
    "same": ExitCode.PROVED,
    "bounded": ExitCode.PROVED,
    "different": ExitCode.REFUTED,
    "unknown": ExitCode.UNKNOWN,
}


@dataclass(frozen=True)
class AuditConfig:
    """What ``audit`` is asked to do; see the command's options."""

    before: Path
    after: Path
    data: Path | None = None
    domain: tuple[float, float] | None = None
    radius: float = 0.0
    points: int = 8
    tolerance: float | None = None
    exact: bool = False
    time_limit: float | None = None
    settings: Settings = field(default_factory=Settings)


def run_audit(config: AuditConfig) -> Outcome:
    """Compare two networks.

    Raises:
        PreparedError: bad input; see ``edit.audit.audit_networks``.
    """
    # Imported here so that help and usage errors come without the delay of loading torch.
    import torch

    from torch_prepared.cli._inputs import load_network, load_reference
    from torch_prepared.edit.audit import audit_networks

    inputs = labels = None
    if config.data is not None:
        reference = load_reference(config.data)
        inputs = torch.from_numpy(reference.inputs.astype("float64"))
        labels = None if reference.labels is None else torch.from_numpy(reference.labels)
    audit = audit_networks(
        load_network(config.before),
        load_network(config.after),
        inputs=inputs,
        labels=labels,
        domain=config.domain,
        radius=config.radius,
        points=config.points,
        tolerance=config.tolerance,
        exact=config.exact,
        time_limit=config.time_limit,
        seed=config.settings.seed,
        progress=config.settings.progress,
    )
    data = {
        "status": audit.verdict,
        "message": audit.message,
        "seconds": audit.seconds,
        "layers": audit.layers,
        "data": audit.data,
        "suspects": [s for s in audit.suspects[:8] if s.difference > 0],
        "bounds": [{"point": i, "bound": b.bound, "proved": b.proved} for i, b in audit.bounds],
        "largest": [
            {"point": i, "lower": d.lower, "upper": d.upper, "complete": d.complete}
            for i, d in audit.largest
        ],
    }
    return Outcome(_CODES[audit.verdict.value], data, _describe(audit))


def _describe(audit: Audit) -> str:
    lines = [f"{audit.verdict.value.upper()} after {audit.seconds:.1f} s: {audit.message}"]
    for change in audit.layers:
        shape = f", rank {change.rank}, {100 * change.top_share:.0f} % in one direction"
        lines.append(
            f"  {change.name}: {change.changed:,} of {change.entries:,} entries changed, relative "
            f"{100 * change.relative:.3g} %, largest {change.largest:.3g} "
            f"({change.outlier:.2g} deviations)"
            + (shape if change.top_share == change.top_share else "")
            + f"; histogram distance {change.statistic:.2g} (p = {change.p_value:.2g})"
        )
    if audit.data is not None:
        seen = audit.data
        accuracy = ""
        if seen.accuracy_before is not None and seen.accuracy_after is not None:
            before, after = 100 * seen.accuracy_before, 100 * seen.accuracy_after
            accuracy = f", accuracy {before:.2f} % -> {after:.2f} %"
        lines.append(
            f"  data: same decision on {100 * seen.agreement:.2f} % of {seen.samples:,} inputs"
            f"{accuracy}; outputs differ by {seen.mean_difference:.3g} on average, at most "
            f"{seen.largest_difference:.3g}"
        )
    for suspect in audit.suspects[:5]:
        if suspect.difference > 0:
            where = f"data point {suspect.origin}"
            if suspect.distance > 0:
                where = f"input at distance {suspect.distance:.3g} from {where}"
            decision = (
                f"class {suspect.before.argmax()} -> {suspect.after.argmax()}, "
                if suspect.flips
                else ""
            )
            lines.append(f"  {where}: {decision}outputs differ by {suspect.difference:.3g}")
    for i, bound in audit.bounds:
        word = "proved" if bound.proved else "not confirmed"
        lines.append(f"  ball around data point {i}: difference at most {bound.bound:.3g} ({word})")
    for i, found in audit.largest:
        lines.append(
            f"  ball around data point {i}: largest difference from {found.lower:.6g} (reached) to "
            f"{found.upper:.6g} (branch and bound's claim)"
        )
    return "\n".join(lines)


def _domain(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, float] | None:
    """``LO,HI``."""
    if value is None:
        return None
    try:
        low, high = map(float, value.split(","))
    except ValueError:
        raise click.BadParameter(f"got {value!r}; expected two numbers LO,HI") from None
    return low, high


@click.command("audit")
@click.argument("before", type=FILE)
@click.argument("after", type=FILE)
@click.option("--data", type=FILE, help="Inputs, perhaps with labels (.npz, .npy).")
@click.option("--domain", callback=_domain, metavar="LO,HI", help="Limits of valid inputs.")
@click.option(
    "--radius", type=Number(0), default=0.0, help="Search and bound balls of this radius."
)
@click.option("--points", type=click.IntRange(0, 100_000), default=8, help="Balls to bound.")
@click.option("--tolerance", type=Number(0), help="Outputs may differ by that much.")
@click.option(
    "--exact", is_flag=True, help="Largest difference on each ball by branch and bound; tiny nets."
)
@click.option("--time-limit", type=Number(0, min_open=True), help="Seconds.")
@common_options
def command(
    settings: Settings,
    before: Path,
    after: Path,
    data: Path | None,
    domain: tuple[float, float] | None,
    radius: float,
    points: int,
    tolerance: float | None,
    exact: bool,
    time_limit: float | None,
) -> None:
    """Compare the network AFTER (.onnx) with a reference BEFORE (.onnx).

    Without --data and --domain only weights are compared: which layers moved, and how.

    Exit codes: 0 the same function, or within --tolerance on all balls examined; 10 an input
    with another decision (or beyond the tolerance) is shown; 20 neither.
    """
    config = AuditConfig(
        before, after, data, domain, radius, points, tolerance, exact, time_limit, settings
    )
    finish(run_audit(config), settings.json)
