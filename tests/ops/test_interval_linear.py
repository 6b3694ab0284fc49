from fractions import Fraction

import pytest
import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.ops._reference import interval_linear_reference


def make(
    sizes: tuple[int, int, int], device: str, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, n, m = sizes
    lower = torch.randn(b, n, device=device, dtype=dtype) * scale
    upper = lower + torch.rand_like(lower) * torch.randint(0, 2, (b, n), device=device)
    weight = torch.randn(m, n, device=device, dtype=dtype)
    return lower, upper, weight, torch.randn(m, device=device, dtype=dtype)


def exact(row: list[float], bias: float, low: list[float], high: list[float]) -> list[Fraction]:
    """Both ends of the exact image of one output, in rational arithmetic."""
    ends = [Fraction(bias), Fraction(bias)]
    for w, a, z in zip(row, low, high, strict=True):
        products = Fraction(w) * Fraction(a), Fraction(w) * Fraction(z)
        ends[0] += min(products)
        ends[1] += max(products)
    return ends


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e6])
@pytest.mark.parametrize("sizes", [(2, 7, 3), (1, 1, 1), (2, 60, 4)], ids=str)
def test_encloses_the_exact_image_with_no_slack(
    sizes: tuple[int, int, int], scale: float, device: str, dtype: torch.dtype
) -> None:
    lower, upper, weight, bias = make(sizes, device, dtype, scale)
    for operator in (ops.interval_linear, interval_linear_reference):
        low, high = operator(lower, upper, weight, bias)
        for i in range(sizes[0]):
            for j in range(sizes[2]):
                ends = exact(
                    weight[j].tolist(), float(bias[j]), lower[i].tolist(), upper[i].tolist()
                )
                assert Fraction(float(low[i, j])) <= ends[0]
                assert Fraction(float(high[i, j])) >= ends[1]


def test_is_tight(device: str, dtype: torch.dtype) -> None:
    lower, upper, weight, bias = make((8, 50, 20), device, dtype)
    low, high = ops.interval_linear(lower, upper, weight, bias)
    plus, minus = weight.double().clamp(min=0), weight.double().clamp(max=0)
    expected = lower.double() @ plus.T + upper.double() @ minus.T + bias.double()
    slack = (expected - low.double()).max()
    assert float(slack) <= (5e-6 if dtype == torch.float32 else 1e-11)
    assert bool((low <= high).all())


def test_agrees_with_the_reference_without_bias(device: str, dtype: torch.dtype) -> None:
    lower, upper, weight, _ = make((5, 33, 9), device, dtype)
    actual = ops.interval_linear(lower, upper, weight)
    expected = interval_linear_reference(lower, upper, weight, None)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_strided_and_empty_inputs(device: str, dtype: torch.dtype) -> None:
    lower, upper, weight, bias = make((6, 8, 10), device, dtype)
    a = ops.interval_linear(lower[::2, ::2], upper[::2, ::2], weight[::2, ::2], bias[::2])
    dense = [t.contiguous() for t in (lower[::2, ::2], upper[::2, ::2], weight[::2, ::2])]
    e = ops.interval_linear(*dense, bias[::2].contiguous())
    assert all(torch.equal(x, y) for x, y in zip(a, e, strict=True))
    for b, n, m in ((0, 3, 2), (2, 0, 3), (2, 3, 0)):
        lower, upper, weight, bias = make((b, n, m), device, dtype)
        low, high = ops.interval_linear(lower, upper, weight, bias)
        assert low.shape == (b, m)
        assert bool((low <= bias).all())
        assert bool((high >= bias).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 5.0])
def test_bad_bounds_give_nan_not_a_proof(bad: float, device: str, dtype: torch.dtype) -> None:
    lower = torch.tensor([[bad, 0.0]], device=device, dtype=dtype)
    weight = torch.ones(1, 2, device=device, dtype=dtype)
    for operator in (ops.interval_linear, interval_linear_reference):
        low, high = operator(lower, torch.ones_like(lower), weight, None)
        assert bool(low.isnan().all())
        assert bool(high.isnan().all())


def test_gradcheck_and_opcheck(device: str) -> None:
    lower, upper, weight, bias = make((3, 4, 2), device, torch.float64)
    upper = upper + 0.1
    for argument in (lower, upper, weight, bias):
        argument.requires_grad_()
    assert torch.autograd.gradcheck(ops.interval_linear, (lower, upper, weight, bias))
    assert torch.autograd.gradcheck(ops.interval_linear, (lower, upper, weight))
    torch.library.opcheck(torch.ops.torch_prepared.interval_linear, (lower, upper, weight, bias))
    torch.library.opcheck(torch.ops.torch_prepared.interval_linear, (lower, upper, weight, None))
