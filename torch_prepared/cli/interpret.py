"""``torch-prepared interpret``: which features a proof rests on, as a page with pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_prepared.cli._number import Number
from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish
from torch_prepared.cli._staging import staged_files

if TYPE_CHECKING:
    from torch_prepared.core.onnx import OnnxNetwork
    from torch_prepared.edit.verify import PropertyAnswer
    from torch_prepared.interpret import Choices, Explanation, ProofComparison
    from torch_prepared.specs import Property

__all__ = ["InterpretConfig", "command", "run_interpret"]

_REFUTE_SECONDS = 5.0


@dataclass(frozen=True)
class InterpretConfig:
    """What ``interpret`` is asked to do; see the command's options."""

    model: Path
    properties: tuple[Path, ...]
    output: Path
    compare: Path | None = None
    method: str = "crown"
    extract: str = "greedy"
    mode: str = "prune"
    order: str = "priority"
    maps: str = "frozen"
    widen: float = 2.0
    time_limit: float = 60.0
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class _Found:
    """Results of one property."""

    explanation: Explanation
    comparison: ProofComparison | None
    answer: PropertyAnswer | None


def run_interpret(config: InterpretConfig) -> Outcome:
    """Interpret every property's proof and write the page.

    Raises:
        click.UsageError: an output that cannot be written.
        PreparedError: bad input; see ``interpret.explain_proof``.
    """
    if config.output.suffix not in (".html", ".htm"):
        raise click.UsageError(f"{config.output}: expected a name ending in .html")
    sources = [config.model, *config.properties]
    sources += [] if config.compare is None else [config.compare]
    with staged_files([config.output], sources) as staged:
        # Imported here so that help and usage errors come without the delay of loading torch.
        from torch_prepared.interpret.page import render_page

        clock = time.monotonic()
        found = _interpret(config)
        comparisons = [f.comparison for f in found if f.comparison is not None]
        other = "" if config.compare is None else config.compare.name
        page = render_page(
            f"What the proof of {config.model.name} rests on",
            [f.explanation for f in found],
            comparisons,
            names=(other, config.model.name),
            maps=config.maps,
        )
        staged.paths[0].write_text(page, encoding="utf-8")
        staged.commit()
    return _outcome(config, found, time.monotonic() - clock)


def _interpret(config: InterpretConfig) -> list[_Found]:
    from tqdm import tqdm

    from torch_prepared.cli._inputs import load_network, load_properties
    from torch_prepared.core.deadline import Deadline

    deadline = Deadline(config.time_limit)
    network = load_network(config.model, config.settings.device)
    properties = load_properties(config.properties, network)
    other = None
    if config.compare is not None:
        other = load_network(config.compare, config.settings.device)
        load_properties(config.properties, other)
    found = []
    bar = tqdm(properties, disable=not config.settings.progress, unit="property", leave=False)
    for position, prop in enumerate(bar):
        limit = max(deadline.left / (len(properties) - position), 1e-3)
        found.append(_interpret_one(config, network, other, prop, limit))
    return found


def _interpret_one(
    config: InterpretConfig,
    network: OnnxNetwork,
    other: OnnxNetwork | None,
    prop: Property,
    limit: float,
) -> _Found:
    from torch_prepared.edit.verify import verify_network
    from torch_prepared.interpret import compare_proofs, explain_with

    choices, comparison = _choices(config, prop), None
    if other is None:
        explanation = explain_with(choices, network, prop, time_limit=limit)
    else:
        comparison = compare_proofs(other, network, prop, choices, time_limit=limit)
        explanation = comparison.after
    answer = None
    if not explanation.features.proved:
        seconds = min(limit, _REFUTE_SECONDS)
        answer = verify_network(
            network, [prop], time_limit=seconds, seed=config.settings.seed
        ).properties[0]
    return _Found(explanation, comparison, answer)


def _choices(config: InterpretConfig, prop: Property) -> Choices:
    from torch_prepared.interpret import Choices, widen_region

    domain = widen_region(prop.region, config.widen) if config.mode == "coarsen" else None
    return Choices(
        config.method,
        config.extract,
        config.mode,
        config.order,
        config.maps,
        domain,
        config.settings.seed,
    )


def _outcome(config: InterpretConfig, found: Sequence[_Found], seconds: float) -> Outcome:
    code, status = ExitCode.PROVED, "sufficient"
    if not all(f.explanation.selected.sufficient for f in found):
        code, status = ExitCode.UNKNOWN, "unknown"
    if any(f.answer is not None and f.answer.answer.value == "refuted" for f in found):
        code, status = ExitCode.REFUTED, "refuted"
    data = {
        "status": status,
        "seconds": seconds,
        "output": config.output,
        "properties": [f.explanation.to_json() for f in found],
        "comparisons": [f.comparison.to_json() for f in found if f.comparison is not None],
        "answers": [f.answer for f in found if f.answer is not None],
    }
    lines = [f"{status.upper()} in {seconds:.1f} s"]
    for one in found:
        lines.extend(_describe(one))
    lines.append(f"  page written to {config.output}")
    return Outcome(code, data, "\n".join(lines))


def _describe(found: _Found) -> list[str]:
    explanation = found.explanation
    chosen, name = explanation.selected, explanation.features.prop.name
    lines = [f"  {name}: {chosen.outcome.value}"]
    if chosen.sufficient:
        small = "the fewest possible" if chosen.minimum else f"{chosen.method.value} search"
        listed = ", ".join(map(str, chosen.kept.tolist()[:12])) or "none"
        lines[0] += f", {len(chosen.kept)} of {chosen.candidates} features ({small}): {listed}"
    lines.append(f"    {chosen.statement}")
    if found.answer is not None:
        answer = found.answer
        reason = f" ({answer.reason})" if answer.reason else ""
        lines.append(f"    the network itself: {answer.answer.value}{reason}")
        if answer.counterexample is not None:
            x = ", ".join(f"{v:.9g}" for v in answer.counterexample.x)
            lines.append(f"    X = [{x}]")
    if found.comparison is not None:
        both = found.comparison
        lines.append(
            f"    compared: margin {both.before.features.margin:.6g} -> "
            f"{both.after.features.margin:.6g}, common kept features {both.jaccard:.3g}, "
            f"priorities correlate {both.rank_correlation:.3g}, maps {both.map_cosine:.3g}"
        )
    return lines


def _choice(*names: str) -> click.Choice[str]:
    return click.Choice(list(names))


@click.command("interpret")
@click.argument("model", type=FILE)
@click.argument("properties", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, required=True, help="Page to write (.html).")
@click.option("--compare", type=FILE, help="Another network (.onnx), such as before an edit.")
@click.option("--method", type=_choice("crown", "zonotope", "ibp"), default="crown",
              show_default=True, help="How the network is bounded.")  # fmt: skip
@click.option("--extract", type=_choice("greedy", "prefix", "exact"), default="greedy",
              show_default=True, help="Search; prefix is the paper's.")  # fmt: skip
@click.option("--mode", type=_choice("prune", "coarsen"), default="prune", show_default=True,
              help="Other features become zero, or are bounded over a wider region.")  # fmt: skip
@click.option("--order", type=_choice("priority", "weight", "random"), default="priority",
              show_default=True, help="What features are sorted by.")  # fmt: skip
@click.option("--maps", type=_choice("frozen", "moving", "alpha"), default="frozen",
              show_default=True, help="Which derivative is shown.")  # fmt: skip
@click.option("--widen", type=Number(1.0, 1e6), default=2.0, show_default=True,
              help="For coarsen: the wider region, relative to the property's.")  # fmt: skip
@click.option("--time-limit", type=Number(0, min_open=True), default=60.0,
              show_default=True, help="Seconds.")  # fmt: skip
@common_options
def command(
    settings: Settings,
    model: Path,
    properties: tuple[Path, ...],
    output: Path,
    compare: Path | None,
    method: str,
    extract: str,
    mode: str,
    order: str,
    maps: str,
    widen: float,
    time_limit: float,
) -> None:
    """Show what the proof that MODEL (.onnx) satisfies PROPERTIES (.vnnlib) rests on.

    A small set of hidden features is kept that proves the property by itself, which the
    certificate checker confirms; the page says what exactly that proves.
    """
    config = InterpretConfig(
        model=model,
        properties=properties,
        output=output,
        compare=compare,
        method=method,
        extract=extract,
        mode=mode,
        order=order,
        maps=maps,
        widen=widen,
        time_limit=time_limit,
        settings=settings,
    )
    finish(run_interpret(config), settings.json)
