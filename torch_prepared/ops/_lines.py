"""Lines of activations for the bound engine: any transform, any broadcast, NaN instead of errors.

``activation_coefficients`` is opaque to ``torch.func`` transforms and to batched gradients. Both
are handled here, on the same kernels: under ``vmap`` the batch axis joins the others, since the
operator acts on scalars; batched gradients use that the gradient is linear in the four incoming
ones, so unit gradients give its coefficients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["activation_lines", "leans_up"]

OFF_TIE = 1.0 + 2.0**-16

Lines = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def leans_up(lower: Tensor, upper: Tensor) -> Tensor:
    """Where the lower line of ``max(x, p x)`` has, by default, the slope of the right piece.

    The smaller area decides, so the threshold would be ``upper = -lower``. Networks with symmetric
    weights have many neurons exactly there, where rounding would decide, here one way and in the
    checker another; the threshold therefore lies a little off the tie, for all of them alike.

    Args:
        lower: any shape, float32 or float64.
        upper: broadcastable against ``lower``.

    Returns:
        Booleans in the common shape.
    """
    return upper > -OFF_TIE * lower


def activation_lines(
    lower: Tensor, upper: Tensor, kind: str, param: float = 0.0, share: Tensor | None = None
) -> Lines:
    """The lines of :func:`torch_prepared.ops.activation_coefficients`, where bounds may be broken.

    Args:
        lower: any shape, float32 or float64.
        upper: broadcastable against ``lower``, as is ``share``.
        kind: see :func:`torch_prepared.ops.activation_coefficients`.
        param: of the kind.
        share: optional, for smooth kinds: places the tangent points of both lines, 0 at the lower
            end of the interval and 1 at the upper; moved into each line's valid range.

    Returns:
        Lower slope and offset, upper slope and offset, in the common shape. All four are NaN
        where an argument is NaN or ``lower > upper``, which proves nothing. Differentiable once,
        also under ``torch.func`` transforms and for batched gradients. Where the tangent point is
        moved, the gradient of ``share`` is the one into the valid range, so that an ascent on it
        can go back; those of the bounds are derivatives.
    """
    given = [lower, upper] if share is None else [lower, upper, share]
    spread = torch.broadcast_tensors(*given)
    lines: Lines = _Lines.apply(  # type: ignore[no-untyped-call]
        spread[0], spread[1], None if share is None else spread[2], kind, param
    )
    return lines


def _point(lower: Tensor, upper: Tensor, share: Tensor | None) -> Tensor | None:
    """The tangent point; with infinite bounds the lines are horizontal and it is not used."""
    return None if share is None else ((1 - share) * lower + share * upper).nan_to_num()


def _front(value: Tensor | None, axis: int | None, size: int) -> Tensor | None:
    """A value with its batch axis first, expanded where it has none."""
    if value is None:
        return None
    return value.movedim(axis, 0) if axis is not None else value.expand(size, *value.shape)


# Contexts are untyped objects of torch.autograd, hence Any in these signatures.
class _Lines(torch.autograd.Function):
    """The operator, transparent to transforms."""

    @staticmethod
    def forward(
        lower: Tensor, upper: Tensor, share: Tensor | None, kind: str, param: float
    ) -> Lines:
        op = torch.ops.torch_prepared.activation_coefficients
        a, b, c, d, _ = op(lower, upper, kind, param, _point(lower, upper, share))
        return a, b, c, d

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Lines) -> None:
        lower, upper, share, ctx.kind, ctx.param = inputs
        ctx.has_share = share is not None
        ctx.save_for_backward(lower, upper, *([share] if ctx.has_share else []))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lower, upper, *rest = ctx.saved_tensors
        share = rest[0] if ctx.has_share else None
        arguments = lower, upper, share, ctx.kind, ctx.param
        # Batched gradients of ``torch.autograd.grad`` come from an older vmap than torch.func's.
        if any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads):
            found = _combined(grads, *arguments)
        else:
            found = _LinesGradient.apply(*grads, *arguments)  # type: ignore[no-untyped-call]
        return found[0], found[1], found[2] if ctx.has_share else None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[Lines, tuple[int, ...]]:
        moved = [_front(x, d, info.batch_size) for x, d in zip(inputs[:3], in_dims, strict=False)]
        return _Lines.apply(*moved, *inputs[3:]), (0, 0, 0, 0)  # type: ignore[no-untyped-call]


class _LinesGradient(torch.autograd.Function):
    """Gradients of lower, upper and share (zeros when there is none); not differentiable again."""

    @staticmethod
    def forward(*inputs: Any) -> Gradients:
        *grads, lower, upper, share, kind, param = inputs
        op = torch.ops.torch_prepared.activation_coefficients_grad
        point = _point(lower, upper, share)
        to_lower, to_upper, to_point = op(*grads, lower, upper, kind, param, point)
        if share is None:
            return to_lower, to_upper, torch.zeros_like(to_lower)
        exact, inward = to_point
        # Where the bounds are infinite nothing depends on the point: no 0 * inf.
        to_share = torch.where(inward == 0, 0, inward * (upper - lower))
        return to_lower + (1 - share) * exact, to_upper + share * exact, to_share

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to save."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("activation_lines: got a second derivative; it is differentiable once")

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[Gradients, tuple[int, ...]]:
        moved = [_front(x, d, info.batch_size) for x, d in zip(inputs[:7], in_dims, strict=False)]
        return _LinesGradient.apply(*moved, *inputs[7:]), (0, 0, 0)  # type: ignore[no-untyped-call]


def _combined(
    grads: tuple[Tensor, ...],
    lower: Tensor,
    upper: Tensor,
    share: Tensor | None,
    kind: str,
    param: float,
) -> Gradients:
    """The same for batched incoming gradients, by plain products with coefficients."""
    one, zero = torch.ones_like(lower), torch.zeros_like(lower)
    parts = [
        _LinesGradient.forward(*units, lower, upper, share, kind, param)
        for units in ([one if a == b else zero for b in range(4)] for a in range(4))
    ]
    first, second, third = (
        sum(grad * part[way] for grad, part in zip(grads, parts, strict=True)) for way in range(3)
    )
    return first, second, third  # type: ignore[return-value]
