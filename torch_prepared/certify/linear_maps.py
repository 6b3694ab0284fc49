"""Linear maps ``y = M x`` on flattened values, with their transposes and entrywise magnitudes.

A map is applied to a batch of vectors (``apply``) and pulls rows back (``transpose``:
``a -> a M``). ``magnitude()`` is the same map with every entry replaced by its absolute value.
``forward_terms`` and ``backward_terms`` are the lengths of the longest sums behind one entry of
``apply`` and ``transpose``; 0 says that the operation is exact (it only copies or negates).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from torch_prepared.certify.rounding import FloatArray, IntArray

__all__ = ["Conv", "Dense", "Diagonal", "LinearMap", "Sparse"]


_BLAS_SERIAL = 2**18  # multiplications up to which OpenBLAS stays on one thread
_FEWEST_ROWS = 16


class LinearMap(Protocol):
    """What the rest of the checker needs of a linear map from R^n to R^m."""

    @property
    def forward_terms(self) -> int:
        """Length of the longest sum in ``apply``."""

    @property
    def backward_terms(self) -> int:
        """Length of the longest sum in ``transpose``."""

    @property
    def workspace(self) -> int:
        """Scalars held at once per row by ``transpose``."""

    def apply(self, x: FloatArray) -> FloatArray:
        """``M x`` for x of shape (b, n); returns (b, m)."""

    def transpose(self, rows: FloatArray) -> FloatArray:
        """``a M`` for every row a of ``rows`` (r, m); returns (r, n)."""

    def magnitude(self) -> LinearMap:
        """The map with entries ``|M_ij|``."""


class Dense:
    """``x @ weight.T`` over the last axis of a value of shape (positions, n)."""

    def __init__(self, weight: FloatArray, positions: int = 1) -> None:
        self.weight = np.ascontiguousarray(weight)
        self.positions = positions
        out_size, in_size = weight.shape
        self.forward_terms, self.backward_terms = in_size, out_size
        self.workspace = positions * max(out_size, in_size)

    def apply(self, x: FloatArray) -> FloatArray:
        """See :class:`LinearMap`."""
        flat = x.reshape(x.shape[0] * self.positions, self.weight.shape[1])
        return _product(flat, self.weight.T).reshape(x.shape[0], -1)

    def transpose(self, rows: FloatArray) -> FloatArray:
        """See :class:`LinearMap`."""
        flat = rows.reshape(-1, self.weight.shape[0])
        return _product(flat, self.weight).reshape(len(rows), -1)

    def magnitude(self) -> Dense:
        """See :class:`LinearMap`."""
        return Dense(np.abs(self.weight), self.positions)


def _product(left: FloatArray, right: FloatArray) -> FloatArray:
    """``left @ right``, as a stack of products so small that BLAS starts no threads for them.

    Starting threads costs more than it gains where matrices are small and calls are many.
    """
    out: FloatArray = np.empty((len(left), right.shape[1]))
    block = _BLAS_SERIAL // right.size
    whole = len(left) // block * block if block >= _FEWEST_ROWS else 0
    if whole:
        stack = left[:whole].reshape(whole // block, block, -1)
        np.matmul(stack, right, out=out[:whole].reshape(whole // block, block, -1))
    np.matmul(left[whole:], right, out=out[whole:])
    return out


class Diagonal:
    """``x * factor`` with one factor per entry, or one scalar for all."""

    def __init__(self, factor: FloatArray, size: int) -> None:
        self.factor = factor
        self.size = size
        exact = bool(np.all(np.abs(factor) == 1.0))
        self.forward_terms = self.backward_terms = 0 if exact else 1
        self.workspace = size

    def apply(self, x: FloatArray) -> FloatArray:
        """See :class:`LinearMap`."""
        return x * self.factor

    def transpose(self, rows: FloatArray) -> FloatArray:
        """See :class:`LinearMap`."""
        return rows * self.factor

    def magnitude(self) -> Diagonal:
        """See :class:`LinearMap`."""
        return Diagonal(np.abs(self.factor), self.size)


class _Reduction:
    """``out[t] = sum of values[i] * x[source[i]]`` over all i with ``target[i] == t``."""

    def __init__(self, target: IntArray, source: IntArray, values: FloatArray, size: int) -> None:
        order = np.argsort(target, kind="stable")
        target, self._source, self._values = target[order], source[order], values[order]
        self._unique, self._starts, counts = np.unique(
            target, return_index=True, return_counts=True
        )
        self._size = size
        exact = bool(np.all(np.abs(values) == 1.0))
        longest = int(counts.max(initial=0))
        self.terms = 0 if exact and longest <= 1 else longest

    def __call__(self, x: FloatArray) -> FloatArray:
        out = np.zeros((*x.shape[:-1], self._size))
        if self._unique.size:
            products = x[..., self._source] * self._values
            out[..., self._unique] = np.add.reduceat(products, self._starts, axis=-1)
        return out


class Sparse:
    """A map given by its non-zero entries: gathers, placements, sums and average pools."""

    def __init__(
        self, rows: IntArray, columns: IntArray, values: FloatArray, shape: tuple[int, int]
    ) -> None:
        self._entries = (rows, columns, values)
        self.shape = shape
        self._forward = _Reduction(rows, columns, values, shape[0])
        self._backward = _Reduction(columns, rows, values, shape[1])
        self.forward_terms = self._forward.terms
        self.backward_terms = self._backward.terms
        self.workspace = max(*shape, len(rows))

    def apply(self, x: FloatArray) -> FloatArray:
        """See :class:`LinearMap`."""
        return self._forward(x)

    def transpose(self, rows: FloatArray) -> FloatArray:
        """See :class:`LinearMap`."""
        return self._backward(rows)

    def magnitude(self) -> Sparse:
        """See :class:`LinearMap`."""
        rows, columns, values = self._entries
        return Sparse(rows, columns, np.abs(values), self.shape)


class Conv:
    """2-d cross-correlation with groups, stride, dilation and asymmetric zero padding.

    Args:
        weight: (o, i / groups, kh, kw).
        in_shape: (i, height, width).
        out_shape: (o, height', width').
        stride: two steps.
        padding: begins then ends, (top, left, bottom, right).
        dilation: two spacings.
        groups: number of independent blocks of channels.
    """

    def __init__(
        self,
        weight: FloatArray,
        in_shape: tuple[int, int, int],
        out_shape: tuple[int, int, int],
        *,
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> None:
        self.weight, self.in_shape, self.out_shape = weight, in_shape, out_shape
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups = groups
        taps = weight.shape[2] * weight.shape[3]
        self._matrix = np.ascontiguousarray(
            weight.reshape(groups, weight.shape[0] // groups, weight.shape[1] * taps)
        )
        self.forward_terms = weight.shape[1] * taps
        self.backward_terms = weight.shape[0] // groups * taps
        self.workspace = in_shape[0] * taps * out_shape[1] * out_shape[2]

    def _slices(self) -> list[tuple[int, int, slice, slice]]:
        """For each kernel tap the padded input positions that it meets."""
        (_, height, width), (sy, sx), (dy, dx) = self.out_shape, self.stride, self.dilation
        return [
            (
                ky,
                kx,
                slice(ky * dy, ky * dy + sy * (height - 1) + 1, sy),
                slice(kx * dx, kx * dx + sx * (width - 1) + 1, sx),
            )
            for ky in range(self.weight.shape[2])
            for kx in range(self.weight.shape[3])
        ]

    def apply(self, x: FloatArray) -> FloatArray:
        """See :class:`LinearMap`."""
        batch, (channels, _, _) = x.shape[0], self.in_shape
        top, left, bottom, right = self.padding
        padded = np.pad(
            x.reshape(batch, *self.in_shape), ((0, 0), (0, 0), (top, bottom), (left, right))
        )
        _, _, kh, kw = self.weight.shape
        columns: FloatArray = np.empty((batch, channels, kh, kw, *self.out_shape[1:]))
        for ky, kx, ys, xs in self._slices():
            columns[:, :, ky, kx] = padded[:, :, ys, xs]
        columns = columns.reshape(batch, self.groups, self._matrix.shape[2], -1)
        out: FloatArray = np.matmul(self._matrix, columns).reshape(batch, -1)
        return out

    def transpose(self, rows: FloatArray) -> FloatArray:
        """See :class:`LinearMap`."""
        count = len(rows)
        channels, height, width = self.in_shape
        top, left, bottom, right = self.padding
        _, _, kh, kw = self.weight.shape
        blocks = rows.reshape(count, self.groups, self._matrix.shape[1], -1)
        columns: FloatArray = np.matmul(self._matrix.transpose(0, 2, 1), blocks)
        columns = columns.reshape(count, channels, kh, kw, *self.out_shape[1:])
        out = np.zeros((count, channels, height + top + bottom, width + left + right))
        for ky, kx, ys, xs in self._slices():
            out[:, :, ys, xs] += columns[:, :, ky, kx]
        cropped: FloatArray = out[:, :, top : top + height, left : left + width]
        return cropped.reshape(count, -1)

    def magnitude(self) -> Conv:
        """See :class:`LinearMap`."""
        return Conv(
            np.abs(self.weight),
            self.in_shape,
            self.out_shape,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
