"""``torch-prepared invert``: around which inputs, and how far, is a network invertible?"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from torch_prepared.cli._invert_outcome import distance_outcome, radius_outcome
from torch_prepared.cli._number import Number
from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import Outcome, finish
from torch_prepared.cli._staging import staged_files

if TYPE_CHECKING:
    from torch_prepared.core.graph import Graph
    from torch_prepared.invert import CollisionBound, Effort, RadiusBound
    from torch_prepared.specs import Box

__all__ = ["InvertConfig", "command", "run_invert"]

_PROBLEMS = ("preimage", "injectivity")


@dataclass(frozen=True)
class InvertConfig:
    """What ``invert`` is asked to do; see the command's options."""

    model: Path
    at: str
    problem: str = "preimage"
    match: Path | None = None
    of: str | None = None
    norm: str = "inf"
    radius: float = 1.0
    separation: float = 1e-3
    output_tolerance: float = 0.0
    distance: bool = False
    method: str = "auto"
    bounds: str = "crown"
    domain: tuple[float, float] | None = None
    time_limit: float | None = 60.0
    plot: Path | None = None
    certificate: Path | None = None
    settings: Settings = field(default_factory=Settings)


def run_invert(config: InvertConfig) -> Outcome:
    """Ask the question, write the picture and the certificate if they are asked for.

    Raises:
        PreparedError: bad input; see ``torch_prepared.invert``.
        click.UsageError: an output that cannot be written.
    """
    # Imported here so that help and usage errors come without the delay of loading torch.
    from torch_prepared.cli._inputs import load_network

    wanted = [path for path in (config.plot, config.certificate) if path is not None]
    sources = [config.model, *([] if config.match is None else [config.match])]
    with ExitStack() as stack:
        staged = stack.enter_context(staged_files(wanted, sources))
        graph = load_network(config.model).graph
        center = _read_point(config.at, graph.input_size, "--at")
        effort = stack.enter_context(_effort(config))
        if config.distance:
            return distance_outcome(config, _ask_distance(config, graph, center, effort))
        answer = _ask(config, graph, center, effort)
        written = dict(zip(wanted, staged.paths, strict=True))
        kept: list[Path] = []
        if config.plot is not None:
            from torch_prepared.invert.pictures import save_answer

            save_answer(written[config.plot], graph, center, answer)
            kept.append(config.plot)
        if config.certificate is not None and answer.certified is not None:
            answer.certified.certificate.save(written[config.certificate])
            kept.append(config.certificate)
        if len(kept) == len(wanted):
            staged.commit()
        elif config.plot in kept and config.plot is not None:
            written[config.plot].replace(config.plot)
    return radius_outcome(config, answer, kept)


def _ask(config: InvertConfig, graph: Graph, center: np.ndarray, effort: Effort) -> RadiusBound:
    from torch_prepared.cli._inputs import load_network
    from torch_prepared.invert import injectivity_radius, matching_radius, nearest_preimage

    domain = _domain(config, graph)
    if config.match is not None:
        return matching_radius(
            graph,
            load_network(config.match).graph,
            center,
            r_max=config.radius,
            norm=config.norm,
            tolerance=config.separation,
            output_tolerance=config.output_tolerance,
            domain=domain,
            effort=effort,
        )
    if config.problem == "injectivity":
        return injectivity_radius(
            graph,
            center,
            r_max=config.radius,
            norm=config.norm,
            separation=config.separation,
            output_tolerance=config.output_tolerance,
            domain=domain,
            effort=effort,
        )
    return nearest_preimage(
        graph,
        center,
        r_max=config.radius,
        norm=config.norm,
        of=None if config.of is None else _read_point(config.of, graph.input_size, "--of"),
        domain=domain,
        separation=config.separation,
        output_tolerance=config.output_tolerance,
        method=config.method,
        effort=effort,
    )


def _domain(config: InvertConfig, graph: Graph) -> Box | None:
    from torch_prepared.specs import Box

    if config.domain is None:
        return None
    low, high = (np.full(graph.input_size, end) for end in config.domain)
    return Box(low, high)


def _ask_distance(
    config: InvertConfig, graph: Graph, center: np.ndarray, effort: Effort
) -> CollisionBound:
    from torch_prepared.cli._inputs import load_network
    from torch_prepared.invert import max_collision, max_mismatch

    if config.match is not None:
        return max_mismatch(
            graph,
            load_network(config.match).graph,
            center,
            config.radius,
            norm=config.norm,
            output_tolerance=config.output_tolerance,
            domain=_domain(config, graph),
            effort=effort,
        )
    return max_collision(
        graph,
        center,
        config.radius,
        norm=config.norm,
        anchor=config.problem == "preimage",
        output_tolerance=config.output_tolerance,
        domain=_domain(config, graph),
        effort=effort,
    )


def _read_point(text: str, size: int, option: str) -> np.ndarray:
    """Numbers with commas between, or the first row of a .npy or .npz file."""
    from torch_prepared.cli._inputs import load_reference

    if text.endswith((".npy", ".npz")):
        rows = load_reference(Path(text)).inputs.astype(np.float64)
        point = rows.reshape(-1) if rows.size in (0, size) else rows[0].reshape(-1)
    else:
        try:
            point = np.array([float(part) for part in text.split(",")])
        except ValueError:
            point = np.empty(0)
    if point.size != size or not bool(np.isfinite(point).all()):
        raise click.UsageError(
            f"{option}: got {text[:60]!r}; expected {size} finite numbers with commas between, or "
            "a .npy or .npz file of them"
        )
    return point


@contextmanager
def _effort(config: InvertConfig) -> Iterator[Effort]:
    """Options of the search, with a bar on standard error where it would be seen."""
    from tqdm import tqdm

    from torch_prepared.invert import Effort

    settings = config.settings
    with tqdm(
        total=None, disable=not settings.progress, bar_format="{desc} [{elapsed}]", leave=False
    ) as bar:
        best = [0.0, math.inf]

        def show(lower: float, upper: float) -> None:
            best[0], best[1] = max(best[0], lower), min(best[1], upper)
            bar.set_description_str(f"radius between {best[0]:.6g} and {best[1]:.6g}")

        yield Effort(
            time_limit=config.time_limit,
            threads=settings.threads,
            bounds=config.bounds,
            seed=settings.seed,
            progress=show if settings.progress else None,
            stop=threading.Event(),  # Ctrl-C then leaves the bounds found so far
        )


@click.command("invert")
@click.argument("model", type=FILE)
@click.option("--at", required=True, help="Center: numbers with commas, or .npy, .npz.")
@click.option(
    "--problem",
    type=click.Choice(_PROBLEMS),
    default="preimage",
    show_default=True,
    help="Nearest other input with the center's output, or any two inputs around it.",
)
@click.option("--match", type=FILE, help="Is this network's output a function of MODEL's?")
@click.option("--of", help="Nearest input with the output of this point instead.")
@click.option("--norm", type=click.Choice(["1", "2", "inf"]), default="inf", show_default=True)
@click.option(
    "--radius",
    type=Number(0, min_open=True),
    default=1.0,
    show_default=True,
    help="Largest radius of interest, in input units.",
)
@click.option(
    "--separation",
    type=Number(0, min_open=True),
    default=1e-3,
    show_default=True,
    help="Closer pairs are not excluded by claims (--match: in output units).",
)
@click.option(
    "--output-tolerance",
    type=Number(0),
    default=0.0,
    show_default=True,
    help="Outputs that differ by no more count as the same, of inputs --separation apart.",
)
@click.option(
    "--distance",
    is_flag=True,
    help="In place of a radius: how far apart colliding inputs within --radius can be (--match: "
    "the other network's outputs at them).",
)
@click.option("--method", type=click.Choice(["auto", "milp", "split"]), default="auto")
@click.option(
    "--bounds",
    type=click.Choice(["crown", "ibp", "obbt"]),
    default="crown",
    show_default=True,
    help="Constants of integer programs; obbt takes longer, for hard nearest inputs.",
)
@click.option("--domain", help="LO,HI: inputs outside of this range do not count.")
@click.option("--time-limit", type=Number(0, min_open=True), default=60.0, show_default=True)
@click.option("--plot", type=FILE, help="Write a picture (.png).")
@click.option("--certificate", type=FILE, help="Write the certificate, if there is one.")
@common_options
def command(
    settings: Settings,
    model: Path,
    at: str,
    problem: str,
    match: Path | None,
    of: str | None,
    norm: str,
    radius: float,
    separation: float,
    output_tolerance: float,
    distance: bool,
    method: str,
    bounds: str,
    domain: str | None,
    time_limit: float,
    plot: Path | None,
    certificate: Path | None,
) -> None:
    """How far around an input is MODEL (.onnx) invertible?

    Prints a radius within which nothing collides, what that rests on, and one at which two
    different inputs have exactly the same output.

    Exit codes: 0 proved that nothing collides up to --radius, 10 a collision was found (the
    radius lies between the two numbers), 20 neither: time over, or a solver's claim only. Ctrl-C
    ends the search with the bounds found so far, and exit code 130.
    """
    if match is not None and (of is not None or problem != "preimage" or method != "auto"):
        raise click.UsageError("--match: cannot be combined with --of, --problem or --method")
    if problem == "injectivity" and (of is not None or method != "auto"):
        raise click.UsageError("--problem injectivity: cannot be combined with --of or --method")
    if distance and (of is not None or method != "auto" or plot is not None or certificate):
        raise click.UsageError(
            "--distance: cannot be combined with --of, --method, --plot or --certificate"
        )
    config = InvertConfig(
        model=model,
        at=at,
        problem=problem,
        match=match,
        of=of,
        norm=norm,
        radius=radius,
        separation=separation,
        output_tolerance=output_tolerance,
        distance=distance,
        method=method,
        bounds=bounds,
        domain=None if domain is None else _read_domain(domain),
        time_limit=time_limit,
        plot=plot,
        certificate=certificate,
        settings=settings,
    )
    finish(run_invert(config), settings.json)


def _read_domain(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not -math.inf < low <= high < math.inf:
        raise click.UsageError(f"--domain: got {text!r}; expected LO,HI with LO <= HI")
    return low, high
