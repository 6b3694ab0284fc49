"""``torch-prepared pointwise``: change a network until listed examples provably come out right."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from torch_prepared.cli._number import Number
from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish
from torch_prepared.cli._staging import StagedFiles, staged_files

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torch_prepared.certify import PointCertificate
    from torch_prepared.certify.compute import ComputeType
    from torch_prepared.core.graph import Graph
    from torch_prepared.core.onnx import OnnxNetwork
    from torch_prepared.edit.pointwise import PointEditResult

    Result = PointEditResult[nn.Module | OnnxNetwork | Graph]

__all__ = ["PointwiseConfig", "command", "run_pointwise"]

_MODEL_SUFFIXES = (".onnx", ".onnx.gz")


@dataclass(frozen=True)
class PointwiseConfig:
    """What ``pointwise`` is asked to do; see the command's options."""

    model: Path
    examples: Path
    output: Path
    certificate: Path
    keep: Path | None = None
    keep_weight: float | None = None
    preserve: Path | None = None
    layer: str | None = None
    norm: str | None = None
    solver: str = "highs"
    verify: str = "exact"
    compute: ComputeType = "float32"
    free: int | None = None
    margin: float | None = None
    budget: float | None = None
    radius: float | None = None
    lift: str = "sequential"
    ball_certificate: Path | None = None
    ball_properties: Path | None = None
    time_limit: float | None = None
    settings: Settings = field(default_factory=Settings)

    @property
    def sources(self) -> list[Path]:
        """Every file that is read."""
        more = [path for path in (self.keep, self.preserve) if path is not None]
        return [self.model, self.examples, *more]

    @property
    def targets(self) -> list[Path]:
        """Every file that is written."""
        more = [p for p in (self.ball_certificate, self.ball_properties) if p is not None]
        return [self.output, self.certificate, *more]


def run_pointwise(config: PointwiseConfig) -> Outcome:
    """Edit, write, read back, replay; files appear only if all agree.

    Raises:
        click.UsageError: options that do not go together, or an output that cannot be written.
        PreparedError: bad input; see ``edit.pointwise.edit_points``.
    """
    if not config.output.name.endswith(_MODEL_SUFFIXES):
        raise click.UsageError(f"{config.output}: expected a name ending in .onnx or .onnx.gz")
    balls = (config.radius, config.ball_certificate, config.ball_properties)
    if len({value is None for value in balls}) != 1:
        raise click.UsageError(
            "--radius, --ball-certificate and --ball-properties: got some of them; expected all "
            "three or none"
        )
    with staged_files(config.targets, config.sources) as staged:
        return _edit(config, staged)


def _edit(config: PointwiseConfig, staged: StagedFiles) -> Outcome:
    # Imported here so that help and usage errors come without the delay of loading torch.
    import torch

    from torch_prepared.cli._examples import load_examples
    from torch_prepared.cli._inputs import load_network
    from torch_prepared.core.onnx import OnnxNetwork, save_onnx
    from torch_prepared.edit.pointwise import Outcome as Edited
    from torch_prepared.edit.pointwise import edit_points

    clock = time.monotonic()
    network = load_network(config.model)
    examples = load_examples(config.examples)
    keep, _ = _reference(config.keep)
    preserve, labels = _reference(config.preserve)
    inputs, targets = torch.from_numpy(examples.inputs), torch.from_numpy(examples.targets)
    result = edit_points(
        network,
        inputs,
        targets,
        layer=config.layer,
        norm=config.norm,
        keep=keep,
        keep_weight=config.keep_weight,
        preserve=preserve,
        labels=labels,
        margin=config.margin,
        budget=config.budget,
        free=config.free,
        solver=config.solver,
        verify=config.verify,
        compute=config.compute,
        time_limit=config.time_limit,
        threads=config.settings.threads,
        seed=config.settings.seed,
        progress=config.settings.progress,
    )
    if result.outcome is not Edited.EDITED or result.certificate is None:
        return _outcome(config, result, clock, "unknown", result.message)
    model = result.model
    certificate = result.certificate
    if config.radius is not None:
        left = None
        if config.time_limit is not None:
            left = max(1.0, config.time_limit - (time.monotonic() - clock))
        lifted, reason = _lift(config, model, inputs, targets, preserve, labels, left, staged)
        if lifted is None:
            return _outcome(config, result, clock, "unknown", reason)
        model, certificate = lifted
    if not isinstance(model, OnnxNetwork):
        return _outcome(config, result, clock, "unknown", "the edit returned no ONNX network")
    save_onnx(model, {}, staged.paths[0])
    certificate.save(staged.paths[1])
    reason = _replay(config, staged)
    if reason:
        return _outcome(config, result, clock, "unknown", reason)
    staged.commit()
    return _outcome(config, result, clock, "certified", result.message)


def _lift(
    config: PointwiseConfig,
    model: nn.Module | OnnxNetwork | Graph,
    inputs: Tensor,
    targets: Tensor,
    preserve: Tensor | None,
    labels: Tensor | None,
    seconds: float | None,
    staged: StagedFiles,
) -> tuple[tuple[OnnxNetwork, PointCertificate] | None, str]:
    """The network certified on balls, with a certificate of the examples for it."""
    from torch_prepared.certify import PointCertificate as Points
    from torch_prepared.certify import PointClaims, Verdict
    from torch_prepared.core.onnx import OnnxNetwork
    from torch_prepared.edit.pointwise import ball_properties, lift_to_balls
    from torch_prepared.specs.vnnlib import save_vnnlib

    if not isinstance(model, OnnxNetwork) or config.radius is None:
        return None, "the edit returned no ONNX network"
    lifted = lift_to_balls(
        model,
        inputs,
        targets,
        config.radius,
        method=config.lift,
        preserve=preserve,
        preserve_labels=labels,
        time_limit=seconds,
        threads=config.settings.threads,
        seed=config.settings.seed,
        raise_on_failure=False,
    )
    if lifted.status is not Verdict.CERTIFIED or lifted.certificate is None:
        return None, f"not certified on balls of radius {config.radius:g}: {lifted.report.message}"
    if not isinstance(lifted.model, OnnxNetwork):
        return None, "the edit returned no ONNX network"
    graph = lifted.model.graph
    save_vnnlib(ball_properties(graph, inputs, targets, config.radius), staged.paths[3])
    lifted.certificate.save(staged.paths[2])
    x = inputs.to(graph.dtype).double().numpy()
    claims = PointClaims.labels(x, targets.tolist(), graph.output_size)
    manifest = {"method": f"{config.lift} over balls of radius {config.radius:g}"}
    return (lifted.model, Points.create(graph.record(), claims, manifest)), ""


def _replay(config: PointwiseConfig, staged: StagedFiles) -> str:
    """Why the files as written are not certified; empty when they are."""
    from torch_prepared.cli._point_check import replay_points
    from torch_prepared.cli.check import CheckConfig, replay_certificate

    if config.verify != "none":
        mode: Literal["real"] | ComputeType = config.compute if config.verify == "float" else "real"
        replay = replay_points(staged.paths[1], staged.paths[0], config.examples, mode)
        if not replay.certified:
            return f"the files as written are not certified: {replay.reason}"
    if config.radius is not None:
        files = CheckConfig(
            staged.paths[2], staged.paths[0], (staged.paths[3],), settings=config.settings
        )
        balls = replay_certificate(files)
        if not balls.certified:
            return f"the files as written are not certified on the balls: {balls.reason}"
    return ""


def _reference(path: Path | None) -> tuple[Tensor | None, Tensor | None]:
    """Inputs and labels as tensors."""
    import torch

    from torch_prepared.cli._inputs import load_reference

    if path is None:
        return None, None
    reference = load_reference(path)
    labels = None if reference.labels is None else torch.from_numpy(reference.labels)
    return torch.from_numpy(reference.inputs.astype("float64")), labels


def _outcome(
    config: PointwiseConfig, result: Result, clock: float, status: str, message: str
) -> Outcome:
    written = status == "certified"
    margins = result.margins
    if written and config.verify == "none":
        status = "unverified"
    data = {
        "status": status,
        "outcome": result.outcome,
        "verified": result.status,
        "method": result.method,
        "message": message,
        "seconds": time.monotonic() - clock,
        "phases": result.seconds,
        "examples": len(margins),
        "margin": float(margins.min()) if len(margins) else float("nan"),
        "compute": result.compute,
        "margin_float": float(result.margins_float.min()) if len(margins) else float("nan"),
        "size": result.size,
        "bound": result.bound,
        "delta": result.delta,
        "drawdown": result.drawdown,
        "conflicting": result.conflicting,
        "stale_layers": result.stale_layers,
        "manifest": result.manifest,
        "radius": config.radius if written else None,
        "certificate": config.certificate if written else None,
        "output": config.output if written else None,
    }
    seconds = time.monotonic() - clock
    if not written:
        text = f"UNKNOWN after {seconds:.1f} s: {message}; nothing was written"
        return Outcome(ExitCode.UNKNOWN, data, text)
    code = ExitCode.UNKNOWN if config.verify == "none" else ExitCode.PROVED
    lines = [f"{status.upper()} in {seconds:.1f} s: {message}", *_describe(config, result)]
    return Outcome(code, data, "\n".join(lines))


def _describe(config: PointwiseConfig, result: Result) -> list[str]:
    delta, lost = result.delta, result.drawdown
    least, loose = result.margins.min(), result.margins_float.min()
    lines = [
        f"  examples     {len(result.margins)}, margin at least {least:.6g} exactly, {loose:.6g} "
        f"in {result.compute}",
        f"  weights      {delta.changed:,} changed; l1 {delta.l1:.4g}, l2 {delta.l2:.4g}, "
        f"linf {delta.linf:.4g}, relative {100 * delta.relative_l2:.3g} %",
    ]
    if lost is not None:
        parts = [] if lost.agreement is None else [f"same decision {100 * lost.agreement:.2f} %"]
        if lost.accuracy_before is not None and lost.accuracy_after is not None:
            parts.append(
                f"accuracy {100 * lost.accuracy_before:.2f} % -> {100 * lost.accuracy_after:.2f} %"
            )
        lines.append(f"  behavior     {', '.join(parts)} ({lost.samples} inputs)")
    if config.radius is not None:
        lines.append(f"  balls        certified with radius {config.radius:g}")
    written = ", ".join(map(str, config.targets))
    return [*lines, f"  written      {written}"]


@click.command("pointwise")
@click.argument("model", type=FILE)
@click.argument("examples", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="Edited network, .onnx[.gz].")
@click.option("--certificate", type=FILE, required=True, help="Certificate, .json[.gz].")
@click.option("--keep", type=FILE, help="Inputs whose decision must stay (.npz, .npy).")
@click.option(
    "--keep-weight",
    type=Number(0, min_open=True),
    help="Price of a kept input's shortfall; without it none is allowed.",
)
@click.option("--preserve", type=FILE, help="Inputs whose outputs should stay (.npz, .npy).")
@click.option(
    "--layer",
    help="The layer that may change, the last one by default; 'biases' for those of all layers.",
)
@click.option(
    "--free",
    type=click.IntRange(1),
    metavar="K",
    help="Change only the K weights of the layer that move the examples' margins most.",
)
@click.option("--norm", type=click.Choice(["behavior", "2", "inf", "1", "0"]))
@click.option("--solver", type=click.Choice(["highs", "z3"]), default="highs", show_default=True)
@click.option(
    "--verify",
    type=click.Choice(["exact", "float", "none"]),
    default="exact",
    show_default=True,
    help="What must be proved: exact arithmetic, or any evaluation in the type of --compute.",
)
@click.option(
    "--compute",
    type=click.Choice(["float32", "float64", "tf32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Type in which the network will run.",
)
@click.option("--margin", type=Number(0), help="Margin to aim at, in output units.")
@click.option("--budget", type=Number(0, min_open=True), help="Largest change of one weight.")
@click.option("--radius", type=Number(0, min_open=True), help="Hold on balls around the examples.")
@click.option(
    "--lift", type=click.Choice(["sequential", "one_shot", "auto"]), default="sequential",
    show_default=True, help="Editor for the balls.",
)  # fmt: skip
@click.option("--ball-certificate", type=FILE, help="With --radius: certificate of the balls.")
@click.option("--ball-properties", type=FILE, help="With --radius: the balls, .vnnlib.")
@click.option("--time-limit", type=Number(0, min_open=True), help="Seconds.")
@common_options
def command(
    settings: Settings,
    model: Path,
    examples: Path,
    output: Path,
    certificate: Path,
    keep: Path | None,
    keep_weight: float | None,
    preserve: Path | None,
    layer: str | None,
    free: int | None,
    norm: str | None,
    solver: str,
    verify: str,
    compute: ComputeType,
    margin: float | None,
    budget: float | None,
    radius: float | None,
    lift: str,
    ball_certificate: Path | None,
    ball_properties: Path | None,
    time_limit: float | None,
) -> None:
    """Change MODEL (.onnx) until all EXAMPLES (.npz or .csv) provably get their classes.

    EXAMPLES holds arrays 'inputs' and 'targets', or lines of a class and an input's numbers. The
    guarantee is for the examples alone unless --radius is given. Nothing is written unless the
    certificate, read back from disk, holds of the network read back from disk.
    """
    config = PointwiseConfig(
        model, examples, output, certificate, keep, keep_weight, preserve, layer, norm, solver,
        verify, compute, free, margin, budget, radius, lift, ball_certificate, ball_properties,
        time_limit, settings,
    )  # fmt: skip
    finish(run_pointwise(config), settings.json)
