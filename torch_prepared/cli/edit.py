"""``torch-prepared edit``: change a network until its properties are certified."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from torch_prepared.cli._edit_config import EditConfig
from torch_prepared.cli._edit_outcome import edit_outcome
from torch_prepared.cli._number import Number
from torch_prepared.cli._options import FILE, Settings, common_options
from torch_prepared.cli._outcome import ExitCode, Outcome, finish
from torch_prepared.cli._staging import StagedFiles, staged_files
from torch_prepared.cli._team import command_team
from torch_prepared.cli.check import CheckConfig, replay_certificate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torch_prepared.cluster import RankTeam
    from torch_prepared.core.graph import Graph
    from torch_prepared.core.onnx import OnnxNetwork
    from torch_prepared.edit import EditResult
    from torch_prepared.edit.verify import CrossCheck
    from torch_prepared.specs import Property

__all__ = ["command", "run_edit"]

logger = logging.getLogger(__name__)

_MODEL_SUFFIXES = (".onnx", ".onnx.gz")
_AFTER_SHARE, _AFTER_MOST = 0.2, 10.0


@dataclass(frozen=True)
class _Found:
    """What was to hold, and the edit that was found."""

    properties: tuple[Property, ...]
    keep: tuple[Property, ...]
    result: EditResult[nn.Module | OnnxNetwork | Graph]


def run_edit(config: EditConfig, team: RankTeam | None = None) -> Outcome:
    """Edit, write, read back, replay the certificate, attack; files appear only if all agree.

    In a team the ranks that do not lead help with the edit, and neither write nor attack.

    Raises:
        click.UsageError: an output that cannot be written.
        PreparedError: bad input; see ``edit.edit_network``.
    """
    if not config.output.name.endswith(_MODEL_SUFFIXES):
        raise click.UsageError(f"{config.output}: expected a name ending in .onnx or .onnx.gz")
    # Imported here so that help and usage errors come without the delay of loading NumPy.
    from torch_prepared.cli._report_file import write_record

    if team is not None and not team.leads:
        certified = _find(config, team).result.status.value == "certified"
        return Outcome(ExitCode.PROVED if certified else ExitCode.UNKNOWN, {}, "")
    wanted = [config.output, config.certificate]
    wanted += [] if config.report is None else [config.report]
    with staged_files(wanted, config.sources) as staged:
        outcome = _edit(config, staged, team)
        certified = outcome.code is ExitCode.PROVED
        if config.report is not None:
            edited = staged.paths[0] if certified else None
            write_record(staged.paths[2], config, outcome.data, edited)
        if certified:
            staged.commit()
        else:  # the report of a failed edit is the one file that appears
            StagedFiles(staged.targets[2:], staged.paths[2:], staged.modes[2:]).commit()
    return outcome


def _find(config: EditConfig, team: RankTeam | None) -> _Found:
    # Imported here so that help and usage errors come without the delay of loading torch.
    from torch_prepared.cli._inputs import load_network, load_properties
    from torch_prepared.edit import edit_network

    clock, limit = time.monotonic(), config.time_limit
    network = load_network(config.model, config.settings.device)
    properties = load_properties(config.properties, network)
    keep = load_properties(config.keep, network)
    inputs, labels = _reference(config)
    left = None
    if limit is not None:
        left = max(limit - _after(limit) - (time.monotonic() - clock), 0.1)
    result = edit_network(
        network,
        properties,
        keep=keep,
        holdout=load_properties(config.holdout, network),
        method=config.method or default_method(),
        preserve=inputs,
        labels=labels,
        domain=config.domain,
        norm=config.norm,
        layers=config.layers,
        margin=config.margin,
        time_limit=left,
        threads=config.settings.threads,
        seed=config.settings.seed,
        progress=config.settings.progress and (team is None or team.leads),
        raise_on_failure=False,
        team=team,
        checkpoint=config.checkpoint,
    )
    return _Found(properties, keep, result)


def _after(limit: float | None) -> float:
    """Seconds for the attack on the written file."""
    return _AFTER_MOST if limit is None else min(_AFTER_MOST, _AFTER_SHARE * limit)


def _edit(config: EditConfig, staged: StagedFiles, team: RankTeam | None) -> Outcome:
    # Imported here, like above.
    from torch_prepared.core.onnx import OnnxNetwork, save_onnx

    clock, limit = time.monotonic(), config.time_limit
    found = _find(config, team)
    result = found.result
    report = result.report
    if result.certificate is None or not isinstance(result.model, OnnxNetwork):
        return edit_outcome(config, report, clock, "unknown", report.message or "no certified edit")
    save_onnx(result.model, {}, staged.paths[0])
    result.certificate.save(staged.paths[1])
    files = CheckConfig(
        staged.paths[1],
        staged.paths[0],
        (*config.properties, *config.keep),
        settings=config.settings,
    )
    checked = None if result.check is None else (result.certificate, result.check)
    replay = replay_certificate(files, checked)
    if not replay.certified:
        reason = f"the files as written are not certified: {replay.reason}"
        return edit_outcome(config, report, clock, "unknown", reason, replay=replay)
    spare = _after(limit)
    if limit is not None:
        spare = min(spare, max(limit - (time.monotonic() - clock), 1.0))
    every, seed = (*found.properties, *found.keep), config.settings.seed
    cross = _attack_file(staged.paths[0], every, result.worst_inputs, spare, seed)
    if cross.violations:
        reason = (
            "SOUNDNESS ALARM: onnxruntime violates a certified property "
            f"({cross.violations[0]}, margin {cross.smallest_margin:.3g}); nothing was kept; "
            "please report this network"
        )
        click.echo(f"error: {reason}", err=True)
        return edit_outcome(config, report, clock, "unknown", reason, replay=replay, cross=cross)
    return edit_outcome(
        config, report, clock, "certified", report.message, replay=replay, cross=cross
    )


def default_method() -> str:
    """The editor that chooses among the others, where there is one."""
    from torch_prepared.edit import EDITORS

    return "auto" if "auto" in EDITORS else "one_shot"


def _reference(config: EditConfig) -> tuple[Tensor | None, Tensor | None]:
    """Inputs and labels to preserve, as tensors."""
    import torch

    from torch_prepared.cli._inputs import load_reference

    if config.preserve is None:
        return None, None
    reference = load_reference(config.preserve)
    labels = None if reference.labels is None else torch.from_numpy(reference.labels)
    return torch.from_numpy(reference.inputs.astype("float64")), labels


def _attack_file(
    path: Path, properties: Sequence[Property], starts: Tensor, seconds: float, seed: int
) -> CrossCheck:
    """Attack the written network, starting from what violated the original one, too."""
    from torch_prepared.cli._inputs import load_network
    from torch_prepared.edit.verify import cross_check

    network: OnnxNetwork = load_network(path)
    return cross_check(network, properties, starts=starts[:, None], time_limit=seconds, seed=seed)


class _Method(click.ParamType[str]):
    """Name of an editor."""

    name = "method"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """All names."""
        # Imported here, as everywhere in this package, so that other help pages stay fast.
        from torch_prepared.edit import EDITORS

        return f"[{'|'.join(EDITORS)}]"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse unknown names."""
        from torch_prepared.edit import EDITORS

        if value not in EDITORS:
            self.fail(f"got {value!r}; expected one of {', '.join(EDITORS)}", param, ctx)
        return value


class _Domain(click.ParamType[tuple[float, float]]):
    """``LO,HI``."""

    name = "lo,hi"

    def convert(
        self,
        value: str | tuple[float, float],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[float, float]:
        """Two finite numbers in order."""
        if isinstance(value, tuple):
            return value
        try:
            low, high = map(float, value.split(","))
        except ValueError:
            low, high = math.nan, math.nan
        if not -math.inf < low <= high < math.inf:
            self.fail(f"got {value!r}; expected two numbers LO,HI with LO <= HI", param, ctx)
        return low, high


@click.command("edit")
@click.argument("model", type=FILE)
@click.argument("properties", type=FILE, nargs=-1, required=True)
@click.option("-o", "--output", type=FILE, required=True, help="Edited network (.onnx[.gz]).")
@click.option("--certificate", type=FILE, required=True, help="Its certificate (.json[.gz]).")
@click.option("--method", type=_Method(), help="Editor; by default the one that chooses.")
@click.option("--preserve", type=FILE, help="Inputs to stay the same on (.npz: inputs, labels).")
@click.option("--domain", type=_Domain(), help="Range of inputs to stay the same on.")
@click.option(
    "--norm",
    type=click.Choice(["1", "2", "inf", "1+inf", "behavior"]),
    help="Distance to minimize; by default the editor chooses.",
)
@click.option("--time-limit", type=Number(0, min_open=True), help="Seconds.")
@click.option("--margin", type=Number(0), help="Safety margin to aim at, in output units.")
@click.option(
    "--keep",
    type=FILE,
    multiple=True,
    help="Property (.vnnlib) that holds and must still hold; certified as well. Repeatable.",
)
@click.option(
    "--holdout",
    type=FILE,
    multiple=True,
    help="Property (.vnnlib) to report on before and after, unseen by the editor. Repeatable.",
)
@click.option(
    "--checkpoint",
    type=FILE,
    help="Folder to note progress in; the same command goes on from there.",
)
@click.option("--report", type=FILE, help="Write all numbers here (.json), even of a failed edit.")
@click.option("--layers", help="Names of the layers that may change, with commas between.")
@common_options
def command(
    settings: Settings,
    model: Path,
    properties: tuple[Path, ...],
    output: Path,
    certificate: Path,
    method: str | None,
    preserve: Path | None,
    domain: tuple[float, float] | None,
    norm: str | None,
    time_limit: float | None,
    margin: float | None,
    layers: str | None,
    keep: tuple[Path, ...],
    holdout: tuple[Path, ...],
    report: Path | None,
    checkpoint: Path | None,
) -> None:
    """Change MODEL (.onnx) as little as possible until PROPERTIES (.vnnlib) are certified.

    Nothing is written unless the certificate, read back from disk, replays on the network read
    back from disk and an attack in onnxruntime finds nothing. The certificate covers PROPERTIES,
    then those to keep.
    """
    if preserve is not None and domain is not None:
        raise click.UsageError("--preserve and --domain: got both; expected one of them")
    config = EditConfig(
        model=model,
        properties=properties,
        output=output,
        certificate=certificate,
        method=method,
        preserve=preserve,
        domain=domain,
        norm=norm,
        time_limit=time_limit,
        margin=margin,
        layers=None if layers is None else tuple(name.strip() for name in layers.split(",")),
        keep=keep,
        holdout=holdout,
        report=report,
        checkpoint=checkpoint,
        settings=settings,
    )
    with command_team() as team:
        outcome = run_edit(config, team)
    if team is not None and not team.leads:
        raise click.exceptions.Exit(int(outcome.code))
    finish(outcome, settings.json)
