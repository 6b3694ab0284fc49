"""Features shown on the input: how a feature's interval moves when the input does."""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from torch_prepared.bounds import RegionBatch, bound_rows
from torch_prepared.errors import SpecError, UnsupportedOperationError
from torch_prepared.interpret._relaxed import relax_batch
from torch_prepared.interpret.features import ProofFeatures, feature_box
from torch_prepared.relax import ElementwiseOperator, lookup

__all__ = ["MapStyle", "feature_maps", "foreground_share", "total_map"]

_STEPS = 20
_RATE = 0.1


class MapStyle(enum.Enum):
    r"""Which derivative of the interval's midpoint :math:`(l_i + u_i)/2` is shown.

    ``FROZEN``: with the relaxation held fixed; the mean of the two rows of input coefficients
    behind l and u (the sum of the two is what the authors' code stores). ``MOVING``: of the whole
    bound computation, the relaxation moving with the region. ``ALPHA``: as ``FROZEN``, after the
    slopes of the relaxation were optimized for l and u of each feature (alpha-CROWN with fixed
    intermediate bounds), so that the rows belong to tighter intervals.
    """

    FROZEN = "frozen"
    MOVING = "moving"
    ALPHA = "alpha"

    @classmethod
    def named(cls, name: str | MapStyle) -> MapStyle:
        """The style called ``name``."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(m.value for m in cls)
            raise SpecError(f"maps: got {name!r}; expected one of {known}") from None


def feature_maps(
    features: ProofFeatures, kept: Tensor, *, style: str | MapStyle = MapStyle.FROZEN
) -> Tensor:
    """Gradients of the midpoints of features with respect to the center of the region.

    Args:
        features: the proof.
        kept: (k,) positions of the features to show.
        style: see :class:`MapStyle`.

    Returns:
        (k, *input_shape) float64 on the CPU; zero for features that are never active (u <= 0). For
        interval proofs ``FROZEN`` and ``ALPHA`` use the lines that the intervals allow.

    Raises:
        SpecError: an unknown style, positions out of range, or ``MOVING`` on a region that is not
            a box.

    Source: Banerjee, Singh and Singh (ICLR 2024) and their code; ``ALPHA`` is ours.
    """
    kind = MapStyle.named(style)
    index = kept.to(features.rows.device)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < features.size:
        raise SpecError(f"maps: got features out of range; expected 0 to {features.size - 1}")
    shape = (len(index), *features.cut.graph.input_shape)
    if not len(index):
        return torch.zeros(shape, dtype=torch.float64)
    if kind is MapStyle.MOVING:
        found = _moving(features, index)
    else:
        units = torch.zeros(len(index), features.size, dtype=torch.float64, device=index.device)
        units[torch.arange(len(index)), index] = 1.0
        both = torch.cat([units, -units])
        if kind is MapStyle.ALPHA:
            inputs = _optimized(features, both)
        else:
            with torch.no_grad():
                inputs = features.relaxed.bound(features.cut.hidden, both).inputs
        lower, negated = inputs.chunk(2)
        found = (lower - negated) / 2
    dead = features.upper[index] <= 0
    return found.masked_fill(dead.unsqueeze(1), 0.0).reshape(shape).cpu()


def total_map(features: ProofFeatures, kept: Tensor, maps: Tensor) -> Tensor:
    """``sum_i v_i maps_i`` over the kept features, v being the binding row: (*input_shape)."""
    weights = features.rows[features.binding][kept.to(features.rows.device)].to(maps)
    return (weights.reshape(-1, *[1] * (maps.dim() - 1)) * maps).sum(dim=0)


def foreground_share(maps: Tensor, mask: Tensor) -> Tensor:
    """(k,) share of each map's absolute values on the inputs where ``mask`` (*input) is True.

    NaN for a map that is zero everywhere.
    """
    flat = maps.abs().flatten(1)
    return flat[:, mask.flatten()].sum(dim=1) / flat.sum(dim=1)


def _moving(features: ProofFeatures, index: Tensor) -> Tensor:
    """Autograd through all bounds."""
    relaxed = features.relaxed
    if not relaxed.regions.is_box:
        raise SpecError("maps 'moving': got a region that is not a box; use 'frozen'")
    shift = torch.zeros(
        features.prop.region.size, dtype=torch.float64, device=index.device, requires_grad=True
    )
    with torch.enable_grad():
        regions = RegionBatch(relaxed.regions.lower + shift, relaxed.regions.upper + shift)
        moved = relax_batch(relaxed.graph, regions, relaxed.method)
        lower, upper = feature_box(moved, features.cut)
        middle = (lower + upper)[index] / 2
        rows = [
            torch.autograd.grad(m, shift, retain_graph=True, allow_unused=True)[0] for m in middle
        ]
    return torch.stack([torch.zeros_like(shift) if row is None else row for row in rows])


def _optimized(features: ProofFeatures, rows: Tensor) -> Tensor:
    """Input coefficients (r, n0) of ``rows`` (r, n) under slopes optimized for each."""
    relaxed = features.relaxed
    alphas = {}
    for node in relaxed.graph.nodes[1:]:
        operator = lookup(node.op)
        if not isinstance(operator, ElementwiseOperator):
            continue
        try:
            start = operator.alpha_start(node, relaxed.boxes[node.inputs[0]])
        except UnsupportedOperationError:
            continue  # keeps its default lines
        if relaxed.alphas is not None:
            start = relaxed.alphas[node.name].squeeze(1)
        spread = start.unsqueeze(1).expand(1, len(rows), *start.shape[1:])
        alphas[node.name] = spread.clone().requires_grad_(True)
    optimizer = torch.optim.Adam(alphas.values(), lr=_RATE) if alphas else None
    best = torch.full((len(rows),), -torch.inf, dtype=rows.dtype, device=rows.device)
    inputs = rows.new_zeros(len(rows), relaxed.graph.input_size)
    for _ in range(_STEPS if alphas else 1):
        with torch.enable_grad():
            bound = bound_rows(
                relaxed.graph,
                relaxed.regions,
                relaxed.boxes,
                rows.unsqueeze(0),
                node=features.cut.hidden,
                alphas=alphas,
                cuts=False,  # else the best cut, not the input coefficients, would be optimized
            )
        lower = bound.lower[0].detach()
        better = lower > best
        best = torch.where(better, lower, best)
        inputs = torch.where(better.unsqueeze(1), bound.inputs[0].detach(), inputs)
        if optimizer is None or not bound.lower.requires_grad:
            break
        optimizer.zero_grad()
        (-bound.lower.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            for alpha in alphas.values():
                alpha.clamp_(0.0, 1.0)
    return inputs
