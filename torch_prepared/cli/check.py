"""``torch-prepared check``: replay a certificate against files given independently."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from torch_prepared.cli._number import Number
from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish

if TYPE_CHECKING:
    from torch_prepared.certify import Certificate, CheckResult
    from torch_prepared.edit.verify import Agreement

__all__ = ["CheckConfig", "Replay", "command", "replay_certificate", "run_check"]

ArithmeticName = Literal["real", "float32", "float64", "tf32", "bfloat16"]


@dataclass(frozen=True)
class CheckConfig:
    """What ``check`` is asked to do; see the command's options."""

    certificate: Path
    model: Path
    properties: tuple[Path, ...]
    arithmetic: ArithmeticName = "real"
    activation_ulp: float | None = None
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True)
class Replay:
    """The checker's answer, and whether importer and onnxruntime mean the same network."""

    check: CheckResult
    agreement: Agreement

    @property
    def certified(self) -> bool:
        """Whether every property is proved, of the network that onnxruntime runs."""
        return self.check.status.value == "certified" and self.agreement.holds

    @property
    def reason(self) -> str:
        """Why not, in one line; empty when certified."""
        if not self.agreement.holds:
            return (
                f"imported graph and onnxruntime differ by {self.agreement.largest_difference:.3g} "
                f"(expected at most {self.agreement.tolerance:.3g}): the file means another network"
            )
        failed = [c for c in self.check.per_property if c.status.value != "certified"]
        return f"{failed[0].name}: {failed[0].reason}" if failed else ""


def replay_certificate(
    config: CheckConfig, checked: tuple[Certificate, CheckResult] | None = None
) -> Replay:
    """Read all files anew, replay the certificate, and compare the importer with onnxruntime.

    ``checked`` is a certificate replayed in this process, with its verdict: if the file holds the
    very same one, and network and properties on disk are those it was replayed on, digit for digit,
    the verdict stands without a second replay.

    Raises:
        CertificateError: the certificate is malformed or made for something else.
        ModelFormatError: see ``core.onnx.load_onnx``.
        SpecError: see ``specs.load_vnnlib``.
        UnsupportedOperationError: an operator without support.
    """
    # Imported here, like in all commands: help and usage errors come without this delay.
    from torch_prepared.certify import Certificate, check_certificate, match_certificate
    from torch_prepared.cli._inputs import load_network, load_properties
    from torch_prepared.edit.verify import compare_with_onnxruntime

    arithmetic = config.arithmetic
    if arithmetic != "real" and arithmetic != "float32":
        raise click.UsageError(
            f"--arithmetic: got {arithmetic} for a certificate about properties; expected real or "
            "float32"
        )
    network = load_network(config.model)
    properties = load_properties(config.properties, network)
    certificate = Certificate.load(config.certificate)
    record, claims = network.graph.record(), [prop.record() for prop in properties]
    if checked is not None and certificate.to_json() == checked[0].to_json():
        match_certificate(certificate, record, claims)
        check = checked[1]
    else:
        check = check_certificate(
            certificate,
            record,
            claims,
            arithmetic=arithmetic,
            activation_ulp=config.activation_ulp,
            workers=config.settings.threads or 1,
        )
    agreement = compare_with_onnxruntime(network, properties, seed=config.settings.seed)
    return Replay(check, agreement)


def run_check(config: CheckConfig) -> Outcome:
    """Replay, and say what came of it."""
    # Imported here, like in all commands: help and usage errors come without this delay.
    from torch_prepared.cli._point_check import is_point_certificate, run_point_check

    if is_point_certificate(config.certificate):
        return run_point_check(
            config.certificate, config.model, config.properties, config.arithmetic
        )
    from torch_prepared.cli._radius_check import is_radius_certificate, run_radius_check

    if is_radius_certificate(config.certificate):
        return run_radius_check(
            config.certificate, config.model, config.properties, config.arithmetic,
            config.settings.seed,
        )  # fmt: skip
    if not config.properties:
        raise click.UsageError(
            f"{config.certificate}: a certificate about properties; got none; expected their files"
        )
    replay = replay_certificate(config)
    check, agreement = replay.check, replay.agreement
    status = "certified" if replay.certified else "unknown"
    data = {
        "status": status,
        "arithmetic": check.arithmetic,
        "margin": check.margin,
        "seconds": check.seconds,
        "reason": replay.reason,
        "properties": check.per_property,
        "onnxruntime": agreement,
    }
    lines = [
        f"{status.upper()} in {check.arithmetic} arithmetic"
        + (f": {replay.reason}" if replay.reason else f", margin at least {check.margin:.6g}"),
        *(
            f"  {c.name}: {c.status.value}, margin {c.margin:.6g}, {c.leaves} leaves"
            + (f" ({c.reason})" if c.reason else "")
            for c in check.per_property
        ),
        f"  onnxruntime agrees within {agreement.largest_difference:.2g} on {agreement.points} "
        f"random inputs; replayed in {check.seconds:.2f} s",
    ]
    if not agreement.holds:
        lines.pop()
    code = ExitCode.PROVED if replay.certified else ExitCode.UNKNOWN
    return Outcome(code, data, "\n".join(lines))


@click.command("check")
@click.argument("certificate", type=FILE)
@click.argument("model", type=FILE)
@click.argument("properties", type=FILE, nargs=-1)
@click.option(
    "--arithmetic",
    type=click.Choice(["real", "float32", "float64", "tf32", "bfloat16"]),
    default="real",
    show_default=True,
    help="Judge exact arithmetic on the stored weights, or any evaluation of them in float32; "
    "the other types are for examples of pointwise.",
)
@click.option(
    "--activation-ulp",
    type=Number(0, 1e6),
    help="With float32: error of tanh, sigmoid, ... in units of the last place.",
)
@common_options
def command(
    settings: Settings,
    certificate: Path,
    model: Path,
    properties: tuple[Path, ...],
    arithmetic: ArithmeticName,
    activation_ulp: float | None,
) -> None:
    """Replay CERTIFICATE for MODEL (.onnx) and PROPERTIES (.vnnlib), trusting none of them.

    A certificate of ``pointwise`` takes the file of examples (.npz, .csv) in place of PROPERTIES,
    one of ``invert`` none, or with --match the other network (.onnx).
    """
    config = CheckConfig(certificate, model, properties, arithmetic, activation_ulp, settings)
    finish(run_check(config), settings.json)
