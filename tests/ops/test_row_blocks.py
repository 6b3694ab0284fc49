"""Operators on rows handle several at once in whole vectors: no row may notice."""

from __future__ import annotations

import pytest
import torch

from torch_prepared import ops

SIZES = [1, 3, 7, 8, 15, 16, 17, 31, 50, 64, 515, 4099]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
def test_rows_do_not_depend_on_their_neighbors(size: int, dtype: torch.dtype) -> None:
    """Equal to the last bit, however many rows share the coefficients."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(2, 11, size, generator=generator, dtype=dtype)
    lines = [torch.rand(2, size, generator=generator, dtype=dtype) for _ in range(4)]
    out, bias = ops.relaxed_backward(rows, *lines)
    bound = ops.concretize(rows, *lines[:2])
    for first, last in ((0, 1), (2, 5), (6, 11)):
        part = rows[:, first:last]
        alone, alone_bias = ops.relaxed_backward(part, *lines)
        assert torch.equal(alone, out[:, first:last])
        assert torch.equal(alone_bias, bias[:, first:last])
        assert torch.equal(ops.concretize(part, *lines[:2]), bound[:, first:last])


@pytest.mark.parametrize("layout", [(3, 1), (1, 6), (3, 6)])
@pytest.mark.parametrize("size", SIZES)
def test_any_layout_agrees_with_binary64(size: int, layout: tuple[int, int]) -> None:
    """Sums of n terms within n roundings of their magnitudes, single entries within one."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(3, 6, size, generator=generator)
    lines = [torch.rand(*layout, size, generator=generator) for _ in range(4)]
    out, bias = ops.relaxed_backward(rows, *lines)
    wide, lower, upper = rows.double(), *(lines[k].double() for k in (1, 3))
    slope = torch.where(rows >= 0, lines[0], lines[2])
    assert torch.equal(out, rows * slope)
    terms = wide * torch.where(rows >= 0, lower, upper)
    slack = 2.0**-24 * (size + 1) * terms.abs().sum(-1)
    assert bool(((bias.double() - terms.sum(-1)).abs() <= slack).all())


@pytest.mark.parametrize("size", [17, 50])
def test_an_infinite_radius_gives_no_bound_and_no_nan(size: int) -> None:
    rows, center, radius = torch.ones(1, 5, size), torch.zeros(1, size), torch.ones(1, size)
    for column in range(size):
        wide = radius.clone()
        wide[0, column] = torch.inf
        assert bool((ops.concretize(rows, center, wide) == -torch.inf).all())
