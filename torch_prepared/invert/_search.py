"""Looking for collisions in float64, so that programs start with a small radius.

Nothing found here is believed: :func:`best_pair` corrects candidates in rational arithmetic and
keeps those that collide exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.spatial import cKDTree

from torch_prepared.core.deadline import Deadline
from torch_prepared.core.rows import Floats
from torch_prepared.invert._ball import Ball
from torch_prepared.invert._exact import correct_pair, jacobian
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.invert._result import Pair

__all__ = ["best_pair", "collide_near", "find_collisions", "find_preimages", "inside", "one_thread"]

_STEPS = 32
_STARTS = 256
_SAMPLES = 4096
_NEIGHBORS = 8
_TRIES = 6
_RESIDUAL = 1e-7
_EDGE = 1e-7  #: coordinates so near to the box of the ball, relatively, stay when made exact
_WIDE = 4096  #: entries of one Jacobian above which fewer starts are used


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread meanwhile: these networks are too small for more to pay."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def find_preimages(
    net: PiecewiseNetwork, target: Floats, ball: Ball, least: float, seed: int, deadline: Deadline
) -> Floats:
    """Inputs (k, n) of the ball with output near ``target`` (m,), nearest to the center first.

    Newton steps of least norm from random points; where the system leaves freedom, half of it is
    spent on moving toward the center. Points within ``least`` of the center (maximum norm) are left
    out.
    """
    generator = torch.Generator().manual_seed(seed)
    count = max(16, min(_STARTS, _STARTS * _WIDE // (net.input_size * net.output_size) // 8))
    count = _STARTS if net.input_size * net.output_size <= _WIDE // 16 else count
    low, high = ball.region.lower.numpy(), ball.region.upper.numpy()
    points = ball.region.sample(count, generator).numpy()
    if net.output_size < net.input_size:  # there are many: those near the center are wanted
        share = torch.rand(count, 1, generator=generator, dtype=torch.float64).numpy() ** 2
        points = ball.center + share * (points - ball.center)
        points[0] = ball.center
    for step in range(_STEPS):
        if deadline.over:
            break
        slopes, residual = jacobian(net, points), target - net.values(points)
        pull = np.zeros_like(points)
        if net.output_size < net.input_size and step < _STEPS - 16:
            pull = 0.5 * (ball.center - points)
        move = _least_move(slopes, residual, pull)
        stuck = ((points <= low) & (move < 0)) | ((points >= high) & (move > 0))
        if bool(stuck.any()):
            pull[stuck] = 0.0
            move = _least_move(slopes * ~stuck[:, None, :], residual, pull)
        points = np.clip(points + move, low, high)
    residual = np.abs(net.values(points) - target).max(axis=1)
    good = residual <= _RESIDUAL * (1.0 + np.abs(target).max())
    good &= np.abs(points - ball.center).max(axis=1) > least
    return _nearest_first(points[good], ball)


def _least_move(slopes: Floats, residual: Floats, pull: Floats) -> Floats:
    """Per point the move nearest to ``pull`` with ``slopes @ move = residual``, roughly."""
    rest = residual - np.einsum("bmn,bn->bm", slopes, pull)
    _, m, n = slopes.shape
    if m >= n:
        return np.asarray(np.einsum("bnm,bm->bn", np.linalg.pinv(slopes, rcond=1e-8), rest) + pull)
    gram = np.einsum("bmn,bkn->bmk", slopes, slopes)
    size = np.trace(gram, axis1=1, axis2=2)[:, None, None]
    weights = np.linalg.solve(gram + (1e-12 * size + 1e-300) * np.eye(m), rest[..., None])
    return np.asarray(np.einsum("bmn,bm->bn", slopes, weights[..., 0]) + pull)


@one_thread()
def find_collisions(
    net: PiecewiseNetwork, ball: Ball, least: float, seed: int, deadline: Deadline
) -> list[tuple[Floats, Floats]]:
    """Pairs in the ball at least ``least`` apart with nearly equal outputs, smallest reach first.

    Samples whose outputs are close though they are far apart are refined by Newton steps, then
    moved toward the center at random as long as they collide. Meant for few inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    points = ball.region.sample(_SAMPLES, generator).numpy()
    outputs = net.values(points)
    _, near = cKDTree(outputs).query(outputs, k=_NEIGHBORS + 1)
    left = np.repeat(np.arange(len(points)), _NEIGHBORS)
    right = np.asarray(near)[:, 1:].reshape(-1)
    spacing = 2.0 * ball.radius * len(points) ** (-1.0 / net.input_size)
    inverse = np.linalg.pinv(jacobian(net, points), rcond=1e-8)
    step = np.einsum("bnm,bm->bn", inverse[left], outputs[right] - outputs[left])
    apart = np.abs(points[left] - points[right]).max(axis=1)
    # Neighbors that one Newton step would move onto each other are neighbors, not a collision.
    likely = (apart > max(least, spacing)) & (np.abs(step).max(axis=1) < 0.5 * apart)
    x, y = points[left[likely]], points[right[likely]]
    order = np.argsort(np.maximum(_lengths(x, ball), _lengths(y, ball)))[:_STARTS]
    x, y = _collide(net, x[order], y[order], ball, least)
    rng = np.random.default_rng(seed)
    for spread in np.geomspace(0.3, 1e-4, 16):
        if deadline.over or not len(x):
            break
        best = np.argsort(np.maximum(_lengths(x, ball), _lengths(y, ball)))[:16]
        seeds = np.tile(y[best], (8, 1))
        noise = rng.normal(size=seeds.shape) * spread * ball.radius
        moved = _collide(net, np.tile(x[best], (8, 1)), seeds + noise, ball, least)
        x = np.concatenate([x[best], moved[0]])
        y = np.concatenate([y[best], moved[1]])
    order = np.argsort(np.maximum(_lengths(x, ball), _lengths(y, ball)), kind="stable")
    return [(x[i], y[i]) for i in order]


@one_thread()
def collide_near(
    net: PiecewiseNetwork, x: Floats, y: Floats, ball: Ball, seed: int, *, move_second: bool
) -> list[tuple[Floats, Floats]]:
    """Pairs of the ball near ``x`` and ``y`` with nearly equal outputs, smallest reach first.

    Both are moved at random, by less and less, then the first one by Newton steps. Meant for points
    that nearly collide, but on a kink, where the slopes of one side alone lead nowhere.
    """
    rng = np.random.default_rng(seed)
    size = max(float(np.abs(x - y).max()), 1e-9 * ball.radius)
    spread = np.repeat(size * np.geomspace(0.3, 1e-5, 16), 16)[:, None]
    first = x + spread * rng.normal(size=(len(spread), len(x)))
    second = np.tile(y, (len(spread), 1))
    if move_second:
        second = second + spread * rng.normal(size=second.shape)
    first, second = _collide(net, first, second, ball, 0.1 * size)
    reach = _lengths(first, ball)
    if move_second:
        reach = np.maximum(reach, _lengths(second, ball))
    return [(first[i], second[i]) for i in np.argsort(reach, kind="stable")]


def best_pair(
    net: PiecewiseNetwork,
    candidates: Iterator[tuple[Floats, Floats]] | list[tuple[Floats, Floats]],
    ball: Ball,
    deadline: Deadline,
    only_first: bool = False,
    *,
    move_both: bool = False,
    within: float = 0.0,
) -> Pair | None:
    """The first of a few candidates that becomes an exact collision inside the ball.

    With ``only_first`` the second point may lie anywhere; ``within`` is how much outputs may differ
    by.
    """
    low, high = ball.region.lower.numpy(), ball.region.upper.numpy()
    margin = _EDGE * ball.radius
    for tried, (x, y) in enumerate(candidates):
        if tried >= _TRIES or (tried and deadline.over):
            return None
        inner = (x > low + margin) & (x < high - margin)
        for movable in (None,) if bool(inner.all()) else (inner, None):
            found = correct_pair(net, x, y, move_both=move_both, movable=movable, within=within)
            if found is None:
                continue
            pair = Pair(*found)
            if inside(Pair(pair.x, pair.x) if only_first else pair, ball):
                return pair
    return None


def inside(pair: Pair, ball: Ball) -> bool:
    """Whether both points are exactly in the ball and its domain."""
    if not pair.reach(ball.center, ball.norm) <= ball.radius:
        return False
    if ball.domain is None:
        return True
    low, high = ball.domain.lower.tolist(), ball.domain.upper.tolist()
    both = (*zip(pair.x, low, high, strict=True), *zip(pair.y, low, high, strict=True))
    return all(a <= v <= b for v, a, b in both)


def _collide(
    net: PiecewiseNetwork, x: Floats, y: Floats, ball: Ball, least: float
) -> tuple[Floats, Floats]:
    """Newton steps of ``x`` toward the output at ``y``; the pairs that end up colliding."""
    if not len(x):
        return x, y
    target = net.values(y)
    for _ in range(6):
        inverse = np.linalg.pinv(jacobian(net, x), rcond=1e-8)
        x = x + np.clip(
            np.einsum("bnm,bm->bn", inverse, target - net.values(x)), -ball.radius, ball.radius
        )
    residual = np.abs(net.values(x) - target).max(axis=1)
    good = residual <= _RESIDUAL * (1.0 + np.abs(target).max(axis=1))
    good &= np.abs(x - y).max(axis=1) > least
    good &= np.maximum(_lengths(x, ball), _lengths(y, ball)) <= ball.radius
    return x[good], y[good]


def _lengths(points: Floats, ball: Ball) -> Floats:
    return np.asarray(np.linalg.norm(points - ball.center, ball.norm, axis=1))


def _nearest_first(points: Floats, ball: Ball) -> Floats:
    return np.asarray(points[np.argsort(_lengths(points, ball), kind="stable")])
