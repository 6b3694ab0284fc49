"""Fused operators for batched linear bounds: native kernels when built, plain torch otherwise.

:func:`relaxed_backward` pulls affine rows back through elementwise relaxations,
:func:`concretize` minimizes rows over boxes, :func:`activation_coefficients` gives the lines of
an activation, :func:`interval_linear` is an outward-rounded interval affine map,
:func:`chain_bounds` bounds a fully connected ReLU network over many boxes, :func:`row_program`
pulls rows back through any network of affine and elementwise layers, and :func:`build_info` says
what runs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from torch_prepared.errors import SpecError
from torch_prepared.ops._lines import activation_lines, leans_up
from torch_prepared.ops._load import BuildInfo, build_info
from torch_prepared.ops._passes import (
    SLOPE_LEVELS,
    SLOPE_PATIENCE,
    chain_bounds,
    chain_slopes,
    row_program,
    row_shares,
)
from torch_prepared.ops._program import RowProgram, RowShares
from torch_prepared.ops._reference import concretize_reference, relaxed_backward_reference
from torch_prepared.ops._reference_functions import Smooth, smooth_function
from torch_prepared.ops._register import register_all, transforms_active

__all__ = [
    "SLOPE_LEVELS",
    "SLOPE_PATIENCE",
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
    "leans_up",
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
            where ``leans_up(lower, upper)``, else 0.

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
