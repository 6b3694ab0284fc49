"""How far rounding may move the bounds of fully connected networks: tolerances that are derived."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_prepared.core.interval import Interval

STEPS = 8  #: roundings of a line, of its use, and of interval arithmetic's centers and radii


def rounding_slack(
    weights: Sequence[Tensor], biases: Sequence[Tensor], rows: Tensor, box: Interval
) -> Tensor:
    """What a bound (b, s) of ``rows`` may miss by: to first order in the unit u of the dtype.

    A sum of n terms errs by (n + STEPS) u times the sum of their magnitudes. With S the sum of
    these counts over all layers, a pass back to the inputs errs by S u M, where M is what all
    terms sum to in magnitude, and by what the lines of each layer before were off because their
    own intervals were: E_k <= S + E_1 + .. + E_(k-1), hence E_L <= 2 ** (L - 1) S. The points that
    a bound is compared with err by another S u M. Lines have slopes in [-1, 1].
    """
    unit = torch.finfo(weights[0].dtype).eps / 2
    value, count = torch.maximum(box.lower.abs(), box.upper.abs()).double(), 0
    for weight, bias in zip(weights, biases, strict=True):
        value = value @ weight.abs().double().T + bias.abs().double()
        count += weight.shape[1] + STEPS
    value = value @ rows.abs().double().T
    return (2.0 ** (len(weights) - 1) + 1.0) * (count + rows.shape[1] + STEPS) * unit * value
