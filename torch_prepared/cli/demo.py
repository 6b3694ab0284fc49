"""``torch-prepared demo``: train, find adversarial images, edit, certify, and show it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from torch_prepared.cli._edit_config import EditConfig
from torch_prepared.cli._number import Number
from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish
from torch_prepared.cli.edit import run_edit

if TYPE_CHECKING:
    from torch_prepared.cli._demo_network import Digits
    from torch_prepared.cli._demo_state import State
    from torch_prepared.specs import Property

__all__ = ["DemoConfig", "command", "run_demo"]

_EPS_CHOICES = (0.03, 0.05, 0.08, 0.12)
_VIOLATED_SHARE = 0.2


@dataclass(frozen=True)
class DemoConfig:
    """What ``demo`` is asked to do; see the command's options."""

    output: Path = Path("demo")
    images: int = 20
    time_limit: float = 45.0
    settings: Settings = field(default_factory=Settings)

    @property
    def edit(self) -> EditConfig:
        """The edit, as a user would ask for it on the command line."""
        return EditConfig(
            model=self.output / "original.onnx",
            properties=(self.output / "properties.vnnlib",),
            output=self.output / "edited.onnx",
            certificate=self.output / "certificate.json",
            preserve=self.output / "training.npz",
            time_limit=self.time_limit,
            settings=self.settings,
        )


@dataclass(frozen=True)
class _Violations:
    """Test images that small perturbations make the original network misread.

    ``every`` holds the robustness property of each test image for radius ``eps``, ``chosen`` the
    positions of the images to repair, ``before`` what the original network does.
    """

    eps: float
    every: tuple[Property, ...]
    chosen: list[int]
    before: State


def run_demo(config: DemoConfig) -> Outcome:
    """Do all of it; every file that is used lies in the output folder afterwards."""
    # Imported here so that help and usage errors come without the delay of loading torch.
    from torch_prepared.cli._demo_network import export_onnx, load_digits, train
    from torch_prepared.cli._demo_picture import draw
    from torch_prepared.cli._demo_state import examine
    from torch_prepared.core.onnx import load_onnx
    from torch_prepared.specs import save_vnnlib

    seconds: dict[str, float] = {}
    edit, seed = config.edit, config.settings.seed
    with _timed(seconds, "train"):
        config.output.mkdir(parents=True, exist_ok=True)
        digits = load_digits(seed)
        export_onnx(train(digits, seed), edit.model)
    with _timed(seconds, "find violated images"):
        found = _find_violations(edit.model, digits, config.images, seed)
        save_vnnlib([found.every[i] for i in found.chosen], edit.properties[0])
        labels = digits.train_labels.numpy()
        np.savez(config.output / "training.npz", inputs=digits.train_images, labels=labels)
    with _timed(seconds, "edit, certify, attack"):
        edited = run_edit(edit)
    if edited.code is not ExitCode.PROVED:
        return edited
    with _timed(seconds, "examine and draw"):
        after = examine(load_onnx(edit.output), found.every, digits, seed)
        states = (found.before, after)
        picture = config.output / "before_after.png"
        draw(picture, digits, found.eps, states, found.chosen, (edit.model, edit.output))
    data = {
        "status": "certified",
        "eps": found.eps,
        "images": len(found.chosen),
        "test_images": len(digits.test_labels),
        "before": found.before.count(found.chosen),
        "after": after.count(found.chosen),
        "seconds": {**seconds, "total": sum(seconds.values())},
        "edit": edited.data,
        "picture": picture,
    }
    table = _table(found, after, digits, {**seconds, "total": sum(seconds.values())})
    lines = [*table, edited.text, f"  picture      {picture}", *_by_hand(edit)]
    return Outcome(ExitCode.PROVED, data, "\n".join(lines))


def _find_violations(model: Path, digits: Digits, count: int, seed: int) -> _Violations:
    """The smallest radius at which a fifth of the test images is violated."""
    from torch_prepared.cli._demo_network import CLASSES
    from torch_prepared.cli._demo_state import examine
    from torch_prepared.core.onnx import load_onnx
    from torch_prepared.edit.attack import find_counterexamples
    from torch_prepared.specs import local_robustness_batch

    network = load_onnx(model)
    for eps in _EPS_CHOICES:
        every = local_robustness_batch(
            digits.test_images, digits.test_labels, eps, CLASSES, clip=(0.0, 1.0)
        )
        quick = find_counterexamples(network.graph, every, restarts=4, steps=20, seed=seed)
        if float(quick.violated.double().mean()) >= _VIOLATED_SHARE:
            break
    before = examine(network, every, digits, seed)
    chosen = np.flatnonzero(before.violated & before.right)[:count].tolist()
    return _Violations(eps, every, chosen, before)


def _table(
    found: _Violations, after: State, digits: Digits, seconds: dict[str, float]
) -> list[str]:
    """Before and after, and the seconds of each phase."""
    before, count, total = found.before, len(found.chosen), len(digits.test_labels)
    old, new = before.count(found.chosen), after.count(found.chosen)
    rows = [
        (f"of {count} images to repair, certified", "certified"),
        (f"of {count} images to repair, violated", "violated"),
        (f"of all {total} test images, certified", "certified_all"),
        (f"of all {total} test images, violated", "violated_all"),
    ]
    return [
        f"Digits of 8 x 8 pixels, robust to changes of every pixel by up to {found.eps:g}:",
        f"{'':44} {'before':>9} {'after':>9}",
        *(f"  {label:42} {old[key]:>9} {new[key]:>9}" for label, key in rows),
        f"  {'test accuracy':42} {100 * before.accuracy:>8.1f}% {100 * after.accuracy:>8.1f}%",
        "seconds: " + ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items()),
    ]


def _by_hand(edit: EditConfig) -> list[str]:
    """The commands that do the same with the files left behind."""
    files = f"{edit.model} {edit.properties[0]}"
    return [
        "by hand:",
        f"  torch-prepared verify {files}",
        f"  torch-prepared edit {files} --preserve {edit.preserve} -o {edit.output} "
        f"--certificate {edit.certificate}",
        f"  torch-prepared check {edit.certificate} {edit.output} {edit.properties[0]}",
    ]


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[phase] = time.monotonic() - start


@click.command("demo")
@click.option("--output", type=FILE, default="demo", show_default=True, help="Folder to write to.")
@click.option(
    "--images", type=click.IntRange(1, 100), default=20, show_default=True, help="To repair."
)
@click.option("--time-limit", type=Number(5), default=45.0, show_default=True)
@common_options
def command(settings: Settings, output: Path, images: int, time_limit: float) -> None:
    """Repair a small digit classifier so that chosen images are provably robust."""
    finish(run_demo(DemoConfig(output, images, time_limit, settings)), settings.json)
