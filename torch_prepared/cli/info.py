"""``torch-prepared info``: what a network consists of, and what is supported."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import click

from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish

__all__ = ["InfoConfig", "command", "run_info"]


@dataclass(frozen=True)
class InfoConfig:
    """What ``info`` is asked to do; see the command's options."""

    model: Path | None
    operators: bool = False
    settings: Settings = field(default_factory=Settings)


def run_info(config: InfoConfig) -> Outcome:
    """Describe the network, the supported operators, or both."""
    # Imported here so that help and usage errors come without the delay of loading torch.
    from torch_prepared.ops import build_info
    from torch_prepared.relax import support_table

    data: dict[str, object] = {"build": str(build_info())}
    text = []
    if config.model is not None:
        described, lines = _describe_model(config.model)
        data |= described
        text += lines
    if config.operators:
        table = support_table()
        rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
        data["supported"] = [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
        text += [table]
    return Outcome(ExitCode.PROVED, data, "\n".join([*text, str(build_info())]))


def _describe_model(path: Path) -> tuple[dict[str, object], list[str]]:
    """Facts about one network, as data and as lines."""
    from torch_prepared.bounds import editable_layers
    from torch_prepared.cli._inputs import load_network

    graph = load_network(path).graph
    counts = Counter(node.op for node in graph.nodes[1:])
    layers = editable_layers(graph)
    weights = {name: graph.parameters[name].numel() for name in sorted(graph.editable)}
    total = sum(value.numel() for value in graph.parameters.values() if value.is_floating_point())
    data = {
        "model": path,
        "input_shape": graph.input_shape,
        "output_shape": graph.output_shape,
        "dtype": str(graph.dtype).removeprefix("torch."),
        "operators": dict(counts),
        "parameters": total,
        "editable_parameters": sum(weights.values()),
        "editable_layers": layers,
        "nodes": [{"name": n.name, "operator": n.op, "shape": n.shape} for n in graph.nodes],
    }
    lines = [
        f"{path}: {'x'.join(map(str, graph.input_shape))} -> "
        f"{'x'.join(map(str, graph.output_shape))}, {data['dtype']}, {total:,} parameters "
        f"({sum(weights.values()):,} editable)",
        "operators: " + ", ".join(f"{count} {op}" for op, count in sorted(counts.items())),
        "editable layers: " + ", ".join(layers),
        *(f"  {line}" for line in graph.describe().splitlines()),
    ]
    return data, lines


@click.command("info")
@click.argument("model", type=FILE, required=False)
@click.option("--operators", is_flag=True, help="Also print the table of supported operators.")
@common_options
def command(settings: Settings, model: Path | None, operators: bool) -> None:
    """Describe MODEL (.onnx): operators, shapes, parameters, layers an edit may change."""
    if model is None and not operators:
        raise click.UsageError("info: got nothing to describe; expected MODEL or --operators")
    finish(run_info(InfoConfig(model, operators, settings)), settings.json)
