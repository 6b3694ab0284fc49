"""Plain-torch oracle of the chain operator: every neuron, every column, batched over the boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.ops._lines import leans_up

__all__ = [
    "chain_bounds_reference",
    "chain_slopes_reference",
    "fake_chain_bounds",
    "fake_chain_slopes",
    "refuse_gradient",
    "setup_nothing",
]


class _Search(NamedTuple):
    """Steps of Adam: how many, size of the first, factors after each, when hope is given up."""

    iterations: int
    rate: float
    decay: float
    momentum: float
    square_momentum: float
    patience: int


class _Side(NamedTuple):
    """Values that one map reads: their box (b, n) and, after a ReLU, its lines (b, n)."""

    lower: Tensor
    upper: Tensor
    lower_slope: Tensor | None = None
    upper_slope: Tensor | None = None
    upper_offset: Tensor | None = None
    before: tuple[Tensor, Tensor] | None = None


def chain_bounds_reference(
    lower: Tensor,
    upper: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor,
    known_lower: Tensor | None,
    known_upper: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes (b, n), maps and rows (s, m) or (b, s, m) to values, input rows and hidden bounds."""
    proper = (lower <= upper).all(1)
    proper &= all(bool(torch.isfinite(part).all()) for part in (*weights, *biases))
    sides, first = [_Side(lower, upper)], 0
    hidden: list[tuple[Tensor, Tensor]] = [(lower[:, :0], upper[:, :0])]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        ends = _propagate(sides[-1], weight, bias)
        last = first + len(bias)
        if known_lower is not None and known_upper is not None:
            ends = _intersect(*ends, known_lower[:, first:last], known_upper[:, first:last])
        if len(sides) > 1:
            ends = _tighten(ends, sides, weights, biases)
        proper &= (ends[0] <= ends[1]).all(1)
        hidden.append(ends)
        sides.append(_relax(*ends))
        first = last
    start = rows.expand(len(lower), *rows.shape[-2:])
    values, inputs = _pull(start @ weights[-1], start @ biases[-1], sides, weights, biases, True)
    below, above = (torch.cat(parts, dim=1) for parts in zip(*hidden, strict=True))
    spoiled = [
        torch.where(proper.reshape(-1, *[1] * (part.dim() - 1)), part, torch.nan)
        for part in (values, inputs, below, above)
    ]
    return spoiled[0], spoiled[1], spoiled[2], spoiled[3]


def fake_chain_bounds(
    lower: Tensor,
    upper: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor,
    *known: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the right shapes without values."""
    count, size, spec = lower.shape[0], lower.shape[1], rows.shape[-2]
    hidden = sum(bias.shape[0] for bias in biases[:-1])
    return (
        lower.new_empty(count, spec),
        lower.new_empty(count, spec, size),
        lower.new_empty(count, hidden),
        lower.new_empty(count, hidden),
    )


def chain_slopes_reference(
    lower: Tensor,
    upper: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor,
    row: Tensor,
    enough: Tensor,
    slopes: Tensor,
    iterations: int,
    rate: float,
    decay: float,
    momentum: float,
    square_momentum: float,
    levels: int,
    patience: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Better slopes (b, h) for one row of each box; values and input rows of all rows at these."""
    work, found = slopes.clone(), []
    search = _Search(iterations, rate, decay, momentum, square_momentum, patience)
    for i in range(len(lower) if iterations and slopes.numel() else 0):
        box = lower[i : i + 1], upper[i : i + 1]
        start = rows[row[i]].reshape(1, 1, -1)
        found.append(_climb(*box, weights, biases, start, enough[i], work[i : i + 1], search))
    work = torch.cat(found) if found else work
    work = torch.where(work < 0, work, (work * levels).round() / levels)
    start = rows.expand(len(lower), *rows.shape)
    values, inputs, _ = _pull_shared(lower, upper, weights, biases, start, work, True)
    return work, values, inputs


def _climb(
    lower: Tensor,
    upper: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    row: Tensor,
    enough: Tensor,
    slopes: Tensor,
    search: _Search,
) -> Tensor:
    """The best slopes (1, h) that some steps of Adam meet."""
    rate, one, two = search.rate, search.momentum, search.square_momentum
    first, second = torch.zeros_like(slopes), torch.zeros_like(slopes)
    best, start, found = torch.tensor(-torch.inf), torch.tensor(-torch.inf), slopes
    for step in range(1, search.iterations + 2):
        slopes = _pull_shared(lower, upper, weights, biases, row, slopes, False)[2]
        with torch.enable_grad():
            leaf = slopes.detach().clone().requires_grad_()
            value = _pull_shared(lower, upper, weights, biases, row, leaf, False)[0][0, 0]
            gradient = torch.autograd.grad(value, leaf)[0].nan_to_num()
        value = value.detach()
        if step == 1:
            found, start = slopes, value
        if value > best:
            best, found = value, slopes
        late = step > search.patience and not best - start > enough - best
        if bool(value.isnan()) or best > enough or step > search.iterations or late:
            break
        first = one * first + (1 - one) * gradient
        second = two * second + (1 - two) * gradient.square()
        scale = (second / (1 - two**step)).sqrt() + 1e-12
        moved = (slopes + rate * first / (1 - one**step) / scale).clamp(0, 1)
        slopes, rate = torch.where(slopes < 0, slopes, moved), rate * search.decay
    return found


def _pull_shared(
    lower: Tensor,
    upper: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor,
    slopes: Tensor,
    cuts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (b, s), input rows (b, s, n), and slopes with the usual ones written out."""
    proper = (lower <= upper).all(1)
    proper &= all(bool(torch.isfinite(part).all()) for part in (*weights, *biases))
    sides, used = [_Side(lower, upper)], []
    sizes = [len(bias) for bias in biases[:-1]]
    for own, weight, bias in zip(slopes.split(sizes, 1), weights[:-1], biases[:-1], strict=True):
        ends = _propagate(sides[-1], weight, bias)
        if len(sides) > 1:
            new = _tighten(ends, sides, weights, biases)
            # A gradient flows to the new ends also where the old ones are better.
            free = _tighten((ends[0] - torch.inf, ends[1] + torch.inf), sides, weights, biases)
            ends = (
                new[0].detach() + torch.where(new[0] < 0, free[0] - free[0].detach(), 0),
                new[1].detach() + torch.where(new[1] > 0, free[1] - free[1].detach(), 0),
            )
        proper &= (ends[0] <= ends[1]).all(1)
        side = _relax(*ends)
        unstable = (ends[0] < 0) & (ends[1] > 0)
        usual = torch.zeros_like(ends[0]) if side.lower_slope is None else side.lower_slope
        own = torch.where(unstable & (own < 0), usual.detach(), own)
        used.append(own)
        sides.append(side._replace(lower_slope=torch.where(unstable, own, usual)))
    values, inputs = _pull(rows @ weights[-1], rows @ biases[-1], sides, weights, biases, cuts)
    spoil = ~proper[:, None]
    return (
        values.masked_fill(spoil, torch.nan),
        inputs.masked_fill(spoil[..., None], torch.nan),
        torch.cat([lower[:, :0], *used], dim=1),
    )


def fake_chain_slopes(
    lower: Tensor,
    upper: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rows: Tensor,
    row: Tensor,
    enough: Tensor,
    slopes: Tensor,
    *search: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the right shapes without values."""
    count, size, spec = lower.shape[0], lower.shape[1], rows.shape[0]
    return (
        torch.empty_like(slopes),
        lower.new_empty(count, spec),
        lower.new_empty(count, spec, size),
    )


# The autograd context is an untyped object of torch.library, hence Any.
def setup_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing is kept for a backward pass."""


def refuse_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    """There is no backward pass."""
    raise UnsupportedOperationError(
        "chain_bounds: got a request for its gradient; expected none, as it has none; use "
        "bounds.certified_margin for bounds that are differentiable in the weights"
    )


def _propagate(side: _Side, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Interval arithmetic: the box (b, n) through one map (m, n)."""
    center = (side.lower + side.upper) / 2 @ weight.T + bias
    radius = (side.upper - side.lower) / 2 @ weight.abs().T
    return center - radius, center + radius


def _intersect(
    lower: Tensor, upper: Tensor, other_lower: Tensor, other_upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Common part; ends that rounding has crossed are both kept, NaN stays NaN."""
    low, high = torch.maximum(lower, other_lower), torch.minimum(upper, other_upper)
    crossed = low > high
    return torch.where(crossed, high, low), torch.where(crossed, low, high)


def _tighten(
    ends: tuple[Tensor, Tensor],
    sides: Sequence[_Side],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Intersect the unstable scalars with backward bounds."""
    weight, bias = weights[len(sides) - 1], biases[len(sides) - 1]
    start = torch.cat([weight, -weight]).expand(len(ends[0]), -1, -1)
    const = torch.cat([bias, -bias]).expand(len(ends[0]), -1)
    lower, negated = _pull(start, const, sides, weights, biases, False)[0].chunk(2, dim=1)
    tight = _intersect(*ends, lower, -negated)
    stable = (ends[0] >= 0) | (ends[1] <= 0)
    return torch.where(stable, ends[0], tight[0]), torch.where(stable, ends[1], tight[1])


def _relax(lower: Tensor, upper: Tensor) -> _Side:
    """The box and the lines of ``max(x, 0)`` on [lower, upper]."""
    one, zero = torch.ones_like(lower), torch.zeros_like(lower)
    unstable = (lower < 0) & (upper > 0)
    chord = torch.where(unstable, upper / torch.where(unstable, upper - lower, one), zero)
    active = lower >= 0
    return _Side(
        lower.clamp_min(0),
        upper.clamp_min(0),
        torch.where(active | (unstable & leans_up(lower, upper)), one, zero),
        torch.where(active, one, chord),
        torch.where(unstable, -lower * chord, zero),
        (lower, upper),
    )


def _pull(
    rows: Tensor,
    const: Tensor,
    sides: Sequence[_Side],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    cuts: bool,
) -> tuple[Tensor, Tensor]:
    """Rows (b, s, n) on the last side to lower bounds (b, s) and rows on the network's inputs."""
    best = torch.full_like(const, -torch.inf)
    for k in range(len(sides) - 1, 0, -1):
        side = sides[k]
        if cuts:
            best = torch.maximum(best, const + _minimum(rows, side.lower, side.upper))
        plus, minus = rows.clamp_min(0), rows.clamp_max(0)
        rows = _times(plus, side.lower_slope) + _times(minus, side.upper_slope)
        const = const + _times(minus, side.upper_offset).sum(-1)
        if cuts and side.before is not None:
            best = torch.maximum(best, const + _minimum(rows, *side.before))
        const = const + rows @ biases[k - 1]
        rows = rows @ weights[k - 1]
    return torch.maximum(best, const + _minimum(rows, sides[0].lower, sides[0].upper)), rows


def _times(rows: Tensor, columns: Tensor | None) -> Tensor:
    """Rows (b, s, n) with each column scaled (b, n); the identity for None."""
    return rows if columns is None else rows * columns.unsqueeze(1)


def _minimum(rows: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Minima (b, s) of rows (b, s, n) over boxes (b, n)."""
    return (_times(rows.clamp_min(0), lower) + _times(rows.clamp_max(0), upper)).sum(-1)
