"""Compute types: which numbers a deployed network rounds, when, and how far that can move it.

Each model holds for sums in any order, with or without fused operations, and for results below the
normal range that are flushed to zero or not. Accumulation errors are Higham's ``g_k`` (Accuracy and
Stability of Numerical Algorithms, 2002, section 3.1), at least doubled.

=========  =========================================================================================
type       model
=========  =========================================================================================
float32    weights, inputs and results are float32; nothing else is rounded
float64    the same in float64; weights and inputs are converted exactly
tf32       both factors of every product lose bits until 10 are left after the leading one, by
           rounding or by truncation (relative error below 2**-10; to nearest it is 2**-11); sums
           are accumulated in float32, where every addition may truncate and blocks of products may
           be aligned to the largest (hence sums count twice their length); biases and results are
           float32
bfloat16   weights, biases and inputs are rounded once to the nearest number of 7 bits after the
           leading one, ties to even; sums are accumulated in float32 as for tf32; every operator
           rounds to nearest (relative error 2**-8) its result, and once more in between where a
           bias, shift or factor is applied to a stored result
=========  =========================================================================================

Sums split into parts that are stored in the narrow type are outside of these models, and so is
batch normalization in bfloat16, whose statistics frameworks keep in different types.

Source: Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores" (PeerJ
Computer Science 2021), for truncation and alignment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from torch_prepared.certify.facts import EXACT_IN_FLOAT, ActivationFacts
from torch_prepared.certify.nodes import read_nodes
from torch_prepared.certify.operators import Arithmetic
from torch_prepared.certify.records import NetworkRecord
from torch_prepared.certify.rounding import INFLATION, UNIT, UNIT_FLOAT32, FloatArray, gamma

__all__ = [
    "COMPUTE_TYPES",
    "ComputeType",
    "arithmetic_of",
    "refusal",
    "round_bfloat16",
    "stored_as",
]

ComputeType = Literal["float32", "float64", "tf32", "bfloat16"]
COMPUTE_TYPES: tuple[ComputeType, ...] = get_args(ComputeType)

_MOST_SUMMANDS = 3  # that two roundings of a result cover


@dataclass(frozen=True)
class _Rounded(Arithmetic):
    """A compute type by its relative errors.

    Args:
        unit: of one addition or elementwise operation.
        stretch: how many additions are granted per term of a sum.
        factor: of each factor of a product.
        result: of a stored result.
        limit: largest weight, input or sum of magnitudes; nothing is said beyond.
        tiny: absolute error per term: underflow of a factor below the normal range times ``limit``.
    """

    unit: float = UNIT_FLOAT32
    stretch: int = 1
    factor: float = 0.0
    result: float = 0.0
    limit: float = 2.0**26
    tiny: float = 2.0**-97

    def affine_error(self, terms: int, size: FloatArray) -> FloatArray | float:
        """See :class:`Arithmetic`: ``((1 + f)^2 (1 + g) (1 + r)^2 - 1) size``, plus underflow."""
        if terms == 0:
            return 0.0
        growth = self._growth(gamma(self.stretch * terms, self.unit), self.factor)
        error = growth * size + (terms + 2) * self.tiny
        return np.where(size < self.limit, error, np.nan)

    def activation_error(self, op: str, facts: ActivationFacts, size: FloatArray) -> FloatArray:
        """See :class:`Arithmetic`; a slope may be rounded like a result."""
        if op in EXACT_IN_FLOAT:
            return np.zeros_like(size)
        if facts.piecewise_linear:
            growth = self._growth(gamma(1, self.unit), 0.0)
            return growth * facts.lipschitz * size + self.tiny
        if self.activation_ulp is None:
            return np.full_like(size, np.nan)
        ulps = self.activation_ulp * 2.0 * self.unit * np.maximum(1.0, size)
        return (ulps + self.result * (size + ulps) + self.tiny) * INFLATION

    def _growth(self, added: float, factor: float) -> float:
        steps = 2.0 * math.log1p(factor) + math.log1p(added) + 2.0 * math.log1p(self.result)
        return math.expm1(steps) * INFLATION


_TYPES: Mapping[str, Arithmetic] = {
    "real": Arithmetic(),
    "float32": Arithmetic(float32=True),
    "float64": _Rounded(unit=UNIT, limit=2.0**100, tiny=2.0**-900),
    "tf32": _Rounded(stretch=2, factor=2.0**-10),
    "bfloat16": _Rounded(stretch=2, result=2.0**-8),
}


def arithmetic_of(name: str, activation_ulp: float | None) -> Arithmetic:
    """The error model called ``name``: a :data:`ComputeType`, or ``"real"``."""
    return replace(_TYPES[name], activation_ulp=activation_ulp)


def refusal(name: str, network: NetworkRecord, inputs: FloatArray) -> str:
    """Why the computation called ``name`` is not defined, in one line; empty when it is.

    Args:
        name: a :data:`ComputeType`, or ``"real"``.
        network: as stored.
        inputs: (b, n).
    """
    if name == "real":
        return ""
    nodes = read_nodes(network)
    stored = [value for node in nodes for value in node.params.values()]
    narrow = name != "float64"
    if narrow and any(value.dtype == np.float64 for value in stored):
        return f"weights are stored in float64, so no {name} computation is defined"
    with np.errstate(over="ignore"):
        same = inputs.astype(np.float32).astype(np.float64) == inputs
    if narrow and not bool(same.all()):
        return "inputs are not float32 numbers"
    model = _TYPES[name]
    if not isinstance(model, _Rounded):
        return ""
    largest = max(float(np.abs(a).max(initial=0.0)) for a in (inputs, *stored))
    if not largest <= model.limit:
        return f"inputs or weights up to {largest:.4g}; {name} has a model up to {model.limit:.4g}"
    for node in nodes if model.result else ():
        if node.op == "batch_norm":
            return f"{node.name}: batch normalization in {name} has no model; fold it"
        if node.op == "add" and len(node.inputs) > _MOST_SUMMANDS:
            return f"{node.name}: {name} has a model for sums of up to {_MOST_SUMMANDS} values"
    return ""


def stored_as(
    name: str, network: NetworkRecord, inputs: FloatArray
) -> tuple[NetworkRecord, FloatArray]:
    """The network and the inputs (b, n) as the compute type holds them before it starts."""
    if name != "bfloat16":
        return network, inputs
    weights = {key: round_bfloat16(value) for key, value in network.weights.items()}
    return NetworkRecord(network.structure, weights), round_bfloat16(inputs).astype(np.float64)


def round_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 numbers, ties to even, as float32; ``values`` are float32 numbers."""
    bits = np.asarray(values).astype(np.float32).view(np.uint32)
    even = (bits >> np.uint32(16)) & np.uint32(1)
    kept = (bits + np.uint32(0x7FFF) + even) & np.uint32(0xFFFF0000)
    return np.asarray(kept).view(np.float32)
