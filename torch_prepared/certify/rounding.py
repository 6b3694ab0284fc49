"""A-priori rounding bounds for float64: the arithmetic the checker's soundness rests on.

Everything here follows from the standard model: ``fl(a op b) = (a op b)(1 + d) + e`` with
``|d| <= u = 2**-53`` and ``|e| <= 2**-1022`` (the latter also covers flush-to-zero). A sum of k
products, in any order and with or without fused operations, is off by at most
``g_k * sum |a_i b_i| + k * 2**-1022`` where ``g_k = k u / (1 - k u)`` (Higham, Accuracy and
Stability of Numerical Algorithms, 2002, section 3.1). All constants are at least doubled, so that
the rounding of the error terms themselves never matters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "INFLATION",
    "UNDERFLOW",
    "UNIT",
    "UNIT_FLOAT32",
    "BoolArray",
    "FloatArray",
    "IntArray",
    "gamma",
    "row_dot",
    "sum_below",
]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

UNIT = 2.0**-53
UNIT_FLOAT32 = 2.0**-24
UNDERFLOW = 2.0**-900
"""Stands for any sum of up to 2**100 underflow errors of 2**-1022, each times a factor <= 2**20."""

INFLATION = 1.0 + 2.0**-20
"""Covers the rounding of a non-negative sum of fewer than 2**30 terms used as an error term."""

_SPARE = 16  # extra roundings granted to every sum: bias, entry errors (at most 8 u), final adds


def gamma(terms: int, unit: float = UNIT) -> float:
    """Twice ``g_(terms + 16)``: relative error bound of a sum of ``terms`` products.

    Args:
        terms: length of the sum; 0 stands for an exact operation and gives 0.
        unit: unit roundoff of the arithmetic.

    Returns:
        The bound, or infinity when the sum is too long for the theory.
    """
    if terms == 0:
        return 0.0
    total = (terms + _SPARE) * unit
    return 2.0 * total / (1.0 - total) if total < 0.25 else float("inf")


def row_dot(rows: FloatArray, vectors: FloatArray, boxes: IntArray) -> FloatArray:
    """Products ``rows[i] @ vectors[boxes[i]]``.

    Args:
        rows: (r, n).
        vectors: (b, n), one for every box.
        boxes: (r,) which box a row belongs to.

    Returns:
        (r,), in plain rounded arithmetic.
    """
    out: FloatArray
    if len(vectors) == 1:
        out = np.einsum("rn,n->r", rows, vectors[0])
    else:
        out = np.einsum("rn,rn->r", rows, vectors.take(boxes, axis=0))
    return out


def sum_below(*terms: FloatArray) -> FloatArray:
    """A lower bound of the exact sum of the (broadcast) ``terms``.

    With k terms the computed sum is off by at most ``(k - 1) u' sum |t_i|`` and the final
    subtraction by about ``u sum |t_i|``; ``2 (k + 2) u`` covers both.
    """
    total, size = terms[0], np.abs(terms[0])
    for term in terms[1:]:
        total = total + term
        size = size + np.abs(term)
    return total - (2.0 * (len(terms) + 2) * UNIT * size + UNDERFLOW)
