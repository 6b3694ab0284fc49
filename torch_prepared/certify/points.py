"""Claims about finitely many inputs: their certificate, and the check that decides it.

Nothing in such a certificate needs to be trusted or searched: the network as stored is evaluated
anew at every point, in exact rational arithmetic where all operators are rational, or by enclosing
every evaluation in a compute type (float32, say) in any order of summation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np

from torch_prepared.certify.checker import Verdict
from torch_prepared.certify.compute import (
    COMPUTE_TYPES,
    ComputeType,
    arithmetic_of,
    refusal,
    stored_as,
)
from torch_prepared.certify.dyadic import evaluate_dyadic
from torch_prepared.certify.encoding import (
    ArrayReader,
    digest,
    encode_array,
    entries,
    fields,
    text,
    texts,
)
from torch_prepared.certify.envelope import Envelope, match_network, weights_digest
from torch_prepared.certify.exact import evaluate_exactly
from torch_prepared.certify.network import read_network
from torch_prepared.certify.operators import Enclosure
from torch_prepared.certify.records import NetworkRecord
from torch_prepared.certify.rounding import BoolArray, FloatArray, IntArray
from torch_prepared.errors import CertificateError, UnsupportedOperationError

__all__ = ["POINTS_FORMAT", "PointCertificate", "PointCheck", "PointClaims", "check_points"]

POINTS_FORMAT = "torch_prepared.points"
_ARRAYS = ("inputs", "rows", "offset", "point", "clause")
_CHUNK = 256
_MAX_MANIFEST = 10_000
Score = TypeVar("Score", Fraction, float)


@dataclass(frozen=True)
class PointClaims:
    """For every (point, clause) pair listed some row has ``rows @ f(inputs[point]) + offset > 0``.

    Args:
        inputs: (b, n) float64.
        rows: (r, m) float64 coefficients on the flattened output.
        offset: (r,) float64.
        point: (r,) int64, which input a row speaks of; every input has at least one row.
        clause: (r,) int64; rows of one point and clause are alternatives.
        strict: whether 0 does not count.
    """

    inputs: FloatArray
    rows: FloatArray
    offset: FloatArray
    point: IntArray
    clause: IntArray
    strict: bool = True

    def __post_init__(self) -> None:
        count = len(self.offset)
        fits = self.inputs.ndim == 2 and self.rows.ndim == 2 and len(self.rows) == count
        fits &= self.point.shape == self.clause.shape == self.offset.shape == (count,)
        floats = (self.inputs, self.rows, self.offset)
        kinds = all(a.dtype == np.float64 for a in floats) and all(
            a.dtype == np.int64 for a in (self.point, self.clause)
        )
        if not fits or not kinds:
            raise CertificateError(
                "claims: arrays whose shapes or types do not fit; expected float64 inputs (b, n), "
                "rows (r, m), offset (r,) and int64 point (r,), clause (r,)"
            )
        if not all(np.isfinite(a).all() for a in floats):
            raise CertificateError("claims: NaN or infinity; expected finite numbers")
        named = np.unique(self.point)
        if not len(self.inputs) or not np.array_equal(named, np.arange(len(self.inputs))):
            raise CertificateError("claims: a point without rows, or rows without a point")

    @classmethod
    def labels(cls, inputs: FloatArray, labels: Sequence[int], classes: int) -> PointClaims:
        """Output ``labels[i]`` of point i is strictly the largest of ``classes``."""
        wanted = np.asarray(labels, dtype=np.int64)
        good = bool(((wanted >= 0) & (wanted < classes)).all())
        if classes < 2 or wanted.shape != (len(inputs),) or not good:
            raise CertificateError(
                f"claims: got {len(wanted)} labels for {len(inputs)} points; expected one from 0 "
                f"to {classes - 1} each"
            )
        point = np.repeat(np.arange(len(wanted)), classes - 1)
        every = np.tile(np.arange(classes), (len(wanted), 1))
        rival = every[every != wanted[:, None]]
        rows = np.zeros((len(point), classes))
        rows[np.arange(len(point)), wanted[point]] = 1.0
        rows[np.arange(len(point)), rival] = -1.0
        clause = np.tile(np.arange(classes - 1), len(wanted))
        x = np.asarray(inputs, dtype=np.float64).reshape(len(wanted), -1)
        return cls(x, rows, np.zeros(len(point)), point, clause)

    @property
    def digest(self) -> str:
        """SHA-256 of all arrays, in their order."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, object]:
        """Plain JSON data; negative zero becomes zero."""
        data: dict[str, object] = {}
        for name in _ARRAYS:
            array = getattr(self, name)
            data[name] = encode_array(array + 0.0 if array.dtype == np.float64 else array)
        return {**data, "strict": bool(self.strict)}

    @classmethod
    def from_json(cls, data: object) -> PointClaims:
        """Read data that is not trusted."""
        *arrays, strict = fields(data, (*_ARRAYS, "strict"), "claims")
        if not isinstance(strict, bool):
            raise CertificateError("claims.strict: expected true or false")
        reader = ArrayReader()
        read = [reader.read(a, f"claims.{n}") for n, a in zip(_ARRAYS, arrays, strict=True)]
        inputs, rows, offset, point, clause = read
        return cls(inputs, rows, offset, point, clause, strict)


@dataclass(frozen=True)
class PointCertificate(Envelope):
    """A claim about a network at finitely many points; only ``check_points`` gives a verdict.

    Args:
        structure: of the network, plain JSON data.
        weights_digest: of the weights as stored.
        claims: what is claimed.
        manifest: free text by key about the edit, outside of any claim.
    """

    FORMAT = POINTS_FORMAT

    structure: Mapping[str, object]
    weights_digest: str
    claims: PointClaims
    manifest: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "manifest", MappingProxyType(dict(self.manifest)))

    @classmethod
    def create(
        cls, network: NetworkRecord, claims: PointClaims, manifest: Mapping[str, str] | None = None
    ) -> PointCertificate:
        """The certificate that claims ``claims`` of ``network``."""
        return cls(network.structure, weights_digest(network.weights), claims, manifest or {})

    def _content(self) -> dict[str, object]:
        return {
            "structure": dict(self.structure),
            "weights_digest": self.weights_digest,
            "claims": self.claims.to_json(),
            "manifest": dict(self.manifest),
        }

    @classmethod
    def _from_content(cls, content: Mapping[str, object]) -> PointCertificate:
        names = ("structure", "weights_digest", "claims", "manifest")
        structure, stored, claims, manifest = fields(content, names, "certificate")
        told = texts(manifest, "manifest")
        if len(told) > _MAX_MANIFEST:
            raise CertificateError(f"manifest: expected at most {_MAX_MANIFEST} fields")
        return cls(
            entries(structure, "structure"),
            text(stored, "weights_digest"),
            PointClaims.from_json(claims),
            told,
        )


@dataclass(frozen=True)
class PointCheck:
    """Verdict on a finite set of points.

    Args:
        status: certified only when every point is.
        margins: (b,) proved lower bound of each point's margin; NaN where nothing was proved.
        failed: positions of points that are not proved.
        arithmetic: ``"real"`` or a compute type.
        exact: whether the margins were computed in rational arithmetic (then rounded down).
        seconds: wall time.
        reason: why not certified; empty otherwise.
    """

    status: Verdict
    margins: FloatArray
    failed: tuple[int, ...]
    arithmetic: str
    exact: bool
    seconds: float
    reason: str

    @property
    def margin(self) -> float:
        """The smallest margin; NaN when some point has none."""
        return float(np.min(self.margins))


def check_points(
    certificate: PointCertificate,
    network: NetworkRecord,
    claims: PointClaims,
    *,
    arithmetic: Literal["real"] | ComputeType = "real",
    activation_ulp: float | None = None,
    time_limit: float | None = None,
) -> PointCheck:
    """Evaluate a network anew at all points of a certificate.

    Args:
        certificate: not trusted.
        network: structure and weights exactly as stored; the object of the verdict.
        claims: what is to be proved, given independently.
        arithmetic: ``"real"`` for exact arithmetic on the stored weights; ``"float32"``,
            ``"float64"``, ``"tf32"`` or ``"bfloat16"`` for every evaluation in that type that sums
            the products of each operator in any order, with or without fused operations: see
            :mod:`torch_prepared.certify.compute` for what is rounded and when.
        activation_ulp: see ``check_certificate``.
        time_limit: seconds; points not reached by then are not proved.

    Raises:
        CertificateError: made for another network or other claims, or malformed.
        UnsupportedOperationError: an operator without facts here.

    Soundness: ``real`` uses rational arithmetic where the network is rational and float64
    enclosures with a-priori rounding terms otherwise; NaN and overflow prove nothing.
    """
    start = time.monotonic()
    deadline = math.inf if time_limit is None else start + time_limit
    if arithmetic not in ("real", *COMPUTE_TYPES):
        known = ", ".join(COMPUTE_TYPES)
        raise CertificateError(f"arithmetic: got {arithmetic!r}; expected real, {known}")
    match_network(network, certificate.structure, certificate.weights_digest)
    if certificate.claims.digest != claims.digest:
        raise CertificateError("certificate: proves other claims than the examples given")
    checked = read_network(network)
    if claims.inputs.shape[1] != checked.input_size or claims.rows.shape[1] != checked.output_size:
        raise CertificateError(
            f"claims: inputs of {claims.inputs.shape[1]} and rows over {claims.rows.shape[1]} "
            f"numbers; expected {checked.input_size} and {checked.output_size}"
        )
    margins, proved, exact = np.full(len(claims.inputs), np.nan), [], False
    reason = refusal(arithmetic, network, claims.inputs)
    for first in range(0, 0 if reason else len(claims.inputs), _CHUNK):
        chosen = np.arange(first, min(first + _CHUNK, len(claims.inputs)))
        if time.monotonic() > deadline:
            reason = f"time limit reached after {first} of {len(claims.inputs)} points"
            break
        found = _exact_margins(network, claims, chosen) if arithmetic == "real" else None
        exact = found is not None
        if found is not None:
            low = np.array([_round_down(value) for value in found])
        else:
            low = _enclosed_margins(network, claims, chosen, arithmetic, activation_ulp)
        margins[chosen] = low
        proved.extend(_holds(low, found, claims.strict).tolist())
    good = np.zeros(len(claims.inputs), dtype=bool)
    good[: len(proved)] = proved
    failed = tuple(np.flatnonzero(~good).tolist())
    if failed and not reason:
        reason = f"point {failed[0]}: margin {margins[failed[0]]:.6g}"
    status = Verdict.UNKNOWN if failed or reason else Verdict.CERTIFIED
    seconds = time.monotonic() - start
    return PointCheck(status, margins, failed, arithmetic, exact, seconds, reason)


def _holds(low: FloatArray, found: list[Fraction] | None, strict: bool) -> BoolArray:
    """Which margins suffice, judged on the exact ones where they are known."""
    if found is not None:
        return np.array([v > 0 or (v == 0 and not strict) for v in found], dtype=bool)
    return (low > 0.0) if strict else (low >= 0.0)  # comparisons with NaN are False


def _exact_margins(
    network: NetworkRecord, claims: PointClaims, chosen: IntArray
) -> list[Fraction] | None:
    """Margins as fractions, or None when some operator is not rational."""
    outputs = evaluate_dyadic(network, claims.inputs[chosen])
    if outputs is None:
        try:
            outputs = np.stack([evaluate_exactly(network, x) for x in claims.inputs[chosen]])
        except UnsupportedOperationError:
            return None
    return _reduce(claims, chosen, lambda row, i: _score(claims, row, outputs[i]))


def _score(claims: PointClaims, row: int, output: np.ndarray) -> Fraction:
    """``rows[row] @ output + offset[row]`` exactly."""
    total = Fraction(float(claims.offset[row]))
    for column in np.flatnonzero(claims.rows[row]):
        total += Fraction(float(claims.rows[row, column])) * output[column]
    return total


def _reduce(
    claims: PointClaims, chosen: IntArray, score: Callable[[int, int], Score]
) -> list[Score]:
    """Least over clauses of the largest score over their rows, per chosen point."""
    best: dict[tuple[int, int], Score] = {}
    place = {int(p): i for i, p in enumerate(chosen)}
    for row in np.flatnonzero(np.isin(claims.point, chosen)).tolist():
        key = (place[int(claims.point[row])], int(claims.clause[row]))
        value = score(row, key[0])
        best[key] = max(best[key], value) if key in best else value
    least: dict[int, Score] = {}
    for (i, _), value in best.items():
        least[i] = min(least[i], value) if i in least else value
    return [least[i] for i in range(len(chosen))]


def _round_down(value: Fraction) -> float:
    """A float64 at or below ``value``; ``-inf`` when it is out of range."""
    try:
        near = float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    return near if Fraction(near) <= value else math.nextafter(near, -math.inf)


def _enclosed_margins(
    network: NetworkRecord,
    claims: PointClaims,
    chosen: IntArray,
    arithmetic: str,
    activation_ulp: float | None,
) -> FloatArray:
    """Lower bounds of the margins of every evaluation in the given arithmetic."""
    stored, x = stored_as(arithmetic, network, claims.inputs[chosen])
    checked = read_network(stored)
    mode = arithmetic_of(arithmetic, activation_ulp)
    with np.errstate(all="ignore"):  # what is not finite proves nothing
        values = {checked.input_name: Enclosure(x, x)}
        for operator in checked.operators:
            inputs = [values[name] for name in operator.sources]
            lower, upper, _ = operator.propagate(inputs, (None, None), mode)
            values[operator.name] = Enclosure(lower, upper)
        out = values[checked.output_name]
        here = np.flatnonzero(np.isin(claims.point, chosen))
        boxes = (claims.point[here] - chosen[0]).astype(np.int64)
        low = out.concretize(claims.rows[here], boxes) + claims.offset[here]
        low = np.nextafter(low, -np.inf)
        low = np.where(np.isnan(low), -np.inf, low)
    scores = dict(zip(here.tolist(), low.tolist(), strict=True))
    return np.array(_reduce(claims, chosen, lambda row, _: scores[row]), dtype=np.float64)
