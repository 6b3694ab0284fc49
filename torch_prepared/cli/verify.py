"""``torch-prepared verify``: refute or prove a network as it is."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from torch_prepared.cli._number import Number
from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish
from torch_prepared.cli._staging import staged_files

if TYPE_CHECKING:
    from torch_prepared.edit.verify import PropertyAnswer, Verification

__all__ = ["VerifyConfig", "command", "run_verify"]

_CODES = {
    "proved": ExitCode.PROVED,
    "refuted": ExitCode.REFUTED,
    "unknown": ExitCode.UNKNOWN,
}


@dataclass(frozen=True)
class VerifyConfig:
    """What ``verify`` is asked to do; see the command's options."""

    model: Path
    properties: tuple[Path, ...]
    certificate: Path | None = None
    time_limit: float | None = None
    settings: Settings = field(default_factory=Settings)


def run_verify(config: VerifyConfig) -> Outcome:
    """Attack, then prove; writes a certificate if one is asked for and all is proved."""
    # Imported here so that help and usage errors come without the delay of loading torch.
    from torch_prepared.cli._inputs import load_network, load_properties
    from torch_prepared.edit.verify import verify_network

    clock = time.monotonic()
    wanted = [] if config.certificate is None else [config.certificate]
    with ExitStack() as stack:
        staged = stack.enter_context(staged_files(wanted, [config.model, *config.properties]))
        network = load_network(config.model, config.settings.device)
        properties = load_properties(config.properties, network)
        result = verify_network(
            network, properties, time_limit=config.time_limit, seed=config.settings.seed
        )
        written = None
        if config.certificate is not None and result.answer.value == "proved" and result.certified:
            result.certified.certificate.save(staged.paths[0])
            staged.commit()
            written = config.certificate
    data = {
        "status": result.answer,
        "seconds": time.monotonic() - clock,
        "phases": {"attack": result.attack_seconds, "proof": result.proof_seconds},
        "margin": min((p.bound for p in result.properties), default=float("nan")),
        "certificate": written,
        "properties": result.properties,
    }
    return Outcome(_CODES[result.answer.value], data, _describe(result, written))


def _describe(result: Verification, written: Path | None) -> str:
    seconds = result.attack_seconds + result.proof_seconds
    lines = [f"{result.answer.value.upper()} in {seconds:.1f} s"]
    for answer in result.properties:
        lines.extend(_describe_property(answer))
    if written is not None:
        lines.append(f"  certificate written to {written}")
    return "\n".join(lines)


def _describe_property(answer: PropertyAnswer) -> list[str]:
    line = f"  {answer.name}: {answer.answer.value}"
    if answer.answer.value == "proved":
        return [f"{line}, margin between {answer.bound:.6g} and {answer.worst:.6g}"]
    if answer.counterexample is None:
        return [f"{line}, {answer.reason} (smallest margin met by the attack {answer.worst:.6g})"]
    found = answer.counterexample
    return [
        f"{line}, {answer.reason} (in onnxruntime {found.deployed_margin:.6g}) at",
        f"    X = {_numbers(found.x)}",
        f"    Y = {_numbers(found.output)}",
    ]


def _numbers(values: np.ndarray) -> str:
    """All digits that float32 needs; whatever float32 does not hold in float64."""
    short = values.astype(np.float32)
    exact = np.array_equal(short.astype(values.dtype), values)
    return "[" + ", ".join(str(v) for v in (short if exact else values)) + "]"


@click.command("verify")
@click.argument("model", type=FILE)
@click.argument("properties", type=FILE, nargs=-1, required=True)
@click.option("--certificate", type=FILE, help="Write a certificate here if all is proved.")
@click.option("--time-limit", type=Number(0, min_open=True), help="Seconds.")
@common_options
def command(
    settings: Settings,
    model: Path,
    properties: tuple[Path, ...],
    certificate: Path | None,
    time_limit: float | None,
) -> None:
    """Refute or prove that MODEL (.onnx) satisfies PROPERTIES (.vnnlib).

    A violating input counts only if onnxruntime's own output violates.
    """
    config = VerifyConfig(model, properties, certificate, time_limit, settings)
    finish(run_verify(config), settings.json)
