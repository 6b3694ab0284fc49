"""Whole backward passes in one operator: fully connected chains, and programs for any network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from torch_prepared.ops._program import RowProgram, RowShares

__all__ = [
    "SLOPE_LEVELS",
    "SLOPE_PATIENCE",
    "chain_bounds",
    "chain_slopes",
    "row_program",
    "row_shares",
]

SLOPE_LEVELS = 254  #: slopes of boxes are multiples of its inverse
SLOPE_PATIENCE = 3  #: steps after which a search must have come more than half of its way


def chain_bounds(
    lower: Float[Tensor, "b n"],
    upper: Float[Tensor, "b n"],
    weights: Sequence[Float[Tensor, "m k"]],
    biases: Sequence[Float[Tensor, " m"]],
    rows: Float[Tensor, "... s m"],
    known_lower: Float[Tensor, "b h"] | None = None,
    known_upper: Float[Tensor, "b h"] | None = None,
) -> tuple[
    Float[Tensor, "b s"], Float[Tensor, "b s n"], Float[Tensor, "b h"], Float[Tensor, "b h"]
]:
    """Lower bounds of output rows of a fully connected ReLU network, for many small boxes.

    The network is ``x -> W_L relu(... relu(W_1 x + b_1) ...) + b_L``. Each layer's intervals come
    from interval arithmetic, then from a backward pass for every scalar still unstable; the rows
    are pulled back through all layers and evaluated over every box on the way, the best counts.

    Args:
        lower: (b, n), float32 or float64.
        upper: like ``lower``, not smaller.
        weights: W_1 ... W_L, each (m_k, m_{k-1}) with m_0 = n; same dtype, on the CPU.
        biases: b_1 ... b_L, each (m_k,).
        rows: (s, m_L) for all boxes, or (b, s, m_L).
        known_lower: (b, h), intervals of the h hidden scalars proved elsewhere, in layer order;
            intersected in. Both ends or neither.
        known_upper: see ``known_lower``.

    Returns:
        ``values`` (b, s) with ``values <= rows @ f(x)`` on each box; ``inputs`` (b, s, n), the
        coefficients that the pulled-back rows have on x; ``hidden_lower`` and ``hidden_upper``
        (b, h), intervals of what the ReLUs read. Not differentiable. Everything of a box is NaN
        when its ends, or any interval met, are NaN or out of order, or a weight is not finite.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message names the argument.
        UnsupportedOperationError: when a gradient is asked for.

    Soundness:
        The inequality holds in exact real arithmetic; results are rounded to nearest, and a proof
        must account for that (the certificate checker replays on its own).

    Source:
        Zhang, Weng, Chen, Hsieh, Daniel (2018), CROWN, with the adaptive lower slope.

    Example:
        >>> eye, zero = torch.eye(2), torch.zeros(2)
        >>> box = -torch.ones(1, 2), torch.ones(1, 2)
        >>> values, *_ = chain_bounds(*box, [eye, eye], [zero, zero], -torch.ones(1, 2))
        >>> float(values)
        -2.0
    """
    op = torch.ops.torch_prepared.chain_bounds
    values, inputs, hidden_lower, hidden_upper = op(
        lower, upper, list(weights), list(biases), rows, known_lower, known_upper
    )
    return values, inputs, hidden_lower, hidden_upper


def chain_slopes(
    lower: Float[Tensor, "b n"],
    upper: Float[Tensor, "b n"],
    weights: Sequence[Float[Tensor, "m k"]],
    biases: Sequence[Float[Tensor, " m"]],
    rows: Float[Tensor, "s m"],
    row: Tensor,
    enough: Float[Tensor, " b"],
    slopes: Float[Tensor, "b h"],
    iterations: int = 5,
    rate: float = 0.5,
    decay: float = 0.8,
    momentum: tuple[float, float] = (0.4, 0.9),
) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b s"], Float[Tensor, "b s n"]]:
    """Optimized lower slopes of a fully connected ReLU network, for many small boxes.

    All backward passes over a box, those that bound hidden scalars included, use the same lower
    slope at a neuron. Adam raises the bound of one output row of each box.

    Args:
        lower: (b, n), float32 or float64.
        upper: like ``lower``, not smaller.
        weights: as in :func:`chain_bounds`.
        biases: as in :func:`chain_bounds`.
        rows: (s, m_L) coefficients on the output.
        row: (b,) int64, which of the rows to raise.
        enough: (b,) a bound of that row at which a box needs no more steps; a box that after
            ``SLOPE_PATIENCE`` steps has not come more than half of its way is given up.
        slopes: (b, h) to start from, in [0, 1]; negative ones stand for the usual slope.
        iterations: steps of Adam; 0 only bounds with the given slopes.
        rate: size of the first step.
        decay: factor on it after each step.
        momentum: factors on Adam's first and second moments per step.

    Returns:
        ``slopes`` (b, h), multiples of ``1 / SLOPE_LEVELS``, negative where the neuron was never
        unstable; ``values`` (b, s) and ``inputs`` (b, s, n) of all rows at these slopes, as in
        :func:`chain_bounds`. Not differentiable. NaN as there.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message names the argument.
        UnsupportedOperationError: when a gradient is asked for.

    Soundness:
        As :func:`chain_bounds`; every slope in [0, 1] gives a bound.

    Source:
        Xu et al., "Fast and Complete" (ICLR 2021). Slopes shared by all rows of a box, and the
        gradient of whole passes in closed form, are ours.
    """
    found, values, inputs = torch.ops.torch_prepared.chain_slopes(
        lower, upper, list(weights), list(biases), rows, row, enough, slopes,
        iterations, rate, decay, *momentum, SLOPE_LEVELS, SLOPE_PATIENCE,
    )  # fmt: skip
    return found, values, inputs


def row_program(
    program: RowProgram,
    lines: Sequence[Float[Tensor, "4 b n"]],
    boxes: Sequence[Float[Tensor, "2 b n"]],
    rows: Float[Tensor, "b s n"] | None = None,
    shares: RowShares | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lower bounds of rows on one value of a network, by one backward pass per region.

    Rows start on slot 0 and are moved by the program's steps, in order.

    Args:
        program: the steps, with the neurons to bound when there are no ``rows``.
        lines: per activation lower slope and offset, upper slope and offset, in slot order.
        boxes: per cut centers and radii, in slot order; the input's last.
        rows: coefficients on slot 0.
        shares: slopes of each row's own, from :func:`row_shares`.

    Returns:
        ``lower`` (2, k), bounds of ``v`` and ``-v`` for each entry of ``program.index``, with two
        empty tensors; or, with rows, ``lower`` (b, s), the rows on the input (b, s, n) and their
        constants (b, s). Each bound is the best of the program's cuts. ``lower`` is
        differentiable once in lines and shares when the input's cut is the only one.

    Raises:
        RuntimeError: a program that is inconsistent; the message names the argument.
        UnsupportedOperationError: a gradient in weights, boxes or rows is asked for.

    Soundness:
        As :func:`relaxed_backward` and :func:`concretize`, in exact real arithmetic; results are
        rounded to nearest in an order that the slots fix, whatever the batch. Every share in
        [0, 1] gives a bound.

    Source:
        Zhang et al., CROWN (NeurIPS 2018); Xu et al., "Fast and Complete" (ICLR 2021) for slopes
        of each row's own. The arrangement of rows in vector lanes is ours.
    """
    none = shares is None
    lower, inputs, constants = torch.ops.torch_prepared.row_program(
        *program.arguments(lines, boxes, rows),
        [] if shares is None else list(shares.free),
        None if none else shares.values,  # type: ignore[union-attr]
        None if none else shares.offsets,  # type: ignore[union-attr]
    )
    return lower, inputs, constants


def row_shares(
    program: RowProgram,
    lines: Sequence[Float[Tensor, "4 b n"]],
    boxes: Sequence[Float[Tensor, "2 b n"]],
    free: Sequence[Float[Tensor, "b n"]],
    rows: Float[Tensor, "b s n"] | None = None,
) -> RowShares:
    """Slopes of each row's own that equal those of the lines, to be optimized.

    Args:
        program: see :func:`row_program`.
        lines: see :func:`row_program`.
        boxes: see :func:`row_program`.
        free: per activation ``1 - a`` where the line below may have any slope in [a, 1] and zero
            offset; 0 elsewhere. It counts only where the line above has a positive offset.
        rows: see :func:`row_program`.

    Returns:
        Shares whose ``values`` may be replaced by any numbers in [0, 1].

    Raises:
        RuntimeError: see :func:`row_program`.
    """
    offsets, values = torch.ops.torch_prepared.row_shares(
        *program.arguments(lines, boxes, rows), list(free)
    )
    return RowShares(values, offsets, tuple(free))
