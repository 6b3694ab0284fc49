r"""Projection onto half-spaces through its dual, whose size is the number of rows.

The step that editors need is ``min d @ M d / 2`` subject to ``J d >= q`` with millions of
parameters d but few rows. Its dual needs only ``G = J M^{-1} J^T`` (m, m):

``max over multipliers >= 0 of q @ multipliers - multipliers @ G multipliers / 2``,

and ``d = M^{-1} J^T multipliers``, so that ``J d = G multipliers``. The dual is solved to high
accuracy by proximal-point steps (each subtracts ``eps * |multipliers - last|^2 / 2``, which makes
a singular G definite without biasing the limit: no ridge remains).

Source: Rockafellar, "Monotone operators and the proximal point algorithm" (SIAM J. Control Optim.
14, 1976); the parts are in ``_complementarity``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from torch_prepared.core.rows import Floats
from torch_prepared.errors import SolverError
from torch_prepared.solvers._batched_central import interior_point
from torch_prepared.solvers._batched_gram import DenseGram, Gram
from torch_prepared.solvers._complementarity import ProximalStep, kkt_residual
from torch_prepared.solvers._result import Status

__all__ = ["DualProjection", "gram_matrix", "project"]

_RESIDUAL_TOLERANCE = 1e-10  #: KKT residual at which the dual counts as solved
_FARTHEST = 1e4  #: a step this many times longer than the way to one half-space: infeasible
_LENGTH_NOISE = 2e-8  #: rounding of |J^T ray| relative to the sum of ray_i |J_i|
_PROXIMITY = 1e-8  #: eps relative to a unit diagonal
_STEP_LIMIT = 50
_FEW = 64  #: rows, beyond which a solution is looked for on some of them first
_CHUNK = 1 << 14  #: columns converted to float64 at a time


@dataclass(frozen=True, eq=False)
class DualProjection:
    """Answer of :func:`project`.

    Attributes:
        multipliers: (m,) float64, nonnegative.
        status: ``OPTIMAL``, ``INFEASIBLE`` (see ``ray``) or ``UNKNOWN``.
        kkt_residual: largest entry of ``|min(u, Gu - q)|`` after scaling G to unit diagonal, over
            the largest scaled q: bounds both the violation and the complementarity.
        ray: (m,) Farkas ray when infeasible: nonnegative with ``q @ ray > 0`` and ``J^T ray`` zero
            up to rounding. Any d with ``J d >= q`` is at least ``q @ ray / |J^T ray|`` long;
            "infeasible" means that this exceeds 1e4 times the way to the farthest half-space.
        distance: ``sqrt(multipliers @ G multipliers)``, the norm ``sqrt(d @ M d)`` of the step.
    """

    multipliers: Floats
    status: Status
    kkt_residual: float
    ray: Floats | None
    distance: float


def gram_matrix(
    jacobian: Tensor, inverse_metric: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """``J M^{-1} J^T``, (m, m) or (b, m, m), in float64, made exactly symmetric.

    Args:
        jacobian: (m, p), or a batch (b, m, p); any floating dtype and device.
        inverse_metric: maps it to ``J M^{-1}`` row by row; the identity when None.
    """
    rows = jacobian.detach()
    if inverse_metric is None:  # converted in parts that stay in the cache
        parts = (part.to(torch.float64) for part in rows.split(_CHUNK, dim=-1))
        gram = sum(
            (part @ part.mT for part in parts),
            rows.new_zeros((*rows.shape[:-1], rows.shape[-2]), dtype=torch.float64),
        )
    else:
        rows = rows.to(torch.float64)
        gram = rows @ inverse_metric(rows).to(torch.float64).mT
    return 0.5 * (gram + gram.mT)


def project(gram: ArrayLike | Tensor | Gram, q: ArrayLike | Tensor) -> DualProjection:
    """Multipliers of the projection of 0 onto ``{d : J d >= q}`` from ``G = J M^{-1} J^T``.

    Args:
        gram: (m, m) symmetric positive semidefinite, possibly singular; m up to a few thousand.
            A :class:`Gram` of one sample is formed only as far as the solution needs it.
        q: (m,) right-hand sides.

    Returns:
        Multipliers with their KKT residual. Numerical failure is ``UNKNOWN``, never an answer.

    Raises:
        SolverError: shapes that do not fit, NaN, a negative diagonal or an asymmetric matrix.

    Example:
        >>> result = project([[1.0, 0.0], [0.0, 4.0]], [1.0, -3.0])   # d_1 >= 1, 2 d_2 >= -3
        >>> result.multipliers.round(12).tolist(), result.status.name
        ([1.0, 0.0], 'OPTIMAL')
    """
    given, rhs = _checked(gram, q)
    norms = given.norms()[0].numpy()
    dead = norms == 0.0
    stuck = dead & (rhs > 0)
    if bool(stuck.any()):
        inf, which = float("inf"), stuck.astype(np.float64)
        return DualProjection(np.zeros(len(rhs)), Status.INFEASIBLE, inf, which, inf)
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=~dead)
    target = np.where(dead, -1.0, rhs * scale)
    size = float(target.max(initial=0.0))
    if size <= 0.0:
        return DualProjection(np.zeros(len(rhs)), Status.OPTIMAL, 0.0, None, 0.0)
    unit = given.scaled(torch.from_numpy(scale)[None], torch.from_numpy(dead)[None])
    solution, status, residual, direction = _solve_unit(unit, target / size)
    multipliers = solution * scale * size
    ray = None if direction is None or status is not Status.INFEASIBLE else direction * scale
    squared = float(multipliers @ _image(given, multipliers))
    distance = float("inf") if ray is not None else float(np.sqrt(max(squared, 0.0)))
    return DualProjection(multipliers, status, residual, ray, distance)


def _checked(gram: ArrayLike | Tensor | Gram, q: ArrayLike | Tensor) -> tuple[Gram, Floats]:
    rhs = _to_numpy(q)
    if isinstance(gram, Gram):
        norms = gram.norms()
        if rhs.ndim != 1 or norms.shape != (1, len(rhs)):
            raise SolverError(
                f"project: got a Gram matrix of {tuple(norms.shape)} rows, q {rhs.shape}; "
                "expected (1, m), (m,)"
            )
        if not (bool(norms.isfinite().all()) and np.isfinite(rhs).all()):
            raise SolverError(
                "project: got NaN or infinite entries; expected finite rows and bounds"
            )
        return gram, rhs
    matrix = _to_numpy(gram)
    if rhs.ndim != 1 or matrix.shape != (len(rhs), len(rhs)):
        raise SolverError(f"project: got gram {matrix.shape}, q {rhs.shape}; expected (m, m), (m,)")
    squares = np.diagonal(matrix)
    with np.errstate(invalid="ignore"):
        skew = matrix - matrix.T  # NaN where an entry, or both of a pair, are not finite
    off = max(float(skew.max(initial=0.0)), -float(skew.min(initial=0.0)))
    if not (np.isfinite(off) and np.isfinite(squares).all() and np.isfinite(rhs).all()):
        raise SolverError("project: got NaN or infinite entries; expected finite rows and bounds")
    if bool((squares < 0.0).any()):
        raise SolverError("project: got a negative diagonal; expected a positive metric")
    if off > 1e-6 * float(squares.max(initial=0.0)):  # the largest entry, for semidefinite ones
        raise SolverError("project: got an asymmetric Gram matrix; expected J M^-1 J^T")
    skew *= -0.5
    skew += matrix
    return DenseGram(torch.from_numpy(skew)[None]), rhs


def _image(gram: Gram, x: Floats) -> Floats:
    """``G x`` (m,)."""
    return np.asarray(gram.times(torch.from_numpy(x)[None])[0].numpy())


def _to_numpy(value: ArrayLike | Tensor) -> Floats:
    if isinstance(value, Tensor):
        return np.asarray(value.detach().to("cpu", torch.float64).numpy())
    return np.asarray(value, dtype=np.float64)


def _solve_unit(gram: Gram, q: Floats) -> tuple[Floats, Status, float, Floats | None]:
    """Solve with unit diagonal and ``max(q) == 1``: multipliers, status, residual, ray."""
    few = _solve_few(gram, q) if len(q) > _FEW else None
    if few is not None:
        return few
    return _solve_all(gram.whole()[0].numpy(), q, np.zeros_like(q), q > 0)


def _solve_all(
    gram: Floats, q: Floats, start: Floats, active: NDArray[np.bool_]
) -> tuple[Floats, Status, float, Floats | None]:
    """As :func:`_solve_unit`, from a guess of the solution and of its active rows.

    Pivoting from the violated rows settles most problems in a few factorizations. Where it cycles
    (many nearly dependent rows) an interior-point run supplies a start that needs few pivots.
    """
    first = _refine(gram, q, start, active)
    if first[1] is not Status.UNKNOWN:
        return first
    slow = interior_point(
        DenseGram(torch.from_numpy(gram)[None]),
        torch.from_numpy(q)[None],
        lambda _, point, *__: torch.tensor([_is_ray(gram, q, point[0].numpy())]),
    )[0].numpy()
    if _is_ray(gram, q, slow):
        return np.zeros_like(q), Status.INFEASIBLE, 1.0, slow / slow.max()
    second = _refine(gram, q, slow, slow > gram @ slow - q)
    return second if second[2] <= first[2] else first


def _solve_few(gram: Gram, q: Floats) -> tuple[Floats, Status, float, Floats | None] | None:
    """As :func:`_solve_unit`, by the rows that prove to matter; None where these get too many.

    A solution usually leans on few of many rows, of which pivoting would start with half. Each
    round solves for the chosen rows, from the last solution, and adds those it violates most;
    the dual's value rises, so no set comes twice. A ray of some rows is one of all.
    """
    chosen = np.zeros(len(q), dtype=bool)
    point, slack = np.zeros_like(q), -q
    while True:
        lacking = np.flatnonzero((slack < -_RESIDUAL_TOLERANCE) & ~chosen)
        if not len(lacking):
            break
        most = lacking[np.argsort(slack[lacking], kind="stable")[: max(_FEW // 2, chosen.sum())]]
        chosen[most] = True
        index = np.flatnonzero(chosen)
        if 2 * len(index) > len(q):
            return None
        active = (point[index] > 0) | (slack[index] < 0)
        where = torch.from_numpy(index)[None]
        small = gram.block(where, torch.ones_like(where, dtype=torch.bool))[0].numpy()
        part, status, residual, ray = _solve_all(small, q[index], point[index], active)
        if status is Status.UNKNOWN:
            return None
        if ray is not None:
            whole = np.zeros_like(q)
            whole[index] = ray
            return np.zeros_like(q), status, residual, whole
        point = np.zeros_like(q)
        point[index] = part
        slack = _image(gram, point) - q
    residual = float(np.abs(np.minimum(point, slack)).max())
    return (point, Status.OPTIMAL, residual, None) if residual <= _RESIDUAL_TOLERANCE else None


def _refine(
    gram: Floats, q: Floats, start: Floats, active: NDArray[np.bool_]
) -> tuple[Floats, Status, float, Floats | None]:
    """Proximal-point steps from ``start`` until the KKT residual is below the tolerance."""
    best, last = start, start
    best_residual = kkt_residual(gram, q, start)
    step = ProximalStep(gram, q, _PROXIMITY, active)
    for _ in range(_STEP_LIMIT):
        point = step.solve(last)
        if point is None:
            break
        ray = np.maximum(point - last, 0.0)
        if _is_ray(gram, q, ray):
            return best, Status.INFEASIBLE, best_residual, ray / ray.max()
        residual = kkt_residual(gram, q, point)
        if residual < best_residual or residual <= _RESIDUAL_TOLERANCE:
            best, best_residual = point, residual
        if best_residual <= _RESIDUAL_TOLERANCE:
            break
        last = point
    status = Status.OPTIMAL if best_residual <= _RESIDUAL_TOLERANCE else Status.UNKNOWN
    return best, status, best_residual, None


def _is_ray(gram: Floats, q: Floats, ray: Floats) -> bool:
    """Whether ``q @ ray`` exceeds ``|J^T ray|`` so far that no step of sensible length fits."""
    length = float(np.sqrt(max(float(ray @ (gram @ ray)), 0.0)))
    noise = _LENGTH_NOISE * float(ray.sum())
    return float(q @ ray) > _FARTHEST * max(length, noise, np.finfo(np.float64).tiny)
