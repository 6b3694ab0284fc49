"""Replaying certificates that no two inputs of a ball collide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from torch_prepared.certify import RadiusCertificate, RadiusCheck, check_radius
from torch_prepared.certify.encoding import read_json
from torch_prepared.certify.radius import RADIUS_FORMAT
from torch_prepared.cli._inputs import load_network
from torch_prepared.cli._outcome import ExitCode, Outcome
from torch_prepared.edit.verify import Agreement, compare_with_onnxruntime
from torch_prepared.errors import SpecError
from torch_prepared.specs import Box, Property, SafeSet

__all__ = ["RadiusReplay", "is_radius_certificate", "replay_radius", "run_radius_check"]


@dataclass(frozen=True)
class RadiusReplay:
    """The checker's answer, and whether importer and onnxruntime mean the same networks."""

    check: RadiusCheck
    agreements: tuple[Agreement, ...]

    @property
    def certified(self) -> bool:
        """Whether the claim is proved, of the networks that onnxruntime runs."""
        agree = all(a.holds for a in self.agreements)
        return self.check.status.value == "certified" and agree

    @property
    def reason(self) -> str:
        """Why not, in one line; empty when certified."""
        if self.check.reason:
            return self.check.reason
        wrong = [a for a in self.agreements if not a.holds]
        if not wrong:
            return ""
        return (
            f"imported graph and onnxruntime differ by {wrong[0].largest_difference:.3g} (expected "
            f"at most {wrong[0].tolerance:.3g}): the file means another network"
        )


def is_radius_certificate(path: Path) -> bool:
    """Whether a file holds a certificate about a ball; its contents are not judged here."""
    data = read_json(path)
    return isinstance(data, dict) and data.get("format") == RADIUS_FORMAT


def replay_radius(certificate: Path, models: tuple[Path, ...], seed: int = 0) -> RadiusReplay:
    """Read all files anew and replay the certificate.

    Args:
        certificate: the file.
        models: the network, and for a claim about two networks the second.
        seed: of the inputs on which onnxruntime is asked.

    Raises:
        CertificateError: malformed, or made for something else.
        ModelFormatError: see ``core.onnx.load_onnx``.
        UnsupportedOperationError: an operator without support.
    """
    found = RadiusCertificate.load(certificate)
    networks = [load_network(path) for path in models]
    check = check_radius(found, [n.graph.record() for n in networks])
    agreements = tuple(
        compare_with_onnxruntime(n, [_inputs(found, n.graph.output_size)], seed=seed)
        for n in networks
    )
    return RadiusReplay(check, agreements)


def _inputs(certificate: RadiusCertificate, outputs: int) -> Property:
    """A property over the certificate's box, for its inputs; what it asks for does not matter."""
    row = torch.ones(1, outputs, dtype=torch.float64)
    safe = SafeSet(((row, torch.zeros(1, dtype=torch.float64)),))
    return Property(Box(np.array(certificate.lower), np.array(certificate.upper)), safe, "ball")


def run_radius_check(
    certificate: Path, model: Path, others: tuple[Path, ...], arithmetic: str, seed: int
) -> Outcome:
    """Replay, and say what came of it."""
    if arithmetic != "real":
        raise SpecError(
            f"{certificate}: a certificate about a ball; got --arithmetic {arithmetic}; expected "
            "real: equal outputs of exact arithmetic are not equal after rounding"
        )
    replay = replay_radius(certificate, (model, *others), seed)
    check, claim = replay.check, replay.check.claim
    status = "certified" if replay.certified else "unknown"
    data = {
        "status": status,
        "kind": claim.kind,
        "claim": claim.sentence,
        "radius": claim.radius,
        "norm": claim.norm,
        "center": claim.center,
        "tolerance": claim.tolerance,
        "output_tolerance": claim.output_tolerance,
        "separation": claim.separation,
        "pairs": check.pairs,
        "seconds": check.seconds,
        "reason": replay.reason,
        "onnxruntime": replay.agreements,
    }
    text = (
        f"{status.upper()} in real arithmetic"
        + (f": {replay.reason}" if replay.reason else "")
        + f"\n  claim: {claim.sentence}"
        f"\n  {check.pairs} pairs of boxes, replayed in {check.seconds:.2f} s"
    )
    return Outcome(ExitCode.PROVED if replay.certified else ExitCode.UNKNOWN, data, text)
