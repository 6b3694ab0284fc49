"""Provable training of a physics-informed network for buoyant Stokes flow.

A hot and a cold blob drive a viscous fluid in a box with free-slip walls, as in the mantle of a
planet. Our own finite-difference solver makes the data; a network (x, y) -> (u, v) learns from 400
noisy velocities. Two constraints must hold everywhere, not only where somebody looks:

- *continuity*: for every cell of the solver's size, wherever its center lies, the net outflow
  through its four faces, as the solver writes it, is at most eps_c per area;
- *walls*: the velocity through each wall is at most eps_b, on all of the wall.

Five trainings are compared (see ``_stokes_training``), each judged on velocities it did not see,
by sampling, and by the independent certificate checker. A stream function would make the flow free
of divergence by construction, but only in two dimensions and for a constant density, and its
walls would need a proof all the same; here velocities are learned and the method is general.

    python -m benchmarks.examples.stokes_flow [--smoke]
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.examples._stokes_case import Settings, measure_flow, reference_flow
from benchmarks.examples._stokes_judge import judge, map_flow
from benchmarks.examples._stokes_training import METHODS, Trained, train

__all__ = ["Row", "center_velocity", "run_method", "run_study", "table"]

PROVED_BOXES = 96  #: along a side, of the map of bounds

Row = dict[str, object]


def run_method(settings: Settings, method: str, *, maps: bool = False) -> tuple[Row, Trained]:
    """Train in one way and judge.

    Args:
        settings: everything the run depends on.
        method: one of ``METHODS``.
        maps: also return fields for pictures.
    """
    trained = train(settings, method)
    _, held_out = measure_flow(settings)
    quality = judge(settings, trained.model, held_out, known=trained.certified)
    row: Row = {
        "method": method,
        "seed": settings.seed,
        **quality.to_json(),
        "train_cpu": trained.train_cpu,
        "train_wall": trained.train_wall,
        "hook_cpu": trained.hook_cpu,
        "finish_cpu": trained.finish_cpu,
        "finish_wall": trained.finish_wall,
        "looks": {name: trained.looks.count(name) for name in sorted(set(trained.looks))},
        "edited_at_end": trained.edited,
    }
    if maps:
        fields = map_flow(settings, trained.model, center_velocity(settings), PROVED_BOXES)
        row["maps"] = fields.to_json()
    return row, trained


def run_study(
    settings: Settings,
    methods: Sequence[str] = METHODS,
    *,
    maps: bool = False,
    tell: Callable[[Row], None] | None = None,
) -> list[Row]:
    """All methods from one seed, under a progress bar on stderr; ``tell`` gets each row."""
    rows = []
    for method in tqdm(methods, desc="stokes flow", unit="method", leave=False):
        rows.append(run_method(settings, method, maps=maps)[0])
        if tell is not None:
            tell(rows[-1])
    return rows


def center_velocity(settings: Settings) -> tuple[Tensor, Tensor]:
    """The solver's velocities (n, n) in cell centers."""
    flow = reference_flow(settings.cells)
    u, v = torch.from_numpy(flow.u), torch.from_numpy(flow.v)
    return (u[1:] + u[:-1]) / 2, (v[:, 1:] + v[:, :-1]) / 2


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Markdown: accuracy, sampled and certified violations, process seconds."""
    lines = [
        "| training | relative error | outflow: max | mean | certified | through walls: max | mean "
        "| certified | within tolerance | training CPU s | certificate CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        number = {k: float(v) for k, v in row.items() if isinstance(v, (int, float))}
        proved = {k: _proved(number[k]) for k in ("cell_certified", "wall_certified")}
        lines.append(
            f"| {row['method']} | {number['relative_error']:.4f} "
            f"| {number['cell_largest']:.3f} | {number['cell_mean']:.3f} "
            f"| {proved['cell_certified']} "
            f"| {number['wall_largest']:.4f} | {number['wall_mean']:.4f} "
            f"| {proved['wall_certified']} | {'certified' if row['certified'] else 'no'} "
            f"| {number['train_cpu']:.1f} | {number['finish_cpu']:.1f} |"
        )
    return "\n".join(lines)


def _proved(bound: float) -> str:
    return f"{bound:.3g}" if bound == bound else "-"


def main() -> None:
    """Parse the command line, run, print the table."""
    parser = argparse.ArgumentParser(description="Provable training for Stokes flow.")
    parser.add_argument("--smoke", action="store_true", help="a tiny size, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings.smoke() if options.smoke else Settings()
    settings = dataclasses.replace(settings, seed=options.seed)
    rows = run_study(settings)
    print(
        f"eps_c = {settings.continuity} mean speeds per side "
        f"({100 * settings.continuity * settings.spacing:.2g} % of the mean flux through a face), "
        f"eps_b = {settings.wall} mean speeds\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
