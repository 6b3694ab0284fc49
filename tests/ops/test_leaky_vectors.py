"""Blocks of neurons give what single neurons give, bit by bit, however they are stored."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from torch_prepared import ops

pytestmark = pytest.mark.skipif(not ops.build_info().native, reason="no native library")
EDGES = [
    0.0, -0.0, 1.0, -1.0, 0.1, -0.1, 3.0, -7.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, -3e38,
    1e-30, -1e-30, 16777217.0, -16777215.0, torch.inf, -torch.inf, torch.nan,
]  # fmt: skip


def _lines(lower: Tensor, upper: Tensor, p: float, alpha: Tensor | None = None) -> Tensor:
    op = torch.ops.torch_prepared.activation_coefficients
    return torch.stack(op(lower, upper, "leaky_relu", p, alpha)[:4])


def _bits(lines: Tensor) -> Tensor:
    """Bit patterns, with one pattern for every NaN."""
    return torch.where(lines.isnan(), torch.nan, lines).view(torch.int32)


def _random(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    scale = 10.0 ** torch.randint(-12, 12, (count,), generator=generator)
    ends = torch.randn(2, count, generator=generator) * scale
    alpha = 1.5 * torch.rand(count, generator=generator) - 0.25
    return ends.amin(0), ends.amax(0), alpha


@pytest.mark.parametrize("p", [0.0, 0.1, 0.75, 1.0])
@pytest.mark.parametrize("slopes", [False, True])
def test_blocks_equal_single_neurons(p: float, slopes: bool) -> None:
    pairs = torch.tensor(list(itertools.product(EDGES, EDGES))).T
    more = _random(600)
    lower, upper = torch.cat([pairs[0], more[0]]), torch.cat([pairs[1], more[1]])
    alpha = torch.cat([pairs[0], more[2]]) if slopes else None
    together = _lines(lower, upper, p, alpha)
    ones = [
        _lines(lower[i : i + 1], upper[i : i + 1], p, None if alpha is None else alpha[i : i + 1])
        for i in range(len(lower))
    ]
    assert torch.equal(_bits(together), _bits(torch.cat(ones, dim=1)))


def test_invalid_neurons_are_counted_and_give_nan() -> None:
    lower, upper, _ = _random(100)
    lower[[3, 40, 97]] = torch.tensor([torch.nan, torch.inf, 1e30])
    upper[[40, 97]] = torch.tensor([-torch.inf, -1e30])
    *lines, errors = torch.ops.torch_prepared.activation_coefficients(
        lower, upper, "relu", 0.0, None
    )
    assert int(errors) == 3
    for line in lines:
        assert line.isnan().nonzero().flatten().tolist() == [3, 40, 97]


def test_outputs_beyond_every_cache_equal_small_ones() -> None:
    count = (32 << 20) // 16 + 37  # bytes of outputs from which they go around the cache
    lower, upper, alpha = _random(count)
    for slopes in (None, alpha):
        whole = _lines(lower, upper, 0.1, slopes)
        parts = [
            _lines(lower[part], upper[part], 0.1, None if slopes is None else slopes[part])
            for part in (slice(first, first + 500_000) for first in range(0, count, 500_000))
        ]
        assert torch.equal(_bits(whole), _bits(torch.cat(parts, dim=1)))
