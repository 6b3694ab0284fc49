"""The cheap way to a nearby provable point: linearize certified margins, project, look again.

At theta with margins v and rows J, which say how margins move with the weights, the step is

    min |s|   subject to   J s >= aim - v,

whose dual has as many unknowns as there are properties. It counts when the lowest *true* bound
rises by a fair share of what was promised. Rows of earlier points serve as long as they do; then
those of the lowest margins are computed anew, one backward pass each; so they are before a long
step, as an old row that still works may point along a detour. Where even fresh rows promise
too much a smaller share is asked for. All in the working precision: this is a part of training,
not a proof.

Source: rows kept from earlier points as in bundle methods, see ``edit.sequential``; here one per
property, the newest.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.hooks._margins import LiveMargins
from torch_prepared.hooks._memory import RowMemory

__all__ = ["Restored", "restore"]

SHARES = (1.0, 0.4, 0.15, 0.05)
STRETCH = 1.5  #: bounds rise less than their linearization says, so more is asked for
FAIR_SHARE = 0.1
LONG_STEP = 0.03  #: of the weights' norm; longer ones are taken along fresh rows only
STALE_SHARE = 0.5  #: of what was promised, at which rows of earlier points go on serving


@dataclass(frozen=True)
class Restored:
    """Where the walk ended.

    Args:
        theta: (p,) the point.
        value: (b,) margins there.
        reached: whether every margin is at least what was needed.
        rounds: steps tried.
        gradients: rows computed.
    """

    theta: Tensor
    value: Tensor
    reached: bool
    rounds: int = 0
    gradients: int = 0

    @property
    def lowest(self) -> float:
        """The smallest margin; NaN if any is."""
        return float(self.value.min())


def restore(
    margins: LiveMargins,
    memory: RowMemory,
    theta: Tensor,
    value: Tensor,
    *,
    aim: float,
    needed: float,
    rounds: int,
) -> Restored:
    """Walk from ``theta`` until every margin is at least ``needed``.

    Args:
        margins: what must hold.
        memory: rows of earlier points; those computed here replace theirs.
        theta: (p,) start; never changed.
        value: (b,) margins there.
        aim: what steps aim at, above ``needed``.
        needed: what counts.
        rounds: steps at most.
    """
    if bool((value >= needed).all()):
        return Restored(theta, value, True)
    memory.grow_old()
    size = memory.length(theta)
    walk = Restored(theta, value, False)
    trusted, share, gradients = True, 0, 0
    fresh = torch.zeros(len(value), dtype=torch.bool)
    while walk.rounds < rounds and bool(torch.isfinite(walk.value).all()):
        low = (walk.value < needed).nonzero().flatten().cpu()
        which = memory.missing((walk.value < aim).nonzero().flatten())
        if not trusted:
            which = torch.cat([which, low[~fresh[low]]]).unique()
        if not memory.refresh(margins, walk.theta, which):
            break
        fresh[which], gradients = True, gradients + len(which)
        stale = trusted and not bool(fresh[low].all())
        asked = SHARES[share] * (aim - walk.value)
        step = memory.step(asked if share else STRETCH * asked)
        if stale and (step is None or step[1] > LONG_STEP * size):
            trusted = False
            continue
        trial = _at(margins, walk, None if step is None else step[0], gradients)
        if bool((trial.value >= needed).all()):
            return dataclasses.replace(trial, reached=True)
        promised = SHARES[share] * (aim - walk.lowest)
        rise = float(trial.value.clamp_max(aim).min()) - walk.lowest
        if rise > FAIR_SHARE * promised:
            walk, share, trusted = trial, 0, rise > STALE_SHARE * promised
            fresh[:] = False
            continue
        walk = dataclasses.replace(walk, rounds=trial.rounds, gradients=gradients)
        trusted, share = False, share if stale else share + 1
        if share == len(SHARES):
            break
    return walk


def _at(margins: LiveMargins, walk: Restored, delta: Tensor | None, gradients: int) -> Restored:
    """The point a step (p,) away; the same one when there is no step."""
    theta = walk.theta if delta is None else walk.theta + delta
    value = walk.value if delta is None else margins.value(theta)
    return Restored(theta, value, False, walk.rounds + 1, gradients)
