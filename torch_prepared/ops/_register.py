"""Schemas when the native library is absent, reference kernels, shape functions and gradients.

The reference is registered for every device; a native kernel of a device takes precedence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_prepared.ops import _reference as linear
from torch_prepared.ops import _reference_activation as activation
from torch_prepared.ops import _reference_chain as chain
from torch_prepared.ops import _reference_program as program
from torch_prepared.ops._load import load_native

__all__ = ["SCHEMAS", "register_all", "transforms_active"]

_PROGRAM = (
    "Tensor slots, Tensor steps, Tensor[] tensors, Tensor[] lines, Tensor[] boxes, "
    "Tensor starts, Tensor index, Tensor? rows, int input_slot, Tensor[] free"
)
# What csrc/library.cpp defines; a test compares the two.
SCHEMAS = {
    "relaxed_backward": "(Tensor rows, Tensor lower_slope, Tensor lower_offset, "
    "Tensor upper_slope, Tensor upper_offset) -> (Tensor, Tensor)",
    "relaxed_backward_grad": "(Tensor grad_rows, Tensor grad_bias, Tensor rows, "
    "Tensor lower_slope, Tensor lower_offset, Tensor upper_slope, Tensor upper_offset) "
    "-> (Tensor, Tensor)",
    "concretize": "(Tensor rows, Tensor center, Tensor radius) -> Tensor",
    "activation_coefficients": "(Tensor lower, Tensor upper, str kind, float param, "
    "Tensor? alpha) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "activation_coefficients_grad": "(Tensor grad_lower_slope, Tensor grad_lower_offset, "
    "Tensor grad_upper_slope, Tensor grad_upper_offset, Tensor lower, Tensor upper, "
    "str kind, float param, Tensor? alpha) -> (Tensor, Tensor, Tensor)",
    "interval_linear": "(Tensor lower, Tensor upper, Tensor weight, Tensor? bias) "
    "-> (Tensor, Tensor)",
    "chain_bounds": "(Tensor lower, Tensor upper, Tensor[] weights, Tensor[] biases, "
    "Tensor rows, Tensor? known_lower, Tensor? known_upper) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "chain_slopes": "(Tensor lower, Tensor upper, Tensor[] weights, Tensor[] biases, Tensor rows, "
    "Tensor row, Tensor enough, Tensor slopes, int iterations, float rate, float decay, "
    "float momentum, float square_momentum, int levels, int patience) -> (Tensor, Tensor, Tensor)",
    "row_program": f"({_PROGRAM}, Tensor? shares, Tensor? offsets) -> (Tensor, Tensor, Tensor)",
    "row_program_grad": f"(Tensor grad_lower, {_PROGRAM}, Tensor? shares, Tensor? offsets) "
    "-> (Tensor, Tensor)",
    "row_shares": f"({_PROGRAM}) -> (Tensor, Tensor)",
}

_REFERENCES: dict[str, Callable[..., Any]] = {
    "relaxed_backward": linear.relaxed_backward_reference,
    "relaxed_backward_grad": linear.relaxed_backward_grad_reference,
    "concretize": linear.concretize_reference,
    "activation_coefficients": activation.activation_coefficients_reference,
    "activation_coefficients_grad": activation.activation_coefficients_grad_reference,
    "interval_linear": linear.interval_linear_reference,
    "chain_bounds": chain.chain_bounds_reference,
    "chain_slopes": chain.chain_slopes_reference,
    "row_program": program.row_program_reference,
    "row_program_grad": program.row_program_grad_reference,
    "row_shares": program.row_shares_reference,
}


def _fake_relaxed_backward(rows: Tensor, *coefficients: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty(rows.shape[:2])


def _fake_relaxed_backward_grad(
    grad_rows: Tensor, grad_bias: Tensor, rows: Tensor, *coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty((4, *coefficients[0].shape))


def _fake_concretize(rows: Tensor, center: Tensor, radius: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[:2])


def _fake_activation(
    lower: Tensor, upper: Tensor, kind: str, param: float, alpha: Tensor | None
) -> tuple[Tensor, ...]:
    lines = [lower.new_empty(lower.shape) for _ in range(4)]
    return (*lines, lower.new_empty((1,), dtype=torch.int64))


def _fake_activation_grad(
    gls: Tensor,
    glo: Tensor,
    gus: Tensor,
    guo: Tensor,
    lower: Tensor,
    upper: Tensor,
    kind: str,
    param: float,
    alpha: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    to_alpha = lower.new_empty((0,) if alpha is None else (2, *lower.shape))
    return lower.new_empty(lower.shape), lower.new_empty(lower.shape), to_alpha


def _fake_interval_linear(
    lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (lower.shape[0], weight.shape[0])
    return lower.new_empty(shape), lower.new_empty(shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "relaxed_backward": _fake_relaxed_backward,
    "relaxed_backward_grad": _fake_relaxed_backward_grad,
    "concretize": _fake_concretize,
    "activation_coefficients": _fake_activation,
    "activation_coefficients_grad": _fake_activation_grad,
    "interval_linear": _fake_interval_linear,
    "chain_bounds": chain.fake_chain_bounds,
    "chain_slopes": chain.fake_chain_slopes,
    "row_program": program.fake_row_program,
    "row_program_grad": program.fake_row_program_grad,
}


# The autograd context is an untyped object of torch.library, hence Any in these signatures.
def _save_tensors(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def transforms_active(*tensors: Tensor) -> bool:
    """Whether ``torch.func`` transforms are running or a tensor carries batched gradients.

    Transforms see through plain torch operations but not into ours: the reference runs then.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    # Batched gradients of ``torch.autograd.grad`` come from an older vmap, which would loop.
    return any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


def _backward_relaxed(ctx: Any, grad_rows: Tensor, grad_bias: Tensor) -> tuple[Tensor, ...]:
    op: Callable[..., Any] = torch.ops.torch_prepared.relaxed_backward_grad
    if transforms_active(grad_rows, grad_bias):
        op = linear.relaxed_backward_grad_reference
    to_rows, to_coefficients = op(grad_rows, grad_bias, *ctx.saved_tensors)
    return (to_rows, *to_coefficients.unbind(0))


def _backward_concretize(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, center, radius = ctx.saved_tensors
    to_rows = grad.unsqueeze(-1) * (center.unsqueeze(1) - rows.sign() * radius.unsqueeze(1))
    weights = grad.unsqueeze(1)
    to_center = torch.bmm(weights, rows).squeeze(1)
    to_radius = -torch.bmm(weights, rows.abs()).squeeze(1)
    return to_rows, to_center.sum_to_size(center.shape), to_radius.sum_to_size(radius.shape)


def _setup_activation(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    lower, upper, ctx.kind, ctx.param, alpha = inputs
    ctx.has_alpha = alpha is not None
    ctx.save_for_backward(lower, upper, *([alpha] if ctx.has_alpha else []))
    ctx.mark_non_differentiable(output[4])


def _backward_activation(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    lower, upper, *rest = ctx.saved_tensors
    alpha = rest[0] if ctx.has_alpha else None
    op = torch.ops.torch_prepared.activation_coefficients_grad
    to_lower, to_upper, to_alpha = op(*grads[:4], lower, upper, ctx.kind, ctx.param, alpha)
    return to_lower, to_upper, None, None, to_alpha[0] if ctx.has_alpha else None


def _setup_interval(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    lower, upper, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(lower, upper, weight)


def _backward_interval(ctx: Any, g_low: Tensor, g_high: Tensor) -> tuple[Tensor | None, ...]:
    lower, upper, weight = ctx.saved_tensors
    plus, minus = weight.clamp(min=0), weight.clamp(max=0)
    to_lower = g_low @ plus + g_high @ minus
    to_upper = g_low @ minus + g_high @ plus
    same = g_low.T @ lower + g_high.T @ upper
    crossed = g_low.T @ upper + g_high.T @ lower
    to_weight = torch.where(weight >= 0, same, crossed)
    return to_lower, to_upper, to_weight, (g_low + g_high).sum(0) if ctx.has_bias else None


_libraries: list[torch.library.Library] = []


def register_all() -> None:
    """Register everything that csrc does not; called once, when ``ops`` is imported."""
    if _libraries:
        return
    native = load_native().native
    library = torch.library.Library("torch_prepared", "FRAGMENT" if native else "DEF")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        if not native:
            library.define(name + schema)
        reference = _REFERENCES[name]
        library.impl(name, reference, "CompositeExplicitAutograd")
        if name in _FAKES:  # the number of shares depends on values
            torch.library.register_fake(f"torch_prepared::{name}", _FAKES[name], lib=library)
    gradients: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "relaxed_backward": (_backward_relaxed, _save_tensors),
        "concretize": (_backward_concretize, _save_tensors),
        "activation_coefficients": (_backward_activation, _setup_activation),
        "interval_linear": (_backward_interval, _setup_interval),
        "chain_bounds": (chain.refuse_gradient, chain.setup_nothing),
        "chain_slopes": (chain.refuse_gradient, chain.setup_nothing),
        "row_program": (program.row_program_backward, program.row_program_setup),
    }
    for name, (backward, setup) in gradients.items():
        torch.library.register_autograd(
            f"torch_prepared::{name}", backward, setup_context=setup, lib=library
        )
