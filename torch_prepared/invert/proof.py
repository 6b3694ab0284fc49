"""Proving a shell around a point free of preimages, with a certificate that the checker replays.

That no x of a box has ``f(x) = c`` is an ordinary property, "some output is above or below c", so
branch and bound over the input proves it and ``certify.check_certificate`` replays the proof. A
ball minus a box around its center is a union of 2n such boxes; inside that box the network is
affine and injective by exact rational arithmetic (see ``_exact.linear_cell``). For few inputs this
is both faster and stronger than a mixed-integer program.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from torch_prepared.core.deadline import Deadline
from torch_prepared.edit._certify import LOW_DIMENSION, Certified
from torch_prepared.edit.verify import prove_or_refute
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.invert._ball import Ball
from torch_prepared.invert._exact import Rationals
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.specs import Box, Property, SafeSet

__all__ = ["can_split", "certify_shell", "shell_properties"]


def can_split(net: PiecewiseNetwork) -> bool:
    """Whether the input has few enough coordinates for branch and bound over it."""
    return net.input_size <= LOW_DIMENSION


def shell_properties(target: Rationals, ball: Ball, core: float) -> list[Property]:
    """That the output is not ``target`` on boxes that cover a ball minus a box at its center.

    Args:
        target: (m,) exact output to be avoided.
        ball: its bounding box, clipped to the domain, is covered, which for the 1- and 2-norm is
            more than the ball.
        core: the open box ``max |x - center| < core`` is left out; 0 leaves nothing out.
    """
    safe = _differs_from(target)
    low, high = ball.region.lower.numpy().copy(), ball.region.upper.numpy().copy()
    if core == 0.0:
        return [Property(Box(low, high), safe, name="ball")]
    found = []
    for j, middle in enumerate(ball.center):
        inner = _inner_ends(float(middle), core)
        for sign, name in ((-1, "below"), (1, "above")):
            lower, upper = low.copy(), high.copy()
            if sign < 0:
                upper[j] = inner[0]
            else:
                lower[j] = inner[1]
            if lower[j] <= upper[j]:
                found.append(Property(Box(lower, upper), safe, name=f"{name} {j}"))
        low[j], high[j] = max(low[j], inner[0]), min(high[j], inner[1])
    return found


def certify_shell(
    net: PiecewiseNetwork, target: Rationals, ball: Ball, core: float, deadline: Deadline
) -> Certified | None:
    """A certificate that no x of the ball outside its core has output ``target``, or None.

    Returns:
        What the checker certified, in exact arithmetic on the stored weights; None when it did not.
    """
    properties = shell_properties(target, ball, core)
    if not properties:
        return None
    try:
        found, _ = prove_or_refute(net.stored, properties, deadline)
    except UnsupportedOperationError:
        return None
    return found if found.holds else None


def _differs_from(target: Rationals) -> SafeSet:
    """Some output is above or below an interval that holds its target."""
    above = [_float_from(v, 1) for v in target]
    below = [_float_from(v, -1) for v in target]
    eye = torch.eye(len(target), dtype=torch.float64)
    offset = torch.tensor([*(-v for v in above), *below], dtype=torch.float64)
    return SafeSet(((torch.cat([eye, -eye]), offset),))


def _float_from(value: Fraction, sign: int) -> float:
    """The nearest float on one side of a rational number."""
    near = float(value)
    wrong = Fraction(near) < value if sign > 0 else Fraction(near) > value
    return math.nextafter(near, sign * math.inf) if wrong else near


def _inner_ends(middle: float, core: float) -> tuple[float, float]:
    """Floats strictly within ``core`` of ``middle`` on either side, so that nothing is skipped."""
    exact = Fraction(middle)
    low, high = middle - core, middle + core
    while exact - Fraction(low) >= Fraction(core):
        low = math.nextafter(low, math.inf)
    while Fraction(high) - exact >= Fraction(core):
        high = math.nextafter(high, -math.inf)
    return low, high
