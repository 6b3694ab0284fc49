"""What every :class:`~torch_prepared.specs.InputSet` must do, as a test class to inherit.

Example:
    class TestMySet(InputSetSuite):
        @classmethod
        def input_sets(cls) -> st.SearchStrategy[InputSet]:
            return st.builds(MySet, ...)
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_prepared.errors import SpecError
from torch_prepared.specs import InputSet

__all__ = ["InputSetSuite", "exact_dot", "moderate_floats"]

_SETTINGS = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def moderate_floats(magnitude: float = 100.0) -> st.SearchStrategy[float]:
    """Finite float64 numbers, tiny ones and zeros included, of bounded magnitude."""
    return st.floats(-magnitude, magnitude, allow_nan=False)


def exact_dot(row: Tensor, point: Tensor) -> Fraction:
    """The scalar product of stored numbers in rational arithmetic."""
    pairs = zip(row.tolist(), point.tolist(), strict=True)
    return sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))


class InputSetSuite(ABC):
    """Inherit, and define ``input_sets``; every inequality is judged with zero slack."""

    @classmethod
    @abstractmethod
    def input_sets(cls) -> st.SearchStrategy[InputSet]:
        """A Hypothesis strategy for regions, degenerate ones included."""

    @given(data=st.data())
    @_SETTINGS
    def test_support_is_at_least_every_contained_point(self, data: st.DataObject) -> None:
        """``support(c) >= c . x`` for samples, corners and c of every dtype, in rationals."""
        region, row = self._draw(data)
        row = row.to(data.draw(st.sampled_from(_DTYPES)))
        points = torch.cat([self._sample(data, region, 5), region.corner(row)[None]])
        bound = region.support(row)
        assert bound.dtype == row.dtype
        assert not bool(torch.isnan(bound))
        if not bool(torch.isinf(bound)):
            largest = max(exact_dot(row, point) for point in points)
            assert Fraction(bound.item()) >= largest

    @given(data=st.data())
    @_SETTINGS
    def test_samples_and_corners_are_contained(self, data: st.DataObject) -> None:
        """``contains`` accepts whatever the region itself produces; the box holds it."""
        region, row = self._draw(data)
        points = torch.cat([self._sample(data, region, 8), region.corner(row[None])])
        assert points.dtype == torch.float64
        assert bool(region.contains(points).all())
        assert bool(((region.lower <= points) & (points <= region.upper)).all())

    @given(data=st.data())
    @_SETTINGS
    def test_support_is_attained_at_the_corner(self, data: st.DataObject) -> None:
        """No bound is looser than 1e-9 of the magnitudes involved."""
        region, row = self._draw(data)
        gap = Fraction(region.support(row).item()) - exact_dot(row, region.corner(row))
        reach = torch.maximum(region.lower.abs(), region.upper.abs())
        assert gap <= Fraction(1e-9) * exact_dot(row.abs(), reach) + Fraction(1e-280)

    @given(data=st.data())
    @_SETTINGS
    def test_box_is_tight_and_outside_is_refused(self, data: st.DataObject) -> None:
        """The support of unit rows is the box; points past it, NaN and inf are not contained."""
        region, _ = self._draw(data)
        axis = data.draw(st.integers(0, region.size - 1))
        unit = torch.zeros(region.size, dtype=torch.float64)
        unit[axis] = 1.0
        reach = 1e-9 * float(region.lower.abs().max() + region.upper.abs().max()) + 1e-280
        assert abs(float(region.support(unit)) - float(region.upper[axis])) <= reach
        assert abs(-float(region.support(-unit)) - float(region.lower[axis])) <= reach
        inside = region.corner(unit)
        for value in (float(region.upper[axis]) + 2 * reach + 1e-9, torch.nan, torch.inf):
            outside = inside.clone()
            outside[axis] = value
            assert not bool(region.contains(outside[None]).any())

    @given(data=st.data())
    @_SETTINGS
    def test_support_is_convex_and_scales(self, data: st.DataObject) -> None:
        """``support(a + b) <= support(a) + support(b)`` and ``support(2 a) = 2 support(a)``."""
        region, a = self._draw(data)
        b = self._row(data, region)
        values = region.support(torch.stack([a, b, a + b, 2 * a])).tolist()
        reach = torch.maximum(region.lower.abs(), region.upper.abs())
        slack = 1e-9 * float((a.abs() + b.abs()) @ reach) + 1e-280
        assert values[2] <= values[0] + values[1] + slack
        assert abs(values[3] - 2 * values[0]) <= slack

    @given(data=st.data())
    @_SETTINGS
    def test_gradient_is_a_maximizer(self, data: st.DataObject) -> None:
        """The gradient of the support function is a point that attains it, within rounding."""
        region, row = self._draw(data)
        row.requires_grad_()
        value = region.support(row)
        (gradient,) = torch.autograd.grad(value, row)
        reach = torch.maximum(region.lower.abs(), region.upper.abs())
        slack = 1e-7 * float(row.detach().abs() @ reach) + 1e-280
        assert abs(float(gradient @ row.detach()) - float(value.detach())) <= slack
        margin = 1e-9 * float(reach.max()) + 1e-280
        assert bool((gradient >= region.lower - margin).all())
        assert bool((gradient <= region.upper + margin).all())

    @given(data=st.data())
    @_SETTINGS
    def test_shapes_broadcast_and_flatten(self, data: st.DataObject) -> None:
        """Rows of any leading shape; points of any trailing shape; wrong sizes are refused."""
        region, row = self._draw(data)
        rows = row.expand(2, 3, region.size)
        assert region.support(rows).shape == (2, 3)
        assert region.corner(rows).shape == rows.shape
        assert region.support(rows[:0]).shape == (0, 3)
        assert region.contains(self._sample(data, region, 2)[:, :, None, None]).shape == (2,)
        assert region.contains(torch.zeros(0, region.size)).shape == (0,)
        with pytest.raises(SpecError, match="expected"):
            region.support(torch.zeros(region.size + 1))
        with pytest.raises(SpecError, match="expected"):
            region.contains(torch.zeros(1, region.size + 1))
        nan_row = row.clone()
        nan_row[0] = torch.nan
        assert bool(torch.isnan(region.support(nan_row)))

    @given(data=st.data())
    @_SETTINGS
    def test_sampling_repeats_and_data_is_frozen(self, data: st.DataObject) -> None:
        """The generator alone decides the samples; fields cannot be rebound."""
        region, _ = self._draw(data)
        first, second = (region.sample(4, torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(first, second)
        assert first.shape == (4, region.size)
        with pytest.raises(dataclasses.FrozenInstanceError):
            region.lower = region.upper

    @given(data=st.data())
    @_SETTINGS
    def test_record_states_the_region(self, data: st.DataObject) -> None:
        """The record is NumPy float64, has the same box, and shares no memory."""
        region, _ = self._draw(data)
        record = region.record()
        assert record.kind in {"box", "lp_ball", "v_polytope"}
        assert record.lower.dtype == np.float64
        assert np.array_equal(record.lower, region.lower.numpy())
        assert np.array_equal(record.upper, region.upper.numpy())
        record.lower[:] = -1e9
        assert not bool((region.lower == -1e9).any())

    def _draw(self, data: st.DataObject) -> tuple[InputSet, Tensor]:
        region = data.draw(self.input_sets())
        return region, self._row(data, region)

    def _row(self, data: st.DataObject, region: InputSet) -> Tensor:
        size = region.size
        numbers = data.draw(st.lists(moderate_floats(), min_size=size, max_size=size))
        return torch.tensor(numbers, dtype=torch.float64)

    def _sample(self, data: st.DataObject, region: InputSet, count: int) -> Tensor:
        seed = data.draw(st.integers(0, 2**31))
        return region.sample(count, torch.Generator().manual_seed(seed))
