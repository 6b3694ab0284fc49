"""``torch-prepared calibrate``: worst-case calibration over perturbed inputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_prepared.cli._number import Number
from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish
from torch_prepared.cli._staging import staged_files

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from torch_prepared.calibrate import CalibrationAttack, CalibrationReport, RadiusReport
    from torch_prepared.core.onnx import OnnxNetwork

__all__ = ["CalibrateConfig", "command", "run_calibrate"]

_NORMS = {"1": 1.0, "2": 2.0, "inf": float("inf")}
_PANELS = 4


@dataclass(frozen=True)
class CalibrateConfig:
    """What ``calibrate`` is asked to do; see the command's options."""

    model: Path
    data: Path
    eps: tuple[float, ...]
    norm: str = "inf"
    clip: tuple[float, float] | None = None
    samples: int | None = None
    bins: int = 15
    adaptive: bool = False
    method: str = "crown"
    temperature: float = 1.0
    check: bool = True
    attack: bool = True
    sigma: float | None = None
    noise: int = 10_000
    alpha: float = 1e-3
    delta: float = 1e-3
    max_ece: float | None = None
    max_brier: float | None = None
    time_limit: float | None = None
    plot: Path | None = None
    settings: Settings = field(default_factory=Settings)

    @property
    def limits(self) -> dict[str, float]:
        """What is to be proved, by metric."""
        asked = {"ece": self.max_ece, "brier": self.max_brier}
        return {name: limit for name, limit in asked.items() if limit is not None}


def run_calibrate(config: CalibrateConfig) -> Outcome:
    """Bound, attack, compare with what was asked, draw.

    Raises:
        PreparedError: bad input.
        click.UsageError: a picture that cannot be written.
    """
    # Imported here so that help and usage errors come without the delay of loading torch.
    from torch_prepared.cli._inputs import load_network

    clock = time.monotonic()
    wanted = [] if config.plot is None else [config.plot]
    with ExitStack() as stack:
        staged = stack.enter_context(staged_files(wanted, [config.model, config.data]))
        network = load_network(config.model, config.settings.device)
        x, labels = _samples(config, network)
        report = _measure(config, network, x, labels)
        status, message = _verdict(config, report, network)
        if config.plot is not None:
            _draw(staged.paths[0], report)
            staged.commit()
    data = {
        "status": status,
        "message": message,
        "seconds": time.monotonic() - clock,
        **report.to_json(),
        "limits": config.limits,
        "norm": "2" if config.sigma is not None else config.norm,
        "sigma": config.sigma,
        "temperature": config.temperature,
        "plot": config.plot,
    }
    codes = {"certified": ExitCode.PROVED, "refuted": ExitCode.REFUTED}
    code = codes.get(status, ExitCode.UNKNOWN)
    return Outcome(code, data, _describe(report, status, message, config.plot))


def _samples(config: CalibrateConfig, network: OnnxNetwork) -> tuple[Tensor, Tensor]:
    """Inputs in the network's dtype and labels, as many as asked for."""
    import torch

    from torch_prepared.cli._inputs import load_reference
    from torch_prepared.errors import SpecError

    found = load_reference(config.data)
    if found.labels is None:
        raise SpecError(f"{config.data}: got no labels; expected .npz with 'inputs' and 'labels'")
    inputs, labels = found.inputs[: config.samples], found.labels[: config.samples]
    size = network.graph.input_size
    if inputs.ndim < 2 or not len(inputs) or inputs[0].size != size:
        raise SpecError(
            f"{config.data}: got inputs of shape {inputs.shape}; expected (N, ...) with {size} "
            "numbers each, as the network takes"
        )
    x = torch.from_numpy(inputs.astype("float64").reshape(len(inputs), size))
    return x.to(network.graph.dtype), torch.from_numpy(labels)


def _measure(
    config: CalibrateConfig, network: OnnxNetwork, x: Tensor, labels: Tensor
) -> CalibrationReport:
    from torch_prepared.calibrate import (
        certify_calibration,
        certify_smoothed_calibration,
        confidences,
        equal_count_edges,
    )
    from torch_prepared.relax import evaluate_graph

    edges: np.ndarray | None = None
    if config.adaptive:
        graph = network.graph.to(device="cpu")
        edges = equal_count_edges(
            confidences(lambda b: evaluate_graph(graph, b) / config.temperature, x)[0],
            config.bins,
        )
    progress = config.settings.progress
    if config.sigma is not None:
        return certify_smoothed_calibration(
            network, x, labels, config.eps, config.sigma, n=config.noise, alpha=config.alpha,
            delta=config.delta, temperature=config.temperature, n_bins=config.bins, edges=edges,
            seed=config.settings.seed, progress=progress,
        )  # fmt: skip
    return certify_calibration(
        network, x, labels, config.eps, p=_NORMS[config.norm], clip=config.clip,
        method=config.method, temperature=config.temperature, checked=config.check,
        attack=config.attack, n_bins=config.bins, edges=edges, time_limit=config.time_limit,
        progress=progress,
    )  # fmt: skip


def _verdict(
    config: CalibrateConfig, report: CalibrationReport, network: OnnxNetwork
) -> tuple[str, str]:
    """Status and one line: refuted by an attack, certified, or unknown."""
    for name, limit in config.limits.items():
        for one in report.radii:
            reached = _refutes(report, one, name, limit, network, config.temperature)
            if reached is not None:
                return "refuted", f"{name} reaches {reached:.4f} > {limit} at radius {one.radius}"
    if not all(one.interval.complete for one in report.radii):
        return "unknown", "time over before all samples were bounded"
    for name, limit in config.limits.items():
        for one in report.radii:
            bound = one.ece_all if name == "ece" else one.brier_all
            if not bound.value <= limit:
                return "unknown", f"{name} is at most {bound.value:.4f} at radius {one.radius}"
    if not all(one.interval.checked for one in report.radii):
        return "unknown", "bounds were not checked for rounding (--no-check)"
    if config.sigma is not None:
        return "certified", f"each with probability {1 - config.delta:g} over the noise"
    return "certified", "all rounding accounted for"


def _refutes(
    report: CalibrationReport,
    one: RadiusReport,
    name: str,
    limit: float,
    network: OnnxNetwork,
    temperature: float,
) -> float | None:
    """The metric's value above ``limit`` that inputs within the radius reach, or None.

    It has to exceed the limit in float64 on the stored weights and in onnxruntime.
    """
    attack: CalibrationAttack | None = one.attacked_ece if name == "ece" else one.attacked_brier
    if attack is None or not attack.value > limit:
        return None
    import torch

    from torch_prepared.calibrate import brier_score, calibration_error
    from torch_prepared.core.onnx import run_onnx

    logits = torch.from_numpy(run_onnx(network, attack.x.flatten(1).numpy())).double()
    if not bool(torch.isfinite(logits).all()):
        return None
    z = torch.softmax(logits / temperature, dim=1)
    same = z.argmax(dim=1) == one.interval.prediction
    if not bool(same.all()):
        return None
    score = z.amax(dim=1)
    measures: dict[str, Callable[[], float]] = {
        "ece": lambda: calibration_error(score, report.correct, edges=report.edges),
        "brier": lambda: brier_score(score, report.correct),
    }
    deployed = measures[name]()
    return min(deployed, attack.value) if deployed > limit else None


def _draw(path: Path, report: CalibrationReport) -> None:
    import numpy as np

    from torch_prepared.calibrate import reliability, reliability_envelope
    from torch_prepared.calibrate.diagram import Panel, save_figure

    clean = reliability(report.confidence, report.correct, edges=report.edges)
    panels: list[Panel] = []
    for one in report.radii[:_PANELS]:
        keep, bound = one.interval.certified, one.ece
        title = f"radius {one.radius:g}: {int(keep.sum())} of {len(keep)} predictions certified"
        if bound.confidence is None or bound.bin is None:
            panels.append((title, clean, None, None))
            continue
        correct = report.correct[keep]
        envelope = reliability_envelope(
            one.interval.lower[keep], one.interval.upper[keep], correct, edges=report.edges
        )
        worst = reliability(bound.confidence, correct, edges=report.edges, bins=bound.bin)
        panels.append((f"{title}\nECE at most {bound.value:.3f} on them", clean, envelope, worst))
    radii = np.array([one.radius for one in report.radii])
    curves = [
        ("certified ECE", radii, np.array([one.ece_all.value for one in report.radii])),
        ("certified Brier", radii, np.array([one.brier_all.value for one in report.radii])),
        ("clean ECE", radii, np.full(len(radii), report.ece)),
    ]
    found = [one.attacked_ece.value for one in report.radii if one.attacked_ece is not None]
    if len(found) == len(radii):
        curves.insert(1, ("attacked ECE", radii, np.array(found)))
    save_figure(path, panels, curves)


def _describe(report: CalibrationReport, status: str, message: str, plot: Path | None) -> str:
    """The report as lines of text."""
    lines = [
        f"{status.upper()}: {message}",
        f"  {len(report.correct)} samples, accuracy {100 * report.accuracy:.2f} %, clean ECE "
        f"{report.ece:.4f}, clean Brier {report.brier:.4f}",
        "    radius  certified predictions   attacked ECE, Brier   certified on them   on all",
    ]
    for one in report.radii:
        attacks = [one.attacked_ece, one.attacked_brier]
        reached = ", ".join("-" if a is None else f"{a.value:.4f}" for a in attacks)
        own = [b.value if b.samples else float("nan") for b in (one.ece, one.brier)]
        lines.append(
            f"  {one.radius:8.4g}  {int(one.interval.certified.sum()):10d}"
            f" ({100 * float(one.interval.certified.double().mean()):5.1f} %)"
            f"   {reached:>19}   {own[0]:.4f}, {own[1]:.4f}"
            f"      {one.ece_all.value:.4f}, {one.brier_all.value:.4f}"
        )
    return "\n".join(lines if plot is None else [*lines, f"  picture written to {plot}"])


def _clip(ctx: click.Context, param: click.Parameter, value: str | None) -> object:
    if value is None:
        return None
    try:
        low, high = map(float, value.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not -float("inf") < low <= high < float("inf"):
        raise click.BadParameter(f"got {value!r}; expected two numbers LO,HI with LO <= HI")
    return low, high


_LEVEL = Number(0, 1, min_open=True, max_open=True)


@click.command("calibrate")
@click.argument("model", type=FILE)
@click.argument("data", type=FILE)
@click.option(
    "--eps", type=Number(0), multiple=True, required=True,
    help="Radius of the perturbations; may be repeated.",
)  # fmt: skip
@click.option("--norm", type=click.Choice(list(_NORMS)), default="inf", show_default=True)
@click.option("--clip", callback=_clip, help="LO,HI: limits of valid inputs.")
@click.option("--samples", type=click.IntRange(1), help="Use the first samples only.")
@click.option("--bins", type=click.IntRange(1, 1024), default=15, show_default=True)
@click.option("--adaptive", is_flag=True, help="Bins of equal count, fixed at clean confidences.")
@click.option(
    "--method", type=click.Choice(["ibp", "crown-ibp", "crown"]), default="crown",
    show_default=True,
)  # fmt: skip
@click.option(
    "--temperature", type=Number(0, min_open=True), default=1.0, show_default=True,
    help="Divide the logits by this.",
)  # fmt: skip
@click.option("--check/--no-check", default=True, help="Account for all rounding; slower.")
@click.option("--attack/--no-attack", default=True, help="Also attack.")
@click.option(
    "--sigma", type=Number(0, min_open=True),
    help="Judge the classifier smoothed by noise of this deviation (2-norm) instead.",
)  # fmt: skip
@click.option("--noise", type=click.IntRange(1), default=10_000, help="Noise draws per sample.")
@click.option("--alpha", type=_LEVEL, default=1e-3, help="Level of one noise bound.")
@click.option("--delta", type=_LEVEL, default=1e-3, help="Level of one radius's result.")
@click.option("--max-ece", type=Number(0, 1), help="Prove this calibration error.")
@click.option("--max-brier", type=Number(0, 1), help="Prove this Brier score.")
@click.option("--time-limit", type=Number(0, min_open=True), help="Seconds.")
@click.option("--plot", type=FILE, help="Write reliability diagrams to this PNG.")
@common_options
def command(settings: Settings, /, **options: object) -> None:
    """Bound the calibration error and Brier score of MODEL (.onnx) on DATA (.npz).

    DATA holds 'inputs' and 'labels'. Every input may be perturbed within --eps on its own; the
    bounds hold for the worst such perturbation of all samples together. With --max-ece or
    --max-brier the exit code tells whether the limit, over all samples and at every radius, is
    proved (0), refuted by an attack (10) or neither (20).
    """
    _refuse_contradictions(options)
    finish(run_calibrate(CalibrateConfig(settings=settings, **options)), settings.json)  # type: ignore[arg-type]  # names and types are click's


def _refuse_contradictions(options: dict[str, object]) -> None:
    if options["sigma"] is None:
        return
    if options["norm"] != "inf" or options["clip"] is not None or options["time_limit"] is not None:
        raise click.UsageError(
            "--sigma: got --norm, --clip or --time-limit as well; smoothing is about the 2-norm "
            "without limits, and its time is set by --noise and --samples"
        )
