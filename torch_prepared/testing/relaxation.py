"""Conformance suite of operators: inherit it and list cases; every claim is tested on them.

What is exact is tested with zero slack: on dyadic data float64 arithmetic does not round. Where
it rounds, a line ``slope x + offset`` may miss its function by ``ULPS`` units in the last place
of the terms involved, ``|slope x| + |offset| + |f(x)|``: at most 4 for evaluating f at each of two
places of the line's construction, 4 for f at x, and 4 for the sums and products.

Example::

    class TestMyActivation(ElementwiseSuite):
        @classmethod
        def cases(cls) -> Sequence[OperatorCase]:
            node = Node("y", "my_activation", ("x",), (6,))
            return [OperatorCase("plain", node, ((6,),), {}, reference=my_numpy_function)]
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.relax import ElementwiseOperator
from torch_prepared.testing._operator_case import BATCH, ULPS, OperatorCase
from torch_prepared.testing.strategies import BoxKind, boxes, dyadic, points_in, random_box

__all__ = ["ULPS", "ElementwiseSuite", "OperatorCase", "OperatorSuite", "check_lines"]

_SETTINGS = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors],
)
_FAR = (0.0, 1e-12, 1e-3, 0.3, 1.0, 2.7, 9.0, 35.0, 41.0, 1e3, 1e6, 1e12)


class OperatorSuite(ABC):
    """Tests that every :class:`~torch_prepared.relax.Operator` passes."""

    @classmethod
    @abstractmethod
    def cases(cls) -> Sequence[OperatorCase]:
        """Nodes to test."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per case."""
        if "case" in metafunc.fixturenames:
            found = self.cases()
            metafunc.parametrize("case", found, ids=[f"{c.node.op}-{c.name}" for c in found])

    def test_value_is_the_reference(self, case: OperatorCase) -> None:
        """The exact function, in float64 and float32, and the stated output shape."""
        assert case.reference is not None
        generator = torch.Generator().manual_seed(0)
        inputs = [dyadic((BATCH, *shape), generator) for shape in case.shapes]
        expected = case.reference(*(x.numpy() for x in inputs))
        for dtype, rtol in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
            table = {name: value.to(dtype) for name, value in case.parameters.items()}
            got = case.operator.value(case.node, [x.to(dtype) for x in inputs], table)
            assert got.shape == (BATCH, *case.node.shape)
            assert got.dtype == dtype
            scale = max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(got.numpy(), expected, rtol=rtol, atol=rtol * scale)

    @given(data=st.data())
    @_SETTINGS
    def test_interval_encloses_every_point(self, case: OperatorCase, data: st.DataObject) -> None:
        """``lower <= f(x) <= upper``, zero slack where nothing rounds; points give points."""
        box, kind, generator = case.draw(data)
        image = case.operator.interval(case.node, box, case.parameters)
        exact = case.is_exact(kind)
        y = case.values([points_in(one, generator, 16, () if exact else (0.0,)) for one in box])
        slack = 0.0 if exact else case.slack(box)
        assert bool((image.lower - slack <= y).all())
        assert bool((y <= image.upper + slack).all())
        if kind is BoxKind.POINT:
            assert bool((image.width <= case.slack(box)).all())

    @given(data=st.data())
    @_SETTINGS
    def test_pull_back_is_a_lower_bound(self, case: OperatorCase, data: st.DataObject) -> None:
        """``rows . f(x) >= sum_i inputs_i . x_i + bias``, with equality for affine operators."""
        box, kind, generator = case.draw(data)
        rows = dyadic((BATCH, 3, *case.node.shape), generator, largest=8)
        moved = case.operator.pull_back(case.node, rows, box, case.parameters)
        for part, shape in zip(moved.inputs, case.shapes, strict=True):
            assert part.shape == (BATCH, 3, *shape)
        affine = case.operator.traits.affine
        exact = affine and case.is_exact(kind)
        points = [points_in(one, generator, 6, () if exact else (0.0,)) for one in box]
        attacked = case.attack(rows, moved, box, points)
        points = [torch.cat(pair) for pair in zip(points, attacked, strict=True)]
        slack = 0.0 if exact else case.slack(box, rows, moved)
        gap = case.gap(rows, moved, points)
        assert bool((gap >= -slack).all())
        assert not affine or bool((gap <= slack).all())

    def test_select_is_the_pull_back_of_unit_rows(self, case: OperatorCase) -> None:
        """``select`` of scalars i equals ``pull_back`` of the unit rows e_i."""
        generator = torch.Generator().manual_seed(1)
        box = [random_box(BoxKind.DYADIC, (BATCH, *s), generator) for s in case.shapes]
        index = torch.randint(case.node.size, (BATCH, 5), generator=generator)
        units = torch.eye(case.node.size, dtype=torch.float64)[index]
        units = units.reshape(BATCH, 5, *case.node.shape)
        got = case.operator.select(case.node, index, box, case.parameters)
        expected = case.operator.pull_back(case.node, units, box, case.parameters)
        for a, b in zip(got.inputs, expected.inputs, strict=True):
            assert torch.equal(a, b)
        zero = torch.zeros(BATCH, 5, dtype=torch.float64)
        biases = [zero if moved.bias is None else moved.bias for moved in (got, expected)]
        assert torch.equal(*biases)

    def test_matrices_are_the_linear_part(self, case: OperatorCase) -> None:
        """``f(x) = sum_i matrices[i] @ x_i + f(0)`` for affine operators."""
        if not case.operator.traits.affine:
            pytest.skip("the operator is not affine")
        generator = torch.Generator().manual_seed(2)
        x = [dyadic((1, *shape), generator) for shape in case.shapes]
        matrices = case.operator.matrices(case.node, case.shapes, case.parameters)  # type: ignore[attr-defined]
        origin = case.operator.value(case.node, [0 * one for one in x], case.parameters)
        total = origin.numpy().ravel()
        for matrix, one in zip(matrices, x, strict=True):
            total = total + matrix @ one.numpy().ravel()
        value = case.operator.value(case.node, x, case.parameters).numpy().ravel()
        slack = 0.0 if case.exact else 1e-12 * max(1.0, float(np.abs(value).max()))
        assert bool((np.abs(value - total) <= slack).all())

    def test_nan_boxes_give_nan(self, case: OperatorCase) -> None:
        """A box with NaN never yields lines or intervals that look sound."""
        generator = torch.Generator().manual_seed(3)
        box = [random_box(BoxKind.UNIT, (BATCH, *shape), generator) for shape in case.shapes]
        nan = torch.full_like(box[0].lower, torch.nan)
        for broken in (Interval(nan, nan), Interval(box[0].lower, nan), Interval(nan, nan * 0)):
            image = case.operator.interval(case.node, [broken, *box[1:]], case.parameters)
            assert bool(torch.isnan(image.upper).any() | torch.isnan(image.lower).any())
            if case.operator.traits.affine:
                continue
            rows = -torch.ones(BATCH, 1, *case.node.shape, dtype=torch.float64)
            moved = case.operator.pull_back(case.node, rows, [broken], case.parameters)
            assert moved.bias is not None
            assert bool(torch.isnan(moved.bias).all())


class ElementwiseSuite(OperatorSuite):
    """Further tests of scalar functions and their lines."""

    @given(data=st.data())
    @_SETTINGS
    def test_lines_enclose_for_every_alpha(self, case: OperatorCase, data: st.DataObject) -> None:
        """``lower line <= f <= upper line`` on the box, for the default and any alpha in [0, 1]."""
        operator = _elementwise(case)
        dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
        box = data.draw(boxes((BATCH, case.node.size), dtype=dtype))
        alpha = data.draw(st.none() | st.floats(0, 1).map(lambda a: torch.full_like(box.lower, a)))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        lines = operator.affine(case.node, box, alpha)
        x = points_in(box, generator, 40, (0.0, *operator.traits.inflections))
        check_lines(operator, case.node, lines[:2], x, below=True)
        check_lines(operator, case.node, lines[2:], x, below=False)

    @given(data=st.data())
    @_SETTINGS
    def test_piecewise_linear_lines_are_exact(
        self, case: OperatorCase, data: st.DataObject
    ) -> None:
        """Zero slack on dyadic boxes whose width is a power of two, where nothing rounds."""
        operator = _elementwise(case)
        if not operator.traits.piecewise_linear:
            pytest.skip("the function is not piecewise linear")
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        lower = dyadic((BATCH, case.node.size), generator)
        width = 2.0 ** torch.randint(-3, 5, lower.shape, generator=generator).double()
        alpha = torch.randint(0, 5, lower.shape, generator=generator).double() / 4
        box = Interval(lower, lower + width)
        x = lower + width * torch.arange(9).double().reshape(-1, 1, 1) / 8
        f = operator.function(case.node, x)
        for share in (None, alpha):
            lines = operator.affine(case.node, box, share)
            assert bool((lines.lower_slope * x + lines.lower_offset <= f).all())
            assert bool((f <= lines.upper_slope * x + lines.upper_offset).all())

    @given(data=st.data())
    @_SETTINGS
    def test_alpha_start_is_the_default(self, case: OperatorCase, data: st.DataObject) -> None:
        """``affine(box, alpha_start(box))`` equals ``affine(box)``, also with one alpha a row."""
        operator = _elementwise(case)
        if type(operator).alpha_start is ElementwiseOperator.alpha_start:
            pytest.skip("the operator has no optimizable lines")
        box = data.draw(boxes((BATCH, *case.node.shape)))
        start = operator.alpha_start(case.node, box)
        assert bool(((start >= 0) & (start <= 1)).all())
        for a, b in zip(
            operator.affine(case.node, box),
            operator.affine(case.node, box, start.to(box.lower)),
            strict=True,
        ):
            assert torch.equal(a.expand_as(b), b)
        rows = dyadic((BATCH, 3, *case.node.shape), torch.Generator().manual_seed(4))
        alpha = start.unsqueeze(1).expand(BATCH, 3, *case.node.shape)
        plain = operator.pull_back(case.node, rows, [box], {})
        by_row = operator.pull_back(case.node, rows, [box], {}, alpha)
        assert plain.bias is not None
        torch.testing.assert_close(plain.inputs[0], by_row.inputs[0], rtol=1e-12, atol=1e-12)
        reach = float(box.lower.abs().max() + box.upper.abs().max() + 1)
        torch.testing.assert_close(plain.bias, by_row.bias, rtol=1e-12, atol=1e-12 * reach)

    @given(data=st.data())
    @_SETTINGS
    def test_enclosing_lines_hold_on_all_reals(
        self, case: OperatorCase, data: st.DataObject
    ) -> None:
        """``min_k below_k(x) <= f(t), t >= x`` and ``f(t) <= max_k above_k(x), t <= x``; tight.

        Far beyond the reference; tight at its ends.
        """
        operator = _elementwise(case)
        if not operator.parametric:
            pytest.skip("the operator states no lines for unknown bounds")
        box = data.draw(boxes((case.node.size,)))
        below, above = operator.enclosing_lines(case.node, box)
        far = torch.tensor([sign * x for x in _FAR for sign in (1, -1)], dtype=torch.float64)
        near = box.center + torch.linspace(-9, 9, 37, dtype=torch.float64).unsqueeze(1)
        x = torch.cat([far.unsqueeze(1).expand(-1, case.node.size), near])
        for lines, pick, sign in ((below, torch.amin, 1.0), (above, torch.amax, -1.0)):
            values = lines[0].unsqueeze(1) * x + lines[1].unsqueeze(1)
            hull = _hull(operator, case.node, x, sign)
            sizes = (lines[0].unsqueeze(1) * x).abs() + lines[1].unsqueeze(1).abs()
            slack = ULPS * 2.0**-52 * (sizes.amax(0) + hull.abs())
            assert bool((sign * (hull - pick(values, dim=0)) >= -slack).all())
            at = (box.lower if pick is torch.amin else box.upper).unsqueeze(0)
            touch = pick(lines[0] * at + lines[1], dim=0)
            room = 1e-9 * (1 + (lines[0] * at).abs().amax(0))
            assert bool(((touch - _hull(operator, case.node, at, sign)[0]).abs() <= room).all())

    @pytest.mark.parametrize(
        "ends", [(-1.3, 0.9), (0.4, 2.1), (-2.2, -0.3), (-0.2, 3.0), (-4.0, 0.3)]
    )
    def test_gradients_of_lines(self, case: OperatorCase, ends: tuple[float, float]) -> None:
        """Lines are differentiable in the ends of the box, and in alpha where they move with it.

        Where a valid range keeps a line from moving, its gradient in alpha may be the one into
        the range.
        """
        operator = _elementwise(case)
        lower = torch.full((2,), ends[0], dtype=torch.float64, requires_grad=True)
        upper = torch.full((2,), ends[1], dtype=torch.float64, requires_grad=True)
        alpha = torch.tensor([0.3, 0.8], dtype=torch.float64)

        def lines(low: Tensor, high: Tensor, share: Tensor = alpha) -> tuple[Tensor, ...]:
            return tuple(operator.affine(case.node, Interval(low, high), share))

        assert torch.autograd.gradcheck(lines, (lower, upper))
        for part in range(4):
            free = alpha.clone().requires_grad_()
            value = lines(lower.detach(), upper.detach(), free)[part]
            if not value.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(value.sum(), free)
            ahead, behind = (
                lines(lower.detach(), upper.detach(), alpha + h)[part] for h in (1e-6, -1e-6)
            )
            moved = ahead != behind
            expected = (ahead - behind) / 2e-6
            torch.testing.assert_close(gradient[moved], expected[moved], rtol=1e-6, atol=1e-8)


def _hull(operator: ElementwiseOperator, node: Node, x: Tensor, sign: float) -> Tensor:
    """Least value right of x (sign > 0), or largest value left of it."""
    rim = torch.full_like(x, 1e13)
    if sign > 0:
        return operator.interval(node, [Interval(x, torch.maximum(x, rim))], {}).lower
    return operator.interval(node, [Interval(torch.minimum(x, -rim), x)], {}).upper


def check_lines(
    operator: ElementwiseOperator,
    node: Node,
    line: Sequence[Tensor],
    x: Tensor,
    below: bool,
) -> None:
    """Assert that ``slope x + offset`` lies below (above) the function at points (q, *shape).

    Judged in float64 with the slack stated at the top of the module, in units of the last place
    of the line's own dtype.
    """
    slope, offset = (part.double() for part in line)
    wide = x.double()
    f = operator.function(node, wide)
    sizes = (slope * wide).abs() + offset.abs() + f.abs()
    slack = ULPS * torch.finfo(x.dtype).eps * sizes + torch.finfo(x.dtype).tiny
    gap = f - (slope * wide + offset)
    assert bool(((gap if below else -gap) >= -slack).all())


def _elementwise(case: OperatorCase) -> ElementwiseOperator:
    operator = case.operator
    assert isinstance(operator, ElementwiseOperator)
    return operator
