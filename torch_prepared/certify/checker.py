"""The independent checker: the only place where anything is called certified."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np

from torch_prepared.certify.certificate import Certificate, property_digest
from torch_prepared.certify.envelope import match_network
from torch_prepared.certify.network import CheckedNetwork, read_network
from torch_prepared.certify.operators import Arithmetic
from torch_prepared.certify.parallel import run_in_processes
from torch_prepared.certify.proof import ProofTree
from torch_prepared.certify.records import NetworkRecord, PropertyRecord
from torch_prepared.certify.regions import check_region
from torch_prepared.certify.replay import TreeReplay
from torch_prepared.certify.rounding import FloatArray, IntArray
from torch_prepared.errors import CertificateError

__all__ = [
    "MOST_FAILED",
    "CheckResult",
    "PropertyCheck",
    "Verdict",
    "check_certificate",
    "match_certificate",
]

Progress = Callable[[int, int], None]
MOST_FAILED = 64  #: leaves of a tree that may fail before its replay ends
_FEWEST_LEAVES = 2000  # per worker; below, starting a process costs more than it gains


class Verdict(Enum):
    """What the checker says."""

    CERTIFIED = "certified"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class PropertyCheck:
    """Verdict on one property.

    ``margin`` is a proved lower bound of the smallest claimed row over the leaves replayed (all
    of them when certified); NaN when no leaf gave one. ``failed`` are the numbers of leaves that
    were replayed and not proved; a replay ends once there are more than :data:`MOST_FAILED`.
    """

    name: str
    status: Verdict
    margin: float
    leaves: int
    reason: str
    failed: tuple[int, ...] = ()


@dataclass(frozen=True)
class CheckResult:
    """Verdict on a certificate: certified when every property is."""

    status: Verdict
    per_property: tuple[PropertyCheck, ...]
    seconds: float
    arithmetic: str

    @property
    def margin(self) -> float:
        """Smallest margin of all properties."""
        return float(np.min([check.margin for check in self.per_property]))


def check_certificate(
    certificate: Certificate,
    network: NetworkRecord,
    properties: Sequence[PropertyRecord],
    *,
    arithmetic: Literal["real", "float32"] = "real",
    activation_ulp: float | None = None,
    progress: Progress | None = None,
    time_limit: float | None = None,
    workers: int = 1,
) -> CheckResult:
    """Replay a certificate against a network and properties that are given independently.

    Args:
        certificate: not trusted.
        network: structure and weights exactly as stored; the object of the verdict.
        properties: what is to be proved, in the certificate's order.
        arithmetic: ``"real"`` judges the network in exact arithmetic on the stored weights;
            ``"float32"`` any evaluation in float32 that sums the products of each operator in
            any order, with or without fused operations, on float32 inputs.
        activation_ulp: for ``"float32"``: error of transcendental functions in units of the last
            place of ``max(1, |value|, |x|)``; without it such networks stay UNKNOWN.
        progress: called with (leaves done, leaves) over all properties.
        time_limit: seconds; what is not done by then stays UNKNOWN.
        workers: processes that share the leaves of a large tree.

    Returns:
        The verdict; CERTIFIED only if every leaf of every property was proved.

    Raises:
        CertificateError: the certificate was made for another network or other properties, or is
            malformed.
        UnsupportedOperationError: the network has an operator without facts here.

    Soundness: all rounding of the checker's own float64 arithmetic is covered by a-priori error
    terms; NaN, infinity and overflow prove nothing.
    """
    start = time.monotonic()
    deadline = math.inf if time_limit is None else start + time_limit
    if arithmetic not in ("real", "float32"):
        raise CertificateError(f"arithmetic: got {arithmetic!r}; expected 'real' or 'float32'")
    if activation_ulp is not None and not 0 <= activation_ulp < 1e6:
        raise CertificateError(f"activation_ulp: got {activation_ulp}; expected 0 to 1e6")
    match_certificate(certificate, network, properties)
    checked = read_network(network)
    for prop in properties:
        _check_property(prop, checked)
    mode = Arithmetic(float32=arithmetic == "float32", activation_ulp=activation_ulp)
    replays = [
        TreeReplay(checked, prop, proof, mode)
        for prop, proof in zip(properties, certificate.proofs, strict=True)
    ]
    refusal = ""
    if mode.float32 and "float64" in checked.stored_dtypes:
        refusal = "weights are stored in float64, so no float32 computation is defined"
    total, done = sum(proof.leaves for proof in certificate.proofs), 0
    checks = []
    for prop, proof, replay in zip(properties, certificate.proofs, replays, strict=True):
        if refusal:
            checks.append(PropertyCheck(prop.name, Verdict.UNKNOWN, math.nan, 0, refusal))
            continue

        def report(leaves: int, before: int = done) -> None:
            if progress is not None:
                progress(before + leaves, total)

        bounds = replay.run()
        if workers > 1 and proof.leaves >= workers * _FEWEST_LEAVES:
            bounds = run_in_processes(network, prop, proof, mode, workers)
        checks.append(_check_tree(prop, proof, bounds, report, deadline))
        done += proof.leaves
    certified = all(check.status is Verdict.CERTIFIED for check in checks)
    return CheckResult(
        status=Verdict.CERTIFIED if certified else Verdict.UNKNOWN,
        per_property=tuple(checks),
        seconds=time.monotonic() - start,
        arithmetic=arithmetic,
    )


def match_certificate(
    certificate: Certificate, network: NetworkRecord, properties: Sequence[PropertyRecord]
) -> None:
    """Refuse a certificate about something else."""
    match_network(network, certificate.structure, certificate.weights_digest)
    if len(certificate.properties) != len(properties):
        raise CertificateError(
            f"certificate: {len(certificate.properties)} properties; expected {len(properties)}"
        )
    for claimed, asked in zip(certificate.properties, properties, strict=True):
        if property_digest(claimed) != property_digest(asked):
            raise CertificateError(
                f"certificate: proves another property than {asked.name!r}; give the properties "
                "in the certificate's order"
            )


def _check_property(prop: PropertyRecord, network: CheckedNetwork) -> None:
    """Refuse a property that is malformed or does not fit the network."""
    check_region(prop.region, network.input_size, f"property {prop.name!r}")
    if not prop.clauses:
        raise CertificateError(f"property {prop.name!r}: no clauses; expected at least one")
    for rows, offset in prop.clauses:
        shape = (len(offset), network.output_size)
        if rows.dtype != np.float64 or offset.dtype != np.float64 or offset.ndim != 1:
            raise CertificateError(f"property {prop.name!r}: expected float64 rows and offsets")
        if rows.shape != shape or not len(offset):
            raise CertificateError(
                f"property {prop.name!r}: rows {rows.shape}; expected {shape}, not empty"
            )
        if not (np.isfinite(rows).all() and np.isfinite(offset).all()):
            raise CertificateError(f"property {prop.name!r}: NaN or infinity in a clause")


def _check_tree(
    prop: PropertyRecord,
    proof: ProofTree,
    replayed: Iterator[tuple[IntArray, FloatArray]],
    report: Callable[[int], None],
    deadline: float,
) -> PropertyCheck:
    """Judge the bounds of one tree; stops when too many leaves have failed."""
    proved = np.zeros(proof.leaves, dtype=np.bool_)
    failed: list[int] = []
    margin, reason, done = math.inf, "", 0
    try:
        with np.errstate(all="ignore"):  # non-finite results are looked for explicitly
            for leaves, bounds in replayed:
                # comparisons with NaN are False
                good = (bounds > 0.0) if prop.strict else (bounds >= 0.0)
                proved[leaves] = good.all(axis=1)
                worst = bounds.min(axis=1)
                margin = float(np.minimum(margin, worst.min()))
                done += len(leaves)
                report(done)
                if not proved[leaves].all():
                    position = int(np.flatnonzero(~proved[leaves])[0])
                    clause = int(np.flatnonzero(~good[position])[0])
                    bound = float(bounds[position, clause])
                    reason = reason or f"leaf {int(leaves[position])}, clause {clause}: " + (
                        "bounds are not finite" if math.isnan(bound) else f"lower bound {bound:.6g}"
                    )
                    failed += leaves[~proved[leaves]].tolist()
                    if len(failed) > MOST_FAILED:
                        break
                if time.monotonic() > deadline and done < proof.leaves:
                    reason = reason or f"time limit reached after {done} of {proof.leaves} leaves"
                    break
    except (CertificateError, OSError) as error:
        reason = f"replay failed: {error}"
    certified = not reason and bool(proved.all())
    status = Verdict.CERTIFIED if certified else Verdict.UNKNOWN
    if not certified and not reason:
        reason = "some leaves were not reached"
    return PropertyCheck(prop.name, status, margin, done, reason, tuple(sorted(failed)))
