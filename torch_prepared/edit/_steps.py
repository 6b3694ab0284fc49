"""Half-spaces over weight changes, steps into them, and what a distance must answer of both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.core.rows import Floats

__all__ = ["Distance", "Rows", "Step", "bordered"]


@dataclass(frozen=True)
class Rows:
    """Half-spaces' normals (m, p) with what all metrics of one sketch need to know of them.

    Args:
        jacobian: (m, p).
        products: ``jacobian jacobian'`` (m, m), float64.
        image: (m, k), see :meth:`Metric.image`.
    """

    jacobian: Tensor
    products: Tensor
    image: Tensor

    def take(self, kept: Tensor) -> Rows:
        """The rows at positions ``kept``."""
        return Rows(self.jacobian[kept], self.products[kept][:, kept], self.image[kept])

    def effect(self, vector: Tensor) -> Tensor:
        """Inner products (m,) with a vector (p,), float64."""
        return (self.jacobian @ vector.to(self.jacobian)).double()

    def combine(self, weights: Tensor) -> Tensor:
        """The sum (p,), float64, of the rows by ``weights`` (m,)."""
        return (weights.to(self.jacobian) @ self.jacobian).double()


@dataclass(frozen=True)
class Step:
    """A step (p,), float64, and the multipliers (m,) of its rows.

    Args:
        delta: the step.
        multipliers: of the rows.
        damping: of the metric in which to look for the next one; 0 where there is no choice.
    """

    delta: Tensor
    multipliers: Floats
    damping: float = 0.0


class Distance(ABC):
    """How far a weight change goes, and the shortest one with given linear effects."""

    @abstractmethod
    def size(self, delta: Tensor) -> float:
        """The distance of a change (p,); the square of a quadratic one."""

    @abstractmethod
    def extend(self, rows: Rows | None, jacobian: Tensor) -> Rows:
        """``rows`` and then those of ``jacobian`` (k, p)."""

    @abstractmethod
    def step(self, rows: Rows, lift: Tensor) -> Step | None:
        """The smallest step with ``jacobian @ step >= lift`` (m,); None when none was found."""

    def nearest(self, rows: Rows, delta: Tensor, lift: Tensor) -> Step | None:
        """The step from ``delta`` (p,) to the smallest change with ``jacobian @ step >= lift``."""
        found = self.step(rows, lift + rows.effect(delta))
        return None if found is None else Step(found.delta - delta, found.multipliers)

    def shortest(self, rows: Rows, delta: Tensor, lift: Tensor) -> Step | None:
        """A short step from ``delta`` (p,) with ``jacobian @ step >= lift``, if one is found."""
        return self.step(rows, lift)

    def around(self, delta: Tensor) -> Distance:
        """The same distance, steps measured as suits a change (p,) that has gone far."""
        return self

    def after(self, step: Step) -> Distance:
        """The same distance, the next step looked for where ``step`` was found."""
        return self


def bordered(old: Tensor, cross: Tensor, fresh: Tensor) -> Tensor:
    """The symmetric matrix of blocks ``old`` (m, m), ``cross`` (m, k) and ``fresh`` (k, k)."""
    return torch.cat([torch.cat([old, cross], 1), torch.cat([cross.T, fresh], 1)])
