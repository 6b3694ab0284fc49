"""A finite-difference solver of steady Stokes flow with buoyancy in the unit square.

    -laplace(u) + dp/dx = 0,    -laplace(v) + dp/dy = f(x, y),    du/dx + dv/dy = 0,

with walls that let nothing through and do not hold the fluid back (free slip, as at the top and
bottom of a mantle) or do (no slip). f is the buoyancy, Rayleigh number times temperature. Marker
and cell scheme: u lives on vertical faces of n x n cells, v on horizontal ones, p in the centers,
so that the discrete divergence of every cell, the net flux through its four faces over its area,
is zero up to the rounding of the linear solver. Second order in 1/n.

Source: Harlow & Welch, "Numerical calculation of time-dependent viscous incompressible flow of
fluid with free surface" (Physics of Fluids, 1965); for mantle flow Gerya, "Introduction to
Numerical Geodynamic Modelling" (2019), ch. 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import spsolve

__all__ = ["Flow", "gaussian_plume", "solve_stokes"]

Floats = NDArray[np.float64]
Buoyancy = Callable[[Floats, Floats], Floats]


@dataclass(frozen=True)
class Flow:
    """Velocities of n x n cells of side ``h = 1/n``; first index x, second y.

    Args:
        u: (n + 1, n) horizontal velocity at ``(i h, (j + 1/2) h)``.
        v: (n, n + 1) vertical velocity at ``((i + 1/2) h, j h)``.
        p: (n, n) pressure in cell centers, of mean zero.
    """

    u: Floats
    v: Floats
    p: Floats

    @property
    def cells(self) -> int:
        """Number n of cells along a side."""
        return len(self.p)

    @property
    def divergence(self) -> Floats:
        """(n, n) net flux out of each cell over its area."""
        found: Floats = (np.diff(self.u, axis=0) + np.diff(self.v, axis=1)) * self.cells
        return found

    @property
    def mean_speed(self) -> float:
        """Mean of ``sqrt(u^2 + v^2)`` over cell centers."""
        u = (self.u[1:] + self.u[:-1]) / 2
        v = (self.v[:, 1:] + self.v[:, :-1]) / 2
        return float(np.hypot(u, v).mean())

    def scaled(self, factor: float) -> Flow:
        """The flow of ``factor`` times the buoyancy: the equations are linear."""
        return Flow(self.u * factor, self.v * factor, self.p * factor)


def gaussian_plume(x: Floats, y: Floats) -> Floats:
    """Temperature anomaly: a hot blob low on the left, a weaker cold one high on the right."""
    hot = np.exp(-((x - 0.36) ** 2 + (y - 0.34) ** 2) / (2 * 0.13**2))
    cold = np.exp(-((x - 0.74) ** 2 + (y - 0.70) ** 2) / (2 * 0.12**2))
    found: Floats = hot - 0.7 * cold
    return found


def solve_stokes(cells: int, buoyancy: Buoyancy, *, no_slip: bool = False) -> Flow:
    """Solve on ``cells x cells`` cells by one sparse direct factorization.

    Args:
        cells: at least 2.
        buoyancy: f at arrays of points.
        no_slip: whether walls hold the fluid; else it slips freely along them.

    Raises:
        ValueError: fewer than two cells, or a buoyancy that is not finite.
    """
    if cells < 2:
        raise ValueError(f"cells: got {cells}; expected at least 2")
    n, h = cells, 1.0 / cells
    middle, edge = (np.arange(n) + 0.5) * h, np.arange(1, n) * h
    force = buoyancy(*np.meshgrid(middle, edge, indexing="ij"))
    if not np.isfinite(force).all():
        raise ValueError("buoyancy: got NaN or infinity; expected finite forces")
    # Along the normal the velocity is zero on the walls themselves; along the tangent the wall is
    # half a cell beyond the last unknown, whose mirror image has the same or the opposite sign.
    normal = _second_difference(n - 1, 0.0)
    tangent = _second_difference(n, -1.0 if no_slip else 1.0)
    slope = sparse.diags([-np.ones(n), np.ones(n)], [0, 1], shape=(n - 1, n))
    one, less = sparse.identity(n), sparse.identity(n - 1)
    stiff_u = sparse.kron(normal, one) + sparse.kron(less, tangent)
    stiff_v = sparse.kron(tangent, less) + sparse.kron(one, normal)
    grad_x, grad_y = sparse.kron(slope, one) * h, sparse.kron(one, slope) * h
    # Pressure is known up to a constant: that of the first cell is pinned in place of its
    # continuity equation, which the others imply.
    continuity = sparse.hstack([grad_x.T, grad_y.T]).tolil()
    continuity[0] = 0.0
    pin = sparse.csr_matrix(([1.0], ([0], [0])), shape=(n * n, n * n))
    stiff = sparse.block_diag([stiff_u, stiff_v])
    gradient = sparse.vstack([grad_x, grad_y])
    matrix = sparse.bmat([[stiff, gradient], [continuity, pin]], format="csc")
    right = np.concatenate([np.zeros((n - 1) * n), force.ravel() * h**2, np.zeros(n * n)])
    solution = spsolve(matrix, right)
    inner_u, inner_v, p = np.split(solution, [(n - 1) * n, 2 * (n - 1) * n])
    u, v = np.zeros((n + 1, n)), np.zeros((n, n + 1))
    u[1:-1], v[:, 1:-1] = inner_u.reshape(n - 1, n), inner_v.reshape(n, n - 1)
    return Flow(u, v, (p - p.mean()).reshape(n, n))


def _second_difference(count: int, mirror: float) -> sparse.spmatrix:
    """``-h^2 d^2`` along one axis; ``mirror`` is the sign of the image beyond either end."""
    diagonal = np.full(count, 2.0)
    diagonal[0] -= mirror
    diagonal[-1] -= mirror
    off = -np.ones(count - 1)
    return sparse.diags([off, diagonal, off], [-1, 0, 1])
