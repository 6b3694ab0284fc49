"""One ATen call as ``torch.export`` writes it: its arguments, and what it gives on constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from torch_prepared.core._builder import Constant, GraphBuilder, Value

__all__ = [
    "RESHAPES",
    "SAME",
    "BatchSize",
    "Call",
    "arguments_by_name",
    "compute_number",
    "depends_on_input",
    "fold",
]

RESHAPES = frozenset(
    {"_unsafe_view", "flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"}
)
SAME = frozenset(
    {"_to_copy", "alias", "clone", "contiguous", "detach", "dropout", "lift_fresh_copy"}
)


class BatchSize(int):
    """A number computed from the batch size: good for shapes, never for values."""


@dataclass(frozen=True)
class Call:
    """One ATen call being translated, its arguments by the names of the operator's schema."""

    builder: GraphBuilder
    op: str
    target: OpOverload
    arguments: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """Argument ``name``, or its default."""
        return self.arguments[name]

    def value(self, name: str = "self") -> Value:
        """Argument ``name``, which must be a tensor that depends on the input."""
        found = self.arguments[name]
        if not isinstance(found, Value):
            self.builder.refuse(f"argument {name!r} does not depend on the input")
        return found

    def operand(self, name: str) -> Value | Constant:
        """Argument ``name``: a tensor, or a number as a constant in the network's dtype."""
        found = self.arguments[name]
        if isinstance(found, BatchSize):
            self.builder.refuse("computes with the batch size")
        if isinstance(found, (int, float)):
            return self.builder.scalar(float(found))
        if isinstance(found, Constant) and found.value.dtype != self.builder.dtype:
            exact = found.value.to(self.builder.dtype)
            promotes = bool(found.shape) and found.value.is_floating_point()
            if promotes or not bool((exact.to(found.value.dtype) == found.value).all()):
                self.builder.refuse(f"argument {name!r} has dtype {found.value.dtype}")
            return Constant(exact, None, found.sources)
        return cast("Value | Constant", found)

    def constant(self, name: str) -> Constant:
        """Argument ``name``, which must be a tensor that does not depend on the input."""
        found = self.arguments[name]
        if not isinstance(found, Constant):
            self.builder.refuse(f"argument {name!r} depends on the input")
        return found

    def spread(self, name: str, dims: int) -> tuple[int, ...]:
        """Argument ``name``, a list of integers of which a single one stands for all axes."""
        values = tuple(int(v) for v in self.arguments[name])
        return values * dims if len(values) == 1 else values


def compute_number(builder: GraphBuilder, function: object, args: Any, kwargs: Any) -> Any:
    """Arithmetic on sizes."""
    numbers = [a for a in args if isinstance(a, (int, float, bool))]
    if not callable(function) or len(numbers) != len(args) or kwargs:
        builder.refuse("this operation on sizes has no support")
    result = function(*args)
    tainted = isinstance(result, int) and any(isinstance(a, BatchSize) for a in args)
    return BatchSize(result) if tainted else result


def arguments_by_name(
    target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    schema = target._schema.arguments
    named = {arg.name: arg.default_value for arg in schema if arg.has_default_value()}
    named.update(zip((arg.name for arg in schema), args, strict=False))
    return {**named, **kwargs}


def depends_on_input(arguments: Sequence[Any]) -> bool:
    return any(
        isinstance(a, Value) or (isinstance(a, (list, tuple)) and depends_on_input(a))
        for a in arguments
    )


def fold(call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The call's result on constants, with provenance where it only rearranges one of them."""
    if torch.Tag.nondeterministic_seeded in call.target.tags:
        call.builder.refuse("draws random numbers")
    if any(isinstance(leaf, BatchSize) for leaf in tree_leaves((list(args), dict(kwargs)))):
        call.builder.refuse("creates a tensor whose shape depends on the batch size")
    sources: set[str] = set()

    def plain(argument: Any) -> Any:
        if isinstance(argument, Constant):
            sources.update(argument.sources)
            return argument.value
        if isinstance(argument, (list, tuple)):
            return [plain(item) for item in argument]
        return argument

    with torch.no_grad():
        result = call.target(*plain(args), **{k: plain(v) for k, v in kwargs.items()})
    first = args[0] if args else None
    if isinstance(result, Tensor) and isinstance(first, Constant):
        if call.op in SAME and result.dtype == first.value.dtype:
            return first
        if call.op in RESHAPES:
            return first.reshaped(tuple(result.shape))
        if call.op in ("t", "transpose", "permute"):
            return first.permuted(_order(call, len(first.shape)))
    if isinstance(result, (list, tuple)):
        return [Constant(r, None, frozenset(sources)) for r in result]
    return Constant(result, None, frozenset(sources)) if isinstance(result, Tensor) else result


def _order(call: Call, rank: int) -> list[int]:
    """The axis order after t, transpose or permute."""
    if call.op == "permute":
        return [int(axis) % rank for axis in call["dims"]]
    order = list(range(rank))
    if rank > 1:
        first, second = (0, 1) if call.op == "t" else (int(call["dim0"]), int(call["dim1"]))
        order[first], order[second] = order[second], order[first]
    return order
