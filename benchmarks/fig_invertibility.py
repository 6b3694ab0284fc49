"""Certified invertibility: radii of injectivity, nearest preimages, pruned copies, classifiers.

``python -m benchmarks.fig_invertibility run [--seconds 60] [--threads 2] [--data DIR]
[--reference DIR] [--smoke]`` writes ``benchmarks/results/invertibility.json``; ``... plot`` draws
``benchmarks/figures/invertibility*.png`` from the JSON alone. ``--reference`` names a folder with
the published Brusselator weights (``para_dep_bru`` of the project ``noninvertibility``); its rows
are left out where it is absent, like those of the classifier without MNIST.

one-dimensional   random 1-10-10-1: radii r (any pair) and R (the center and another input)
brusselator       time stepper with a parameter: R by branch and bound with a replayed certificate
                  and by the mixed-integer program alone, with CROWN, interval and tightened
                  bounds; r, with a replayed certificate; a map of R over the plane; R and r along
                  the parameter
van der pol       flow map and pruned copies: radius on which one is a function of the other, with a
                  replayed certificate
mnist             784-24-24-10: nearest image of another digit with exactly the same ten outputs,
                  with CROWN and with tightened bounds
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import _figure
from benchmarks import _invertibility_systems as systems
from benchmarks._common import FIGURES, SCHEMA, environment, write_json
from torch_prepared.invert import (
    Effort,
    RadiusBound,
    fix_inputs,
    injectivity_radius,
    map_radii,
    matching_radius,
    nearest_preimage,
)

POINTS = ((1.96433, 1.24951), (0.666201, 1.99221))
PARAMETER = 2.1
KNOWN = {POINTS[0]: 2.77391, POINTS[1]: 4.2362}  # published weights, by another solver

Row = dict[str, object]


@dataclass(frozen=True)
class Study:
    """Sizes and limits."""

    seconds: float
    threads: int
    smoke: bool
    data: Path
    reference: Path | None

    def effort(self, **changes: object) -> Effort:
        """Options of one question."""
        return Effort(**{"time_limit": self.seconds, "threads": self.threads, **changes})  # type: ignore[arg-type]

    @property
    def steps(self) -> int:
        """Training steps."""
        return 60 if self.smoke else 4000


def _row(case: str, metric: str, center: object, answer: RadiusBound, **more: object) -> Row:
    witness = None if answer.witness is None else [p.tolist() for p in answer.witness.floats]
    if witness is not None and len(witness[0]) > 3:
        witness = None
    return {
        "case": case,
        "metric": metric,
        "center": np.asarray(center).tolist() if np.asarray(center).size <= 3 else None,
        "lower": answer.lower,
        "proved": answer.proved,
        "upper": answer.upper,
        "unit": "input",
        "evidence": answer.evidence.value,
        "outcome": answer.outcome.value,
        "norm": str(answer.norm),
        "integers": answer.integers,
        "seconds": answer.seconds,
        "certified": answer.certified is not None,
        "pairs": None if answer.certified is None else answer.certified.check.pairs,
        "certified_radius": None
        if answer.certified is None
        else answer.certified.certificate.claim.radius,
        "replay_seconds": None if answer.certified is None else answer.certified.check.seconds,
        "witness": witness,
        **more,
    }


def _one_dimensional(study: Study) -> Iterator[Row]:
    net = systems.one_dimensional(7)
    x = np.linspace(-3, 3, 601)
    with torch.no_grad():
        y = net(torch.from_numpy(x)[:, None])[:, 0].numpy()
    yield {"case": "one-dimensional", "metric": "graph", "x": x.tolist(), "y": y.tolist()}
    for center in (-1.8, -1.0, -0.3):
        near = nearest_preimage(net, [center], r_max=4.0, effort=study.effort())
        any_pair = injectivity_radius(
            net, [center], r_max=4.0, separation=1e-4, effort=study.effort()
        )
        yield _row("one-dimensional", "R", [center], near)
        yield _row("one-dimensional", "r", [center], any_pair)


def _stepper(study: Study, case: str, model: torch.nn.Module) -> Iterator[Row]:
    graph = fix_inputs(model, 3, {2: PARAMETER})
    for center in POINTS:
        for method, bounds in (
            ("auto", "crown"),
            ("milp", "crown"),
            ("milp", "ibp"),
            ("milp", "obbt"),
        ):
            limit = study.seconds * (5 if method == "milp" and bounds == "crown" else 1)
            effort = study.effort(bounds=bounds, time_limit=limit)
            found = nearest_preimage(graph, center, r_max=6.0, method=method, effort=effort)
            known = KNOWN[center] if "published" in case else None
            yield _row(case, f"R {method} {bounds}", center, found, known=known)
        for norm in (math.inf, 2.0):
            found = injectivity_radius(graph, center, r_max=3.0, norm=norm, effort=study.effort())
            yield _row(case, f"r norm {norm:g}", center, found)


def _surroundings(study: Study, case: str, model: torch.nn.Module) -> Iterator[Row]:
    """R over a grid, and along the parameter."""
    side = 3 if study.smoke else 7
    ticks = np.linspace(0.2, 4.2, side)
    centers = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    graph = fix_inputs(model, 3, {2: PARAMETER})
    found = map_radii(
        lambda c, effort: nearest_preimage(graph, c, r_max=8.0, method="split", effort=effort),
        centers,
        effort=study.effort(time_limit=8 * study.seconds),
    )
    for center, answer in zip(centers, found.results, strict=False):
        yield _row(case, "R map", center, answer)
    for b in np.linspace(1.9, 2.3, 3 if study.smoke else 9):
        at = fix_inputs(model, 3, {2: float(b)})
        effort = study.effort()
        near = nearest_preimage(at, POINTS[0], r_max=8.0, method="split", effort=effort)
        yield _row(case, "R curve", POINTS[0], near, parameter=float(b))
        pair = injectivity_radius(at, POINTS[0], r_max=3.0, effort=effort)
        yield _row(case, "r curve", POINTS[0], pair, parameter=float(b))


def _brusselator(study: Study) -> Iterator[Row]:
    width = 8 if study.smoke else 32
    model = systems.brusselator(0, study.steps, width)
    yield from _stepper(study, f"brusselator 3-{width}-{width}-2", model)


def _parameters(study: Study) -> Iterator[Row]:
    width = 8 if study.smoke else 32
    model = systems.brusselator(0, study.steps, width)
    yield from _surroundings(study, f"brusselator 3-{width}-{width}-2", model)


def _published(study: Study) -> Iterator[Row]:
    if study.reference is None:
        print("published brusselator: left out, no --reference")
        return
    try:
        model = systems.published_brusselator(study.reference)
    except (OSError, ValueError) as error:
        print(f"published brusselator: left out, {' '.join(str(error).split())}")
        return
    yield from _stepper(study, "brusselator published", model)


def _van_der_pol(study: Study) -> Iterator[Row]:
    width = 6 if study.smoke else 16
    model, x, y = systems.van_der_pol(0, study.steps, width)
    own = injectivity_radius(model, [0.0, 0.0], r_max=5.0, effort=study.effort())
    yield _row(f"van der pol 2-{width}-{width}-2", "r of A", [0, 0], own)
    for sparsity in (0.4, 0.5, 0.6)[: 1 if study.smoke else 3]:
        copy = systems.pruned(model, x, y, sparsity, study.steps // 4, 1)
        with torch.no_grad():
            error = float((model(x) - copy(x)).square().mean().sqrt())
        for name, first, second in (("r_AB", model, copy), ("r_BA", copy, model)):
            found = matching_radius(first, second, [0.0, 0.0], r_max=5.0, effort=study.effort())
            case = f"van der pol 2-{width}-{width}-2"
            yield _row(case, name, [0, 0], found, sparsity=sparsity, difference=error)


def _mnist(study: Study) -> Iterator[Row]:
    folder = study.data / "mnist"
    if not folder.is_dir():
        print(f"mnist: left out, no {folder}")
        return
    from torch_prepared.specs import Box

    model, accuracy = systems.image_classifier(folder, 0, study.steps)
    images, labels = systems.mnist_images(folder, "t10k")
    domain = Box(np.zeros(784), np.ones(784))
    digits = [int((labels == d).nonzero()[0, 0]) for d in range(10)]
    flat = nearest_preimage(model, images[digits[0]], r_max=1.0, effort=study.effort())
    yield _row("mnist 784-24-24-10", "R", images[digits[0]], flat, accuracy=accuracy)
    for first, second in ((0, 1), (3, 8), (4, 9), (7, 1), (5, 6))[: 1 if study.smoke else 5]:
        center, goal = images[digits[first]], images[digits[second]]
        tight = nearest_preimage(
            model, center, of=goal, r_max=1.0, domain=domain, effort=study.effort(bounds="obbt")
        )
        yield _row(
            "mnist 784-24-24-10", "same outputs obbt", center, tight,
            digits=[first, second], accuracy=accuracy,
        )  # fmt: skip
        found = nearest_preimage(
            model, center, of=goal, r_max=1.0, domain=domain, effort=study.effort()
        )
        picture = None if found.witness is None else found.witness.floats[0].tolist()
        yield _row(
            "mnist 784-24-24-10", "same outputs", center, found,
            digits=[first, second], accuracy=accuracy, picture=picture,
            images=[center.tolist(), goal.tolist()],
        )  # fmt: skip


CASES: dict[str, Callable[[Study], Iterator[Row]]] = {
    "one-dimensional": _one_dimensional,
    "brusselator": _brusselator,
    "surroundings": _parameters,
    "published": _published,
    "van-der-pol": _van_der_pol,
    "mnist": _mnist,
}


def run(study: Study, chosen: list[str], output: Path) -> None:
    """Ask every question; the JSON is written after every case.

    Rows of other cases are kept, and so are earlier ones of a case that is left out now.
    """
    torch.set_num_threads(study.threads)
    kept: dict[str, list[Row]] = {}
    settings: dict[str, Row] = {}
    if output.exists():
        before = json.loads(output.read_text())
        kept, settings = before["rows_by_case"], before["by_case"]
    for name in chosen:
        rows: list[Row] = []
        for row in CASES[name](study):
            rows.append(row)
            if "lower" in row:
                texts = [row["case"], row["metric"], row["center"] or "", row["evidence"]]
                print(
                    *texts,
                    *(f"{k} {row[k]:.6g}" for k in ("lower", "upper", "seconds")),
                    flush=True,
                )
        if not rows:  # left out: what an earlier run found stays
            continue
        kept[name] = rows
        settings[name] = {
            "seconds": study.seconds,
            "threads": study.threads,
            "load_average": os.getloadavg()[0],
        }
        record = {
            "schema": SCHEMA,
            **environment(),
            "dtype": "float32 and float64 weights, exact witnesses",
            "seed": 0,
            "threads": study.threads,
            "parameters": {"parameter": PARAMETER},
            "by_case": settings,
            "smoke": study.smoke,
            "rows_by_case": kept,
        }
        write_json(output, record)
    print(f"wrote {output}")


def main() -> None:
    """Parse the command line."""
    parser = _figure.make_parser(__doc__, threads=2, data="mnist")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each question")
    parser.add_argument("--reference", type=Path, help="folder of the published weights")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    options = _figure.parse(parser, "invertibility")
    if options.command != "plot":
        seconds = min(options.seconds, 3.0) if options.smoke else options.seconds
        study = Study(seconds, options.threads, options.smoke, options.data, options.reference)
        run(study, options.cases, options.output)
    if options.command != "run":
        from benchmarks._invertibility_plots import plot

        plot(json.loads(options.output.read_text()), FIGURES, options.output.stem)


if __name__ == "__main__":
    main()
