"""``torch-prepared edit``: change a network until its properties are certified."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish
from torch_prepared.cli._staging import StagedFiles, staged_files
from torch_prepared.cli.check import CheckConfig, Replay, replay_certificate

if TYPE_CHECKING:
    from torch import Tensor

    from torch_prepared.core.onnx import OnnxNetwork
    from torch_prepared.edit import EditReport
    from torch_prepared.edit.verify import CrossCheck
    from torch_prepared.specs import Property

__all__ = ["EditConfig", "command", "run_edit"]

logger = logging.getLogger(__name__)

_MODEL_SUFFIXES = (".onnx", ".onnx.gz")
_AFTER_SHARE, _AFTER_MOST = 0.2, 10.0


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
    settings: Settings = field(default_factory=Settings)


def run_edit(config: EditConfig) -> Outcome:
    """Edit, write, read back, replay the certificate, attack; files appear only if all agree.

    Raises:
        click.UsageError: an output that cannot be written.
        PreparedError: bad input; see ``edit.edit_network``.
    """
    if not config.output.name.endswith(_MODEL_SUFFIXES):
        raise click.UsageError(f"{config.output}: expected a name ending in .onnx or .onnx.gz")
    sources = [config.model, *config.properties]
    sources += [] if config.preserve is None else [config.preserve]
    with staged_files([config.output, config.certificate], sources) as staged:
        return _edit(config, staged)


def _edit(config: EditConfig, staged: StagedFiles) -> Outcome:
    # Imported here so that help and usage errors come without the delay of loading torch.
    from torch_prepared.cli._inputs import load_network, load_properties
    from torch_prepared.core.onnx import OnnxNetwork, save_onnx
    from torch_prepared.edit import edit_network
    from torch_prepared.edit.attack import find_counterexamples

    clock = time.monotonic()
    limit = config.time_limit
    after = _AFTER_MOST if limit is None else min(_AFTER_MOST, _AFTER_SHARE * limit)
    network = load_network(config.model, config.settings.device)
    properties = load_properties(config.properties, network)
    inputs, labels = _reference(config)
    seed = config.settings.seed
    before = find_counterexamples(network.graph, properties, time_limit=after / 4, seed=seed)
    logger.info("%d of %d properties are violated", int(before.violated.sum()), len(properties))
    left = None if limit is None else max(limit - after - (time.monotonic() - clock), 0.1)
    result = edit_network(
        network,
        properties,
        method=config.method or default_method(),
        preserve=inputs,
        labels=labels,
        domain=config.domain,
        norm=config.norm,
        layers=config.layers,
        margin=config.margin,
        time_limit=left,
        threads=config.settings.threads,
        seed=seed,
        progress=config.settings.progress,
        raise_on_failure=False,
    )
    report = result.report
    if result.certificate is None or not isinstance(result.model, OnnxNetwork):
        return _outcome(config, report, clock, "unknown", report.message or "no certified edit")
    save_onnx(result.model, {}, staged.paths[0])
    result.certificate.save(staged.paths[1])
    files = CheckConfig(
        staged.paths[1], staged.paths[0], config.properties, settings=config.settings
    )
    checked = None if result.check is None else (result.certificate, result.check)
    replay = replay_certificate(files, checked)
    if not replay.certified:
        reason = f"the files as written are not certified: {replay.reason}"
        return _outcome(config, report, clock, "unknown", reason, replay=replay)
    spare = after if limit is None else min(after, max(limit - (time.monotonic() - clock), 1.0))
    cross = _attack_file(staged.paths[0], properties, before.inputs, spare, seed)
    if cross.violations:
        reason = (
            "SOUNDNESS ALARM: onnxruntime violates a certified property "
            f"({cross.violations[0]}, margin {cross.smallest_margin:.3g}); nothing was kept; "
            "please report this network"
        )
        click.echo(f"error: {reason}", err=True)
        return _outcome(config, report, clock, "unknown", reason, replay=replay, cross=cross)
    staged.commit()
    return _outcome(config, report, clock, "certified", report.message, replay=replay, cross=cross)


def default_method() -> str:
    """The editor that chooses among the others, where there is one."""
    from torch_prepared.edit import EDITORS

    return "auto" if "auto" in EDITORS else "one_shot"


def _reference(config: EditConfig) -> tuple[Tensor | None, Tensor | None]:
    """Inputs and labels to preserve, as tensors."""
    import torch

    from torch_prepared.cli._inputs import load_reference

    if config.preserve is None:
        return None, None
    reference = load_reference(config.preserve)
    labels = None if reference.labels is None else torch.from_numpy(reference.labels)
    return torch.from_numpy(reference.inputs.astype("float64")), labels


def _attack_file(
    path: Path, properties: Sequence[Property], starts: Tensor, seconds: float, seed: int
) -> CrossCheck:
    """Attack the written network, starting from what violated the original one, too."""
    from torch_prepared.cli._inputs import load_network
    from torch_prepared.edit.verify import cross_check

    network: OnnxNetwork = load_network(path)
    return cross_check(network, properties, starts=starts[:, None], time_limit=seconds, seed=seed)


def _outcome(
    config: EditConfig,
    report: EditReport,
    clock: float,
    status: str,
    message: str,
    *,
    replay: Replay | None = None,
    cross: CrossCheck | None = None,
) -> Outcome:
    certified = status == "certified"
    checks = () if replay is None else replay.check.per_property
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
        "properties": checks,
        "attempts": report.attempts,
        "cross_check": cross,
    }
    code = ExitCode.PROVED if certified else ExitCode.UNKNOWN
    seconds = time.monotonic() - clock
    if not certified:
        return Outcome(code, data, f"UNKNOWN after {seconds:.1f} s: {message}; nothing was written")
    lines = [f"CERTIFIED in {seconds:.1f} s: {message}", *_describe(config, report, replay, cross)]
    return Outcome(code, data, "\n".join(lines))


def _describe(
    config: EditConfig, report: EditReport, replay: Replay | None, cross: CrossCheck | None
) -> list[str]:
    """Lines about a certified edit."""
    delta, lost = report.delta, report.drawdown
    lines = []
    if replay is not None:
        count = len(replay.check.per_property)
        lines.append(
            f"  properties   {count} proved by the checker, margin at least "
            f"{replay.check.margin:.6g}"
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
    if cross is not None:
        lines.append(
            f"  cross-check  onnxruntime on {cross.points} worst, corner and random inputs: "
            f"least margin {cross.smallest_margin:.6g}, no violation"
        )
    phases = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
    return [
        *lines,
        f"  seconds      {phases}",
        f"  written      {config.output}, {config.certificate}",
    ]


class _Method(click.ParamType[str]):
    """Name of an editor."""

    name = "method"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """All names."""
        # Imported here, as everywhere in this package, so that other help pages stay fast.
        from torch_prepared.edit import EDITORS

        return f"[{'|'.join(EDITORS)}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse unknown names."""
        from torch_prepared.edit import EDITORS

        if value not in EDITORS:
            self.fail(f"got {value!r}; expected one of {', '.join(EDITORS)}", param, ctx)
        return value


class _Domain(click.ParamType[tuple[float, float]]):
    """``LO,HI``."""

    name = "lo,hi"

    def convert(
        self,
        value: str | tuple[float, float],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[float, float]:
        """Two finite numbers in order."""
        if isinstance(value, tuple):
            return value
        try:
            low, high = map(float, value.split(","))
        except ValueError:
            low, high = math.nan, math.nan
        if not -math.inf < low <= high < math.inf:
            self.fail(f"got {value!r}; expected two numbers LO,HI with LO <= HI", param, ctx)
        return low, high


@click.command("edit")
@click.argument("model", type=FILE)
@click.argument("properties", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, required=True, help="Edited network (.onnx[.gz]).")
@click.option("--certificate", type=FILE, required=True, help="Its certificate (.json[.gz]).")
@click.option("--method", type=_Method(), help="Editor; by default the one that chooses.")
@click.option("--preserve", type=FILE, help="Inputs to stay the same on (.npz: inputs, labels).")
@click.option("--domain", type=_Domain(), help="Range of inputs to stay the same on.")
@click.option(
    "--norm",
    type=click.Choice(["1", "2", "inf", "1+inf", "behavior"]),
    help="Distance to minimize; by default the editor chooses.",
)
@click.option("--time-limit", type=click.FloatRange(0, min_open=True), help="Seconds.")
@click.option(
    "--margin", type=click.FloatRange(0), help="Safety margin to aim at, in output units."
)
@click.option("--layers", help="Names of the layers that may change, with commas between.")
@common_options
def command(
    settings: Settings,
    model: Path,
    properties: tuple[Path, ...],
    output: Path,
    certificate: Path,
    method: str | None,
    preserve: Path | None,
    domain: tuple[float, float] | None,
    norm: str | None,
    time_limit: float | None,
    margin: float | None,
    layers: str | None,
) -> None:
    """Change MODEL (.onnx) as little as possible until PROPERTIES (.vnnlib) are certified.

    Nothing is written unless the certificate, read back from disk, replays on the network read
    back from disk and an attack in onnxruntime finds nothing.
    """
    if preserve is not None and domain is not None:
        raise click.UsageError("--preserve and --domain: got both; expected one of them")
    config = EditConfig(
        model=model,
        properties=properties,
        output=output,
        certificate=certificate,
        method=method,
        preserve=preserve,
        domain=domain,
        norm=norm,
        time_limit=time_limit,
        margin=margin,
        layers=None if layers is None else tuple(name.strip() for name in layers.split(",")),
        settings=settings,
    )
    finish(run_edit(config), settings.json)
