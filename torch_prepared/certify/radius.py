"""Certificates that no two inputs of a ball collide, and the check that decides them.

A certificate holds a claim, a box that covers the ball, and one step for every pair of boxes of a
tree of pairs that begins with the box paired with itself (or with a fixed point): split it, or name
the test that excludes a collision in it. Boxes and splits follow from rules (``pairs.BoxTree``), so
that no coordinate needs to be trusted; every test is computed anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from torch_prepared.certify.checker import Verdict
from torch_prepared.certify.encoding import (
    ArrayReader,
    encode_array,
    entries,
    fields,
    items,
    number,
    text,
)
from torch_prepared.certify.envelope import Envelope, match_network, weights_digest
from torch_prepared.certify.pairs import BoxTree, PairTests, Step, distance_below
from torch_prepared.certify.records import NetworkRecord
from torch_prepared.certify.rounding import FloatArray, IntArray
from torch_prepared.errors import CertificateError

__all__ = ["RADIUS_FORMAT", "RadiusCertificate", "RadiusCheck", "RadiusClaim", "check_radius"]

RADIUS_FORMAT = "torch_prepared.radius"
_ARRAYS = ("lower", "upper", "directions", "steps")
_CLAIM = ("center", "radius", "norm", "lower", "upper", "anchor", "tolerance")
_ROBUST = ("output_tolerance", "separation")
_PAIRS = 4096  # pairs between two looks at the clock


@dataclass(frozen=True)
class RadiusClaim:
    """What is said of the region R of all x with ``|x - c| < r`` and ``lower <= x <= upper``.

    With an ``anchor`` a: no x of R other than a has the output of a. Without: no two different x, y
    of R have the same output; for two networks, no two x, y of R with the same output of the first
    have outputs of the second that differ by ``tolerance`` or more in some entry.

    With an ``output_tolerance`` e > 0 outputs count as the same when no entry differs by more than
    e; of one network, only inputs that differ by ``separation`` or more in some entry are meant.

    Args:
        center: c (n,), float64.
        radius: r > 0.
        norm: 1, 2 or inf.
        lower: (n,), minus infinity where there is no limit.
        upper: (n,), infinity likewise.
        anchor: a (n,) or None.
        tolerance: positive for two networks, else 0.
        output_tolerance: e, in the unit of the (first) network's outputs.
        separation: in the unit of the inputs; positive for one network and e > 0, else 0.
    """

    center: FloatArray
    radius: float
    norm: float
    lower: FloatArray
    upper: FloatArray
    anchor: FloatArray | None = None
    tolerance: float = 0.0
    output_tolerance: float = 0.0
    separation: float = 0.0

    def __post_init__(self) -> None:
        n = self.center.size
        arrays = [self.center, self.lower, self.upper]
        arrays += [] if self.anchor is None else [self.anchor]
        good = all(a.dtype == np.float64 and a.shape == (n,) for a in arrays)
        if not good or not n:
            raise CertificateError("claim: expected float64 center, lower, upper, anchor (n,)")
        points = [self.center] if self.anchor is None else [self.center, self.anchor]
        if not all(np.isfinite(p).all() for p in points):
            raise CertificateError("claim: a point is not finite; expected finite numbers")
        if not bool((self.lower <= self.upper).all()):
            raise CertificateError(
                "claim: lower > upper somewhere, or NaN; expected lower <= upper"
            )
        if not 0.0 < self.radius < math.inf or self.norm not in (1.0, 2.0, math.inf):
            raise CertificateError(
                f"claim: got radius {self.radius}, norm {self.norm}; expected a finite radius "
                "above 0 and norm 1, 2 or inf"
            )
        if not 0.0 <= self.tolerance < math.inf or (self.tolerance and self.anchor is not None):
            raise CertificateError(f"claim: tolerance {self.tolerance} does not fit")
        apart = self.output_tolerance > 0.0 and not self.tolerance
        good = 0.0 <= self.output_tolerance < math.inf and 0.0 <= self.separation < math.inf
        if not good or (self.separation > 0.0) != apart:
            raise CertificateError(
                f"claim: got output tolerance {self.output_tolerance}, separation "
                f"{self.separation}; expected finite numbers, and a separation above 0 exactly "
                "for one network and a tolerance above 0"
            )

    @property
    def kind(self) -> str:
        """``"preimage"``, ``"matching"`` or ``"injectivity"``."""
        if self.anchor is not None:
            return "preimage"
        return "matching" if self.tolerance else "injectivity"

    @property
    def sentence(self) -> str:
        """The claim in words, for people."""
        center = _numbers(self.center)
        region = f"max norm distance < {self.radius!r} of {center}"
        if self.norm != math.inf:
            region = f"{self.norm:g}-norm distance < {self.radius!r} of {center}"
        if bool(np.isfinite(self.lower).any() or np.isfinite(self.upper).any()):
            region += f", from {_numbers(self.lower)} to {_numbers(self.upper)}"
        near = f"within {self.output_tolerance!r} of each other"
        if self.anchor is not None:
            itself = bool((self.anchor == self.center).all())
            at = "the center" if itself else _numbers(self.anchor)
            if not self.output_tolerance:
                return f"no other input within {region} has the output of {at}"
            return (
                f"no input within {region} that differs from {at} by at least "
                f"{self.separation!r} has an output within {self.output_tolerance!r} of its output"
            )
        if self.tolerance:
            same = "equal outputs of the first network"
            if self.output_tolerance:
                same = f"outputs of the first network {near}"
            return (
                f"inputs within {region} with {same} have outputs of the second that differ by "
                f"less than {self.tolerance!r}"
            )
        if self.output_tolerance:
            return (
                f"inputs within {region} that differ by at least {self.separation!r} have no "
                f"outputs {near}"
            )
        return f"different inputs within {region} have different outputs"

    def to_json(self) -> dict[str, object]:
        """Plain JSON data."""
        data = {
            "center": encode_array(self.center + 0.0),
            "radius": float(self.radius),
            "norm": "inf" if self.norm == math.inf else float(self.norm),
            "lower": encode_array(self.lower + 0.0),
            "upper": encode_array(self.upper + 0.0),
            "anchor": None if self.anchor is None else encode_array(self.anchor + 0.0),
            "tolerance": float(self.tolerance),
        }
        if self.output_tolerance:  # claims about equal outputs read as they did without it
            data |= {name: float(getattr(self, name)) for name in _ROBUST}
        return data

    @classmethod
    def from_json(cls, data: object, reader: ArrayReader) -> RadiusClaim:
        """Read data that is not trusted."""
        robust = isinstance(data, Mapping) and any(name in data for name in _ROBUST)
        names = _CLAIM + _ROBUST if robust else _CLAIM
        center, radius, norm, lower, upper, anchor, tolerance, *more = fields(data, names, "claim")
        return cls(
            reader.read(center, "claim.center"),
            number(radius, "claim.radius"),
            number(norm, "claim.norm"),
            reader.read(lower, "claim.lower"),
            reader.read(upper, "claim.upper"),
            None if anchor is None else reader.read(anchor, "claim.anchor"),
            number(tolerance, "claim.tolerance"),
            *(number(value, f"claim.{name}") for name, value in zip(_ROBUST, more, strict=False)),
        )


@dataclass(frozen=True)
class RadiusCertificate(Envelope):
    """A claim with its proof; only :func:`check_radius` turns it into a verdict.

    Args:
        networks: structure and weights digest of the one or two networks.
        claim: what is claimed.
        lower: (n,) of a box that covers the region.
        upper: (n,).
        directions: (k, m) along which outputs of the first network are compared.
        steps: (pairs,) int32 of :class:`Step`, pairs of the tree level by level.
    """

    FORMAT = RADIUS_FORMAT

    networks: tuple[tuple[Mapping[str, object], str], ...]
    claim: RadiusClaim
    lower: FloatArray
    upper: FloatArray
    directions: FloatArray
    steps: IntArray

    def __post_init__(self) -> None:
        n = len(self.claim.center)
        for array in (self.lower, self.upper):
            if array.dtype != np.float64 or array.shape != (n,) or not np.isfinite(array).all():
                raise CertificateError(f"certificate: expected finite float64 box ends ({n},)")
        finite = self.directions.ndim == 2 and bool(np.isfinite(self.directions).all())
        if not finite or self.directions.dtype != np.float64:
            raise CertificateError("certificate: expected finite float64 directions (k, m)")
        known = bool(np.isin(self.steps, [int(s) for s in Step]).all())
        if self.steps.dtype != np.int32 or self.steps.ndim != 1 or not known:
            raise CertificateError("certificate: expected int32 steps (pairs,) that are known")
        if len(self.networks) != (2 if self.claim.tolerance else 1):
            raise CertificateError("certificate: expected two networks for a tolerance, else one")

    @classmethod
    def create(
        cls,
        networks: Sequence[NetworkRecord],
        claim: RadiusClaim,
        lower: FloatArray,
        upper: FloatArray,
        directions: FloatArray,
        steps: Sequence[int] | IntArray,
    ) -> RadiusCertificate:
        """The certificate of the given networks."""
        named = tuple((n.structure, weights_digest(n.weights)) for n in networks)
        return cls(named, claim, lower, upper, directions, np.asarray(steps, dtype=np.int32))

    def _content(self) -> dict[str, object]:
        return {
            "networks": [{"structure": dict(s), "weights_digest": w} for s, w in self.networks],
            "claim": self.claim.to_json(),
            **{name: encode_array(getattr(self, name)) for name in _ARRAYS},
        }

    @classmethod
    def _from_content(cls, content: Mapping[str, object]) -> RadiusCertificate:
        names = ("networks", "claim", *_ARRAYS)
        listed, claim, *arrays = fields(content, names, "certificate")
        networks = []
        for item in items(listed, "networks"):
            structure, stored = fields(item, ("structure", "weights_digest"), "networks")
            networks.append((entries(structure, "structure"), text(stored, "weights_digest")))
        reader = ArrayReader()
        judged = RadiusClaim.from_json(claim, reader)
        read = [reader.read(array, name) for array, name in zip(arrays, _ARRAYS, strict=True)]
        return cls(tuple(networks), judged, *read)


@dataclass(frozen=True)
class RadiusCheck:
    """Verdict on a claim about a ball.

    Args:
        status: certified or unknown.
        claim: that was judged.
        pairs: pairs of boxes replayed.
        seconds: wall time.
        reason: why not certified; empty otherwise.
    """

    status: Verdict
    claim: RadiusClaim
    pairs: int
    seconds: float
    reason: str


def check_radius(
    certificate: RadiusCertificate,
    networks: Sequence[NetworkRecord],
    *,
    time_limit: float | None = None,
) -> RadiusCheck:
    """Replay a certificate about a ball.

    Args:
        certificate: not trusted.
        networks: structure and weights exactly as stored: the first network, and for a claim with a
            tolerance the second.
        time_limit: seconds.

    Raises:
        CertificateError: made for other networks, or malformed.
        UnsupportedOperationError: an operator that is neither affine nor ReLU nor leaky ReLU.

    Soundness: exact arithmetic on the stored weights. Interval bounds in float64 with a-priori
        rounding terms, outward; what is not finite excludes nothing. That the tree covers all pairs
        of points of the region follows from the rules of ``pairs.BoxTree``.
    """
    start = time.monotonic()
    deadline = math.inf if time_limit is None else start + time_limit
    _match(certificate, networks)
    claim = certificate.claim
    reason = _uncovered(certificate)
    done = 0
    if not reason:
        tree = BoxTree(certificate.lower, certificate.upper, claim.anchor)
        tests = PairTests(
            tree,
            networks,
            certificate.directions,
            claim.tolerance,
            output_tolerance=claim.output_tolerance,
            separation=claim.separation,
        )
        _fit(certificate, tests)
        done, reason = _replay(certificate, tree, tests, deadline)
    status = Verdict.UNKNOWN if reason else Verdict.CERTIFIED
    return RadiusCheck(status, claim, done, time.monotonic() - start, reason)


def _match(certificate: RadiusCertificate, networks: Sequence[NetworkRecord]) -> None:
    """Refuse networks that the certificate was not made for."""
    if len(networks) != len(certificate.networks):
        raise CertificateError(
            f"certificate: speaks of {len(certificate.networks)} networks; got {len(networks)}"
        )
    for network, (structure, stored) in zip(networks, certificate.networks, strict=True):
        match_network(network, structure, stored)


def _fit(certificate: RadiusCertificate, tests: PairTests) -> None:
    """Refuse arrays whose sizes are not those of the networks."""
    first, n = tests.first.network, len(certificate.claim.center)
    sizes = [first.input_size]
    if tests.second is not None:
        sizes.append(tests.second.network.input_size)
    if set(sizes) != {n}:
        found = " and ".join(map(str, sizes))
        raise CertificateError(f"certificate: {n} inputs; expected {found}, as the networks have")
    if certificate.directions.shape[1] != first.output_size:
        raise CertificateError(
            f"certificate: directions of {certificate.directions.shape[1]} outputs; the network "
            f"has {first.output_size}"
        )


def _uncovered(certificate: RadiusCertificate) -> str:
    """Why the box does not cover the region; empty when it does."""
    claim, radius = certificate.claim, Fraction(certificate.claim.radius)
    limits = zip(
        claim.center.tolist(), claim.lower.tolist(), claim.upper.tolist(),
        certificate.lower.tolist(), certificate.upper.tolist(), strict=True,
    )  # fmt: skip
    for i, (middle, least, most, low, high) in enumerate(limits):
        below = low <= least or Fraction(low) <= Fraction(middle) - radius
        above = high >= most or Fraction(high) >= Fraction(middle) + radius
        if not (low <= high and below and above):
            return f"the box does not cover the region along input {i}"
    return ""


def _replay(
    certificate: RadiusCertificate, tree: BoxTree, tests: PairTests, deadline: float
) -> tuple[int, str]:
    """Pairs replayed, and why the proof fails."""
    steps = certificate.steps
    x, y = tree.root
    start = 0
    while len(x):
        here = steps[start : start + len(x)]
        if len(here) < len(x):
            return start, "the tree of pairs is not complete"
        for step in Step:
            chosen = np.flatnonzero(here == step)
            for first in range(0, 0 if step is Step.SPLIT else len(chosen), _PAIRS):
                if time.monotonic() > deadline:
                    return start, "time limit reached"
                part = chosen[first : first + _PAIRS]
                good = (
                    _outside(certificate.claim, tree, x[part], y[part])
                    if step is Step.OUTSIDE
                    else tests.holds(step, x[part], y[part])
                )
                if not good.all():
                    return start, f"pair {start + part[~good][0]}: {step.name.lower()} fails"
        start += len(x)
        split = here == Step.SPLIT
        _, x, y = tree.children(x[split], y[split])
    return start, "" if start == len(steps) else "steps are left over"


def _outside(claim: RadiusClaim, tree: BoxTree, x: IntArray, y: IntArray) -> np.ndarray:
    """Whether no point of x (or, without an anchor, of y) is in the open ball."""
    reach = distance_below(claim.center, claim.norm, tree.lower[x], tree.upper[x])
    if not tree.anchored:
        other = distance_below(claim.center, claim.norm, tree.lower[y], tree.upper[y])
        reach = np.maximum(reach, other)
    return np.asarray(reach >= claim.radius)


def _numbers(values: FloatArray) -> str:
    shown = ", ".join(repr(v) for v in values[:6].tolist())
    return f"[{shown}{', ...' if len(values) > 6 else ''}]"
