"""Bounds under fixed signs of some pre-activations: multipliers beside slopes (beta-CROWN).

On the part of a region where ``sign_j z_j >= 0`` for chosen scalars z that ReLUs read, and for any
multipliers ``beta_j >= 0``,

    min rows . f  >=  min over the whole region of  rows . f - sum_j beta_j sign_j z_j.

A backward pass bounds the right side: the multipliers are subtracted from the rows where these
cross the ReLU, whose line is exact there. Gradient ascent moves multipliers and the slopes of the
other neurons together; every iterate is a bound, so the result is the best of all.

Source: Wang et al., "Beta-CROWN: Efficient Bound Propagation with Per-neuron Split Constraints for
Neural Network Robustness Verification" (NeurIPS 2021), equation 7 and theorem 3.1. Intervals of
inner values are those of CROWN on boxes clipped by the signs, and are not optimized here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds._slopes import start_alphas
from torch_prepared.bounds.alpha_crown import AlphaOptions, BoundState, Problem, optimize
from torch_prepared.bounds.crown import DEFAULT_MEMORY, bound_nodes, bound_rows
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.errors import SpecError
from torch_prepared.relax import lookup
from torch_prepared.relax._base import Parameters
from torch_prepared.relax.relu import TwoPiece

__all__ = ["bound_rows_split"]

Signs = Mapping[str, Tensor]


def bound_rows_split(
    graph: Graph,
    regions: RegionBatch,
    rows: Tensor,
    signs: Signs,
    *,
    parameters: Parameters | None = None,
    known: Mapping[str, Interval] | None = None,
    options: AlphaOptions | None = None,
    max_memory: int = DEFAULT_MEMORY,
) -> tuple[Tensor, dict[str, Interval]]:
    """Lower bounds of output rows over the parts of regions that signs select.

    Args:
        graph: the network.
        regions: b input sets.
        rows: (b or 1, s, m) coefficients on the flattened output.
        signs: by name of a ReLU or leaky ReLU (b, *shape): 1 where its input is not negative, -1
            where it is not positive, 0 where nothing is known.
        parameters: tensors that replace the graph's own.
        known: intervals proved elsewhere, for the whole regions or for the parts; intersected in.
        options: of the optimization.
        max_memory: bytes that one backward pass for intervals may take.

    Returns:
        ``(lower, boxes)``: (b, s), and an interval for every value on the part. Where intervals
        show that a part is empty its bounds are infinite. Not differentiable.

    Raises:
        SpecError: a name that is no such node, a shape that does not fit, or other numbers.

    Soundness: in exact arithmetic, for any multipliers and slopes. NaN keeps NaN.
    """
    options = options or AlphaOptions()
    _check(graph, len(regions), signs)
    table = graph.parameters if parameters is None else {**graph.parameters, **parameters}
    fixed = {name: value.detach() for name, value in table.items()}
    spread = rows.detach().expand(len(regions), *rows.shape[1:])
    with torch.no_grad():
        whole = bound_nodes(graph, regions, parameters=fixed, known=known, max_memory=max_memory)
        clipped, empty = dict(known or {}), torch.zeros(len(regions), dtype=torch.bool)
        empty = empty.to(regions.lower.device)
        for name, sign in signs.items():
            source = graph.node(name).inputs[0]
            box, lost = _clip(clipped.get(source, whole[source]), whole[source], sign)
            clipped[source], empty = box, empty | lost.flatten(1).any(dim=1)
        boxes = bound_nodes(graph, regions, parameters=fixed, known=clipped, max_memory=max_memory)
        lower = bound_rows(graph, regions, boxes, spread, parameters=fixed).lower
    problem = _Split(graph, regions, fixed, spread, BoundState(lower, boxes), signs)
    found = optimize(problem, BoundState(lower, boxes), options)
    lower = torch.where(empty.unsqueeze(1) & ~found.lower.isnan(), torch.inf, found.lower)
    return lower, found.boxes


def _check(graph: Graph, count: int, signs: Signs) -> None:
    for name, sign in signs.items():
        node = next((n for n in graph.nodes[1:] if n.name == name), None)
        if node is None or not isinstance(lookup(node.op), TwoPiece):
            raise SpecError(f"signs: got {name!r}; expected the name of a relu or leaky_relu node")
        if tuple(sign.shape) != (count, *node.shape):
            raise SpecError(
                f"signs of {name!r}: got shape {tuple(sign.shape)}; expected {(count, *node.shape)}"
            )
        if not bool(((sign == 0) | (sign.abs() == 1)).all()):
            raise SpecError(f"signs of {name!r}: got other numbers; expected -1, 0 and 1")


def _clip(box: Interval, whole: Interval, sign: Tensor) -> tuple[Interval, Tensor]:
    """The part of a box that signs select, and where none is left (the box stays there)."""
    box = box.intersect(whole)
    lost = ((sign > 0) & (box.upper < 0)) | ((sign < 0) & (box.lower > 0))
    lower = torch.where((sign > 0) & ~lost, box.lower.clamp_min(0), box.lower)
    upper = torch.where((sign < 0) & ~lost, box.upper.clamp_max(0), box.upper)
    return Interval(lower, upper), lost


class _Split(Problem):
    """Slopes and multipliers of the output rows; intervals are fixed."""

    def __init__(
        self,
        graph: Graph,
        regions: RegionBatch,
        table: Parameters,
        rows: Tensor,
        start: BoundState,
        signs: Signs,
    ) -> None:
        self._graph, self._regions, self._table = graph, regions, table
        self._rows, self._boxes, self.known = rows, start.boxes, start.boxes
        count = rows.shape[1]
        self._alphas = start_alphas(graph, start.boxes, graph.nodes[-1].name, count)
        # Multipliers have the size of the rows they are subtracted from.
        size = rows.abs().amax().clamp_min(torch.finfo(rows.dtype).tiny)
        self._signs = {name: (size * sign.to(rows)).unsqueeze(1) for name, sign in signs.items()}
        self._betas = {
            name: sign.new_zeros(sign.shape[0], count, *sign.shape[2:]).requires_grad_()
            for name, sign in self._signs.items()
        }
        self.leaves = [*self._alphas.values(), *self._betas.values()]

    def run(self) -> BoundState:
        """Bounds at the present slopes and multipliers."""
        pulls = {name: beta * self._signs[name] for name, beta in self._betas.items()}
        found = bound_rows(
            self._graph, self._regions, self._boxes, self._rows, parameters=self._table,
            alphas=self._alphas, pulls=pulls, cuts=False,
        )  # fmt: skip
        return BoundState(found.lower, self._boxes)

    def project(self) -> None:
        for alpha in self._alphas.values():
            alpha.clamp_(0.0, 1.0)
        for beta in self._betas.values():
            beta.clamp_min_(0.0)
