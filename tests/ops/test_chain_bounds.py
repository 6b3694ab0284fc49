"""chain_bounds: the native kernel against the plain-torch oracle, and its promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.ops._reference_chain import chain_bounds_reference

SIZES = [
    (3, 2),
    (1, 1, 1),
    (5, 50, 50, 50, 3),
    (2, 7, 19, 33, 1),
    (4, 65, 130, 17, 2),
    (5, 40, 1, 40, 2),
]
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def _network(
    sizes: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
    weights = [torch.randn(m, n, generator=generator, dtype=dtype) / n**0.5 for m, n in pairs]
    biases = [torch.randn(m, generator=generator, dtype=dtype) * 0.3 for m, _ in pairs]
    return weights, biases


def _boxes(count: int, size: int, radius: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    center = torch.randn(count, size, generator=generator, dtype=dtype)
    spread = torch.rand(count, size, generator=generator, dtype=dtype) * radius
    return center - spread, center + spread


def _forward(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """The value of every map at x (..., n)."""
    values = []
    for weight, bias in zip(weights, biases, strict=True):
        values.append(x @ weight.T + bias)
        x = values[-1].clamp_min(0)
    return values


def _assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        scale = 1 + float(theirs.nan_to_num().abs().max()) if theirs.numel() else 1.0
        tolerance = TOLERANCE[mine.dtype] * scale
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("sizes", SIZES)
def test_kernel_equals_reference(sizes: tuple[int, ...], radius: float, dtype: torch.dtype) -> None:
    weights, biases = _network(sizes, dtype)
    box = _boxes(9, sizes[0], radius, dtype)
    rows = torch.randn(4, sizes[-1], dtype=dtype)
    got = ops.chain_bounds(*box, weights, biases, rows)
    _assert_close(got, chain_bounds_reference(*box, weights, biases, rows, None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_bounds_and_rows_of_each_box(dtype: torch.dtype) -> None:
    weights, biases = _network((3, 20, 21, 22, 4), dtype)
    lower, upper = _boxes(6, 3, 1.0, dtype)
    rows = torch.randn(6, 70, 4, dtype=dtype)
    _, _, *known = ops.chain_bounds(lower - 0.2, upper + 0.2, weights, biases, rows)
    got = ops.chain_bounds(lower, upper, weights, biases, rows, *known)
    _assert_close(got, chain_bounds_reference(lower, upper, weights, biases, rows, *known))
    assert bool((got[2] >= known[0]).all())
    assert bool((got[3] <= known[1]).all())
    for i in range(6):
        alone = ops.chain_bounds(
            lower[i : i + 1],
            upper[i : i + 1],
            weights,
            biases,
            rows[i],
            *(k[i : i + 1] for k in known),
        )
        _assert_close(alone, tuple(part[i : i + 1] for part in got))


def test_strided_arguments_and_many_boxes() -> None:
    weights, biases = _network((4, 30, 30, 2), torch.float32)
    turned = [w.T.contiguous().T for w in weights]
    lower, upper = _boxes(300, 8, 0.5, torch.float32)
    rows = torch.eye(2)
    got = ops.chain_bounds(lower[:, ::2], upper[:, ::2], turned, biases, rows)
    again = ops.chain_bounds(
        lower[:, ::2].contiguous(), upper[:, ::2].contiguous(), weights, biases, rows
    )
    for mine, theirs in zip(got, again, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_dead_and_active_layers(shift: float) -> None:
    weights, biases = _network((3, 9, 9, 9, 2), torch.float64)
    biases[1] = biases[1] + shift
    box = _boxes(5, 3, 1.0, torch.float64)
    rows = torch.eye(2, dtype=torch.float64)
    got = ops.chain_bounds(*box, weights, biases, rows)
    _assert_close(got, chain_bounds_reference(*box, weights, biases, rows, None, None))
    if shift < 0:  # the output is constant
        assert not bool(got[1].any())
        torch.testing.assert_close(got[0], _forward(box[0], weights, biases)[-1])


@pytest.mark.parametrize("sizes", SIZES)
def test_values_lie_below_samples(sizes: tuple[int, ...]) -> None:
    weights, biases = _network(sizes, torch.float64, seed=3)
    lower, upper = _boxes(20, sizes[0], 0.7, torch.float64)
    rows = torch.randn(3, sizes[-1], dtype=torch.float64)
    values, _, hidden_lower, hidden_upper = ops.chain_bounds(lower, upper, weights, biases, rows)
    share = torch.rand(200, 1, sizes[0], dtype=torch.float64)
    share[::2] = share[::2].round()  # corners
    *hidden, outputs = _forward(lower + share * (upper - lower), weights, biases)
    assert bool((values <= outputs @ rows.T + 1e-9).all())
    inner = torch.cat(hidden, dim=-1) if hidden else outputs[..., :0]
    assert bool((hidden_lower <= inner + 1e-9).all())
    assert bool((hidden_upper >= inner - 1e-9).all())


def test_points_are_exact() -> None:
    weights, biases = _network((5, 31, 31, 3), torch.float64)
    x = torch.randn(7, 5, dtype=torch.float64)
    rows = torch.eye(3, dtype=torch.float64)
    values, inputs, *_ = ops.chain_bounds(x, x, weights, biases, rows)
    outputs = _forward(x, weights, biases)[-1]
    torch.testing.assert_close(values, outputs, rtol=0, atol=1e-12)
    slope = torch.autograd.functional.jacobian(
        lambda point: _forward(point, weights, biases)[-1], x[0]
    )
    torch.testing.assert_close(inputs[0], slope, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["lower", "upper", "known"])
def test_improper_numbers_give_nan_for_their_box_alone(place: str, bad: float) -> None:
    weights, biases = _network((3, 12, 12, 2), torch.float32)
    lower, upper = _boxes(4, 3, 0.5, torch.float32)
    rows = torch.eye(2)
    clean = ops.chain_bounds(lower, upper, weights, biases, rows)
    known = [clean[2].clone(), clean[3].clone()]
    if place == "known":
        known[0][1, 15], known[1][1, 15] = bad, torch.nan
    else:
        target = lower if place == "lower" else upper
        target[1, 2] = bad
    got = ops.chain_bounds(lower, upper, weights, biases, rows, *known)
    assert all(bool(part[1].isnan().all()) for part in got)
    for mine, theirs in zip(got, clean, strict=True):
        torch.testing.assert_close(mine[[0, 2, 3]], theirs[[0, 2, 3]], rtol=0, atol=1e-5)
    expected = chain_bounds_reference(lower, upper, weights, biases, rows, *known)
    _assert_close(got, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_improper_parameters_give_nan_everywhere(kind: str, layer: int, bad: float) -> None:
    weights, biases = _network((3, 6, 6, 2), torch.float32)
    biases[1] = biases[1] - 100  # a dead layer must not hide it
    (weights if kind == "weight" else biases)[layer].view(-1)[-1] = bad
    got = ops.chain_bounds(*_boxes(4, 3, 0.5, torch.float32), weights, biases, torch.eye(2))
    assert all(bool(part.isnan().all()) for part in got)


def test_improper_rows_give_nan() -> None:
    weights, biases = _network((3, 6, 6, 2), torch.float32)
    rows = torch.tensor([[1.0, 0.0], [torch.nan, 0.0]])
    values = ops.chain_bounds(*_boxes(4, 3, 0.5, torch.float32), weights, biases, rows)[0]
    assert bool(values[:, 0].isfinite().all())
    assert bool(values[:, 1].isnan().all())


def test_overflow_gives_nan_or_minus_infinity() -> None:
    weights, biases = _network((3, 6, 6, 6, 2), torch.float32)
    weights = [w * 1e18 for w in weights]
    values = ops.chain_bounds(*_boxes(4, 3, 0.5, torch.float32), weights, biases, torch.eye(2))[0]
    assert not bool((values > -torch.inf).any())


def test_crossed_box_gives_nan() -> None:
    weights, biases = _network((3, 6, 2), torch.float32)
    lower, upper = _boxes(2, 3, 0.5, torch.float32)
    assert bool(ops.chain_bounds(upper, lower, weights, biases, torch.eye(2))[0].isnan().all())


def test_nothing_to_bound() -> None:
    weights, biases = _network((3, 6, 7, 2), torch.float32)
    empty = torch.zeros(0, 3)
    values, inputs, lower, upper = ops.chain_bounds(empty, empty, weights, biases, torch.eye(2))
    assert values.shape == (0, 2)
    assert inputs.shape == (0, 2, 3)
    assert lower.shape == upper.shape == (0, 13)
    box = _boxes(4, 3, 0.5, torch.float32)
    assert ops.chain_bounds(*box, weights, biases, torch.zeros(0, 2))[0].shape == (4, 0)


def test_arguments_that_do_not_fit_are_named() -> None:
    if not ops.build_info().native:
        pytest.skip("the reference relies on the checks of torch's own operators")
    weights, biases = _network((3, 6, 2), torch.float32)
    lower, upper = _boxes(4, 3, 0.5, torch.float32)
    rows = torch.eye(2)
    known = torch.zeros(4, 6)
    cases = {
        "upper": (lower, upper[:2], weights, biases, rows, None, None),
        r"weights\[1\]": (lower, upper, [weights[0], weights[1][:, 1:]], biases, rows, None, None),
        r"biases\[0\]": (lower, upper, weights, [biases[0].double(), biases[1]], rows, None, None),
        "weights": (lower, upper, weights, biases[:1], rows, None, None),
        "rows": (lower, upper, weights, biases, torch.eye(3), None, None),
        "known_lower": (lower, upper, weights, biases, rows, known, None),
        "known_upper": (lower, upper, weights, biases, rows, known, known[:, 1:]),
        "lower": (lower.long(), upper, weights, biases, rows, None, None),
    }
    for name, arguments in cases.items():
        with pytest.raises(RuntimeError, match=f"chain_bounds: argument '{name}'"):
            ops.chain_bounds(*arguments)


def test_gradient_is_refused() -> None:
    weights, biases = _network((3, 6, 2), torch.float32)
    weights[0].requires_grad_()
    values = ops.chain_bounds(*_boxes(4, 3, 0.5, torch.float32), weights, biases, torch.eye(2))[0]
    with pytest.raises(UnsupportedOperationError, match="gradient"):
        values.sum().backward()


def test_opcheck() -> None:
    weights, biases = _network((3, 6, 5, 2), torch.float32)
    lower, upper = _boxes(4, 3, 0.5, torch.float32)
    known = torch.full((4, 11), 9.0)
    for rows, ends in ((torch.eye(2), (None, None)), (torch.randn(4, 3, 2), (-known, known))):
        torch.library.opcheck(
            torch.ops.torch_prepared.chain_bounds, (lower, upper, weights, biases, rows, *ends)
        )
