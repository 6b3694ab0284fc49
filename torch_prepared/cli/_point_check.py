"""Replaying certificates about finitely many examples."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from torch_prepared.certify import PointCertificate, PointCheck, PointClaims, check_points
from torch_prepared.certify.compute import ComputeType
from torch_prepared.certify.encoding import read_json
from torch_prepared.certify.points import POINTS_FORMAT
from torch_prepared.cli._examples import load_examples
from torch_prepared.cli._inputs import load_network
from torch_prepared.cli._outcome import ExitCode, Outcome
from torch_prepared.core.onnx import run_onnx
from torch_prepared.errors import SpecError

__all__ = ["PointReplay", "is_point_certificate", "replay_points", "run_point_check"]


class PointReplay:
    """The checker's answer, and how many examples onnxruntime decides as claimed."""

    def __init__(self, check: PointCheck, right: int, total: int) -> None:
        self.check, self.right, self.total = check, right, total

    @property
    def certified(self) -> bool:
        """Whether every example is proved and onnxruntime agrees on all of them."""
        return self.check.status.value == "certified" and self.right == self.total

    @property
    def reason(self) -> str:
        """Why not, in one line; empty when certified."""
        if self.check.status.value != "certified":
            return self.check.reason
        return (
            ""
            if self.right == self.total
            else (
                f"onnxruntime decides {self.total - self.right} of {self.total} examples otherwise"
            )
        )


def is_point_certificate(path: Path) -> bool:
    """Whether a file holds a certificate about examples; its contents are not judged here."""
    data = read_json(path)
    return isinstance(data, dict) and data.get("format") == POINTS_FORMAT


def replay_points(
    certificate: Path,
    model: Path,
    examples: Path,
    arithmetic: Literal["real"] | ComputeType = "real",
) -> PointReplay:
    """Read all files anew and evaluate the network at every example.

    Raises:
        CertificateError: malformed, or made for something else.
        ModelFormatError: see ``core.onnx.load_onnx``.
        SpecError: see :func:`load_examples`.
    """
    network = load_network(model)
    found = load_examples(examples)
    graph = network.graph
    if found.inputs.shape[1] != graph.input_size:
        raise SpecError(
            f"{examples}: got inputs of {found.inputs.shape[1]} numbers; expected "
            f"{graph.input_size}, as the network has"
        )
    record = graph.record()
    kind = np.dtype(str(graph.dtype).removeprefix("torch."))
    x = found.inputs.astype(kind).astype(np.float64)
    claims = PointClaims.labels(x, found.targets.tolist(), graph.output_size)
    check = check_points(PointCertificate.load(certificate), record, claims, arithmetic=arithmetic)
    outputs = run_onnx(network, x.astype(kind))
    own = outputs[np.arange(len(x)), found.targets]
    outputs[np.arange(len(x)), found.targets] = -np.inf
    right = int((own > outputs.max(axis=1)).sum())
    return PointReplay(check, right, len(x))


def run_point_check(
    certificate: Path,
    model: Path,
    examples: tuple[Path, ...],
    arithmetic: Literal["real"] | ComputeType,
) -> Outcome:
    """Replay, and say what came of it."""
    if len(examples) != 1:
        raise SpecError(
            f"{certificate}: a certificate about examples; got {len(examples)} files after the "
            "network; expected the one file of examples"
        )
    replay = replay_points(certificate, model, examples[0], arithmetic)
    check = replay.check
    status = "certified" if replay.certified else "unknown"
    data = {
        "status": status,
        "kind": "examples",
        "arithmetic": check.arithmetic,
        "exact": check.exact,
        "examples": len(check.margins),
        "margin": check.margin,
        "failed": check.failed,
        "seconds": check.seconds,
        "reason": replay.reason,
        "onnxruntime": {"right": replay.right, "total": replay.total},
    }
    how = "rational arithmetic" if check.exact else "enclosures"
    text = (
        f"{status.upper()} in {check.arithmetic} arithmetic ({how})"
        + (f": {replay.reason}" if replay.reason else f", margin at least {check.margin:.6g}")
        + f"\n  {len(check.margins)} examples; onnxruntime decides {replay.right} as claimed; "
        f"replayed in {check.seconds:.2f} s"
    )
    return Outcome(ExitCode.PROVED if replay.certified else ExitCode.UNKNOWN, data, text)
