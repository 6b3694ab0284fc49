"""Edits at finitely many inputs: attack, satisfy what was found, come closer, attack again."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._leaves import PropertyRows, low_points
from torch_prepared.edit._walk import Walk
from torch_prepared.specs import Property

__all__ = ["PointSet"]

logger = logging.getLogger(__name__)

MOST_ROWS = 200
ROUNDS = 200
STEPS = 30
FAIR_SHARE = 0.2
STALLS = 5  #: rounds of attack in a row that may fail to raise the lowest margin
LOW = 0.3  #: margins below this share of the aim are collected
KEPT = 0.9  #: share of the aim that coming closer must leave


class PointSet:
    """Inputs whose margins must reach an aim, by property.

    Args:
        walk: moved by :meth:`seek` and :meth:`satisfy`.
        properties: one per entry of ``rows``.
        rows: margins as functions of the weights.
        aim: margin that points must reach; may be raised later.
        generator: for attacks.
    """

    def __init__(
        self,
        walk: Walk,
        properties: Sequence[Property],
        rows: Sequence[PropertyRows],
        aim: float,
        generator: torch.Generator,
    ) -> None:
        self._walk, self._properties, self._rows = walk, tuple(properties), tuple(rows)
        self.aim, self._generator = aim, generator
        self._points = [
            torch.zeros(0, p.region.size, dtype=torch.float64) for p in self._properties
        ]

    def add(self, position: int, points: Tensor) -> None:
        """Collect inputs (q, n) of one property."""
        self._points[position] = torch.cat([self._points[position], points])

    def seek(self, deadline: Deadline, rounds: int = ROUNDS) -> None:
        """Attack and edit until nothing of low margin is found, or edits no longer help."""
        stalls = 0
        for step in range(rounds):
            found = 0
            for i, (prop, rows) in enumerate(zip(self._properties, self._rows, strict=True)):
                low = low_points(
                    rows, self._walk.theta, prop.region, LOW * self.aim, self._generator
                )
                self.add(i, low)
                found += len(low)
            if not found or deadline.over:
                return
            before = self.lowest(self._walk.theta)
            self.satisfy(deadline)
            stalls = stalls + 1 if self.lowest(self._walk.theta) <= before else 0
            if stalls == STALLS:
                return
            logger.info("points %d: %d new, distance %g", step, found, self._walk.distance())

    def satisfy(self, deadline: Deadline) -> None:
        """Raise the margins of all collected points to the aim, then come a little closer.

        First by the projection of the origin onto the linearized rows, which forgets earlier
        steps; where linearization goes too far, by steps from where we are, shortened until the
        lowest true margin rises by a fair share of what they promise.
        """
        for _ in range(STEPS):
            lowest = self.lowest(self._walk.theta)
            if lowest >= 0.95 * self.aim or deadline.over:
                break
            if not self._rise(lowest):
                return
        if not deadline.over:
            self._approach()

    def lowest(self, theta: Tensor) -> float:
        """The smallest margin of all collected points."""
        margins = [
            rows.at_points(theta, points).min()
            for rows, points in zip(self._rows, self._points, strict=True)
            if len(points)
        ]
        return float(torch.stack(margins).min()) if margins else torch.inf

    def rows(self, near: float = torch.inf) -> tuple[Tensor, Tensor]:
        """Gradients (m, p) and margins (m,) of the points of lowest margin below ``near``."""
        theta = self._walk.theta
        found, values = [theta.new_zeros(0, len(theta))], [theta.new_zeros(0)]
        share = max(20, MOST_ROWS // len(self._rows))
        for rows, points in zip(self._rows, self._points, strict=True):
            if not len(points):
                continue
            margins = rows.at_points(theta, points)
            chosen = margins.argsort()[: min(share, rows.most_rows)]
            chosen = chosen[margins[chosen] < near]
            if len(chosen):
                jacobian, value = rows.point_rows(theta, points[chosen])
                found.append(jacobian)
                values.append(value)
        return torch.cat(found), torch.cat(values)

    def _rise(self, lowest: float) -> bool:
        """One step upward; False when no step does."""
        walk = self._walk
        jacobian, value = self.rows()
        wanted = 1.02 * self.aim - value
        shares = ((True, 1.0), (False, 1.0), (False, 0.3), (False, 0.1), (False, 0.03))
        for forget, share in shares:
            rise = wanted.clamp_max(share * float(wanted.max()))
            step = walk.nearest(jacobian, rise) if forget else walk.shortest(jacobian, rise)
            if step is None:
                continue
            promised = min(float(rise.max()), self.aim - lowest)
            if self.lowest(walk.theta + step) > lowest + FAIR_SHARE * promised:
                walk.theta = walk.theta + step
                return True
        return False

    def _approach(self) -> None:
        """One step toward the origin along which the margins stay, if there is one.

        Where curvature takes margins away, a second step from the end of the first repairs them.
        """
        walk = self._walk
        start, distance = walk.theta, walk.distance()
        jacobian, value = self.rows()
        if not len(value):
            return
        step = walk.nearest(jacobian, 1.02 * self.aim - value)
        if step is None:
            return
        for share in (1.0, 0.5, 0.25, 0.1):
            walk.theta = start + share * step
            if self.lowest(walk.theta) < KEPT * self.aim:
                again, value = self.rows(near=2 * self.aim)
                repair = walk.shortest(again, 1.02 * self.aim - value)
                if repair is not None:
                    walk.theta = walk.theta + repair
            if walk.distance() < 0.97 * distance and self.lowest(walk.theta) >= KEPT * self.aim:
                return
        walk.theta = start
