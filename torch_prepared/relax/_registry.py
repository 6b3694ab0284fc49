"""The table of operators: register, look up, print."""

from __future__ import annotations

from typing import TypeVar

from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax._base import ElementwiseOperator, Operator

__all__ = ["lookup", "register", "registered", "support_table"]

_OPERATORS: dict[str, Operator] = {}
OperatorClass = TypeVar("OperatorClass", bound=type[Operator])


def register(cls: OperatorClass) -> OperatorClass:
    """Class decorator: make an operator known under its ``op`` name."""
    if cls.op in _OPERATORS:
        raise ValueError(f"operator '{cls.op}' is registered twice")
    _OPERATORS[cls.op] = cls()
    return cls


def lookup(op: str) -> Operator:
    """The operator called ``op``."""
    try:
        return _OPERATORS[op]
    except KeyError:
        raise UnsupportedOperationError(
            f"operator '{op}' is not supported; supported: {', '.join(sorted(_OPERATORS))}"
        ) from None


def registered() -> tuple[Operator, ...]:
    """All operators, by name."""
    return tuple(_OPERATORS[name] for name in sorted(_OPERATORS))


def support_table() -> str:
    """A Markdown table of operators and of what is known about each; the README prints it."""
    lines = [
        "| operator | kind | intervals | CROWN | optimizable slopes | rows in unknown weights |",
        "|---|---|---|---|---|---|",
    ]
    for operator in registered():
        elementwise = isinstance(operator, ElementwiseOperator)
        kind = "affine" if operator.traits.affine else "activation" if elementwise else "pooling"
        start = getattr(type(operator), "alpha_start", ElementwiseOperator.alpha_start)
        alpha = start is not ElementwiseOperator.alpha_start
        lines.append(
            f"| {operator.op} | {kind} | yes | yes | {'yes' if alpha else '-'} "
            f"| {'yes' if operator.parametric else '-'} |"
        )
    return "\n".join(lines)
