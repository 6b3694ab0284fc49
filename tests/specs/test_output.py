"""Safe sets: constructors, distribution, margins; properties and robustness."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.errors import SpecError
from torch_prepared.specs import (
    Box,
    LpBall,
    Property,
    SafeSet,
    local_robustness,
    local_robustness_batch,
)


def integers(*shape, generator):
    return torch.randint(-3, 4, shape, generator=generator).double()


def nonzero_rows(count, width, generator):
    rows = integers(count, width, generator=generator)
    rows[:, 0] += (rows == 0).all(dim=1)
    return rows


@given(
    seed=st.integers(0, 10**6),
    strict=st.booleans(),
    counts=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_union_of_polytopes_means_some_polytope(seed, strict, counts):
    """Integer data, so that the comparison of both sides is exact."""
    generator = torch.Generator().manual_seed(seed)
    union = [(nonzero_rows(k, 2, generator), integers(k, generator=generator)) for k in counts]
    safe = SafeSet.from_polytopes(union, strict=strict)
    assert len(safe.clauses) == math.prod(counts)
    y = torch.tensor(list(itertools.product(range(-4, 5), repeat=2)), dtype=torch.float64)
    compare = torch.lt if strict else torch.le
    direct = torch.stack([compare(y @ a.T, b).all(dim=1) for a, b in union]).any(dim=0)
    assert torch.equal(safe.contains(y), direct)
    if math.prod(len(offset) for _, offset in safe.clauses) > 1000:
        return
    back = [(-rows, offset) for rows, offset in safe.polytopes()]
    again = torch.stack([compare(y @ a.T, b).all(dim=1) for a, b in back]).any(dim=0)
    assert torch.equal(again, direct)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_margin_is_the_least_clause_of_the_best_row(seed):
    generator = torch.Generator().manual_seed(seed)
    clauses = tuple(
        (nonzero_rows(k, 3, generator), integers(k, generator=generator)) for k in (1, 3, 2)
    )
    safe = SafeSet(clauses)
    y = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([(y @ a.T + b).amax(dim=-1) for a, b in clauses]).amin(dim=0)
    torch.testing.assert_close(safe.margin(y), expected)
    safe.margin(y).sum().backward()
    assert y.grad is not None
    assert safe.margin(y.detach().float()).dtype == torch.float32


def test_argmax_and_argmin_are_strict():
    y = torch.tensor([[1.0, 2.0, 3.0], [1.0, 3.0, 3.0], [3.0, 1.0, 2.0], [1.0, 1.0, 3.0]])
    assert SafeSet.argmax(2, 3).contains(y).tolist() == [True, False, False, True]
    assert SafeSet.argmin(0, 3).contains(y).tolist() == [True, True, False, False]


def test_interval_is_closed_and_skips_infinite_ends():
    safe = SafeSet.interval([0.0, -math.inf], [1.0, 2.0])
    assert len(safe.clauses) == 3
    y = torch.tensor([[0.0, 2.0], [1.0, -1e9], [1.5, 0.0], [0.5, 2.1]])
    assert safe.contains(y).tolist() == [True, True, False, False]


def test_nan_is_never_safe():
    nan = torch.tensor([[math.nan, 0.0], [0.0, math.nan], [math.nan, math.nan]])
    for safe in (SafeSet.argmax(0, 2), SafeSet.interval([-1, -1], [1, 1])):
        assert not bool(safe.contains(nan).any())
        assert bool(torch.isnan(safe.margin(nan)).all())


def test_nan_in_one_row_of_a_clause_is_not_outvoted():
    safe = SafeSet.from_polytopes([([[1.0, 0.0]], [1.0]), ([[0.0, 1.0]], [1.0])])
    assert safe.contains(torch.tensor([[0.0, 5.0], [math.nan, 0.0]])).tolist() == [True, False]


def test_caller_keeps_no_alias():
    rows, offset = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    safe = SafeSet(((rows, offset),))
    rows.zero_()
    record = safe.record()
    record[0][0][:] = 7
    assert torch.equal(safe.clauses[0][0], torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SafeSet(()), "no clauses"),
        (lambda: SafeSet(((torch.zeros(1, 2), torch.zeros(1)),)), "row 0 is zero"),
        (lambda: SafeSet(((torch.ones(2, 2), torch.zeros(1)),)), r"expected \(r, m\)"),
        (lambda: SafeSet(((torch.ones(1, 2), torch.full((1,), math.nan)),)), "nan at index 0"),
        (
            lambda: SafeSet(((torch.ones(1, 2), torch.ones(1)), (torch.ones(1, 3), torch.ones(1)))),
            "one m",
        ),
        (lambda: SafeSet.argmax(3, 3), "label 3"),
        (lambda: SafeSet.argmin(0, 1), "two classes"),
        (lambda: SafeSet.interval([1.0], [0.0]), r"\[1.0, 0.0\] at index 0"),
        (lambda: SafeSet.interval([math.nan], [0.0]), "nan"),
        (lambda: SafeSet.interval([-math.inf], [math.inf]), "no finite end"),
        (lambda: SafeSet.from_polytopes([]), "no polytopes"),
        (lambda: SafeSet.polytope(torch.ones(2, 2), [1.0]), "and 1 bounds"),
        (
            lambda: SafeSet.from_polytopes([(torch.ones(10, 2), torch.ones(10))] * 5),
            "expands to 100000 clauses",
        ),
        (
            lambda: next(SafeSet(((torch.ones(10, 2), torch.ones(10)),) * 5).polytopes()),
            "100000 disjuncts",
        ),
        (lambda: SafeSet.argmax(0, 2).margin(torch.zeros(3)), "got y of shape"),
    ],
)
def test_malformed_safe_sets_are_refused(build, message):
    with pytest.raises(SpecError, match=message):
        build()


def test_property_record_and_sizes():
    prop = Property(Box([0.0, 0.0], [1.0, 1.0]), SafeSet.argmax(1, 3), "p")
    record = prop.record()
    assert (record.name, record.strict, record.region.kind) == ("p", True, "box")
    assert [offset.tolist() for _, offset in record.clauses] == [[0.0], [0.0]]
    assert np.array_equal(record.clauses[0][0], [[-1.0, 1.0, 0.0]])
    prop.check_against(2, 3)
    with pytest.raises(SpecError, match="region of 2 inputs; expected 5"):
        prop.check_against(5, 3)
    with pytest.raises(SpecError, match="safe set of 3 outputs; expected 10"):
        prop.check_against(2, 10)


def test_robustness_box_holds_the_exact_ball():
    """0.1f - 0.3 rounds: the side must not move inward, and the clip is exact."""
    x = torch.tensor([[0.1, 0.9]])
    prop = local_robustness(x, 1, 0.3, classes=2, clip=(-0.15, 1.0))
    assert isinstance(prop.region, Box)
    assert prop.region.lower[0].item() == -0.15
    assert prop.region.upper.tolist()[1] == 1.0
    center, eps = (Fraction(v) for v in (x[0, 1].item(), 0.3))
    assert Fraction(prop.region.lower[1].item()) <= center - eps
    assert prop.region.lower[1].item() == pytest.approx(float(center - eps), abs=1e-15)


def test_robustness_of_other_norms_and_scaled_channels():
    x = torch.full((3, 2, 2), 0.5)
    ball = local_robustness(x, 0, 0.5, classes=10, p=2, clip=(0.0, 1.0)).region
    assert isinstance(ball, LpBall)
    assert ball.size == 12
    eps = torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1)
    upper = local_robustness(x, 0, eps, classes=10).region.upper.reshape(3, 4)
    assert upper[:, 0].tolist() == pytest.approx([0.6, 0.7, 0.8], abs=1e-7)
    with pytest.raises(SpecError, match="broadcasts"):
        local_robustness(x, 0, torch.ones(5), classes=10)
    with pytest.raises(SpecError, match="got -1"):
        local_robustness(x, 0, -1.0, classes=10)
    with pytest.raises(SpecError, match="would be empty"):
        local_robustness(x, 0, 0.1, classes=10, clip=(0.8, 1.0))


def test_robustness_batch_has_one_property_per_image():
    props = local_robustness_batch(torch.rand(4, 1, 3), torch.tensor([0, 1, 2, 0]), 0.1, 3)
    assert [p.name for p in props] == ["robust-0-0", "robust-1-1", "robust-2-2", "robust-3-0"]
    with pytest.raises(SpecError, match=r"expected \(b, ...\) and \(b,\)"):
        local_robustness_batch(torch.rand(4, 3), torch.tensor([0]), 0.1, 3)
