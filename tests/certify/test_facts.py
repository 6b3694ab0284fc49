"""Lines of the activation facts lie on the right side of the function, for any slope."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.certify.facts import (
    ActivationFacts,
    LineOffsets,
    activation_facts,
    default_slopes,
)
from torch_prepared.certify.operators import Activation, Enclosure
from torch_prepared.errors import UnsupportedOperationError

MP = {
    "relu": lambda x: max(x, mpmath.mpf(0)),
    "abs": abs,
    "leaky_relu": lambda x: x if x > 0 else x * 0.3,
    "tanh": mpmath.tanh,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "elu": lambda x: x if x > 0 else 0.3 * mpmath.expm1(x),
    "gelu": lambda x: x * mpmath.ncdf(x),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "gelu tanh": lambda x: (
        x / (1 + mpmath.exp(-mpmath.sqrt(8 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)))
    ),
}


def known(op: str) -> ActivationFacts:
    name, *form = op.split()
    attrs = {"alpha": 0.3, "approximate": form[0] if form else "none"}
    return activation_facts(name, attrs, "here")


ENDS = st.one_of(
    st.floats(-6, 6),
    st.floats(-1e-8, 1e-8),
    st.sampled_from([0.0, -1.4142135623730951, 2.3993572805154677, -700.0, 700.0, 1e6, -1e6]),
)


@pytest.mark.parametrize("op", MP)
@settings(max_examples=80, deadline=None)
@given(
    ends=st.tuples(ENDS, ENDS),
    slope=st.one_of(st.floats(-2, 2), st.none()),
    seed=st.integers(0, 99),
)
def test_line_is_on_its_side(
    op: str, ends: tuple[float, float], slope: float | None, seed: int
) -> None:
    facts = known(op)
    low, high = np.array([[min(ends)]]), np.array([[max(ends)]])
    with np.errstate(all="ignore"):
        if slope is None:
            slopes = default_slopes(facts, low, high)
        else:
            slopes = (np.full((1, 1), slope),) * 2
        below = LineOffsets(facts, low, high).offset(slopes[0], above=False)
        above = LineOffsets(facts, low, high).offset(slopes[1], above=True)
    rng = np.random.default_rng(seed)
    inner = np.concatenate(
        [
            rng.uniform(low[0, 0], high[0, 0], 12),
            [low[0, 0], high[0, 0]],
            np.clip([0.0, -0.75, -1.28, -0.7525], low[0, 0], high[0, 0]),
        ]
    )
    with mpmath.workdps(50):
        for x in inner.tolist():
            value = MP[op](mpmath.mpf(x))
            assert mpmath.mpf(slopes[0].item()) * x + below.item() <= value
            assert mpmath.mpf(slopes[1].item()) * x + above.item() >= value


@pytest.mark.parametrize("op", MP)
def test_default_lines_touch_the_function(op: str) -> None:
    """Not vacuous: on small intervals the gap between the lines is of second order."""
    facts = known(op)
    center = np.linspace(-4, 4, 41)[None]
    low, high = center - 1e-3, center + 1e-3
    with np.errstate(all="ignore"):
        slopes = default_slopes(facts, low, high)
        below = slopes[0] * center + LineOffsets(facts, low, high).offset(slopes[0], above=False)
        above = slopes[1] * center + LineOffsets(facts, low, high).offset(slopes[1], above=True)
    away = np.abs(center) > 1e-2  # kinks are at 0
    assert np.all((above - below)[away] < 2e-6)
    assert np.all(above - below < 3e-3)


def test_slope_zero_gives_the_range() -> None:
    """The interval rule of functions with a valley finds the bottom of the valley."""
    bottoms = {"gelu": -0.16997120747990369, "silu": -0.27846454276107374, "abs": 0.0}
    bottoms["gelu tanh"] = -0.17004075057125406
    for op, bottom in bottoms.items():
        facts = known(op)
        low, high = np.array([[-5.0]]), np.array([[4.0]])
        found = LineOffsets(facts, low, high).offset(np.zeros((1, 1)), above=False).item()
        assert found <= bottom
        assert found == pytest.approx(bottom, abs=1e-9)


@pytest.mark.parametrize(
    ("op", "attrs"),
    [
        ("sin", {}),
        ("gelu", {"approximate": "quick"}),
        ("leaky_relu", {"alpha": -0.1}),
        ("elu", {"alpha": float("nan")}),
        ("elu", {}),
    ],
)
def test_unknown_functions_are_refused(op: str, attrs: dict[str, object]) -> None:
    with pytest.raises(UnsupportedOperationError, match="here"):
        activation_facts(op, attrs, "here")


@pytest.mark.parametrize("op", MP)
def test_flat_below_means_constant_from_the_upper_end_down(op: str) -> None:
    ends = np.array([[-3.0, -0.5, 0.0, 1e-9, 2.0]])
    activation = Activation("a", "x", op, known(op), ends.shape[1])
    flat = activation.is_flat_below(Enclosure(ends - 1.0, ends))
    assert flat.tolist() == [[True, True, True, False, False] if op == "relu" else [False] * 5]
    below = ends - np.linspace(0.0, 50.0, 200)[:, None]
    values = known(op).value(below)
    assert bool((values == values[0])[:, flat[0]].all())


@pytest.mark.parametrize(("alpha", "flat"), [(0.0, True), (0.1, False)])
def test_leaky_units_are_flat_without_a_leak_only(alpha: float, flat: bool) -> None:
    leaky = activation_facts("leaky_relu", {"alpha": alpha}, "here")
    box = Enclosure(np.array([[-2.0]]), np.array([[-1.0]]))
    assert bool(Activation("a", "x", "leaky_relu", leaky, 1).is_flat_below(box)) is flat
