"""Norm balls as rows: exact for the 1- and maximum norm, outer cuts for the 2-norm."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from torch_prepared.core.rows import Floats
from torch_prepared.errors import SpecError
from torch_prepared.invert._encoding import Affine, Integers, Program
from torch_prepared.specs import Box, LpBall

__all__ = ["Ball", "as_norm"]

_FAN_SIZE = 8  #: inputs up to which the first outer cuts cover all pairs of axes
_INSIDE = 1.0 - 2.0**-40  #: rounded unit vectors are kept below length 1, so that cuts are valid


def as_norm(norm: float | str) -> float:
    """1, 2 or inf.

    Raises:
        SpecError: another norm.
    """
    try:
        value = float(norm)
    except (TypeError, ValueError):
        value = math.nan
    if value not in (1.0, 2.0, math.inf):
        raise SpecError(f"norm: got {norm!r}; expected 1, 2 or inf")
    return value


@dataclass(frozen=True, eq=False)
class Ball:
    """All x within ``radius`` of ``center`` in a norm, and within ``domain`` if there is one.

    For the 2-norm the rows describe a polytope around the ball: the box, the scaled 1-ball, cuts
    between pairs of axes, and cuts through points that :meth:`cut_off` was given. Enlarging the
    set never makes a collision disappear, so bounds of what is inside stay valid.
    """

    center: Floats
    radius: float
    norm: float
    domain: Box | None = None
    cuts: list[Floats] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0.0 < self.radius < math.inf:
            raise SpecError(f"radius: got {self.radius}; expected a finite number above 0")
        if self.domain is not None:
            if self.domain.size != len(self.center):
                raise SpecError(
                    f"domain: got {self.domain.size} numbers; expected {len(self.center)}"
                )
            low, high = self.domain.lower.numpy(), self.domain.upper.numpy()
            if not bool(((low <= self.center) & (self.center <= high)).all()):
                raise SpecError("domain: does not hold the center; expected a larger domain")
        if self.norm == 2 and not self.cuts and len(self.center) <= _FAN_SIZE:
            self.cuts.extend(_fan(len(self.center)))

    @property
    def region(self) -> LpBall:
        """The set for the bound engine."""
        low = None if self.domain is None else self.domain.lower
        high = None if self.domain is None else self.domain.upper
        return LpBall(self.center, self.radius, self.norm, low, high)

    def resized(self, radius: float) -> Ball:
        """The ball of another radius, with the same cuts."""
        return Ball(self.center, radius, self.norm, self.domain, list(self.cuts))

    def columns(self, program: Program, name: str) -> Integers:
        """New columns (n,) for a point of the ball's box."""
        region = self.region
        return program.add(name, region.lower.numpy(), region.upper.numpy())

    def confine(self, program: Program, name: str, point: Affine, reach: Affine) -> None:
        """Rows for ``|point - center| <= reach``, a single affine function.

        Args:
            program: receives rows and, for the 1- and 2-norm, n columns.
            name: prefix of the columns' names.
            point: (n,).
            reach: (1,) at most ``radius``.
        """
        n = len(self.center)
        width = program.columns
        offset = Affine(point.widen(width), point.offset - self.center)
        if self.norm == math.inf:
            _bound(program, _spread(reach, n, width), offset)
            return
        sizes = program.add(f"{name}.size", np.zeros(n), np.full(n, self.radius))
        width = program.columns
        each = program.pick(sizes)
        _bound(program, each, offset)
        scale = 1.0 if self.norm == 1 else math.sqrt(n) / _INSIDE
        total = Affine(sp.csr_matrix(np.ones((1, n)) @ each.matrix), np.zeros(1))
        top = Affine(sp.csr_matrix(scale * reach.widen(width)), scale * reach.offset)
        program.at_least(top - total)
        if self.norm == 2:
            _bound_one_side(program, _spread(reach, n, width), each)
            for direction in self.cuts:
                along = sp.csr_matrix(direction[None] @ offset.matrix)
                program.at_least(reach - Affine(along, np.array([direction @ offset.offset])))

    def length(self, point: Floats) -> float:
        """Norm of ``point - center``."""
        return float(np.linalg.norm(point - self.center, self.norm))

    def cut_off(self, point: Floats) -> bool:
        """Add the tangent cut of the 2-ball toward ``point``; False when it has none."""
        offset = point - self.center
        size = float(np.linalg.norm(offset))
        if self.norm != 2 or not 1e-9 < size < math.inf:
            return False
        self.cuts.append(_INSIDE * offset / size)
        return True


def _fan(n: int) -> list[Floats]:
    """Unit directions between pairs of axes, 22.5 degrees apart; |x_i| rows cover the axes."""
    found = []
    for i, j in itertools.combinations(range(n), 2):
        for angle in np.arange(1, 16) * np.pi / 8:
            direction = np.zeros(n)
            direction[[i, j]] = _INSIDE * np.cos(angle), _INSIDE * np.sin(angle)
            found.append(direction)
    return found


def _spread(scalar: Affine, n: int, width: int) -> Affine:
    """One affine function, n times."""
    return Affine(sp.vstack([scalar.widen(width)] * n, format="csr"), np.repeat(scalar.offset, n))


def _bound(program: Program, size: Affine, offset: Affine) -> None:
    """``-size <= offset <= size``."""
    _bound_one_side(program, size, offset)
    _bound_one_side(program, size, Affine(-offset.matrix, -offset.offset))


def _bound_one_side(program: Program, size: Affine, offset: Affine) -> None:
    """``offset <= size``."""
    program.at_least(size - offset)
