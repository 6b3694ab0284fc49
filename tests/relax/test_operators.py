"""Every registered operator passes the conformance suite."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.relax import AffinePair, ElementwiseOperator, lookup, registered, support_table
from torch_prepared.relax.relu import ReLU
from torch_prepared.testing.relaxation import (
    ElementwiseSuite,
    OperatorCase,
    OperatorSuite,
    check_lines,
)
from torch_prepared.testing.strategies import points_in

from .cases import ACTIVATIONS, AFFINE, POOLS


class TestOperators(OperatorSuite):
    @classmethod
    def cases(cls) -> Sequence[OperatorCase]:
        return [*AFFINE, *POOLS]


class TestActivations(ElementwiseSuite):
    @classmethod
    def cases(cls) -> Sequence[OperatorCase]:
        return ACTIVATIONS


def test_every_registered_operator_has_cases() -> None:
    covered = {case.node.op for case in [*AFFINE, *POOLS, *ACTIVATIONS]}
    assert covered == {operator.op for operator in registered()}


def test_support_table_lists_every_operator() -> None:
    table = support_table()
    for operator in registered():
        assert f"| {operator.op} |" in table


def test_unknown_operators_are_named() -> None:
    with pytest.raises(UnsupportedOperationError, match="'swish' is not supported; supported: add"):
        lookup("swish")


@pytest.mark.parametrize(("op", "alpha"), [("leaky_relu", 1.5), ("leaky_relu", -0.1), ("elu", 2.0)])
def test_parameters_outside_the_proof_are_refused(op: str, alpha: float) -> None:
    node = Node("y", op, ("x",), (1,), {}, {"alpha": alpha})
    box = Interval(torch.zeros(1, 1), torch.ones(1, 1))
    with pytest.raises(UnsupportedOperationError, match="convex"):
        lookup(op).pull_back(node, torch.ones(1, 1, 1), [box], {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-38, 1e30])
def test_relu_chord_survives_extreme_boxes(dtype: torch.dtype, scale: float) -> None:
    """lower * upper would underflow or overflow here and move the chord below the function."""
    box = Interval(torch.full((1,), -scale, dtype=dtype), torch.full((1,), 3 * scale, dtype=dtype))
    lines = ReLU().affine(Node("y", "relu", ("x",), (1,)), box)
    x = torch.stack([box.lower, box.upper]).double()
    values = lines.upper_slope.double() * x + lines.upper_offset.double()
    assert bool((values >= x.clamp_min(0) - 1e-6 * scale).all())
    assert bool((values <= x.clamp_min(0) + 1e-6 * scale).all())


class CarelessReLU(ReLU):
    """A lower line through the origin that is too steep left of it."""

    def affine(self, node: Node, box: Interval, alpha: torch.Tensor | None = None) -> AffinePair:
        lines = super().affine(node, box, alpha)
        return lines._replace(upper_offset=lines.upper_offset * (1 - 1e-13))


def test_the_suite_notices_an_error_of_one_part_in_1e13() -> None:
    operator: ElementwiseOperator = CarelessReLU()
    node = Node("y", "relu", ("x",), (1,))
    box = Interval(torch.tensor([-1.0]).double(), torch.tensor([1.0]).double())
    x = points_in(box, torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError):
        check_lines(operator, node, operator.affine(node, box)[2:], x, below=False)
