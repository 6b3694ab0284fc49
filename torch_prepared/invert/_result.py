"""What the questions of this package answer, and on what evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from torch_prepared.certify import RadiusCertificate, RadiusCheck
from torch_prepared.certify.exact import to_fractions
from torch_prepared.core.rows import Floats
from torch_prepared.invert._exact import Rationals, norm_above

__all__ = ["Certified", "CollisionBound", "Evidence", "Outcome", "Pair", "RadiusBound"]


class Evidence(Enum):
    """What a lower radius rests on, strongest last."""

    NONE = "none"  #: nothing: the lower radius is 0
    CLAIMED = "claimed"  #: the dual bound of a mixed-integer solver, with its tolerances
    INTERVAL = "interval"  #: interval Jacobian in float64 arithmetic with rounding slack
    CERTIFIED = "certified"  #: the certificate checker, and exact rational arithmetic


class Outcome(Enum):
    """Whether the question is answered."""

    SOLVED = "solved"  #: lower and upper radius agree within the tolerance
    EXCLUDED = "excluded"  #: no collision up to the largest radius asked for
    OPEN = "open"  #: time over, or a solver gave up; both bounds still hold


@dataclass(frozen=True, eq=False)
class Pair:
    """Two different inputs with the same output, in rational arithmetic.

    Exactly the same; where an output tolerance was given, outputs that differ by no more.

    Attributes:
        x: (n,) fractions.
        y: (n,) fractions.
    """

    x: Rationals
    y: Rationals

    @property
    def floats(self) -> tuple[Floats, Floats]:
        """Both points rounded to float64."""
        return self.x.astype(np.float64), self.y.astype(np.float64)

    def reach(self, center: Floats, norm: float) -> float:
        """Radius of the smallest ball around ``center`` that holds both, rounded up."""
        middle = to_fractions(center)
        return max(norm_above(self.x - middle, norm), norm_above(self.y - middle, norm))

    def distance(self, norm: float = math.inf) -> float:
        """Distance between the two, rounded up."""
        return norm_above(self.x - self.y, norm)


@dataclass(frozen=True, eq=False)
class Certified:
    """A certificate with what the checker said of it."""

    certificate: RadiusCertificate
    check: RadiusCheck


@dataclass(frozen=True, eq=False)
class CollisionBound:
    """Largest distance of two colliding inputs of a ball: ``lower <= p* <= upper``.

    Of :func:`max_mismatch`: largest difference of a second network's outputs at two inputs that
    collide in the first.

    Attributes:
        lower: that distance (maximum norm) for the witness, rounded down; 0 without one.
        upper: dual bound of the solver plus its tolerance.
        witness: an exact pair within the ball, or None.
        outcome: ``SOLVED`` when both agree within the solver's gap.
        integers: integer columns of the largest program.
        seconds: wall time.
        message: one line for people.
        output_tolerance: outputs that differ by no more count as the same.
        interrupted: whether ``Effort.stop`` ended it.
    """

    lower: float
    upper: float
    witness: Pair | None
    outcome: Outcome
    integers: int
    seconds: float
    message: str
    output_tolerance: float = 0.0
    interrupted: bool = False


@dataclass(frozen=True, eq=False)
class RadiusBound:
    """``lower <= radius asked for <= upper``.

    Attributes:
        lower: no collision (of at least ``separation``) in the open ball of this radius, on the
            stated ``evidence``.
        proved: the largest such radius that needs no trust in a solver (``CERTIFIED``, or
            ``INTERVAL``), for pairs at any distance (for matching: whose outputs of the second
            network differ by the tolerance; with an output tolerance: at least the separation
            apart); at most ``lower``.
        upper: radius of the smallest ball that holds the witness, rounded up; inf without one; 0
            where every ball holds a collision.
        evidence: what ``lower`` rests on.
        outcome: whether the two agree.
        norm: 1, 2 or inf.
        separation: least distance (of inputs; of outputs for matching) of the pairs that ``lower``
            excludes; 0 means all pairs.
        witness: two different inputs that collide in exact rational arithmetic, or None.
        certified: certificate and verdict behind ``CERTIFIED``, or None.
        integers: integer columns of the largest program solved; 0 when there was none.
        seconds: wall time.
        message: one line for people.
        steps: what was done, in order, for people.
        output_tolerance: outputs that differ by no more (maximum norm) count as the same.
        interrupted: whether ``Effort.stop`` ended it.
    """

    lower: float
    proved: float
    upper: float
    evidence: Evidence
    outcome: Outcome
    norm: float
    separation: float
    witness: Pair | None
    certified: Certified | None
    integers: int
    seconds: float
    message: str
    steps: tuple[str, ...] = field(default=())
    output_tolerance: float = 0.0
    interrupted: bool = False

    @property
    def gap(self) -> float:
        """``upper - lower``."""
        return self.upper - self.lower
