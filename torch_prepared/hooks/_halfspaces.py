"""The linearized provable set: half-spaces around certified margins, and the projection onto it.

For property i the half-space is ``{x : J_i x >= level_i}`` with ``J_i`` a gradient of its margin.
Raw weights are projected onto all of them. Where a true bound ``v_i`` misses at the projection x,
the level rises to ``J_i x + stretch (aim - v_i)``, normals held: as x = raw + J' u with u >= 0,
this walks to a provable point that is the exact projection of the raw weights onto the shifted
half-spaces. Normals are computed anew where that stops paying and when the raw weights have come
some way; doing so at every step bounces between the sides of the bounds' kinks. Raw weights that
are too far from provable for that get a constant offset (p,) to a provable point: training then
happens in shifted coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_prepared.hooks._margins import LiveMargins
from torch_prepared.hooks._memory import RowMemory
from torch_prepared.hooks._restore import restore
from torch_prepared.solvers import project_batch

__all__ = ["HalfSpaces"]

STRETCH = 1.5  #: bounds rise less than their linearization says, so more is asked for
FAIR_SHARE = 0.1  #: of what was missing, below which normals are computed anew
TRAVEL = 0.01  #: of the raw weights' norm, after which normals are computed anew
NEEDED_SHARE = 0.1  #: of the margin aimed at, which true bounds must reach at the projection


@dataclass
class HalfSpaces:
    """One half-space ``normals[i] @ x >= level[i]`` (k, p), (k,) for each property ``owner[i]``.

    Args:
        aim: margin that linearizations are held to, in output units.
        rounds: of linearization, at most, for new raw weights.
    """

    aim: float
    rounds: int
    normals: Tensor | None = None
    level: Tensor | None = None
    owner: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    active: Tensor | None = None
    offset: Tensor | None = None
    origin: Tensor | None = None

    def settle(self, margins: LiveMargins, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Adapt to ``raw`` (p,) until its projection is provable.

        Returns:
            The projection (p,), differentiable in ``raw`` as :meth:`project` is, and the margins
            (b,) there, positive if that was reached.
        """
        point, value = self._walk(margins, raw)
        if self._holds(value) and self._is_old(raw):
            self._linearize(margins, point.detach(), value, value < torch.inf)
            self.origin = raw.detach().clone()
            point, value = self._walk(margins, raw)
        if self._holds(value) or not bool(torch.isfinite(value).all()):
            self._relax(value)
            return point, value
        start = raw.detach() if self.offset is None else raw.detach() + self.offset
        self.normals = self.level = self.active = self.offset = None
        found = restore(
            margins, RowMemory(), start, margins.value(start), aim=self.aim,
            needed=0.5 * self.aim, rounds=2 * self.rounds,
        )  # fmt: skip
        self._linearize(margins, found.theta, found.value, found.value < torch.inf)
        self.origin = raw.detach().clone()
        point, value = self._walk(margins, raw)
        if not self._holds(value) and found.reached:
            self.offset = found.theta - raw.detach()
            self._linearize(margins, found.theta, found.value, found.value < torch.inf, slack=True)
            point, value = self._look(margins, raw)
        return point, value

    def _is_old(self, raw: Tensor) -> bool:
        """Whether raw weights have come far since all normals were computed."""
        if self.normals is None or self.origin is None:
            return False
        return bool((raw.detach() - self.origin).norm() > TRAVEL * self.origin.norm())

    def _holds(self, value: Tensor) -> bool:
        return bool((value >= NEEDED_SHARE * self.aim).all())

    def _walk(self, margins: LiveMargins, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Project and raise levels until true bounds hold."""
        point, value = self._look(margins, raw)
        before = -torch.inf
        for _ in range(self.rounds if self.normals is not None else 0):
            lowest = float(value.min())
            if self._holds(value) or not bool(torch.isfinite(value).all()):
                break
            if lowest - before < FAIR_SHARE * (self.aim - lowest):
                self._linearize(margins, point.detach(), value, value < NEEDED_SHARE * self.aim)
            else:
                self._raise(point.detach(), value)
            before = lowest
            point, value = self._look(margins, raw)
        return point, value

    def _look(self, margins: LiveMargins, raw: Tensor) -> tuple[Tensor, Tensor]:
        point = self.project(raw)
        return point, margins.value(point.detach())

    def _raise(self, point: Tensor, value: Tensor) -> None:
        """Move half-spaces to where margins below the aim should reach it."""
        if self.normals is None or self.level is None:
            return
        mine = value[self.owner.to(value.device)].double()
        here = (self.normals @ point).double()
        raised = torch.maximum(self.level, here + STRETCH * (self.aim - mine))
        self.level = torch.where(mine < self.aim, raised, self.level)

    def _relax(self, value: Tensor) -> None:
        """Let half-spaces come back whose margins are more than twice what is aimed at."""
        if self.level is not None:
            mine = value[self.owner.to(value.device)].double()
            self.level = self.level - 0.5 * (mine - 2 * self.aim).clamp_min(0.0)

    def to(self, like: Tensor) -> HalfSpaces:
        """The same half-spaces in another dtype and on another device."""
        if self.normals is not None and self.level is not None:
            self.normals = self.normals.to(like)
            self.level = self.level.to(like.device)
            self.offset = None if self.offset is None else self.offset.to(like)
            self.origin = None if self.origin is None else self.origin.to(like)
            self.active = None if self.active is None else self.active.to(like.device)
        return self

    def project(self, raw: Tensor) -> Tensor:
        """The projection of ``raw`` (p,), differentiable; itself where the set is empty."""
        start = raw if self.offset is None else raw + self.offset
        if self.normals is None or self.level is None:
            return start
        found = project_batch(start, -self.normals, -self.level, start=self.active)
        self.active = found.report.active
        return found.x

    def _linearize(
        self,
        margins: LiveMargins,
        point: Tensor,
        value: Tensor,
        which: Tensor,
        slack: bool = False,
    ) -> None:
        """Build the half-spaces of properties ``which`` (b,) anew at ``point``.

        With ``slack`` they hold the point even where its margins are below the aim.
        """
        owner = which.nonzero().flatten().cpu()
        rows = margins.gradients(point, owner)
        lack = (self.aim - value[which]).double()
        level = (lack.clamp_max(0.0) if slack else lack) + (rows @ point).double()
        if self.normals is not None and self.level is not None:
            kept = ~torch.isin(self.owner, owner)
            rows = torch.cat([self.normals[kept], rows])
            level = torch.cat([self.level[kept], level])
            owner = torch.cat([self.owner[kept], owner])
        self.normals, self.level, self.owner, self.active = rows, level, owner, None
