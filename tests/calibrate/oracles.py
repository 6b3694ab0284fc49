"""Slow, obvious answers that fast algorithms are compared with."""

from __future__ import annotations

import itertools

import numpy as np

Case = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def bins_reachable(low: float, high: float, edges: np.ndarray) -> list[int]:
    """Bins (e_{m-1}, e_m], the first with 0, that [low, high] meets, straight from definition."""
    return [m for m in range(1, len(edges)) if low <= edges[m] and (high > edges[m - 1] or m == 1)]


def worst_by_assignment(lower, upper, correct, edges) -> float:
    """Supremum of the calibration error: every assignment of samples to reachable bins."""
    windows = [bins_reachable(a, b, edges) for a, b in zip(lower, upper, strict=True)]
    best = 0.0
    for bins in itertools.product(*windows):
        total = 0.0
        for m in set(bins):
            inside = [n for n, chosen in enumerate(bins) if chosen == m]
            most = sum(correct[n] - max(lower[n], edges[m - 1]) for n in inside)
            least = sum(correct[n] - min(upper[n], edges[m]) for n in inside)
            total += max(most, -least)
        best = max(best, total)
    return best / len(lower)


def ece_by_definition(confidence, correct, edges) -> float:
    """Weighted gap between accuracy and mean confidence, bin by bin."""
    total = 0.0
    for m in range(1, len(edges)):
        inside = (confidence <= edges[m]) & ((confidence > edges[m - 1]) | (m == 1))
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


def random_case(rng: np.random.Generator, most: int = 6, bins: int = 5) -> Case:
    """A few intervals, often on edges, of zero width, or all of [0, 1]; sometimes uneven edges."""
    size, count = int(rng.integers(1, bins + 1)), int(rng.integers(1, most + 1))
    edges = np.arange(size + 1) / size
    if rng.random() < 0.3:
        inner = np.unique(rng.random(size - 1))
        edges = np.concatenate([[0.0], inner, [1.0]])
    ends = rng.random((2, count))
    if rng.random() < 0.5:
        ends = rng.choice(np.concatenate([edges, (edges[1:] + edges[:-1]) / 2]), (2, count))
    lower, upper = ends.min(axis=0), ends.max(axis=0)
    if rng.random() < 0.2:
        upper = lower.copy()
    whole = rng.random(count) < 0.1
    lower, upper = np.where(whole, 0.0, lower), np.where(whole, 1.0, upper)
    return lower, upper, rng.random(count) < 0.5, edges


def large_case(rng: np.random.Generator, count: int = 400) -> Case:
    """Many intervals around plausible confidences, 15 bins."""
    middle = 0.3 + 0.7 * rng.random(count)
    width = 0.3 * rng.random(count)
    lower, upper = np.clip(middle - width, 0, 1), np.clip(middle + width, 0, 1)
    return lower, upper, rng.random(count) < middle, np.arange(16) / 15
