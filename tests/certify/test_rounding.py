"""The rounding bounds hold against exact rational sums."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.certify import Certificate, ProofTree, check_certificate
from torch_prepared.certify.operators import Enclosure
from torch_prepared.certify.rounding import gamma, row_dot, sum_below

from .nets import NetBuilder, box, row_property

FLOATS = st.floats(-1e30, 1e30)


@given(st.lists(FLOATS, min_size=1, max_size=6))
def test_sum_below_is_below_the_sum(terms: list[float]) -> None:
    found = sum_below(*(np.array([[t]]) for t in terms)).item()
    assert Fraction(found) <= sum(map(Fraction, terms))


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 200), scale=st.sampled_from([1e-300, 1.0]))
def test_gamma_bounds_a_dot_product(seed: int, n: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=n) * scale, rng.normal(size=n)
    found = row_dot(a[None], b[None], np.zeros(1, dtype=np.int64)).item()
    products = [Fraction(x) * Fraction(y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    allowed = Fraction(gamma(n)) * sum(map(abs, products)) + Fraction(2.0**-900)
    assert abs(Fraction(found) - sum(products)) <= allowed


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 20))
def test_concretize_is_below_the_exact_minimum(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = np.sort(rng.normal(size=(2, n)), axis=0)
    rows = rng.normal(size=(1, n))
    found = Enclosure(low[None], high[None]).concretize(rows, np.zeros(1, dtype=np.int64)).item()
    exact = sum(
        min(Fraction(a) * Fraction(x), Fraction(a) * Fraction(y))
        for a, x, y in zip(rows[0].tolist(), low.tolist(), high.tolist(), strict=True)
    )
    assert Fraction(found) <= exact
    assert float(exact) - found < 1e-12


def test_a_contested_maximum_is_bounded_by_its_largest_upper_end() -> None:
    """The entry with the largest lower end is not the one with the largest upper end."""
    net = NetBuilder((1, 3))
    net.pool("max_pool", (3,))
    record = net.record()
    region = box(np.array([0.0, 0.5, -1.0]), np.array([2.0, 1.0, 1.5]))
    for row, offset, expected in ((-1.0, 0.0, -2.0), (1.0, 0.0, 0.5)):
        prop = row_property(region, np.array([[row]]), np.array([offset]))
        certificate = Certificate.create(record, [prop], [ProofTree.leaf([0])])
        margin = check_certificate(certificate, record, [prop]).margin
        assert expected - 1e-12 < margin <= expected
