"""The difference of two networks as one network, and proved bounds of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_prepared.bounds import compute_bounds
from torch_prepared.certify import CheckResult
from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.edit._certify import certify_network, prove
from torch_prepared.errors import SpecError
from torch_prepared.specs import InputSet, Property, SafeSet

__all__ = ["DifferenceBound", "bound_difference", "difference_graph"]

_WIDEN, _LEAST = 1.001, 1e-9
_OTHER = "~after"


@dataclass(frozen=True)
class DifferenceBound:
    """``|after(x) - before(x)| <= bound`` in every output, for all x of a region.

    Args:
        bound: largest difference allowed for; infinite when nothing finite was found.
        per_output: (m,) bound of each output before widening.
        proved: whether the independent checker confirmed ``bound``.
        check: its answer; None when the two networks are the same function by construction.
    """

    bound: float
    per_output: Tensor
    proved: bool
    check: CheckResult | None


def difference_graph(before: Graph, after: Graph) -> Graph:
    """The network ``after(x) - before(x)``; what both compute alike is computed once.

    Nodes of both that have the same operator, inputs and parameter values are shared, so that an
    unchanged first part costs the bounds nothing.

    Raises:
        SpecError: networks with other input or output shapes.
    """
    if before.input_shape != after.input_shape or before.output_shape != after.output_shape:
        raise SpecError(
            f"difference: got networks {before.input_shape} -> {before.output_shape} and "
            f"{after.input_shape} -> {after.output_shape}; expected equal shapes"
        )
    before = before.to(torch.float64, "cpu")
    after = after.to(torch.float64, "cpu")
    nodes, parameters = list(before.nodes), dict(before.parameters)
    names = {after.nodes[0].name: before.nodes[0].name}
    for node in after.nodes[1:]:
        inputs = tuple(names[name] for name in node.inputs)
        twin = _twin(node, inputs, before, after)
        if twin is not None:
            names[node.name] = twin
            continue
        params = {}
        for role, ref in node.params.items():
            name = ref.name + _OTHER
            parameters[name] = after.parameters[ref.name]
            params[role] = ParameterRef(name, ref.permute, ref.reshape)
        names[node.name] = node.name + _OTHER
        nodes.append(replace(node, name=names[node.name], inputs=inputs, params=params))
    ends = (names[after.nodes[-1].name], before.nodes[-1].name)
    shape = before.nodes[-1].shape
    nodes.append(Node("~difference", "add", ends, shape, {}, {"signs": (1, -1)}))
    return Graph(tuple(nodes), parameters, frozenset())


def bound_difference(
    before: Graph, after: Graph, region: InputSet, *, certify: bool = True
) -> DifferenceBound:
    """How far two networks can differ on a region.

    Args:
        before: a network.
        after: another one of the same shapes.
        region: inputs.
        certify: have the bound confirmed by the independent checker.

    Raises:
        SpecError: shapes that do not fit.

    Soundness: the bound is computed in exact-arithmetic terms with float64 and widened by a
        thousandth; only with ``proved`` it also covers rounding, for the weights as stored. A bound
        says nothing outside of the region.
    """
    graph = difference_graph(before, after)
    outputs = graph.output_size
    if graph.nodes[-1].inputs[0] == graph.nodes[-1].inputs[1]:
        return DifferenceBound(0.0, torch.zeros(outputs, dtype=torch.float64), True, None)
    with torch.no_grad():
        box = compute_bounds(graph, region)
    ends = torch.maximum(box.lower.abs(), box.upper.abs())[0]
    if not bool(torch.isfinite(ends).all()):
        return DifferenceBound(float("inf"), ends, False, None)
    bound = float(ends.max()) * _WIDEN + _LEAST
    if not certify:
        return DifferenceBound(bound, ends, False, None)
    prop = Property(region, SafeSet.interval([-bound] * outputs, [bound] * outputs), "difference")
    proofs, _ = prove(graph, [prop])
    certified = certify_network(graph, [prop], proofs, {"method": "audit"})
    return DifferenceBound(bound, ends, certified.holds, certified.check)


def _twin(node: Node, inputs: tuple[str, ...], before: Graph, after: Graph) -> str | None:
    """The node of ``before`` that computes the same value, if there is one."""
    for other in before.nodes:
        if other.op != node.op or other.inputs != inputs or other.shape != node.shape:
            continue
        if _plain(other.attrs) != _plain(node.attrs) or set(other.params) != set(node.params):
            continue
        if all(
            torch.equal(other.params[role].read(before.parameters), ref.read(after.parameters))
            for role, ref in node.params.items()
        ):
            return other.name
    return None


def _plain(attrs: Mapping[str, object]) -> dict[str, object]:
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in attrs.items()}
