"""Convex hulls of finitely many points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared.certify import InputRecord
from torch_prepared.errors import SpecError
from torch_prepared.specs._base import InputSet, RealVector, as_vector

__all__ = ["VPolytope"]


@dataclass(frozen=True, eq=False, init=False)
class VPolytope(InputSet):
    r"""The convex hull of ``vertices``: all :math:`\sum_i \lambda_i v_i`, λ in the simplex.

    Args:
        vertices: (v, n) or (v, ...) with n scalars per vertex, v >= 1, finite. Points that are no
            extreme points of the hull are allowed.

    Raises:
        SpecError: no vertices, fewer than two axes, or NaN or infinite entries.

    Soundness:
        ``support`` is exact up to outward rounding. A hull thinner than the space (a segment, say)
        holds hardly any float64 point besides its vertices, so ``contains`` accepts a point inside
        the bounding box when some convex combination is within ``(256 + 4 v) 2**-52`` of the
        coordinate's largest magnitude; ``support`` covers those points too. A point for which no
        combination is found counts as outside. ``record`` describes the hull itself.
    """

    vertices: Tensor

    def __init__(self, vertices: RealVector) -> None:
        """Check and store the vertices and their bounding box."""
        shape = torch.as_tensor(vertices).shape
        if len(shape) < 2:
            raise SpecError(f"VPolytope: got vertices of shape {tuple(shape)}; expected (v, n)")
        points = as_vector(vertices, "VPolytope vertices").reshape(shape[0], -1)
        object.__setattr__(self, "vertices", points)
        object.__setattr__(self, "lower", points.amin(dim=0))
        object.__setattr__(self, "upper", points.amax(dim=0))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Convex combinations with weights uniform on the simplex; see ``InputSet.sample``."""
        uniform = torch.rand(count, len(self.vertices), generator=generator, dtype=torch.float64)
        weights = -torch.log1p(-uniform) + 2.0**-60
        points = (weights / weights.sum(dim=1, keepdim=True)) @ self.vertices
        return torch.clamp(points, self.lower, self.upper)

    def corner(self, rows: Tensor) -> Tensor:
        """The best vertex of every row, an exact maximizer up to ties within rounding."""
        vertices = self.vertices.to(rows.device)
        return vertices[(rows.to(torch.float64) @ vertices.T).argmax(dim=-1)]

    def record(self) -> InputRecord:
        """Kind ``"v_polytope"``."""
        return InputRecord(
            "v_polytope",
            self.lower.numpy().copy(),
            self.upper.numpy().copy(),
            vertices=self.vertices.numpy().copy(),
        )

    @property
    def _tolerance(self) -> float:
        """Rounding of a convex combination, relative to the coordinate's largest magnitude."""
        return (256 + 4 * len(self.vertices)) * 2.0**-52

    def _contains(self, points: Tensor) -> Tensor:
        inside = ((points >= self.lower) & (points <= self.upper)).all(dim=1)
        vertices = self.vertices.numpy()
        magnitude = np.abs(vertices).max(axis=0)
        magnitude[magnitude == 0] = 1.0
        for index in inside.nonzero()[:, 0].tolist():
            offsets = (vertices - points[index].numpy()) / magnitude
            weights = _nearest_combination(offsets)
            inside[index] = bool((np.abs(weights @ offsets) <= self._tolerance).all())
        return inside

    def _support(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        vertices = self.vertices.to(rows.device)
        scale = rows.detach().abs() @ vertices.abs().amax(dim=0)
        value = (rows @ vertices.T).amax(dim=-1)
        return value + 2 * self._tolerance * scale, 2 * scale


def _nearest_combination(points: np.ndarray) -> np.ndarray:
    """Weights (v,) on the simplex whose combination of ``points`` (v, n) is nearest to zero.

    The active-set method of Wolfe (Finding the nearest point in a polytope, 1976). Its stopping
    test bounds the distance itself, not its square, so it resolves offsets down to rounding.
    Stops with a worse combination when rounding ends its progress.
    """
    lengths = np.linalg.norm(points, axis=1)
    weights = np.zeros(len(points))
    weights[np.argmin(lengths)] = 1.0
    for _ in range(10 * len(points) + 10):
        active = np.flatnonzero(weights)
        nearest = weights @ points
        if len(active) > 1:  # take the rounding along the affine hull out of the direction
            spread = (points[active[1:]] - points[active[0]]).T
            nearest = nearest - spread @ np.linalg.lstsq(spread, nearest, rcond=None)[0]
        distance = np.linalg.norm(nearest)
        if distance == 0:
            break
        scores = points @ (nearest / distance)
        scores[active] = np.inf
        entering = int(np.argmin(scores))
        if scores[entering] >= distance - 2.0**-52 * lengths.max():
            break
        improved = _exchange(points, weights, entering)
        if np.array_equal(improved, weights):
            break
        weights = improved
    return weights


def _exchange(points: np.ndarray, weights: np.ndarray, entering: int) -> np.ndarray:
    """Let a point enter; points leave until the nearest point of the affine hull is inside."""
    active = [*np.flatnonzero(weights).tolist(), entering]
    current = weights[active]
    while len(active) > 1:
        base = points[active[0]]
        shares = np.linalg.lstsq((points[active[1:]] - base).T, -base, rcond=None)[0]
        target = np.concatenate([[1.0 - shares.sum()], shares])
        if (target > 0).all():
            current = target
            break
        falling = target <= 0
        steps = current[falling] / np.maximum(current[falling] - target[falling], 2.0**-1000)
        current = np.maximum(current + steps.min() * (target - current), 0.0)
        leaving = int(np.flatnonzero(falling)[np.argmin(steps)])
        active.pop(leaving)
        current = np.delete(current, leaving)
    result = np.zeros_like(weights)
    result[active] = current / current.sum()
    return result
