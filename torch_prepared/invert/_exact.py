"""Collisions, distances and linear cells in exact rational arithmetic.

A pair that a solver returns collides up to a tolerance only. Within one linear cell the network is
affine, so its columns there are difference quotients ``(f(x + e) - f(x)) / e`` at any small e,
without error in rational arithmetic; solving that square system moves ``x`` onto an exact
collision, which exact evaluation then confirms. Nothing here trusts a solver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch

from torch_prepared.certify.exact import evaluate_exactly, to_fractions, values_exactly
from torch_prepared.core.rows import Floats
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.relax import evaluate_graph
from torch_prepared.relax.pool import pool_windows

__all__ = [
    "Cell",
    "Rationals",
    "correct_pair",
    "excess",
    "jacobian",
    "largest_below",
    "linear_cell",
    "norm_above",
]

Rationals = npt.NDArray[np.object_]
"""Array of ``Fraction``."""

_STEP = Fraction(1, 2**70)
_RANK_TOLERANCE = 1e-10
_MAX_COLUMNS = 64  #: inputs up to which the cell of a point is found exactly


def norm_above(offset: Rationals, p: float) -> float:
    """The least convenient float that is at least the p-norm of ``offset`` (n,)."""
    sizes = [abs(Fraction(v)) for v in offset]
    if p == math.inf:
        return _float_above(max(sizes))
    if p == 1:
        return _float_above(sum(sizes, Fraction(0)))
    square = sum((v * v for v in sizes), Fraction(0))
    root = math.sqrt(_float_above(square))
    while Fraction(root) ** 2 < square:
        root = math.nextafter(root, math.inf)
    return root


def largest_below(offset: Rationals) -> float:
    """The maximum norm of ``offset`` (n,), rounded down."""
    value = max(abs(Fraction(v)) for v in offset)
    near = float(value)
    return near if Fraction(near) <= value else math.nextafter(near, 0.0)


def excess(gap: Rationals, within: float) -> Rationals:
    """By how much the entries of ``gap`` (m,) are outside of ``[-within, within]``, signed."""
    limit = Fraction(within)
    inside = np.array([min(max(v, -limit), limit) for v in gap], dtype=object)
    return np.asarray(gap - inside)


def _float_above(value: Fraction) -> float:
    near = float(value)
    return near if Fraction(near) >= value else math.nextafter(near, math.inf)


def jacobian(net: PiecewiseNetwork, points: Floats) -> Floats:
    """Derivatives (b, m, n) at points (b, n) in float64; at a kink those of one adjacent cell."""
    x = torch.from_numpy(np.array(points, dtype=np.float64)).requires_grad_(True)
    values = evaluate_graph(net.graph, x).flatten(1)
    rows = [
        torch.autograd.grad(values[:, i].sum(), x, retain_graph=True)[0]
        for i in range(values.shape[1])
    ]
    return np.asarray(torch.stack(rows, dim=1).numpy())


def columns_exactly(
    net: PiecewiseNetwork, x: Rationals, columns: Sequence[int], value: Rationals, step: Fraction
) -> Rationals:
    """Columns (m, k) of the derivative on the cell that ``x + step e_j`` lies in."""
    found = np.empty((len(value), len(columns)), dtype=object)
    for k, j in enumerate(columns):
        moved = x.copy()
        moved[j] += step
        found[:, k] = (evaluate_exactly(net.record, moved) - value) / step
    return found


def correct_pair(
    net: PiecewiseNetwork,
    x: Floats,
    y: Floats,
    *,
    move_both: bool = False,
    attempts: int = 3,
    movable: npt.NDArray[np.bool_] | None = None,
    within: float = 0.0,
) -> tuple[Rationals, Rationals] | None:
    """Rational points near ``x`` and ``y`` with exactly equal outputs, or None.

    Args:
        net: the network.
        x: (n,) to be moved.
        y: (n,) stays where it is unless ``move_both``.
        move_both: move ``y`` too; needed where ``x`` alone has too few unknowns.
        attempts: linear solves in rational arithmetic, each from where the last one led.
        movable: (n,) coordinates that may change; all when None.
        within: outputs may differ by so much in every entry.

    Soundness: the pair returned was evaluated exactly on the stored weights, and its points differ.
    """
    free = np.ones(len(x), dtype=bool) if movable is None else movable
    target = net.values(y[None])[0]
    if within:
        target = target + np.clip(net.values(x[None])[0] - target, -within, within)
    x = _newton(net, x, target, free)
    for attempt in range(attempts):
        left, right = to_fractions(x), to_fractions(y)
        value = evaluate_exactly(net.record, left)
        residual = excess(value - evaluate_exactly(net.record, right), within)
        if not any(residual):
            return (left, right) if any(left - right) else None
        slopes = jacobian(net, np.stack([x, y])) * free
        matrix = np.concatenate([slopes[0], -slopes[1]], axis=1) if move_both else slopes[0]
        picked, rows = _basis(matrix)
        if not picked:
            return None
        own = [j for j in picked if j < len(x)]
        other = [j - len(x) for j in picked if j >= len(x)]
        step = _STEP if attempt % 2 == 0 else -_STEP
        exact = columns_exactly(net, left, own, value, step)
        if other:
            there = columns_exactly(net, right, other, evaluate_exactly(net.record, right), step)
            exact = np.concatenate([exact, -there], axis=1)
        shift = solve_exactly(exact[rows], -residual[rows])
        if shift is None:
            continue
        left[own] += shift[: len(own)]
        right[other] += shift[len(own) :]
        gap = evaluate_exactly(net.record, left) - evaluate_exactly(net.record, right)
        if not any(excess(gap, within)):
            return (left, right) if any(left - right) else None
        x, y = left.astype(np.float64), right.astype(np.float64)
    return None


def _newton(
    net: PiecewiseNetwork, x: Floats, target: Floats, free: npt.NDArray[np.bool_], steps: int = 4
) -> Floats:
    """Steps of least norm toward ``f(x) = target``, kept while the residual falls."""
    residual = target - net.values(x[None])[0]
    for _ in range(steps):
        slopes = jacobian(net, x[None])[0] * free
        move = np.linalg.lstsq(slopes, residual, rcond=_RANK_TOLERANCE)[0]
        after = target - net.values((x + move)[None])[0]
        if not float(np.abs(after).max()) < float(np.abs(residual).max()):
            break
        x, residual = x + move, after
    return x


def _basis(matrix: Floats) -> tuple[list[int], list[int]]:
    """Columns and as many rows of a nonsingular submatrix of full rank, well conditioned."""
    _, triangle, order = scipy.linalg.qr(matrix, mode="economic", pivoting=True)
    sizes = np.abs(np.diag(triangle))
    rank = int((sizes > _RANK_TOLERANCE * max(float(sizes.max(initial=0.0)), 1e-300)).sum())
    columns = sorted(int(j) for j in order[:rank])
    if not rank:
        return [], []
    _, _, which = scipy.linalg.qr(matrix[:, columns].T, mode="economic", pivoting=True)
    return columns, sorted(int(i) for i in which[:rank])


def solve_exactly(matrix: Rationals, rhs: Rationals) -> Rationals | None:
    """The solution of a square rational system, or None when it is singular."""
    k = len(rhs)
    work = [[Fraction(v) for v in row] + [Fraction(b)] for row, b in zip(matrix, rhs, strict=True)]
    pivots = _eliminate(work, k)
    if len(pivots) < k:
        return None
    out = np.empty(k, dtype=object)
    out[:] = [work[i][k] for i in range(k)]
    return out


def kernel_exactly(matrix: Rationals) -> tuple[int, Rationals | None]:
    """Rank of a rational matrix (m, n), and a nonzero v (n,) with ``matrix @ v = 0`` if any."""
    n = matrix.shape[1]
    work = [[Fraction(v) for v in row] for row in matrix]
    pivots = _eliminate(work, n)
    free = [j for j in range(n) if j not in pivots]
    if not free:
        return n, None
    vector = np.empty(n, dtype=object)
    vector[:] = [Fraction(0)] * n
    vector[free[0]] = Fraction(1)
    for row, column in enumerate(pivots):
        vector[column] = -work[row][free[0]]
    return len(pivots), vector


def _eliminate(work: list[list[Fraction]], columns: int) -> list[int]:
    """Reduce rows to echelon form with unit pivots, in place; returns the pivot columns."""
    pivots: list[int] = []
    for column in range(columns):
        row = len(pivots)
        found = next((i for i in range(row, len(work)) if work[i][column] != 0), None)
        if found is None:
            continue
        work[row], work[found] = work[found], work[row]
        head = work[row][column]
        work[row] = [v / head for v in work[row]]
        for i, other in enumerate(work):
            if i != row and other[column] != 0:
                factor = other[column]
                work[i] = [v - factor * p for v, p in zip(other, work[row], strict=True)]
        pivots.append(column)
    return pivots


@dataclass(frozen=True)
class Cell:
    """The linear cell of a point, found in exact arithmetic.

    Attributes:
        on_kink: some switch (a ReLU's input, a difference inside a pooling window) is exactly 0,
            so that several cells meet in the point; then nothing else is known.
        radius: the network is affine wherever ``max |x - center| < radius``; 0 when not found.
        injective: whether the affine map has full column rank; None when not found.
        flat: (n,) a nearby point with exactly the same output, or None.
    """

    on_kink: bool = False
    radius: float = 0.0
    injective: bool | None = None
    flat: Rationals | None = None


def linear_cell(net: PiecewiseNetwork, center: Floats) -> Cell:
    """What exact arithmetic says of the network around ``center`` (n,).

    With more inputs than outputs, ``m + 1`` directions are enough to find a flat one. Networks with
    more than 64 inputs and at least as many outputs are not examined.
    """
    n, m = net.input_size, net.output_size
    x = to_fractions(center)
    values = values_exactly(net.record, x)
    switches = _switches(net, values)
    if any(v == 0 for v in switches):
        return Cell(on_kink=True)
    if n > max(m + 1, _MAX_COLUMNS) or m < n:
        columns: list[int] = np.unique(np.linspace(0, n - 1, m + 1).round().astype(int)).tolist()
    else:
        columns = list(range(n))
    if n <= m and n > _MAX_COLUMNS:
        return Cell()
    output = values[next(reversed(values))].reshape(-1)
    _, kernel = kernel_exactly(columns_exactly(net, x, columns, output, _STEP))
    if kernel is not None:
        return Cell(injective=False, flat=_flat_point(net, x, columns, kernel, output))
    slopes, lean = _slopes(net, x, columns, switches)
    safe = [abs(s) / lean_i for s, lean_i in zip(switches, lean, strict=True) if lean_i]
    radius = float(min(safe)) if safe else math.inf
    return Cell(radius=math.nextafter(radius, 0.0) if slopes else 0.0, injective=slopes or None)


def _slopes(
    net: PiecewiseNetwork, x: Rationals, columns: Sequence[int], switches: Sequence[Fraction]
) -> tuple[bool, list[Fraction]]:
    """Whether the step stays in the cell, and the 1-norm of every switch's gradient."""
    lean = [Fraction(0)] * len(switches)
    for j in columns:
        moved = x.copy()
        moved[j] += _STEP
        after = _switches(net, values_exactly(net.record, moved))
        if any((a > 0) != (b > 0) or a == 0 for a, b in zip(after, switches, strict=True)):
            return False, lean
        lean = [n + abs((a - b) / _STEP) for n, a, b in zip(lean, after, switches, strict=True)]
    return True, lean


def _switches(net: PiecewiseNetwork, values: dict[str, Rationals]) -> list[Fraction]:
    """Numbers whose signs say which cell a point is in; 0 on a kink."""
    found: list[Fraction] = []
    for node in net.graph.nodes[1:]:
        if node.op in ("relu", "leaky_relu"):
            found.extend(values[node.inputs[0]].reshape(-1).tolist())
        elif node.op == "max_pool":
            shape = net.graph.node(node.inputs[0]).shape
            flat = values[node.inputs[0]].reshape(-1)
            for window in pool_windows(node, shape).tolist():
                taps = [flat[i] for i in dict.fromkeys(window) if i >= 0]
                best = max(range(len(taps)), key=lambda i: taps[i])
                found.extend(taps[best] - v for i, v in enumerate(taps) if i != best)
    return found


def _flat_point(
    net: PiecewiseNetwork,
    x: Rationals,
    columns: Sequence[int],
    kernel: Rationals,
    output: Rationals,
) -> Rationals | None:
    """A point along a flat direction whose output is exactly ``output``."""
    size = max(abs(v) for v in kernel)
    for exponent in (10, 20, 40, 60, 80):
        moved = x.copy()
        moved[list(columns)] += kernel / size / 2**exponent
        if bool(np.all(evaluate_exactly(net.record, moved) == output)):
            return moved
    return None
