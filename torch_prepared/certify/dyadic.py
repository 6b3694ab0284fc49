"""Exact values of many inputs at once, for networks whose operators map binary fractions to such.

A value is ``digits * 2**-shift`` with whole numbers as digits, so sums and products never round.
Products of matrices are split into digits so short that every partial sum stays below 2**53: then
ordinary float64 matrix products are exact whatever their order of summation.

Source: Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication by using
fast routines of matrix multiplication and its applications" (Numerical Algorithms 59, 2012), here
in fixed point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from torch_prepared.certify.nodes import NodeRecord, read_nodes
from torch_prepared.certify.records import NetworkRecord
from torch_prepared.errors import CertificateError

__all__ = ["DYADIC_OPERATORS", "Dyadic", "evaluate_dyadic"]

Digits = npt.NDArray[np.object_]
"""Array of Python integers."""


@dataclass(frozen=True)
class Dyadic:
    """The numbers ``digits * 2**-shift``."""

    digits: Digits
    shift: int

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Dyadic:
        """Finite float64 numbers, exactly."""
        array = np.asarray(values, dtype=np.float64)
        mantissa, exponent = np.frexp(array)
        whole = np.ldexp(mantissa, 53).astype(np.int64)
        power = exponent.astype(np.int64) - 53
        lowest = np.frexp((whole & -whole).astype(np.float64))[1] - 1
        trailing = np.where(whole == 0, 0, lowest)
        whole, power = whole >> trailing, np.where(whole == 0, 0, power + trailing)
        shift = max(0, -int(power.min(initial=0)))
        digits = np.left_shift(whole.astype(object), (power + shift).astype(object))
        return cls(np.asarray(digits, dtype=object).reshape(array.shape), shift)

    def at(self, shift: int) -> Digits:
        """Digits with another, not smaller, shift."""
        return np.asarray(self.digits * (1 << (shift - self.shift)), dtype=object)

    def fractions(self) -> Digits:
        """The numbers as an array of ``Fraction``."""
        scale = 1 << self.shift
        flat = [Fraction(int(v), scale) for v in self.digits.reshape(-1)]
        out = np.empty(len(flat), dtype=object)
        out[:] = flat
        return out.reshape(self.digits.shape)

    def __add__(self, other: Dyadic) -> Dyadic:
        shift = max(self.shift, other.shift)
        return Dyadic(np.asarray(self.at(shift) + other.at(shift), dtype=object), shift)

    def __mul__(self, other: Dyadic) -> Dyadic:
        product = np.asarray(self.digits * other.digits, dtype=object)
        return Dyadic(product, self.shift + other.shift)

    def reshape(self, shape: Sequence[int]) -> Dyadic:
        """The same numbers in another shape."""
        return Dyadic(self.digits.reshape(tuple(shape)), self.shift)


def _limbs(digits: Digits, bits: int) -> list[npt.NDArray[np.float64]]:
    """Signed digits to base ``2**bits``, lowest first, each a whole float64."""
    size = np.abs(digits)
    longest = int(size.max()).bit_length() if size.size else 0
    sign = np.where(np.asarray(digits < 0, dtype=bool), -1.0, 1.0)
    mask = (1 << bits) - 1
    found = []
    for position in range(0, longest, bits):
        part = np.asarray((size >> position) & mask, dtype=object)
        found.append(part.astype(np.float64) * sign)
    return found


def _matmul(x: Dyadic, weight: Dyadic) -> Dyadic:
    """``x @ weight.T`` for x (b, n) and weight (m, n)."""
    terms = max(1, x.digits.shape[1])
    bits = (52 - terms.bit_length()) // 2  # n products below 2**(2 bits) add up to less than 2**53
    left, right = _limbs(x.digits, bits), _limbs(weight.digits, bits)
    shape = (x.digits.shape[0], weight.digits.shape[0])
    total = np.zeros(shape, dtype=object)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            part = np.matmul(a, b.T).astype(np.int64).astype(object)
            total = total + part * (1 << (bits * (i + j)))
    return Dyadic(np.asarray(total, dtype=object), x.shift + weight.shift)


def _linear(node: NodeRecord, inputs: Sequence[Dyadic]) -> Dyadic:
    weight, bias = Dyadic.of(node.required("weight")), node.param("bias")
    flat = inputs[0].reshape((-1, weight.digits.shape[1]))
    value = _matmul(flat, weight)
    if bias is not None:
        value = value + Dyadic.of(bias)
    return value.reshape((len(inputs[0].digits), *node.shape))


def _rectify(node: NodeRecord, inputs: Sequence[Dyadic]) -> Dyadic:
    (x,) = inputs
    slope = {"relu": 0.0, "abs": -1.0}.get(node.op)
    left = Dyadic.of([node.number("alpha") if slope is None else slope])
    negative = np.asarray(x.digits < 0, dtype=bool)
    moved = x * left
    return Dyadic(np.where(negative, moved.digits, x.at(moved.shift)), moved.shift)


def _scale(node: NodeRecord, inputs: Sequence[Dyadic]) -> Dyadic:
    value, scale, shift = inputs[0], node.param("scale"), node.param("shift")
    value = value if scale is None else value * Dyadic.of(scale)
    return value if shift is None else value + Dyadic.of(shift)


def _add(node: NodeRecord, inputs: Sequence[Dyadic]) -> Dyadic:
    signs = node.attrs.get("signs")
    if not isinstance(signs, Sequence) or len(signs) != len(inputs):
        raise node.error(f"signs={signs!r}", "one sign per input")
    parts = [x * Dyadic.of([float(s)]) for s, x in zip(signs, inputs, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _gather(node: NodeRecord, inputs: Sequence[Dyadic]) -> Dyadic:
    index = np.asarray(node.attrs.get("index"), dtype=np.int64)
    x = inputs[0]
    return Dyadic(x.digits.reshape(len(x.digits), -1)[:, index], x.shift)


def _concat(node: NodeRecord, inputs: Sequence[Dyadic]) -> Dyadic:
    axis = node.attrs.get("axis")
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise node.error(f"axis={axis!r}", "an integer")
    shift = max(x.shift for x in inputs)
    along = axis % len(node.shape) + 1
    return Dyadic(np.concatenate([x.at(shift) for x in inputs], axis=along), shift)


_RULES: dict[str, Callable[[NodeRecord, Sequence[Dyadic]], Dyadic]] = {
    "linear": _linear,
    "relu": _rectify,
    "leaky_relu": _rectify,
    "abs": _rectify,
    "scale": _scale,
    "add": _add,
    "reshape": lambda node, inputs: inputs[0].reshape((len(inputs[0].digits), *node.shape)),
    "gather": _gather,
    "concat": _concat,
}
DYADIC_OPERATORS = frozenset(_RULES)


def evaluate_dyadic(network: NetworkRecord, points: npt.ArrayLike) -> Digits | None:
    """Flattened outputs (b, m) at inputs (b, n) in exact arithmetic on the stored weights.

    Returns:
        Fractions, or None when some operator is not in :data:`DYADIC_OPERATORS`.

    Raises:
        CertificateError: malformed network, or points that are not finite or do not fit.
    """
    nodes = read_nodes(network)
    if any(node.op not in _RULES for node in nodes[1:]):
        return None
    x = np.asarray(points, dtype=np.float64)
    if x.ndim != 2 or x.shape[1] != nodes[0].size or not np.isfinite(x).all():
        raise CertificateError(
            f"points: got shape {x.shape}, or entries that are not finite; expected finite "
            f"(b, {nodes[0].size})"
        )
    values = {nodes[0].name: Dyadic.of(x).reshape((len(x), *nodes[0].shape))}
    for node in nodes[1:]:
        value = _RULES[node.op](node, [values[name] for name in node.inputs])
        if value.digits.shape != (len(x), *node.shape):
            raise node.error(f"shape {value.digits.shape[1:]}", f"{node.shape}")
        values[node.name] = value
    return values[nodes[-1].name].reshape((len(x), -1)).fractions()
