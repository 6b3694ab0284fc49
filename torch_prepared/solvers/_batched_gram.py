"""Gram matrices ``G = R R^T`` of a batch of projections, formed only as far as they are asked for.

The dual of a projection needs products ``G x`` and blocks of G on the few rows that matter.
With many more rows than columns a block costs least from its own rows; with many long rows those
entries are formed that some block has named, which most rows never are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from torch_prepared.solvers._complementarity import self_product

__all__ = [
    "DenseGram",
    "Gram",
    "RowsGram",
    "batch_indices",
    "compress",
    "take_block",
    "worthwhile",
]

_MANY = 256  #: rows or columns, beyond which computing an entry twice costs more than keeping it


class Gram(ABC):
    """Symmetric positive semidefinite matrices (b, m, m), float64."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Square roots of the diagonal, (b, m)."""

    @abstractmethod
    def scaled(self, scale: Tensor, dead: Tensor) -> Gram:
        """``S G S`` with ``S = diag(scale)``, plus 1 on the diagonal where ``dead``; (b, m)."""

    @abstractmethod
    def times(self, x: Tensor) -> Tensor:
        """``G x``, (b, m) from (b, m)."""

    @abstractmethod
    def block(self, index: Tensor, valid: Tensor) -> Tensor:
        """Rows and columns ``index`` (b, k), the identity where not ``valid``; the caller's own.

        Padding, where not valid, names other rows, each once (see :func:`compress`).
        """

    @abstractmethod
    def take(self, samples: Tensor) -> Gram:
        """Some of the samples."""

    @abstractmethod
    def whole(self) -> Tensor:
        """All of it, (b, m, m)."""

    @property
    def rank(self) -> int | None:
        """A bound on the rank; None: the number of rows."""
        return None

    def root(self) -> Tensor | None:
        """(b, m, n) with ``G = root @ root.T`` where one with n < m is known."""
        return None


class DenseGram(Gram):
    """A matrix that is there."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    def norms(self) -> Tensor:
        return self._matrix.diagonal(dim1=1, dim2=2).sqrt()

    def scaled(self, scale: Tensor, dead: Tensor) -> DenseGram:
        unit = (self._matrix * scale[:, :, None]).mul_(scale[:, None, :])
        unit.diagonal(dim1=1, dim2=2).add_(dead.to(unit))
        return DenseGram(unit)

    def times(self, x: Tensor) -> Tensor:
        return (self._matrix @ x[:, :, None])[:, :, 0]

    def block(self, index: Tensor, valid: Tensor) -> Tensor:
        return take_block(self._matrix, index, valid)

    def take(self, samples: Tensor) -> DenseGram:
        return DenseGram(self._matrix[samples])

    def whole(self) -> Tensor:
        return self._matrix


class _Entries:
    """Entries of ``R R^T`` formed so far, for R (b, m, n)."""

    def __init__(self, rows: Tensor, known: Tensor | None = None) -> None:
        self.rows = rows
        self.known = rows.new_zeros(rows.shape[:2], dtype=torch.bool) if known is None else known
        self.matrix: Tensor | None = None

    def block(self, index: Tensor, valid: Tensor) -> Tensor:
        if not _few_columns(self.rows):
            return take_block(self._extended(index, valid), index, valid)
        picked = self.rows[batch_indices(index), index]
        picked = torch.where(valid[:, :, None], picked, 0.0)
        block = self_product(picked, picked)
        block.diagonal(dim1=1, dim2=2).add_((~valid).to(block))
        return block

    def take(self, samples: Tensor) -> _Entries:
        some = _Entries(self.rows[samples], self.known[samples])
        some.matrix = None if self.matrix is None else self.matrix[samples]
        return some

    def _extended(self, index: Tensor, valid: Tensor) -> Tensor:
        """The matrix, right wherever two rows asked for now or earlier meet."""
        count, m, _ = self.rows.shape
        first = self.matrix is None
        matrix = self.rows.new_empty(count, m, m) if self.matrix is None else self.matrix
        self.matrix = matrix
        asked = torch.zeros_like(self.known).scatter(1, index, valid)
        new, _ = compress(asked & ~self.known)
        self.known = self.known | asked
        if not new.shape[1]:
            return matrix
        each = batch_indices(index)
        fresh = self.rows[each, new]
        every = new if first else compress(self.known)[0]
        product = self_product(fresh, fresh) if first else fresh @ self.rows[each, every].mT
        # Padding writes entries that are right as well, only not yet known to be.
        matrix[each[:, :, None], new[:, :, None], every[:, None, :]] = product
        if not first:
            matrix[each[:, :, None], every[:, :, None], new[:, None, :]] = product.mT
        return matrix


class RowsGram(Gram):
    """``S R R^T S`` from R (b, m, n), plus 1 on the diagonal where ``dead``."""

    def __init__(
        self, rows: Tensor, *, scale: Tensor | None = None, dead: Tensor | None = None,
        entries: _Entries | None = None,
    ) -> None:  # fmt: skip
        self._entries = _Entries(rows) if entries is None else entries
        self._scale = scale
        self._dead = None if dead is None or not bool(dead.any()) else dead

    def norms(self) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(self._entries.rows, dim=2)
        return norms if self._scale is None else norms * self._scale

    def scaled(self, scale: Tensor, dead: Tensor) -> RowsGram:
        both = scale if self._scale is None else scale * self._scale
        return RowsGram(self._entries.rows, scale=both, dead=dead, entries=self._entries)

    def times(self, x: Tensor) -> Tensor:
        rows = self._entries.rows
        inner = x if self._scale is None else x * self._scale
        image = (rows @ (inner[:, None, :] @ rows).mT)[:, :, 0]
        image = image if self._scale is None else image * self._scale
        return image if self._dead is None else image + torch.where(self._dead, x, 0.0)

    def block(self, index: Tensor, valid: Tensor) -> Tensor:
        block = self._entries.block(index, valid)
        if self._scale is not None:
            scale = torch.where(valid, self._scale.gather(1, index), 1.0)
            block.mul_(scale[:, :, None]).mul_(scale[:, None, :])
        if self._dead is not None:
            block.diagonal(dim1=1, dim2=2).add_((self._dead.gather(1, index) & valid).to(block))
        return block

    def take(self, samples: Tensor) -> RowsGram:
        entries = self._entries.take(samples)
        scale, dead = (None if v is None else v[samples] for v in (self._scale, self._dead))
        return RowsGram(entries.rows, scale=scale, dead=dead, entries=entries)

    def whole(self) -> Tensor:
        rows = self._scaled_rows()
        matrix = self_product(rows, rows)
        if self._dead is not None:
            matrix.diagonal(dim1=1, dim2=2).add_(self._dead.to(matrix))
        return matrix

    @property
    def rank(self) -> int | None:
        _, m, n = self._entries.rows.shape
        return n if n < m and self._dead is None else None

    def root(self) -> Tensor | None:
        return None if self.rank is None else self._scaled_rows()

    def _scaled_rows(self) -> Tensor:
        rows = self._entries.rows
        return rows if self._scale is None else rows * self._scale[:, :, None]


def worthwhile(rows: Tensor) -> bool:
    """Whether a :class:`RowsGram` of these rows (b, m, n) beats forming G."""
    return _few_columns(rows) or rows.shape[1] > _MANY


def _few_columns(rows: Tensor) -> bool:
    """Whether a block costs less to compute than to keep."""
    return rows.shape[2] <= min(rows.shape[1] // 2, _MANY)


def compress(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the true entries of each row of ``mask`` (b, m), padded to the longest row.

    Returns:
        ``index`` (b, k) and ``valid`` (b, k); padding points at false entries, each once.
    """
    width = int(mask.sum(1).max()) if mask.numel() else 0
    index = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)[:, :width]
    return index, mask.gather(1, index)


def batch_indices(index: Tensor) -> Tensor:
    """(b, 1), to index the batch axis beside ``index`` (b, k)."""
    return torch.arange(len(index), device=index.device)[:, None]


def take_block(gram: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Rows and columns ``index`` (b, k) of ``gram`` (b, m, m); the identity where not valid."""
    if len(index) == 1:  # no padding, and much faster one axis at a time
        return gram[0].index_select(0, index[0]).index_select(1, index[0])[None]
    each = batch_indices(index)[:, :, None]
    block = gram[each, index[:, :, None], index[:, None, :]]
    block = torch.where(valid[:, :, None] & valid[:, None, :], block, 0.0)
    block.diagonal(dim1=1, dim2=2).add_((~valid).to(block))
    return block
