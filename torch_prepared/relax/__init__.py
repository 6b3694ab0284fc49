"""Operators of the closed graph: exact values, intervals, linear relaxations. One file a family."""

from torch_prepared.relax import conv, linear, pool, relu, smooth, structure  # noqa: F401 registers
from torch_prepared.relax._base import (
    AffineOperator,
    AffinePair,
    ElementwiseOperator,
    Operator,
    PulledBack,
    StructuralOperator,
    Traits,
)
from torch_prepared.relax._evaluate import evaluate_all, evaluate_graph
from torch_prepared.relax._registry import lookup, register, registered, support_table

__all__ = [
    "AffineOperator",
    "AffinePair",
    "ElementwiseOperator",
    "Operator",
    "PulledBack",
    "StructuralOperator",
    "Traits",
    "evaluate_all",
    "evaluate_graph",
    "lookup",
    "register",
    "registered",
    "support_table",
]
