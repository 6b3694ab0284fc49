"""chain_slopes: the native kernel against the plain-torch oracle, and its promises."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.rounding import rounding_slack
from torch_prepared import ops
from torch_prepared.core.interval import Interval
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.ops._reference_chain import chain_slopes_reference

pytestmark = pytest.mark.skipif(not ops.build_info().native, reason="no native extension")

SIZES = [(3, 12, 12, 12, 2), (5, 20, 33, 20, 4), (2, 7, 1), (4, 3)]


def case(sizes: tuple[int, ...], dtype: torch.dtype, boxes: int = 12, radius: float = 0.4):
    generator = torch.Generator().manual_seed(len(sizes) + sizes[0])

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = [draw(m, n) / n**0.5 for n, m in pairwise(sizes)]
    biases = [0.3 * draw(m) for m in sizes[1:]]
    center = draw(boxes, sizes[0])
    row = torch.arange(boxes) % 3
    box = center - radius, center + radius
    return box, weights, biases, draw(3, sizes[-1]), row, sum(sizes[1:-1])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize("momentum", [(0.4, 0.9), (0.9, 0.999), (0.0, 0.0)])
def test_the_kernel_agrees_with_the_oracle(
    sizes: tuple[int, ...], iterations: int, momentum: tuple[float, float]
) -> None:
    box, weights, biases, rows, row, hidden = case(sizes, torch.float64)
    given = torch.rand(12, hidden, generator=torch.Generator().manual_seed(0)).double()
    given[::2] = -1.0
    enough = torch.full((12,), torch.inf, dtype=torch.float64)
    got = ops.chain_slopes(
        *box, weights, biases, rows, row, enough, given, iterations, 0.5, 0.8, momentum
    )
    expected = chain_slopes_reference(
        *box,
        weights,
        biases,
        rows,
        row,
        enough,
        given,
        iterations,
        0.5,
        0.8,
        *momentum,
        ops.SLOPE_LEVELS,
        ops.SLOPE_PATIENCE,
    )
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_without_slopes_the_bounds_are_those_of_chain_bounds() -> None:
    box, weights, biases, rows, row, hidden = case(SIZES[1], torch.float32)
    given = torch.full((12, hidden), -1.0)
    _, values, inputs = ops.chain_slopes(*box, weights, biases, rows, row, row.float(), given, 0)
    usual = ops.chain_bounds(*box, weights, biases, rows)
    assert torch.equal(values, usual[0])
    assert torch.equal(inputs, usual[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_steps_raise_the_wanted_row(dtype: torch.dtype) -> None:
    box, weights, biases, rows, row, hidden = case(SIZES[1], dtype, boxes=60)
    given, enough = torch.full((60, hidden), -1.0, dtype=dtype), torch.full((60,), 1e9, dtype=dtype)
    means = []
    for iterations in (0, 2, 10):
        slopes, values, _ = ops.chain_slopes(
            *box, weights, biases, rows, row, enough, given, iterations, 0.3, 0.9
        )
        assert bool(((slopes >= 0) & (slopes <= 1) | (slopes == -1)).all())
        means.append(float(values.gather(1, row[:, None]).mean()))
    assert means == sorted(means)
    assert means[2] > means[0]


def test_values_are_bounds_at_any_slopes() -> None:
    """Against samples; binary64, where what rounding may change is of no account."""
    box, weights, biases, rows, row, hidden = case(SIZES[1], torch.float64, boxes=60)
    given = torch.rand(60, hidden, generator=torch.Generator().manual_seed(0)).double()
    enough = torch.full((60,), torch.inf, dtype=torch.float64)
    slack = rounding_slack(weights, biases, rows, Interval(*box))
    assert float(slack.max()) < 1e-9
    share = torch.rand(50, *box[0].shape, generator=torch.Generator().manual_seed(1)).double()
    x = box[0] + (box[1] - box[0]) * share
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = torch.relu(x @ weight.T + bias)
    y = (x @ weights[-1].T + biases[-1]) @ rows.T
    for iterations in (0, 5):
        values = ops.chain_slopes(*box, weights, biases, rows, row, enough, given, iterations)[1]
        assert bool((values - slack <= y).all())


def test_single_precision_moves_bounds_by_rounding_only() -> None:
    box, weights, biases, rows, row, hidden = case(SIZES[1], torch.float32, boxes=60)
    given = torch.rand(60, hidden, generator=torch.Generator().manual_seed(0))
    got = ops.chain_slopes(*box, weights, biases, rows, row, row.float(), given, 0)[1]
    wide = [[part.double() for part in parts] for parts in (box, weights, biases, [rows])]
    expected = ops.chain_slopes(
        *wide[0], *wide[1:3], *wide[3], row, row.double(), given.double(), 0
    )[1]
    slack = rounding_slack(weights, biases, rows, Interval(*box))
    assert bool(((got.double() - expected).abs() <= slack).all())


def test_boxes_do_not_depend_on_each_other_and_nan_proves_nothing() -> None:
    box, weights, biases, rows, row, hidden = case(SIZES[0], torch.float32)
    given, enough = torch.full((12, hidden), -1.0), torch.full((12,), 1e9)
    whole = ops.chain_slopes(*box, weights, biases, rows, row, enough, given, 3)
    alone = ops.chain_slopes(
        box[0][5:6], box[1][5:6], weights, biases, rows, row[5:6], enough[5:6], given[5:6], 3
    )
    for one, other in zip(whole, alone, strict=True):
        assert torch.equal(one[5:6], other)
    broken = box[0].clone()
    broken[4, 0] = torch.nan
    got = ops.chain_slopes(broken, box[1], weights, biases, rows, row, enough, given, 3)[1]
    assert bool(got[4].isnan().all())
    assert torch.equal(got[5], whole[1][5])
    empty = ops.chain_slopes(
        box[0][:0], box[1][:0], weights, biases, rows, row[:0], enough[:0], given[:0], 3
    )
    assert [tuple(part.shape) for part in empty] == [(0, hidden), (0, 3), (0, 3, 3)]


def test_misfits_are_named() -> None:
    box, weights, biases, rows, row, hidden = case(SIZES[0], torch.float32)
    given, enough = torch.full((12, hidden), -1.0), torch.zeros(12)
    with pytest.raises(RuntimeError, match="argument 'slopes'"):
        ops.chain_slopes(*box, weights, biases, rows, row, enough, given[:, 1:])
    with pytest.raises(RuntimeError, match="argument 'row'"):
        ops.chain_slopes(*box, weights, biases, rows, row + 3, enough, given)
    with pytest.raises(RuntimeError, match="argument 'row'"):
        ops.chain_slopes(*box, weights, biases, rows, row.int(), enough, given)
    with pytest.raises(RuntimeError, match="argument 'enough'"):
        ops.chain_slopes(*box, weights, biases, rows, row, enough[1:], given)
    chain = torch.ops.torch_prepared.chain_slopes
    with pytest.raises(RuntimeError, match="argument 'levels'"):
        chain(*box, weights, biases, rows, row, enough, given, 1, 0.5, 0.8, 0.4, 0.9, 0, 2)
    slopes = given.clone().requires_grad_()
    with pytest.raises(UnsupportedOperationError, match="gradient"):
        ops.chain_slopes(*box, weights, biases, rows, row, enough, slopes)[1].sum().backward()


def test_the_operator_passes_opcheck() -> None:
    box, weights, biases, rows, row, hidden = case(SIZES[0], torch.float64)
    given, enough = torch.full((12, hidden), -1.0).double(), torch.zeros(12).double()
    torch.library.opcheck(
        torch.ops.torch_prepared.chain_slopes,
        (*box, weights, biases, rows, row, enough, given, 2, 0.5, 0.8, 0.4, 0.9, 254, 2),
    )
