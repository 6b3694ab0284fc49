"""Validity of the lines: exact for piecewise-linear kinds, in 60 digits for the others."""

import itertools
from collections.abc import Callable
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torch_prepared import ops
from torch_prepared.errors import SpecError
from torch_prepared.ops._reference_activation import (
    activation_coefficients_grad_reference,
    activation_coefficients_reference,
)

LEAKY = [("relu", 0.0), ("leaky_relu", 0.01), ("leaky_relu", 0.3), ("leaky_relu", 1.0)]
SMOOTH = [
    ("tanh", 0.0), ("sigmoid", 0.0), ("softplus", 0.0), ("gelu", 0.0), ("silu", 0.0),
    ("gelu_tanh", 0.0), ("elu", 1.0), ("elu", 0.4), ("elu", 1.7),
]  # fmt: skip
ALL = LEAKY + SMOOTH
INF = float("inf")
Operator = Callable[..., tuple[Tensor, ...]]


def exact_value(kind: str, parameter: float, x: mpmath.mpf) -> mpmath.mpf:
    """The activation at x, to the working precision of mpmath."""
    if kind == "tanh":
        return mpmath.tanh(x)
    if kind == "sigmoid":
        return 1 / (1 + mpmath.exp(-x))
    if kind == "softplus":
        return mpmath.log1p(mpmath.exp(x))
    if kind == "gelu":
        return x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2
    if kind == "silu":
        return x / (1 + mpmath.exp(-x))
    if kind == "gelu_tanh":
        inner = mpmath.sqrt(8 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)
        return x / (1 + mpmath.exp(-inner))
    return x if x > 0 else parameter * mpmath.expm1(x)


def intervals(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random, one-sided, point, tiny, huge and one-ulp intervals."""
    generator = torch.Generator().manual_seed(1)
    center = torch.randn(60, generator=generator, dtype=torch.float64) * 3
    width = 10 ** (torch.rand(60, generator=generator, dtype=torch.float64) * 6 - 4)
    lower, upper = (center - width).to(dtype), (center + width).to(dtype)
    special = [
        (0.0, 0.0), (-1.0, -1.0), (2.5, 2.5), (0.0, 1.0), (-1.0, 0.0), (-1e-30, 1e-30),
        (-1e-8, 3.0), (-3.0, 1e-8), (-1e5, 1e5), (-1e30, 2.0), (-2.0, 1e30), (-60.0, -1.0),
        (1.0, 60.0), (-2.0, -1.0), (-2.0, 2.0), (-1.5, 8.0), (-8.0, 1.5), (-800.0, 700.0),
        (-2.4, 2.3), (0.3, 2.5), (-5.0, -0.5),
    ]  # fmt: skip
    extra = torch.tensor(special, dtype=dtype)
    one = torch.tensor([-1.0, 0.0, 0.7, 3.0], dtype=dtype)
    above = torch.nextafter(one, one + 1)
    lower = torch.cat([lower, extra[:, 0], one]).to(device)
    upper = torch.cat([upper, extra[:, 1], above]).to(device)
    return lower, upper


def sample(low: float, high: float) -> list[float]:
    """Ends, kinks, inflections, and a grid that is denser near zero; inside [l, u]."""
    marks = [0.0, 1.4142135623730951, 2.3993572805154675, -0.7517915246935645, -1.2784645427610738]
    marks += [1.4185040087908283, -0.752461422071016, 22.0]
    points = [low, high, *marks, *(-m for m in marks)]
    points += [low + (high - low) * k / 24 for k in range(25)]
    points += [s * 10.0**e for e in range(-3, 3) for s in (-1, 1)]
    return [p for p in points if low <= p <= high]


def assert_valid(
    kind: str,
    parameter: float,
    low: float,
    high: float,
    lines: tuple[float, ...],
) -> None:
    """Both inequalities, without tolerance."""
    low_slope, low_offset, high_slope, high_offset = lines
    for x in sample(low, high):
        if kind in ("relu", "leaky_relu"):
            q = Fraction(x)
            value = q if q > 0 else Fraction(parameter) * q
            assert Fraction(low_slope) * q + Fraction(low_offset) <= value
            assert Fraction(high_slope) * q + Fraction(high_offset) >= value
        else:
            with mpmath.workdps(60):
                point = mpmath.mpf(x)
                value = exact_value(kind, parameter, point)
                assert low_slope * point + low_offset <= value, (kind, low, high, x)
                assert high_slope * point + high_offset >= value, (kind, low, high, x)


@pytest.mark.parametrize("operator", [ops.activation_coefficients, None], ids=["op", "reference"])
@pytest.mark.parametrize("with_alpha", [False, True], ids=["default", "alpha"])
@pytest.mark.parametrize(("kind", "parameter"), ALL)
def test_lines_are_valid(
    kind: str,
    parameter: float,
    with_alpha: bool,
    operator: Operator | None,
    device: str,
    dtype: torch.dtype,
) -> None:
    operator = operator or activation_coefficients_reference
    lower, upper = intervals(dtype, device)
    alpha = torch.randn_like(lower) if with_alpha else None
    lines = operator(lower, upper, kind, parameter, alpha)[:4]
    narrowed = float(torch.tensor(parameter, dtype=dtype))
    columns = [lower.tolist(), upper.tolist(), *(line.tolist() for line in lines)]
    for low, high, *line in zip(*columns, strict=True):
        assert_valid(kind, narrowed, low, high, tuple(line))


finite = st.floats(-50, 50, allow_nan=False, width=32)


@given(finite, finite, finite, st.sampled_from(ALL), st.booleans())
def test_lines_are_valid_on_arbitrary_intervals(
    first: float, second: float, alpha: float, case: tuple[str, float], single: bool
) -> None:
    dtype = torch.float32 if single else torch.float64
    ends = torch.tensor(sorted((first, second)), dtype=dtype)
    free = torch.tensor([alpha], dtype=dtype)
    kind, parameter = case
    lines = ops.activation_coefficients(ends[:1], ends[1:], kind, parameter, free)
    narrowed = float(torch.tensor(parameter, dtype=dtype))
    assert_valid(kind, narrowed, float(ends[0]), float(ends[1]), tuple(float(x) for x in lines))


@pytest.mark.parametrize("parameter", [0.0, 0.3])
def test_rounding_near_a_tie_does_not_choose_the_lower_line(
    parameter: float, device: str, dtype: torch.dtype
) -> None:
    """From ``upper = -lower`` up to nearly 1 + 2^-16 times that, all have the small slope."""
    share = torch.tensor([1 - 1e-4, 1 - 1e-6, 1.0, 1 + 1e-6, 1 + 1.4e-5, 1 + 1.7e-5, 1 + 1e-4])
    lower = -torch.tensor([0.1, 1.0, 3e3], dtype=torch.float64).repeat_interleave(7)
    upper = -lower * share.double().repeat(3)
    box = lower.to(device, dtype).repeat(3), upper.to(device, dtype).repeat(3)  # whole blocks too
    slope = ops.activation_coefficients(*box, "leaky_relu", parameter)[0].cpu().view(9, 7)
    expected = torch.tensor([parameter] * 5 + [1.0] * 2, dtype=dtype)
    assert torch.equal(slope, expected.expand(9, 7))


@pytest.mark.parametrize(("kind", "parameter"), ALL)
def test_agrees_with_the_reference(
    kind: str, parameter: float, device: str, dtype: torch.dtype
) -> None:
    lower, upper = intervals(dtype, device)
    wide = (upper - lower > 1e-6) & (upper - lower < 1e4)
    lower, upper = lower[wide], upper[wide]
    for alpha in (None, torch.randn_like(lower)):
        actual = ops.activation_coefficients(lower, upper, kind, parameter, alpha)
        expected = activation_coefficients_reference(lower, upper, kind, parameter, alpha)
        for a, e in zip(actual, expected[:4], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "parameter"), SMOOTH)
def test_lines_touch_or_are_nearly_optimal(kind: str, parameter: float) -> None:
    """No valid line of either side is lower (higher) at the midpoint by more than 1e-6."""
    lower, upper = (t.double() for t in intervals(torch.float64))
    keep = (upper - lower > 1e-3) & (upper - lower < 30) & (upper.abs() < 60)
    lower, upper = lower[keep], upper[keep]
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None] * (upper - lower) + lower
    value = activation(kind, parameter)(grid)
    middle = (lower + upper) / 2
    lines = ops.activation_coefficients(lower, upper, kind, parameter)
    for slope, offset, sign in ((lines[2], lines[3], 1.0), (lines[0], lines[1], -1.0)):
        excess = sign * (slope * grid + offset - value)
        assert bool((excess.amin(0) <= 5e-3).all())  # the line touches the curve
        chord = value[0] + (value[-1] - value[0]) / 2
        peak = torch.maximum(sign * chord, sign * activation(kind, parameter)(middle))
        assert bool((sign * (slope * middle + offset) >= peak - 1e-12).all())


def activation(kind: str, parameter: float) -> Callable[[Tensor], Tensor]:
    functions = torch.nn.functional
    if kind == "elu":
        return lambda x: functions.elu(x, parameter)
    return {
        "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": functions.softplus,
        "gelu": functions.gelu, "silu": functions.silu,
        "gelu_tanh": lambda x: functions.gelu(x, approximate="tanh"),
    }[kind]  # fmt: skip


def test_relu_default_slope_and_stable_neurons(device: str, dtype: torch.dtype) -> None:
    lower = torch.tensor([-1.0, -1.0, -2.0, 0.5, -3.0, 0.0], device=device, dtype=dtype)
    upper = torch.tensor([1.0, 2.0, 1.0, 2.0, -1.0, 0.0], device=device, dtype=dtype)
    low_slope, low_offset, high_slope, _ = ops.activation_coefficients(lower, upper, "relu")
    assert low_slope.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    assert bool((low_offset == 0).all())
    torch.testing.assert_close(
        high_slope, torch.tensor([0.5, 2 / 3, 1 / 3, 1, 0, 1], device=device, dtype=dtype)
    )


def test_relu_alpha_is_clamped(device: str) -> None:
    lower = torch.full((3,), -1.0, device=device)
    alpha = torch.tensor([-0.5, 0.3, 1.5], device=device)
    slope = ops.activation_coefficients(lower, -lower, "relu", alpha=alpha)[0]
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.3, 1.0], device=device))


@pytest.mark.parametrize(("kind", "parameter"), ALL)
@pytest.mark.parametrize(
    "ends", [(-INF, 2.0), (-1.0, INF), (1.0, INF), (-INF, INF), (-INF, -1.0)], ids=str
)
def test_infinite_bounds_stay_valid(
    kind: str, parameter: float, ends: tuple[float, float], device: str, dtype: torch.dtype
) -> None:
    for operator in (ops.activation_coefficients, activation_coefficients_reference):
        bounds = (torch.tensor([e], device=device, dtype=dtype) for e in ends)
        lines = [float(x) for x in operator(*bounds, kind, parameter, None)[:4]]
        assert not any(x != x for x in lines)
        narrowed = float(torch.tensor(parameter, dtype=dtype))
        for x in sample(max(ends[0], -100.0), min(ends[1], 100.0)):
            value = exact_value(kind, narrowed, mpmath.mpf(x))
            if kind in ("relu", "leaky_relu"):
                value = mpmath.mpf(x) if x > 0 else mpmath.mpf(narrowed) * x
            assert lines[0] * mpmath.mpf(x) + lines[1] <= value
            assert lines[2] * mpmath.mpf(x) + lines[3] >= value


@pytest.mark.parametrize(("kind", "parameter"), ALL)
@pytest.mark.parametrize("bad", [(float("nan"), 1.0), (0.0, float("nan")), (1.0, 0.5)])
def test_nan_and_reversed_bounds_are_refused(
    kind: str, parameter: float, bad: tuple[float, float], device: str, dtype: torch.dtype
) -> None:
    lower = torch.tensor([-1.0, bad[0]], device=device, dtype=dtype)
    upper = torch.tensor([1.0, bad[1]], device=device, dtype=dtype)
    with pytest.raises(SpecError, match="1 of 2 neurons"):
        ops.activation_coefficients(lower, upper, kind, parameter)
    native = torch.ops.torch_prepared.activation_coefficients(lower, upper, kind, parameter, None)
    reference = activation_coefficients_reference(lower, upper, kind, parameter, None)
    for *lines, errors in (native, reference):
        assert int(errors) == 1
        assert all(line[1].isnan() and line[0].isfinite() for line in lines)


def test_nan_alpha_is_refused(device: str) -> None:
    lower = torch.full((2,), -1.0, device=device)
    alpha = torch.tensor([0.5, float("nan")], device=device)
    with pytest.raises(SpecError, match="1 of 2"):
        ops.activation_coefficients(lower, -lower, "relu", alpha=alpha)


@pytest.mark.parametrize(("kind", "parameter"), [("leaky_relu", 1.5), ("leaky_relu", -0.1),
                                                 ("elu", -1.0), ("elu", float("nan"))])  # fmt: skip
def test_parameters_out_of_range_are_refused(kind: str, parameter: float) -> None:
    bounds = torch.zeros(1), torch.ones(1)
    for operator in (ops.activation_coefficients, activation_coefficients_reference):
        with pytest.raises(RuntimeError, match=r"'param': expected"):
            operator(*bounds, kind, parameter, None)


def test_unknown_kind_is_refused() -> None:
    for operator in (ops.activation_coefficients, activation_coefficients_reference):
        with pytest.raises(RuntimeError, match=r"'kind': expected .*relu.* got swish"):
            operator(torch.zeros(1), torch.ones(1), "swish", 0.0, None)


def test_shapes_strides_and_empty(device: str, dtype: torch.dtype) -> None:
    lower = torch.randn(6, 8, device=device, dtype=dtype)[::2, 1::3]
    upper = (lower + 1).T.contiguous().T
    for kind, parameter in ALL:
        lines = ops.activation_coefficients(lower, upper, kind, parameter)
        dense = ops.activation_coefficients(lower.contiguous(), upper.contiguous(), kind, parameter)
        assert all(torch.equal(a, b) for a, b in zip(lines, dense, strict=True))
        empty = lower[:0]
        assert ops.activation_coefficients(empty, empty, kind, parameter)[0].shape == empty.shape


def smooth_points() -> tuple[Tensor, Tensor, Tensor]:
    """Intervals of every case, away from points where the choice of line switches."""
    pairs = [(-1.0, 0.7), (-0.6, 1.9), (0.4, 1.3), (-1.7, -0.3), (-4.0, 0.9), (-0.8, 5.0),
             (-6.0, 6.5), (-3.1, -2.6), (2.6, 3.3), (-2.9, 1.1)]  # fmt: skip
    ends = torch.tensor(pairs, dtype=torch.float64)
    alpha = torch.linspace(0.13, 0.71, len(pairs), dtype=torch.float64)
    return ends[:, 0].clone(), ends[:, 1].clone(), alpha


@pytest.mark.parametrize("with_alpha", [False, True], ids=["default", "alpha"])
@pytest.mark.parametrize(("kind", "parameter"), ALL)
def test_gradcheck(kind: str, parameter: float, with_alpha: bool, device: str) -> None:
    lower, upper, alpha = (t.to(device).requires_grad_() for t in smooth_points())

    def lines(low: Tensor, high: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return ops.activation_coefficients(low, high, kind, parameter, a if with_alpha else None)

    assert torch.autograd.gradcheck(lines, (lower, upper, alpha), eps=1e-6, atol=2e-5)


@pytest.mark.parametrize("with_alpha", [False, True], ids=["default", "alpha"])
@pytest.mark.parametrize(("kind", "parameter"), ALL)
def test_gradient_agrees_with_the_reference(
    kind: str, parameter: float, with_alpha: bool, device: str, dtype: torch.dtype
) -> None:
    lower, upper, alpha = (t.to(device, dtype) for t in smooth_points())
    grads = [torch.randn_like(lower) for _ in range(4)]
    arguments = (*grads, lower, upper, kind, parameter, alpha if with_alpha else None)
    actual = torch.ops.torch_prepared.activation_coefficients_grad(*arguments)
    expected = activation_coefficients_grad_reference(*arguments)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_alpha", [False, True], ids=["default", "alpha"])
@pytest.mark.parametrize("kind", ["relu", "tanh", "gelu"])
def test_opcheck(kind: str, with_alpha: bool, device: str) -> None:
    lower, upper, alpha = (t.to(device).requires_grad_() for t in smooth_points())
    arguments = (lower, upper, kind, 0.0, alpha if with_alpha else None)
    torch.library.opcheck(torch.ops.torch_prepared.activation_coefficients, arguments)
    plain = [t.detach() for t in (lower, upper, alpha)]
    grads = [torch.ones_like(plain[0]) for _ in range(4)]
    rest = (plain[0], plain[1], kind, 0.0, plain[2] if with_alpha else None)
    torch.library.opcheck(torch.ops.torch_prepared.activation_coefficients_grad, (*grads, *rest))


def bracket(x: mpmath.iv.mpf) -> mpmath.iv.mpf:
    """What decides the sign of the second derivative of gelu_tanh, for x >= 0.

    With g = k (x + a x^3) and f = x (1 + tanh g) / 2, ``f'' = k sech(g)^2 bracket(x)``.
    """
    iv, k, a = mpmath.iv, mpmath.iv.sqrt(2 / mpmath.iv.pi), mpmath.iv.mpf("0.044715")
    doubled = iv.exp(-2 * k * (x + a * x**3))
    hyperbolic = (1 - doubled) / (1 + doubled)
    return 1 + 6 * a * x**2 - k * x * hyperbolic * (1 + 3 * a * x**2) ** 2


def test_gelu_tanh_bends_only_at_its_inflections() -> None:
    """Positive second derivative below the inflection and negative above, proved by intervals.

    From 3 on: tanh g > 0.99, ``k 0.99 x (1 + 3 a x^2)^2 >= 2.37 (1 + 6 a x^2)`` and so on.
    """
    c, step = 1.4185040087908283, 1 / 512
    for i in range(int(3 / step)):
        ends = mpmath.iv.mpf([i * step, (i + 1) * step])
        if (i + 1) * step < c - step:
            assert bracket(ends).a > 0
        elif i * step > c + step:
            assert bracket(ends).b < 0
    assert bracket(mpmath.iv.mpf(c - 1e-12)).a > 0
    assert bracket(mpmath.iv.mpf(c + 1e-12)).b < 0
    # Between, it falls: differences of the bracket over the gap around the inflection.
    near = [c - step + 2 * step * i / 64 for i in range(65)]
    values = [bracket(mpmath.iv.mpf(x)) for x in near]
    assert all(after.b < before.a for before, after in itertools.pairwise(values))


@pytest.mark.parametrize("kind", ["relu", "tanh", "gelu", "softplus"])
def test_lines_pass_through_transforms_and_batched_gradients(kind: str) -> None:
    """The engine's form agrees with the operator's gradient however gradients are taken."""
    lower, upper, _ = smooth_points()
    share = torch.full_like(lower, 0.4) if kind != "relu" else None

    def total(low: Tensor, high: Tensor) -> Tensor:
        lines = ops.activation_lines(low, high, kind, 0.0, share)
        return sum((i + 1.0) * line.sin().sum() for i, line in enumerate(lines))  # type: ignore

    def one(low: Tensor, high: Tensor) -> Tensor:
        lines = ops.activation_lines(low, high, kind, 0.0, None if share is None else share[0])
        return sum((i + 1.0) * line.sin() for i, line in enumerate(lines))  # type: ignore

    low, high = lower.clone().requires_grad_(), upper.clone().requires_grad_()
    expected = torch.autograd.grad(total(low, high), (low, high))
    mapped = torch.func.vmap(torch.func.grad(one, argnums=(0, 1)))(lower, upper)
    lines = torch.stack(ops.activation_lines(low, high, kind, 0.0, share))
    weights = torch.arange(1.0, 5.0, dtype=torch.float64).unsqueeze(1) * lines.detach().cos()
    units = torch.stack([weights, 2 * weights])
    batched = torch.autograd.grad(lines, (low, high), units, is_grads_batched=True)
    for a, b, c in zip(expected, mapped, batched, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.stack([a, 2 * a]), c, rtol=1e-12, atol=1e-12)


def test_a_clamped_share_has_the_gradient_into_its_range() -> None:
    """On [-3, 3] no tangent of tanh at 0 is valid: both lines have their points moved."""
    low, high = (torch.tensor([x], dtype=torch.float64) for x in (-3.0, 3.0))
    share = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    lines = ops.activation_lines(low, high, "tanh", 0.0, share)
    (gradient,) = torch.autograd.grad(lines[2].sum(), share)  # upper slope falls to the right
    assert float(gradient) < 0
    moved = ops.activation_lines(low, high, "tanh", 0.0, share.detach() + 0.3)
    assert float(moved[2]) < float(lines[2])


def test_broken_bounds_give_nan_lines_without_an_error() -> None:
    low = torch.tensor([0.0, torch.nan, 1.0])
    high = torch.tensor([1.0, 1.0, 0.0])
    for kind in ("relu", "gelu"):
        for line in ops.activation_lines(low, high, kind):
            assert line.isnan().tolist() == [False, True, True]
