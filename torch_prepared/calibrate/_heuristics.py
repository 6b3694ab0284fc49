"""Attacks on the calibration error over intervals: values that are reached, never bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from torch_prepared.calibrate._bins import Floats, Integers, Intervals, bin_gaps, bin_of
from torch_prepared.calibrate._dynamic import best_response

__all__ = ["Assignment", "alternate", "brier_ends", "splitting_attack"]

_RESTARTS = 10
_MAX_ROUNDS = 200
_MAX_STEPS = 3000
_CHECK_EVERY = 50
_PENALTIES = (
    (0.01, 1.002),
    (0.005, 1.005),
)  # first value and growth; chosen on 9 sets of intervals


@dataclass(frozen=True, eq=False)
class Assignment:
    """Confidences (N,), the bins (N,) they count in, the sums' signs (M,), and the error."""

    confidence: Floats
    bin: Integers
    signs: Integers
    value: float

    @classmethod
    def of(cls, data: Intervals, confidence: Floats, bins: Integers, count: int) -> Assignment:
        """The assignment with its error."""
        gaps = bin_gaps(confidence, data.correct, bins, count)
        signs = np.where(gaps >= 0, 1, -1)
        return cls(confidence, bins, signs, math.fsum(np.abs(gaps)) / len(data))


def brier_ends(data: Intervals, edges: Floats) -> Assignment:
    """Every confidence at the end that is worst for the Brier score."""
    worst = np.where(data.correct, data.lower, data.upper)
    return Assignment.of(data, worst, bin_of(worst, edges), len(edges) - 1)


def alternate(data: Intervals, edges: Floats, random: np.random.Generator) -> Assignment:
    """Best response to signs, then signs of the response, until nothing changes; restarts.

    Each round can only raise the error, since the response maximizes ``sum s_m S_m`` and the new
    signs make every term positive.
    """
    bins = len(edges) - 1
    best = brier_ends(data, edges)
    starts = [best.signs, np.ones(bins, np.int64), -np.ones(bins, np.int64)]
    starts += [random.choice(np.array([-1, 1]), bins) for _ in range(_RESTARTS)]
    for start in starts:
        best = max(best, _climb(data, edges, start), key=lambda found: found.value)
    return best


def _climb(data: Intervals, edges: Floats, signs: Integers) -> Assignment:
    """Alternate from ``signs`` to a fixed point."""
    found = Assignment.of(data, *best_response(data, edges, signs), len(edges) - 1)
    for _ in range(_MAX_ROUNDS):
        response = best_response(data, edges, found.signs)
        again = Assignment.of(data, *response, len(edges) - 1)
        if again.value <= found.value:
            break
        found = again
    return found


def splitting_attack(data: Intervals, edges: Floats, random: np.random.Generator) -> Assignment:
    r"""Alternating direction method of multipliers on the integer program, as an attack.

    Bin assignments a (N, M) are relaxed to rows that sum to one; copies y of them are projected
    on the cube and on the sphere through its corners, whose intersection is the binary points.
    Steps: a in closed form against both copies, confidences by a proximal step on their boxes,
    copies by projection, dual ascent, growing penalty. At most 3,000 steps for each of two penalty
    schedules; every fiftieth point is rounded, each confidence moved to the end of its bin that
    its bin's sign asks for, and the best error so far kept.

    Source:
        Emde et al. (ICLR 2025) run this method on their program; box and sphere splitting is that
        of Wu & Ghanem, "Lp-Box ADMM" (TPAMI 2019). Penalties and starts are ours.
    """
    runs = [_split(data, edges, random, *schedule) for schedule in _PENALTIES]
    return max(runs, key=lambda found: found.value)


def _split(
    data: Intervals, edges: Floats, random: np.random.Generator, penalty: float, growth: float
) -> Assignment:
    """One run of the alternating direction method."""
    count, bins = len(data), len(edges) - 1
    position = np.arange(1, bins + 1)
    first, last = bin_of(data.lower, edges), bin_of(data.upper, edges)
    within = (first[:, None] <= position) & (position <= last[:, None])
    low = np.where(within, np.maximum(data.lower[:, None], edges[:-1]), 0.0)
    high = np.where(within, np.minimum(data.upper[:, None], edges[1:]), 0.0)
    right = data.correct[:, None].astype(np.float64)
    middle = bin_of((data.lower + data.upper) / 2, edges)
    a = (position == middle[:, None]).astype(np.float64)
    z = low + (high - low) * random.random((count, bins))
    duals, copies = np.zeros((2, count, bins)), np.stack([a, a])
    free = int(within.sum())
    best = brier_ends(data, edges)
    for step in range(1, _MAX_STEPS + 1):
        signs = np.where((a * (right - z)).sum(axis=0) >= 0, 1.0, -1.0)
        a = (copies - duals).mean(axis=0) + signs * (right - z) / (2 * penalty)
        a = _on_simplex_plane(a, within)
        z = np.clip(z - signs * a / penalty, low, high)
        copies[0] = np.clip(a + duals[0], 0.0, 1.0)
        copies[1] = _on_sphere(a + duals[1], within, free)
        duals += a - copies
        penalty = min(penalty * growth, 50.0)
        if step % _CHECK_EVERY == 0:
            chosen = np.where(within, a, -np.inf).argmax(axis=1)
            best = max(best, _rounded(data, low, high, z, chosen), key=lambda found: found.value)
            if step > 10 * _CHECK_EVERY and float(np.abs(a - copies).max()) < 1e-4:
                break
    return best


def _on_simplex_plane(a: Floats, within: np.ndarray) -> Floats:
    """Nearest point whose rows sum to one and vanish outside of the windows."""
    a = np.where(within, a, 0.0)
    excess = (a.sum(axis=1) - 1.0) / within.sum(axis=1)
    return np.where(within, a - excess[:, None], 0.0)


def _on_sphere(a: Floats, within: np.ndarray, free: int) -> Floats:
    """Nearest point at the corners' distance from the center of the cube."""
    offset = np.where(within, a - 0.5, 0.0)
    length = float(np.linalg.norm(offset))
    scaled = offset * (0.5 * math.sqrt(free) / length) if length > 0 else offset
    return np.where(within, scaled + 0.5, 0.0)


def _rounded(data: Intervals, low: Floats, high: Floats, z: Floats, chosen: Integers) -> Assignment:
    """One bin per sample, then every confidence at the end that its bin's sign asks for."""
    line, count = np.arange(len(data)), low.shape[1]
    bins = chosen.astype(np.int64) + 1
    rounded = Assignment.of(data, z[line, chosen], bins, count)
    under = rounded.signs[chosen] > 0
    ends = np.where(under, low[line, chosen], high[line, chosen])
    moved = Assignment.of(data, ends, bins, count)
    return max(rounded, moved, key=lambda found: found.value)
