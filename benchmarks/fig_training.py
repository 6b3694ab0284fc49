"""What a provable training costs: the hook at its default schedule, and weights projected always.

``python -m benchmarks.fig_training run [--data DIR] [--smoke]`` writes
``benchmarks/results/training.json``; ``... plot`` draws it from the JSON alone. Without a command
it does both. A 256x2 network is trained on MNIST, then fine-tuned from there in four ways that
differ only in what is done about ten robustness properties (the first ten test images):

plain      nothing
hook       ``EditHook`` at its default schedule, every 250 optimizer steps
prepared   ``PreparedModule``, for some steps only, as each costs many plain ones

Seconds are given as process CPU time and as wall time; the hook's own share is measured inside of
the same training, and its start-up (tracing the model, the first edit) is part of it.
"""

from __future__ import annotations

import copy
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks import _figure
from benchmarks._common import RESULTS, SCHEMA, environment, write_json
from benchmarks.examples.robust_digits import (
    Digits,
    accuracy,
    fit,
    load_digits,
    network,
    properties,
)
from torch_prepared.hooks import EditHook, EverySteps, PreparedModule

Row = dict[str, object]


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on."""

    hidden: tuple[int, ...] = (256, 256)
    pretrain_epochs: int = 3
    epochs: int = 10
    batch: int = 128
    rate: float = 1e-4
    images: int = 10
    radii: tuple[float, ...] = (0.03, 0.05)
    every: int = EverySteps().every
    prepared_steps: int = 300
    limit: float = 60.0
    seed: int = 0


SMOKE = Settings((32, 32), 2, 3, 128, 1e-4, 3, (0.03,), 10, 10, 10.0)


def run(settings: Settings, data: Path | None, output: Path) -> None:
    """Measure everything and write the JSON."""
    torch.set_num_threads(1)
    digits = load_digits(data)
    start = network(digits.train[0].shape[1], settings.hidden, settings.seed)
    fit(start, digits.train, settings.pretrain_epochs, 1e-3, batch=settings.batch)
    rows: list[Row] = []
    plain = copy.deepcopy(start)
    cost = fit(plain, digits.train, settings.epochs, settings.rate, batch=settings.batch, seed=1)
    base = {"cpu": cost.cpu / cost.steps, "wall": cost.wall / cost.steps}
    rows += _rows("plain", "start_accuracy", accuracy(start, digits.test), "%")
    rows += _rows("plain", "accuracy", accuracy(plain, digits.test), "%")
    for clock in ("cpu", "wall"):
        rows += _rows("plain", f"step_{clock}", 1e3 * base[clock], "ms")
    curves: dict[str, list[dict[str, object]]] = {}
    for eps in settings.radii:
        wanted = properties(digits, settings.images, eps)
        before = float(EditHook(wanted).certified_margins(plain).min())
        rows += _rows("plain", f"margin_{eps:g}", before, "1")
        found, curves[f"{eps:g}"] = _hooked(settings, digits, start, eps)
        rows += found
        rows += _prepared(settings, digits, start, eps)
    record = {
        "schema": SCHEMA, **environment(), "dtype": "float32", "seed": settings.seed,
        "data": "digits" if data is None else "mnist", "threads": 1,
        "parameters": vars(settings), "rows": rows, "looks": curves,
    }  # fmt: skip
    write_json(output, record)
    for row in rows:
        print(f"{row['case']:16}{row['metric']:24}{row['value']:12.5g} {row['unit']}")
    print(f"wrote {output}")


def _rows(case: str, metric: str, value: float, unit: str) -> list[Row]:
    return [{"case": case, "metric": metric, "value": value, "unit": unit}]


def _hooked(
    settings: Settings, digits: Digits, start: nn.Module, eps: float
) -> tuple[list[Row], list[dict[str, object]]]:
    """Fine-tuning with the hook: its cost by step, and what it ends with."""
    case, model = f"hook {eps:g}", copy.deepcopy(start)
    kept = digits.train[0][:1000], digits.train[1][:1000]
    hook = EditHook(
        properties(digits, settings.images, eps), schedule=EverySteps(settings.every),
        preserve=kept[0], labels=kept[1], time_limit=settings.limit, threads=1,
    )  # fmt: skip
    cost = fit(
        model, digits.train, settings.epochs, settings.rate, batch=settings.batch, seed=1, hook=hook
    )
    trained = accuracy(model, digits.test)
    wall, cpu = time.perf_counter(), time.process_time()
    result = hook.finish(model)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    looks = [record.to_json() for record in hook.records]
    late = hook.records[len(hook.records) // 2 :]
    rest = {"cpu": cost.cpu - cost.hook_cpu, "wall": cost.wall - cost.hook_wall}
    rows = [
        *_rows(case, "accuracy", accuracy(model, digits.test), "%"),
        *_rows(case, "accuracy_before_finish", trained, "%"),
        *_rows(case, "certified", float(result.status.value == "certified"), "1"),
        *_rows(case, "certified_margin", result.report.margin, "1"),
        *_rows(case, "edits", sum(r.distance > 0 for r in hook.records), "1"),
        *_rows(case, "failures", sum(bool(r.message) for r in hook.records), "1"),
        *_rows(case, "share_cpu", 100 * cost.hook_cpu / rest["cpu"], "%"),
        *_rows(case, "share_wall", 100 * cost.hook_wall / rest["wall"], "%"),
        *_rows(case, "finish_cpu", cpu, "s"),
        *_rows(case, "finish_wall", wall, "s"),
    ]
    for clock, spent in (("cpu", cost.hook_cpu), ("wall", cost.hook_wall)):
        looked = sum(getattr(r, "cpu_seconds" if clock == "cpu" else "seconds") for r in late)
        steps = len(late) * settings.every
        rows += _rows(case, f"step_{clock}", 1e3 * spent / cost.steps, "ms")
        steady = 100 * looked / (steps * rest[clock] / cost.steps) if steps else 0.0
        rows += _rows(case, f"steady_share_{clock}", steady, "%")
    return rows, looks


def _prepared(settings: Settings, digits: Digits, start: nn.Module, eps: float) -> list[Row]:
    """Some steps with projected weights."""
    case, steps = f"prepared {eps:g}", settings.prepared_steps
    model = PreparedModule(start, properties(digits, settings.images, eps))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wall, cpu = time.perf_counter(), time.process_time()
        model.certified_margins()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        cost = fit(
            model, digits.train, settings.epochs, settings.rate, batch=settings.batch, seed=1,
            most=steps,
        )  # fmt: skip
        margin = float(model.certified_margins().min())
        reached = accuracy(model, digits.test)
    return [
        *_rows(case, "first_cpu", cpu, "s"),
        *_rows(case, "first_wall", wall, "s"),
        *_rows(case, "steps", cost.steps, "1"),
        *_rows(case, "step_cpu", 1e3 * cost.cpu / cost.steps, "ms"),
        *_rows(case, "step_wall", 1e3 * cost.wall / cost.steps, "ms"),
        *_rows(case, "accuracy", reached, "%"),
        *_rows(case, "lowest_margin", margin, "1"),
        *_rows(case, "warnings", len(told), "1"),
    ]


def plot(source: Path, figure: Path) -> None:
    """Draw margins over steps, and seconds by step, from the JSON."""
    record = json.loads(source.read_text())
    values = {(row["case"], row["metric"]): row["value"] for row in record["rows"]}
    drawing, (lines, bars) = _figure.new(1, 2, (11, 4))
    for color, (eps, looks) in zip(
        ("tab:blue", "tab:orange"), record["looks"].items(), strict=False
    ):
        steps = [look["step"] for look in looks]
        before = [look["margin_before"] for look in looks]
        after = [look["margin_after"] for look in looks]
        lines.plot(steps, before, ":", color=color, label=f"eps {eps}, before the look")
        lines.plot(steps, after, "-", color=color, label=f"eps {eps}, after")
    lines.axhline(0, color="black", linewidth=0.5)
    lines.set_yscale("symlog", linthresh=1)
    lines.set_xlabel("optimizer step")
    lines.set_ylabel("lowest certified margin")
    lines.legend(fontsize=7)
    cases = sorted({row["case"] for row in record["rows"]}, key=lambda c: c.split()[::-1])
    cost = [values[case, "step_cpu"] for case in cases]
    bars.barh(cases, cost, color="tab:gray")
    for position, case in enumerate(cases):
        bars.text(cost[position], position, f" {values[case, 'accuracy']:.2f} %", va="center")
    bars.set_xscale("log")
    bars.set_xlabel("CPU ms per step (hook: added to plain); right: test accuracy")
    drawing.suptitle(
        f"{record['device']}, {record['threads']} thread, {record['data']}", fontsize=9
    )
    _figure.save(drawing, figure)


def main() -> None:
    """Parse the command line."""
    options = _figure.parse(_figure.make_parser(__doc__, data="mnist"), "training")
    if options.command != "plot":
        chosen, data = (SMOKE, None) if options.smoke else (Settings(), options.data)
        run(chosen, data, options.output)
    if options.command != "run":
        committed = options.output.parent == RESULTS
        plot(options.output, options.figure if committed else options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
