"""The conformance suite on every region, and exactness against brute force."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.errors import SpecError
from torch_prepared.specs import Box, InputSet, LpBall, VPolytope
from torch_prepared.testing.input_set import InputSetSuite, exact_dot, moderate_floats

sizes = st.integers(1, 4)


def vectors(size: int) -> st.SearchStrategy[list[float]]:
    return st.lists(moderate_floats(), min_size=size, max_size=size)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    size = draw(sizes)
    a, b = draw(vectors(size)), draw(vectors(size))
    if draw(st.booleans()):
        b = a
    return Box(list(map(min, a, b)), list(map(max, a, b)))


@st.composite
def balls(draw: st.DrawFn, p: float, clipped: bool) -> LpBall:
    center = torch.tensor(draw(vectors(draw(sizes))), dtype=torch.float64)
    radius = draw(st.one_of(st.just(0.0), st.floats(1e-12, 1e3), st.floats(0.1, 2.0)))
    if not clipped:
        return LpBall(center, radius, p)
    share = torch.tensor(draw(vectors(2 * len(center))), dtype=torch.float64).reshape(2, -1) / 100
    inside = center + share[0] * radius / len(center) * 0.999
    clip = torch.stack([inside, center + share[1] * radius])
    return LpBall(center, radius, p, clip.amin(dim=0), clip.amax(dim=0))


@st.composite
def hulls(draw: st.DrawFn) -> VPolytope:
    size, count = draw(sizes), draw(st.integers(1, 6))
    return VPolytope(torch.tensor([draw(vectors(size)) for _ in range(count)], dtype=torch.float64))


class TestBox(InputSetSuite):
    @classmethod
    def input_sets(cls) -> st.SearchStrategy[InputSet]:
        return boxes()


class TestVPolytope(InputSetSuite):
    @classmethod
    def input_sets(cls) -> st.SearchStrategy[InputSet]:
        return hulls()


class TestLpBall(InputSetSuite):
    @classmethod
    def input_sets(cls) -> st.SearchStrategy[InputSet]:
        return st.one_of(balls(p, clipped=False) for p in (1, 2, math.inf))


class TestClippedLpBall(InputSetSuite):
    @classmethod
    def input_sets(cls) -> st.SearchStrategy[InputSet]:
        return st.one_of(balls(p, clipped=True) for p in (1, 2, math.inf))


@given(box=boxes(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_box_support_is_the_best_of_all_corners(box, data):
    row = torch.tensor(data.draw(vectors(box.size)), dtype=torch.float64)
    ends = zip(box.lower, box.upper, strict=True)
    corners = [torch.stack(corner) for corner in itertools.product(*ends)]
    best = max(exact_dot(row, corner) for corner in corners)
    scale = exact_dot(row.abs(), torch.maximum(box.lower.abs(), box.upper.abs()))
    bound = Fraction(float(box.support(row)))
    assert best <= bound <= best + Fraction(1e-13) * scale + Fraction(1e-300)
    assert exact_dot(row, box.corner(row)) == best


@given(hull=hulls(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_polytope_support_is_the_best_vertex(hull, data):
    row = torch.tensor(data.draw(vectors(hull.size)), dtype=torch.float64)
    best = max(exact_dot(row, vertex) for vertex in hull.vertices)
    scale = exact_dot(row.abs(), hull.vertices.abs().amax(dim=0))
    bound = Fraction(float(hull.support(row)))
    assert best <= bound <= best + Fraction(1e-12) * scale + Fraction(1e-300)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_ball_membership_is_exact_on_the_surface(p):
    """0.1 + 0.2 is not 0.3: whatever float arithmetic says, rationals decide."""
    generator = torch.Generator().manual_seed(0)
    answers = set()
    for _ in range(200):
        center, direction = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        radius = float(torch.linalg.vector_norm(direction, p))
        point = center + direction
        offsets = [
            abs(Fraction(a) - Fraction(b))
            for a, b in zip(point.tolist(), center.tolist(), strict=True)
        ]
        norm = {1: sum(offsets), 2: sum(z * z for z in offsets), math.inf: max(offsets)}[p]
        expected = norm <= (Fraction(radius) ** 2 if p == 2 else Fraction(radius))
        assert bool(LpBall(center, radius, p).contains(point[None])[0]) == expected
        answers.add(expected)
    assert answers == {True, False}


@pytest.mark.parametrize("p", [1, 2])
def test_clipped_ball_is_tighter_than_ball_and_box(p):
    """Clipping one coordinate frees radius for the other: neither bound alone is the maximum."""
    ball = LpBall([0.0, 0.0], 1.0, p, lower=[-1.0, -1.0], upper=[0.25, 1.0])
    row = torch.tensor([2.0, 1.0], dtype=torch.float64)
    rest = 0.75 if p == 1 else math.sqrt(1 - 0.25**2)
    assert float(ball.support(row)) == pytest.approx(0.5 + rest, rel=1e-10)


def test_ball_clipped_away_from_its_center_has_the_tight_box():
    ball = LpBall([0.0, 0.0], 1.0, 2, lower=[0.6, -5.0], upper=[5.0, 5.0])
    assert ball.lower.tolist() == pytest.approx([0.6, -0.8], rel=1e-12)
    assert ball.upper.tolist() == pytest.approx([1.0, 0.8], rel=1e-12)


def test_polytope_contains_its_interior_and_not_its_box():
    triangle = VPolytope([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    points = torch.tensor([[0.25, 0.25], [0.5, 0.5], [0.5000001, 0.5], [0.9, 0.9], [0.0, 0.0]])
    assert triangle.contains(points.double()).tolist() == [True, True, False, False, True]


def test_polytope_membership_of_segments_between_images():
    generator = torch.Generator().manual_seed(1)
    hull = VPolytope(torch.rand(3, 784, generator=generator, dtype=torch.float64))
    inside = hull.sample(50, generator)
    assert bool(hull.contains(inside).all())
    assert not bool(hull.contains(inside + 1e-9 * torch.randn(50, 784, generator=generator)).any())


def test_split_halves_share_their_face():
    left, right = Box([0.0, 0.0], [1.0, 1.0]).split(1, 0.25)
    assert (left.upper.tolist(), right.lower.tolist()) == ([1.0, 0.25], [0.0, 0.25])
    with pytest.raises(SpecError, match="got value 2"):
        left.split(1, 2.0)
    with pytest.raises(SpecError, match="got dim 2"):
        left.split(2, 0.0)


def test_huge_and_infinite_sums_stay_sound():
    box = Box([-1e308, -1e308], [1e308, 1e308])
    bound = box.support(torch.tensor([1e3, -1e3], dtype=torch.float64))
    assert not bool(torch.isfinite(bound))
    assert not float(bound) < 0
    assert bool(torch.isfinite(box.sample(10, torch.Generator().manual_seed(0))).all())
    low = Box([-2e5], [-1e5]).support(torch.tensor([1.0], dtype=torch.float16))
    assert float(low) >= -1e5


def test_lists_are_read_in_double_precision():
    assert Box([0.1], [0.3]).lower[0].item() == 0.1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Box([0.0, 1.0, 2.0], [1.0, 0.5, 0.0]), r"lower 1.0 > upper 0.5 at index 1"),
        (lambda: Box([0.0, math.nan], [1.0, 1.0]), "nan at index 1"),
        (lambda: Box([0.0], [math.inf]), "inf at index 0"),
        (lambda: Box([0.0], [1.0, 2.0]), "1 lower and 2 upper"),
        (lambda: Box([], []), "empty"),
        (lambda: Box(["a"], ["b"]), "expected real numbers"),
        (lambda: LpBall([0.0], -1.0, 2), "radius -1"),
        (lambda: LpBall([0.0], math.nan, 2), "radius nan"),
        (lambda: LpBall([0.0], 1.0, 3), "p = 3"),
        (lambda: LpBall([1e308], 1e308, 2), "overflow"),
        (lambda: LpBall([0.0, 0.0], 1.0, 2, [0.8, 0.8], [1.0, 1.0]), "not meet its clipping box"),
        (lambda: LpBall([0.0, 0.0], 1.0, 1, [0.0], [1.0]), "2 center and 1 clip"),
        (lambda: VPolytope(torch.zeros(0, 3)), "empty"),
        (lambda: VPolytope([1.0, 2.0]), r"expected \(v, n\)"),
        (lambda: VPolytope([[1.0, math.inf]]), "inf at index 1"),
    ],
)
def test_malformed_regions_are_refused(build, message):
    with pytest.raises(SpecError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_any_shape_is_flattened_row_major():
    lower = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert Box(lower, lower + 1).lower.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert VPolytope(np.stack([lower, lower + 1])).size == 6
