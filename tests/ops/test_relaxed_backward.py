import pytest
import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.ops._reference import (
    relaxed_backward_grad_reference,
    relaxed_backward_reference,
)

SHAPES = [(2, 3, 5), (3, 70, 50), (1, 1, 1), (2, 9, 4096), (4, 1, 33), (5, 140, 3), (2, 8, 1001)]
KINDS = ["b n", "1 n", "b s n", "1 s n"]


def make_rows(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def make_coefficients(rows: Tensor, kind: str) -> list[Tensor]:
    b, s, n = rows.shape
    shape = {"b n": (b, n), "1 n": (1, n), "b s n": (b, s, n), "1 s n": (1, s, n)}[kind]
    return [torch.randn(shape, device=rows.device, dtype=rows.dtype) for _ in range(4)]


def expand(coefficients: list[Tensor]) -> list[Tensor]:
    return [c.unsqueeze(1) if c.dim() == 2 else c for c in coefficients]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(
    shape: tuple[int, int, int], kind: str, device: str, dtype: torch.dtype
) -> None:
    rows = make_rows(shape, device, dtype)
    coefficients = make_coefficients(rows, kind)
    out, bias = ops.relaxed_backward(rows, *coefficients)
    expected, expected_bias = relaxed_backward_reference(rows, *expand(coefficients))
    assert torch.equal(out, expected)
    torch.testing.assert_close(
        bias, expected_bias, atol=1e-3 if dtype == torch.float32 else 1e-11, rtol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_agrees_with_the_reference(
    shape: tuple[int, int, int], kind: str, device: str, dtype: torch.dtype
) -> None:
    rows = make_rows(shape, device, dtype)
    coefficients = expand(make_coefficients(rows, kind))
    grads = torch.randn_like(rows), torch.randn_like(rows[..., 0])
    actual = torch.ops.torch_prepared.relaxed_backward_grad(*grads, rows, *coefficients)
    expected = relaxed_backward_grad_reference(*grads, rows, *coefficients)
    tolerance = {"atol": 1e-3, "rtol": 1e-4} if dtype == torch.float32 else {}
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


def test_coefficients_may_have_different_shapes(device: str) -> None:
    rows = make_rows((2, 3, 4), device, torch.float64)
    slope, offset = make_coefficients(rows, "b s n")[0], make_coefficients(rows, "1 n")[0]
    one = torch.ones(1, 1, device=device, dtype=torch.float64)
    out, bias = ops.relaxed_backward(rows, slope, offset, one, one * 0)
    torch.testing.assert_close(out, rows.clamp(min=0) * slope + rows.clamp(max=0))
    torch.testing.assert_close(bias, (rows.clamp(min=0) * offset).sum(-1))


def test_strided_inputs(device: str, dtype: torch.dtype) -> None:
    rows = make_rows((4, 6, 10), device, dtype).transpose(0, 2)[::2, :, 1:]
    coefficients = [c.T for c in make_coefficients(rows.transpose(0, 2), "b n")]
    coefficients = [torch.randn(3, 10, device=device, dtype=dtype)[:, ::2].T for _ in range(4)]
    assert not rows.is_contiguous()
    assert not coefficients[0].is_contiguous()
    out, bias = ops.relaxed_backward(rows, *coefficients)
    expected, expected_bias = relaxed_backward_reference(rows, *expand(coefficients))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(bias, expected_bias)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_inputs(shape: tuple[int, int, int], device: str, dtype: torch.dtype) -> None:
    rows = make_rows(shape, device, dtype).requires_grad_()
    out, bias = ops.relaxed_backward(rows, *make_coefficients(rows, "b n"))
    assert out.shape == shape
    assert torch.equal(bias, torch.zeros(shape[:2], device=device, dtype=dtype))
    (out.sum() + bias.sum()).backward()
    assert rows.grad is not None
    assert rows.grad.shape == shape


def test_unselected_coefficients_never_contribute(device: str) -> None:
    rows = torch.tensor([[[1.0, -1.0]]], device=device)
    bad = float("nan")
    lower = torch.tensor([[0.5, bad]], device=device)
    upper = torch.tensor([[bad, 0.25]], device=device)
    out, bias = ops.relaxed_backward(rows, lower, lower, upper, upper)
    assert out.tolist() == [[[0.5, -0.25]]]
    assert bias.tolist() == [[0.25]]


def test_nan_stays_visible(device: str) -> None:
    rows = torch.full((1, 1, 3), float("nan"), device=device)
    out, bias = ops.relaxed_backward(rows, *make_coefficients(rows, "b n"))
    assert bool(out.isnan().all())
    assert bool(bias.isnan().all())


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, device: str) -> None:
    rows = make_rows((2, 3, 4), device, torch.float64).requires_grad_()
    coefficients = [c.requires_grad_() for c in make_coefficients(rows.detach(), kind)]
    assert torch.autograd.gradcheck(ops.relaxed_backward, (rows, *coefficients))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, device: str) -> None:
    rows = make_rows((2, 3, 4), device, torch.float64).requires_grad_()
    coefficients = [c.requires_grad_() for c in expand(make_coefficients(rows.detach(), kind))]
    torch.library.opcheck(torch.ops.torch_prepared.relaxed_backward, (rows, *coefficients))
    plain = [t.detach() for t in (rows, rows[..., 0], rows, *coefficients)]
    torch.library.opcheck(torch.ops.torch_prepared.relaxed_backward_grad, tuple(plain))


@pytest.mark.skipif(not ops.build_info().native, reason="checks belong to the native library")
@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.ones(2, 3, 4, dtype=torch.int32), "'rows': expected float32 or float64"),
        (1, torch.ones(2, 1, 5), r"'lower_slope': expected shape \(any, any, 4\)"),
        (2, torch.ones(2, 1, 4, dtype=torch.float64), "'lower_offset': expected Float"),
        (3, torch.ones(1, 1, 4), r"'upper_slope': expected shape \(2, 1, 4\)"),
        (4, torch.ones(2, 4), r"'upper_offset': expected shape .* got Float \(2, 4\)"),
    ],
)
def test_wrong_arguments_are_named(index: int, value: Tensor, message: str) -> None:
    arguments = [torch.ones(2, 3, 4), *(torch.ones(2, 1, 4) for _ in range(4))]
    arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torch_prepared.relaxed_backward(*arguments)
