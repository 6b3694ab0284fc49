"""Gram matrices formed in part agree with the whole one."""

import pytest
import torch
from torch import Tensor

from torch_prepared.solvers._batched_gram import (
    DenseGram,
    RowsGram,
    compress,
    take_block,
    worthwhile,
)

SHAPES = [(40, 8), (30, 50), (12, 12), (300, 290), (700, 300)]  #: m, n


def rows_of(m: int, n: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(m + n)
    return torch.randn(count, m, n, generator=generator, dtype=torch.float64)


def mask_of(m: int, seed: int, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, m, generator=generator) < share
    mask[1, : m // 2] = False  # so that blocks are padded
    return mask


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_blocks_asked_for_one_after_another_are_those_of_the_product(m: int, n: int) -> None:
    rows = rows_of(m, n)
    whole, gram = rows @ rows.mT, RowsGram(rows)
    for seed, share in ((0, 0.2), (1, 0.3), (0, 0.2), (2, 0.05), (3, 1.0)):
        index, valid = compress(mask_of(m, seed, share))
        block = gram.block(index, valid)
        torch.testing.assert_close(block, take_block(whole, index, valid), rtol=0.0, atol=1e-12 * n)
        block.zero_()  # the caller's own: the next blocks do not notice


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_scaled_products_agree_with_the_dense_ones(m: int, n: int) -> None:
    rows = rows_of(m, n)
    rows[0, 1] = 0.0
    norms = RowsGram(rows).norms()
    dead = norms == 0.0
    scale = torch.where(dead, 0.0, 1.0 / norms)
    sparse, dense = (
        gram.scaled(scale, dead) for gram in (RowsGram(rows), DenseGram(rows @ rows.mT))
    )
    torch.testing.assert_close(DenseGram(rows @ rows.mT).norms(), norms)
    x = torch.rand(3, m, dtype=torch.float64)
    torch.testing.assert_close(sparse.times(x), dense.times(x))
    torch.testing.assert_close(sparse.whole(), dense.whole())
    samples = torch.tensor([2, 0])
    index, valid = compress(mask_of(m, 4, 0.2)[samples])
    sparse.block(*compress(mask_of(m, 5, 0.2)))
    torch.testing.assert_close(
        sparse.take(samples).block(index, valid), dense.take(samples).block(index, valid)
    )
    torch.testing.assert_close(sparse.take(samples).times(x[samples]), dense.times(x)[samples])


def test_root_is_offered_only_where_it_is_smaller_and_whole() -> None:
    tall, wide = rows_of(9, 4), rows_of(4, 9)
    live = torch.zeros(3, 9, dtype=torch.bool)
    scale = torch.full((3, 9), 2.0, dtype=torch.float64)
    root = RowsGram(tall).scaled(scale, live).root()
    assert root is not None
    torch.testing.assert_close(root, 2.0 * tall)
    assert RowsGram(tall).rank == 4
    assert RowsGram(wide).root() is None
    assert RowsGram(wide).rank is None
    assert RowsGram(tall).scaled(scale, ~live).root() is None  # a unit diagonal was added
    assert DenseGram(tall @ tall.mT).root() is None


def test_small_square_problems_keep_their_matrix() -> None:
    assert not worthwhile(rows_of(30, 50))
    assert worthwhile(rows_of(40, 8))
    assert worthwhile(rows_of(300, 290))
