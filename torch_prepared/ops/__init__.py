"""Fused operators for batched linear bounds: native kernels when built, plain torch otherwise.

:func:`relaxed_backward` pulls affine rows back through elementwise relaxations,
:func:`concretize` minimizes rows over boxes, :func:`activation_coefficients` gives the lines of
an activation, :func:`interval_linear` is an outward-rounded interval affine map,
:func:`chain_bounds` bounds a fully connected ReLU network over many boxes, :func:`row_program`
pulls rows back through any network of affine and elementwise layers, and :func:`build_info` says
what runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from torch_prepared.errors import SpecError
from torch_prepared.ops._lines import activation_lines
from torch_prepared.ops._load import BuildInfo, build_info
from torch_prepared.ops._program import RowProgram, RowShares
from torch_prepared.ops._reference import concretize_reference, relaxed_backward_reference
from torch_prepared.ops._reference_functions import Smooth, smooth_function
from torch_prepared.ops._register import register_all, transforms_active

__all__ = [
    "BuildInfo",
    "RowProgram",
    "RowShares",
    "Smooth",
    "activation_coefficients",
    "activation_lines",
    "build_info",
    "chain_bounds",
    "chain_slopes",
    "concretize",
    "interval_linear",
    "relaxed_backward",
    "row_program",
    "row_shares",
    "smooth_function",
]

register_all()


def relaxed_backward(
    rows: Float[Tensor, "b s n"],
    lower_slope: Float[Tensor, ...],
    lower_offset: Float[Tensor, ...],
    upper_slope: Float[Tensor, ...],
    upper_offset: Float[Tensor, ...],
) -> tuple[Float[Tensor, "b s n"], Float[Tensor, "b s"]]:
    """Pull rows back through elementwise lines: one step of backward bound propagation.

    With ``r+ = max(r, 0)`` and ``r- = min(r, 0)``::

        out[b, s, j] = r+ * lower_slope[j] + r- * upper_slope[j]
        bias[b, s]   = sum_j r+ * lower_offset[j] + r- * upper_offset[j]

    so that ``rows @ y >= out @ x + bias`` whenever ``lower_slope * x + lower_offset <= y <=
    upper_slope * x + upper_offset``. For an upper bound pass ``-rows`` and negate the results.

    Args:
        rows: (b, s, n), float32 or float64.
        lower_slope: (b, n), (1, n) or (b, s, n), also with any size 1 that broadcasts; the same
            dtype and device as ``rows``. The other coefficients likewise, each with its own
            shape.
        lower_offset: see ``lower_slope``.
        upper_slope: see ``lower_slope``.
        upper_offset: see ``lower_slope``.

    Returns:
        ``out`` (b, s, n) and ``bias`` (b, s). Differentiable once with respect to every argument.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message names the argument.

    Soundness:
        The inequality holds in exact real arithmetic. Results are rounded to nearest: ``out``
        has one rounding per entry, ``bias`` at most n, so its error is below
        ``gamma_n * sum_j |r * offset|``. A coefficient that a row's sign does not select never
        contributes, not even when it is infinite or NaN; NaN in use gives NaN.

    Source:
        Zhang, Weng, Chen, Hsieh, Daniel (2018), CROWN, theorem 3.2.

    Example:
        >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        >>> relaxed_backward(torch.tensor([[[-2.0]]]), zero, zero, one / 2, one / 2)
        (tensor([[[-1.]]]), tensor([[-1.]]))
    """
    given = (lower_slope, lower_offset, upper_slope, upper_offset)
    deep = [c.unsqueeze(1) if c.dim() == 2 else c for c in given]
    coefficients = torch.broadcast_tensors(*deep)
    if transforms_active():
        return relaxed_backward_reference(rows, *coefficients)
    out, bias = torch.ops.torch_prepared.relaxed_backward(rows, *coefficients)
    return out, bias


def concretize(
    rows: Float[Tensor, "b s n"],
    center: Float[Tensor, "B n"],
    radius: Float[Tensor, "B n"],
) -> Float[Tensor, "b s"]:
    """Minimum of each row over a box: ``rows @ center - |rows| @ radius``.

    Args:
        rows: (b, s, n), float32 or float64.
        center: (b, n) or (1, n), same dtype and device.
        radius: like ``center``, not negative.

    Returns:
        (b, s). Differentiable; at a zero entry of ``rows`` the sign is taken as zero.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message names the argument.

    Soundness:
        Rounded to nearest; the error is below ``gamma_{2n} * |rows| @ (|center| + radius)``,
        which a proof must subtract (the certificate checker does so on its own).

    Example:
        >>> concretize(torch.ones(1, 1, 2), torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[-2.]])
    """
    if transforms_active():
        return concretize_reference(rows, center, radius)
    bound: Tensor = torch.ops.torch_prepared.concretize(rows, center, radius)
    return bound


def activation_coefficients(
    lower: Float[Tensor, "*shape"],
    upper: Float[Tensor, "*shape"],
    kind: str,
    param: float = 0.0,
    alpha: Float[Tensor, "*shape"] | None = None,
) -> tuple[
    Float[Tensor, "*shape"],
    Float[Tensor, "*shape"],
    Float[Tensor, "*shape"],
    Float[Tensor, "*shape"],
]:
    """Lower and upper line of an activation on ``[lower, upper]``, elementwise.

    For every x in the interval::

        lower_slope * x + lower_offset <= sigma(x) <= upper_slope * x + upper_offset

    On a piece where the bounded side is convex the line is the chord, where it is concave the
    tangent at the midpoint. On a mixed interval it is the tangent at the point nearest to the
    midpoint whose tangent is valid at both ends, or the chord when there is none.

    Args:
        lower: any shape, float32 or float64; may be infinite.
        upper: like ``lower``, not smaller.
        kind: relu, leaky_relu, tanh, sigmoid, elu, softplus, gelu (by erf), gelu_tanh or silu.
        param: negative slope in [0, 1] for leaky_relu, alpha in [0, 1e6] for elu; narrowed to the
            bounds' dtype. Other kinds ignore it.
        alpha: optional, like ``lower``: the lower line's slope for relu and leaky_relu (clamped
            to [param, 1]); the tangent point of both lines for the others (clamped to each
            line's valid range). Stable neurons and chords ignore it. Default for relu: slope 1
            when ``upper > -lower``, else 0.

    Returns:
        ``lower_slope, lower_offset, upper_slope, upper_offset``, each like ``lower``.
        Differentiable once with respect to the bounds and alpha.

    Raises:
        SpecError: NaN in an argument, or a lower bound above its upper bound.
        RuntimeError: an unknown kind, or a param, shape, dtype or device that does not fit.

    Soundness:
        For relu and leaky_relu the inequalities hold exactly, with no tolerance, for the returned
        numbers. For the others they hold for the exact function under the assumption that exp,
        expm1, log1p, tanh and erfc in float64 err by at most 4 ulp (erfc: 5); the offsets
        contain that error and all roundings, and are rounded outward. The margin this adds is
        below 1e-13 times the size of the line's terms on the interval in float64, one ulp in
        float32. Bounds beyond 1e150 or infinite give horizontal lines, with an infinite offset
        where the function is unbounded.

    Source:
        Zhang, Weng, Chen, Hsieh, Daniel (2018), CROWN, section 3.3; the offsets are recomputed
        for the rounded slopes here, and the tangent point is the one nearest to the midpoint.

    Example:
        >>> low, high = torch.tensor([-1.0]), torch.tensor([1.0])
        >>> [float(c) for c in activation_coefficients(low, high, "relu")]
        [0.0, 0.0, 0.5, 0.5]
    """
    op = torch.ops.torch_prepared.activation_coefficients
    *lines, errors = op(lower, upper, kind, param, alpha)
    invalid = int(errors)
    if invalid:
        raise SpecError(
            f"activation_coefficients({kind}): got NaN or lower > upper in {invalid} of "
            f"{lower.numel()} neurons; expected lower <= upper; check the weights and the input "
            "region for NaN and overflow"
        )
    lower_slope, lower_offset, upper_slope, upper_offset = lines
    return lower_slope, lower_offset, upper_slope, upper_offset


def interval_linear(
    lower: Float[Tensor, "b n"],
    upper: Float[Tensor, "b n"],
    weight: Float[Tensor, "m n"],
    bias: Float[Tensor, " m"] | None = None,
) -> tuple[Float[Tensor, "b m"], Float[Tensor, "b m"]]:
    """Outward-rounded interval image of ``x -> weight @ x + bias``.

    The results enclose ``{weight @ x + bias : lower <= x <= upper}``.

    Args:
        lower: (b, n), float32 or float64, finite.
        upper: like ``lower``, not smaller.
        weight: (m, n), same dtype and device.
        bias: (m,) or None.

    Returns:
        Lower and upper bounds (b, m). Differentiable (rounding terms count as constants). NaN,
        infinite or reversed inputs give NaN, which proves nothing.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message names the argument.

    Soundness:
        Encloses the exact real image of the given numbers, for any order of summation: products
        run in float64 on midpoint and radius, the radius is enlarged by
        ``gamma_n * |center|``, and every other step is rounded outward. Modes that lower the
        precision of float32 products do not touch it.

    Source:
        Rump (1999), Fast and parallel interval arithmetic; Higham (2002), theorem 3.1, for gamma.

    Example:
        >>> low, high = interval_linear(-torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2))
        >>> bool(low <= -2.0), bool(high >= 2.0)
        (True, True)
    """
    low, high = torch.ops.torch_prepared.interval_linear(lower, upper, weight, bias)
    return low, high


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
        enough: (b,) a bound of that row at which a box needs no more steps.
        slopes: (b, h) to start from, in [0, 1]; negative ones stand for the usual slope.
        iterations: steps of Adam; 0 only bounds with the given slopes.
        rate: size of the first step.
        decay: factor on it after each step.

    Returns:
        ``slopes`` (b, h), multiples of 1 / 254, negative where the neuron was never unstable;
        ``values`` (b, s) and ``inputs`` (b, s, n) of all rows at these slopes, as in
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
        iterations, rate, decay,
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
