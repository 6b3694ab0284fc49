"""What every operator of the closed graph must state about itself.

The author of an operator writes the exact function, an interval rule, and either the transpose of
an affine map or one pair of lines. Sign splitting, batching and lower/upper symmetry live here and
in ``bounds``: nobody writes both sides by hand.

Shape letters: b batch, s rows, n input scalars, m output scalars of a node.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.errors import UnsupportedOperationError

__all__ = [
    "AffineOperator",
    "AffinePair",
    "ElementwiseOperator",
    "Operator",
    "Parameters",
    "PulledBack",
    "StructuralOperator",
    "Traits",
]

Parameters = Mapping[str, Tensor]
Lines = tuple[Tensor, Tensor]
_UNIT_CHUNK = 512


class AffinePair(NamedTuple):
    """``lower_slope x + lower_offset <= f(x) <= upper_slope x + upper_offset`` on boxes."""

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


class PulledBack(NamedTuple):
    """``rows . y >= sum_i inputs[i] . x_i + bias``: rows moved from an output to its inputs.

    ``inputs`` has one tensor (b, s, *shape_i) per input; ``bias`` is (b, s) or None for zero.
    """

    inputs: tuple[Tensor, ...]
    bias: Tensor | None


@dataclass(frozen=True)
class Traits:
    """Facts that callers may rely on. Nothing is inherited by guess.

    Args:
        affine: the operator is affine in its inputs for fixed parameters.
        monotone: elementwise and nondecreasing, so its interval image is its end points' image.
        convex: elementwise and convex on the reals.
        inflections: where an elementwise function changes between convex and concave.
        piecewise_linear: exact in rational arithmetic.
    """

    affine: bool = False
    monotone: bool = False
    convex: bool = False
    inflections: tuple[float, ...] = ()
    piecewise_linear: bool = False


class Operator(ABC):
    """One operator of the closed graph. Stateless; all facts come from the node."""

    op: ClassVar[str]
    traits: ClassVar[Traits] = Traits()
    parametric: ClassVar[bool] = False

    @abstractmethod
    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        """The exact function: inputs (b, *shape_i) to the output (b, *shape)."""

    @abstractmethod
    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        """An interval that holds every value over the input boxes (in exact arithmetic)."""

    @abstractmethod
    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        """Rows (b, s, *shape) on the output as a *lower* bound by rows on the inputs.

        ``boxes`` bound the inputs and are read by nonlinear operators only. ``alpha`` are
        optimizable relaxation parameters (see :meth:`ElementwiseOperator.affine`).
        """

    def select(
        self, node: Node, index: Tensor, boxes: Sequence[Interval], parameters: Parameters
    ) -> PulledBack:
        """Pull-back of single output scalars ``index`` (b, k): exact for affine operators.

        For others it is a lower bound only; its negative says nothing about the upper side.
        """
        return self.pull_back(node, unit_rows(index, node, boxes[0].lower), boxes, parameters)


class AffineOperator(Operator):
    """An operator that is affine in its inputs: the pull-back is its transpose, hence exact."""

    traits: ClassVar[Traits] = Traits(affine=True, piecewise_linear=True)
    parametric: ClassVar[bool] = True

    def magnitude(self, node: Node, reach: Sequence[Tensor], parameters: Parameters) -> Tensor:
        """``sum_i |W_i| reach_i + |bias|``: sizes of all terms behind each output, not negative.

        Of operators whose sums have no signs of their own, by the absolute parameters.
        """
        return self.value(node, reach, absolute(node, parameters))

    def matrices(
        self, node: Node, shapes: Sequence[tuple[int, ...]], parameters: Parameters
    ) -> tuple[sp.csr_matrix, ...]:
        """The linear part as one sparse matrix (m, n_i) per input, float64.

        ``shapes`` are the inputs' shapes without the batch axis. Computed by applying the operator
        to unit inputs in chunks; layers with an explicit matrix override it.
        """
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in shapes]
        zeros = [torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes]
        table = {
            ref.name: parameters[ref.name].detach().to("cpu", torch.float64)
            for ref in node.params.values()
        }
        origin = self.value(node, zeros, table).reshape(1, -1)
        found = []
        for position, size in enumerate(sizes):
            blocks = []
            for units in torch.split(torch.arange(size), _UNIT_CHUNK):
                probe = torch.zeros(len(units), size, dtype=torch.float64)
                probe[torch.arange(len(units)), units] = 1.0
                inputs = [zero.expand(len(units), *zero.shape[1:]) for zero in zeros]
                inputs[position] = probe.reshape(len(units), *shapes[position])
                image = self.value(node, inputs, table).reshape(len(units), -1) - origin
                blocks.append(sp.csr_matrix(image.numpy()))
            found.append(sp.vstack(blocks).T.tocsr() if blocks else sp.csr_matrix((node.size, 0)))
        return tuple(found)


class StructuralOperator(AffineOperator):
    """Moves values without arithmetic, so ends of intervals move alike."""

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        return Interval(
            self.value(node, [box.lower for box in boxes], parameters),
            self.value(node, [box.upper for box in boxes], parameters),
        )


class ElementwiseOperator(Operator):
    """A function applied to each scalar: its author gives the value and one pair of lines."""

    @abstractmethod
    def function(self, node: Node, x: Tensor) -> Tensor:
        """The exact scalar function, elementwise."""

    @abstractmethod
    def affine(self, node: Node, box: Interval, alpha: Tensor | None = None) -> AffinePair:
        """Lines below and above the function on the box, elementwise and differentiable.

        ``alpha`` (any shape broadcastable against the box) selects among valid lower lines; what
        it means is the operator's business, every value in [0, 1] must give a valid pair.
        """

    def lines(self, node: Node, box: Interval, alpha: Tensor | None = None) -> AffinePair:
        """:meth:`affine`, with NaN offsets where the box holds NaN."""
        pair = self.affine(node, box, alpha)
        # Comparisons with NaN are false, so lines of a NaN box could look like those of a good one.
        broken = torch.isnan(box.lower) | torch.isnan(box.upper)
        below = pair.lower_offset.masked_fill(broken, torch.nan)
        above = pair.upper_offset.masked_fill(broken, torch.nan)
        return pair._replace(lower_offset=below, upper_offset=above)

    def alpha_start(self, node: Node, box: Interval) -> Tensor:
        """The ``alpha`` in [0, 1] that reproduces the default pair of lines."""
        raise UnsupportedOperationError(
            f"{node.name}: operator '{self.op}' has no optimizable relaxation; "
            "use method='crown' instead of 'alpha-crown'"
        )

    def enclosing_lines(self, node: Node, reference: Interval) -> tuple[Lines, Lines]:
        """Lines that enclose the function on *all* reals, for bounds of unknown intervals.

        Args:
            node: the node.
            reference: interval (n,) the unknown bounds are expected near; lines are tight there.

        Returns:
            ``(below, above)``, each ``(slope (k, n), offset (k, n))``: the minimum over k of the
            lines below is at most every f(t) with t >= x, and the maximum of the lines above at
            least every f(t) with t <= x, at all real x. So ``u' >= above_k(u)`` for all k and
            ``l' <= below_k(l)`` for all k are linear rows that give valid output bounds for any
            valid input bounds, also where f is not monotone.

        Raises:
            UnsupportedOperationError: the operator states no such lines.
        """
        raise UnsupportedOperationError(
            f"{node.name}: operator '{self.op}' has no relaxation for unknown bounds; "
            "edit a layer after it, or use another method than 'one_shot'"
        )

    def value(self, node: Node, inputs: Sequence[Tensor], parameters: Parameters) -> Tensor:
        return self.function(node, inputs[0])

    def interval(self, node: Node, boxes: Sequence[Interval], parameters: Parameters) -> Interval:
        if not self.traits.monotone:
            raise UnsupportedOperationError(
                f"{node.name}: operator '{self.op}' is not monotone and states no interval rule; "
                "add an 'interval' method to it"
            )
        return Interval(self.function(node, boxes[0].lower), self.function(node, boxes[0].upper))

    def pull_back(
        self,
        node: Node,
        rows: Tensor,
        boxes: Sequence[Interval],
        parameters: Parameters,
        alpha: Tensor | None = None,
    ) -> PulledBack:
        box = boxes[0].map(lambda end: end.flatten(1))
        if alpha is not None:
            box = box.map(lambda end: end.unsqueeze(1))
            alpha = alpha.reshape(*alpha.shape[:2], -1)
        return self.through(rows, self.lines(node, box, alpha))

    def through(self, rows: Tensor, lines: AffinePair) -> PulledBack:
        """Rows (b, s, *shape) through lines (b, n) or (b, s, n): one line by each one's sign."""
        moved, bias = ops.relaxed_backward(rows.flatten(2), *lines)
        return PulledBack((moved.reshape(rows.shape),), bias)


def absolute(node: Node, parameters: Parameters) -> dict[str, Tensor]:
    """Absolute values of the parameters that a node reads."""
    return {ref.name: parameters[ref.name].abs() for ref in node.params.values()}


def unit_rows(index: Tensor, node: Node, like: Tensor) -> Tensor:
    """Rows (b, k, *shape) that pick the scalars ``index`` (b, k) of a node's flattened value."""
    rows = like.new_zeros(*index.shape, node.size).scatter(2, index.unsqueeze(2), 1.0)
    return rows.reshape(*index.shape, *node.shape)


def per_row(rows: Tensor) -> Tensor:
    """Merge batch and row axes: (b, s, ...) -> (b s, ...)."""
    return rows.reshape(rows.shape[0] * rows.shape[1], *rows.shape[2:])


def dot(rows: Tensor, vector: Tensor) -> Tensor:
    """``sum rows * vector`` over all value axes: (b, s, ...) and (...) -> (b, s)."""
    return rows.flatten(2) @ vector.expand(rows.shape[2:]).reshape(-1)
