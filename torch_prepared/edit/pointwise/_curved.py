"""Steps of all dense layers at once that raise the rows of many examples and move behavior little.

With what a layer reads, h, and gradients g at its output, a change D of its weight raises a row by
``g' D h``. The reference's mean squared output change is ``trace(G D A D')`` to second order for
``A = E[h h']`` and ``G = E[g g']``, if both are taken as independent and layers as well. In that
metric rows have the inner products ``(g' G^-1 g') (h' A^-1 h')``, summed over layers: the least
step that raises all rows is a projection of their number, whatever the number of weights.

Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
curvature" (ICML 2015), for the metric; steps under inequalities are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torch_prepared.certify import PointClaims
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph, Node
from torch_prepared.edit.pointwise._examples import best_rows, point_margins, row_values
from torch_prepared.relax import evaluate_all, evaluate_graph

__all__ = ["raise_rows"]

MOST_ROWS = 3000
RIVALS = 3  #: rows of one point, the lowest ones
STEPS = 120
ROUNDS = 30  #: of one projection
NEAR = 20.0  #: times what steps aim at; rows above that are not heeded
WIDEST = 2048  #: features of a layer beyond which it stays
METRIC_INPUTS, GRADIENT_INPUTS = 10_000, 2000
DRAWS = 8  #: random directions of the output per input
METRIC_EVERY = 4  #: steps
DAMPING = 0.03  #: of A and G, in mean eigenvalues
FIRST_RIDGE, LEAST_RIDGE = 2e-4, 1e-6  #: of the rows' unit diagonal
LEAK, LEAK_FALLS, CYCLE = 0.1, 0.3, 10  #: slope below 0 where all ReLUs are 0; after each idle step
HELPED = 0.9  #: share of what was missing that counts as progress
LENGTHS = (1.0, 0.5, 0.25, 0.1)


def raise_rows(
    graph: Graph,
    claims: PointClaims,
    reference: Tensor,
    margin: float,
    aim: float,
    *,
    layers: Sequence[str] | None,
    deadline: Deadline,
) -> Graph:
    """A network whose rows of ``claims`` reach ``margin``, or came closer to it.

    Args:
        graph: near a solution; not changed.
        claims: examples.
        reference: (q, n) inputs whose outputs should stay.
        margin: to reach.
        aim: what steps aim at, at least ``margin``.
        layers: names of layers that may change; None for all.
        deadline: when to stop.
    """
    single = graph.to(torch.float32, "cpu")
    dense = [n for n in single.nodes if _moves(single, n) and (layers is None or n.name in layers)]
    points = torch.from_numpy(claims.inputs).float()
    if not dense:
        return graph
    state = {name: single.parameters[name].clone() for n in dense for name in _names(single, n)}
    search = _Search(single, claims, points, reference.float(), dense)
    best, least, recent, ridge, idle = state, np.inf, np.inf, FIRST_RIDGE, 0
    for number in range(STEPS):
        values = search.values(state)
        missing = float((margin - point_margins(claims, values)).clip(0).sum())
        if number:  # the first steps may well lead away from a state that was tuned long
            idle = 0 if missing < HELPED * recent else idle + 1
            recent = min(recent, missing)
        if missing < least:
            best, least = state, missing
        if deadline.over or not missing > 0.0:
            break
        if number % METRIC_EVERY == 0:
            metrics = search.metrics(state)
        moved = search.step(state, metrics, values, aim, ridge, LEAK * LEAK_FALLS ** (idle % CYCLE))
        if moved is None:
            break
        state, ridge = moved, max(LEAST_RIDGE, 0.5 * ridge)
    state = best
    stored = {n: v.to(graph.parameters[n], copy=True) for n, v in state.items()}
    return graph.with_parameters(stored)


def _moves(graph: Graph, node: Node) -> bool:
    """Whether a node is a layer from one vector to another that alone reads its own weight."""
    if node.op != "linear" or len(node.shape) != 1:
        return False
    name = node.params["weight"].name
    fits = max(node.size, graph.node(node.inputs[0]).size) <= WIDEST
    return fits and name in graph.editable and len(graph.readers(name)) == 1


def _names(graph: Graph, node: Node) -> tuple[str, ...]:
    """The weight, and the bias if it is the layer's own."""
    weight, bias = node.params["weight"].name, node.params.get("bias")
    if bias is None or bias.name not in graph.editable or len(graph.readers(bias.name)) != 1:
        return (weight,)
    return weight, bias.name


@dataclass(frozen=True)
class _Metric:
    """Inverses of A and G of one layer."""

    inner: Tensor
    outer: Tensor


@dataclass(frozen=True)
class _Search:
    """What does not change while the weights do."""

    graph: Graph
    claims: PointClaims
    points: Tensor
    reference: Tensor
    dense: Sequence[Node]

    def values(self, state: Mapping[str, Tensor]) -> np.ndarray:
        """All rows."""
        with torch.no_grad():
            y = torch.cat([evaluate_graph(self.graph, p, state) for p in self.points.split(2048)])
        return row_values(self.claims, y.flatten(1).double().numpy())

    def metrics(self, state: Mapping[str, Tensor]) -> list[_Metric]:
        """Of every layer, at the present weights."""
        every = max(1, len(self.reference) // METRIC_INPUTS)
        x = self.reference[::every]
        few = x[:: max(1, len(x) // GRADIENT_INPUTS)]
        generator = torch.Generator().manual_seed(0)
        read, _ = self._factors(state, x, None)
        outer = [torch.zeros(n.size, n.size, dtype=torch.float64) for n in self.dense]
        for _ in range(DRAWS):
            signs = torch.randint(2, (len(few), self.graph.output_size), generator=generator)
            _, gradients = self._factors(state, few, 2.0 * signs - 1.0)
            for total, g in zip(outer, gradients, strict=True):
                total += (g.T @ g).double() / (len(few) * DRAWS)
        inner = [(h.T @ h).double() / len(h) for h in read]
        return [_Metric(_inverse(a), _inverse(g)) for a, g in zip(inner, outer, strict=True)]

    def step(
        self,
        state: Mapping[str, Tensor],
        metrics: Sequence[_Metric],
        values: np.ndarray,
        aim: float,
        ridge: float,
        leak: float = LEAK,
    ) -> dict[str, Tensor] | None:
        """The best of a few lengths of the projected step, be it worse than now."""
        rows = self._pick(values)
        rows = rows[values[rows] < NEAR * aim]
        point = torch.from_numpy(self.claims.point[rows])
        direction = torch.from_numpy(self.claims.rows[rows]).float()
        read, gradients = self._factors(state, self.points[point], direction)
        dead = torch.stack([g.abs().amax(dim=1) == 0 for g in gradients]).any(dim=0)
        if bool(dead.any()):
            _, woken = self._factors(state, self.points[point[dead]], direction[dead], leak)
            for g, other in zip(gradients, woken, strict=True):
                g[dead] = other
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for h, g, m in zip(read, gradients, metrics, strict=True):
            gram += ((g @ m.outer @ g.T) * (h @ m.inner @ h.T)).double()
        size = gram.diagonal().clamp_min(1e-300).sqrt()
        unit = 0.5 * (gram + gram.T) / torch.outer(size, size)
        unit.diagonal().add_(ridge)
        lift = (aim - values[rows]) / size.numpy()
        share = (_multipliers(unit, torch.from_numpy(lift)) / size).float()
        if not bool(torch.isfinite(share).all()):
            return None
        best: tuple[dict[str, Tensor], float] | None = None
        for length in LENGTHS:
            moved = dict(state)
            for node, h, g, m in zip(self.dense, read, gradients, metrics, strict=True):
                change = m.outer @ ((g * share[:, None]).T @ h) @ m.inner
                moved |= self._moved(node, state, length * change)
            reached = point_margins(self.claims, self.values(moved))
            left = float(np.nan_to_num(aim - reached, nan=np.inf).clip(0).sum())
            if best is None or left < best[1]:
                best = moved, left
        return None if best is None else best[0]

    def _pick(self, values: np.ndarray) -> np.ndarray:
        """The lowest rows of each point."""
        rows = best_rows(self.claims, values)
        rows = rows[np.lexsort((values[rows], self.claims.point[rows]))]
        point = self.claims.point[rows]
        first = np.flatnonzero(np.concatenate([[True], point[1:] != point[:-1]]))
        rank = np.arange(len(rows)) - np.repeat(first, np.diff([*first, len(rows)]))
        return rows[rank < max(1, min(RIVALS, MOST_ROWS // len(first)))]

    def _factors(
        self,
        state: Mapping[str, Tensor],
        x: Tensor,
        direction: Tensor | None,
        leak: float = 0.0,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """What each layer reads (b, n or n + 1), and gradients (b, k) at its output."""
        graph = _leaky(self.graph, leak) if leak else self.graph
        leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
        with torch.enable_grad():
            values = evaluate_all(graph, x, leaves)
            read, gradients = [], []
            if direction is not None:
                output = values[self.graph.nodes[-1].name].flatten(1)
                ends = [values[n.name] for n in self.dense]
                response = (output * direction).sum()
                found = torch.autograd.grad(response, ends, materialize_grads=True)
                gradients = list(found)
        for node in self.dense:
            h = values[node.inputs[0]].detach()
            if len(_names(self.graph, node)) == 2:
                h = torch.cat([h, torch.ones(len(h), 1)], dim=1)
            read.append(h)
        return read, gradients

    def _moved(self, node: Node, state: Mapping[str, Tensor], change: Tensor) -> dict[str, Tensor]:
        """Stored parameters of a layer after a change (k, n or n + 1) of what it applies."""
        names = _names(self.graph, node)
        parts = [change] if len(names) == 1 else [change[:, :-1], change[:, -1]]
        found = {}
        for name, role, part in zip(names, ("weight", "bias"), parts, strict=False):
            old = state[name]
            index = torch.arange(old.numel()).reshape(old.shape)
            place = node.params[role].read({name: index})
            new = old.flatten().clone()
            new[place.flatten()] += part.reshape(place.shape).flatten()
            found[name] = new.reshape(old.shape)
        return found


def _leaky(graph: Graph, slope: float) -> Graph:
    """The network with slopes for negative numbers too.

    A point at which all of some layer's ReLUs are 0 has no gradient before it; with these slopes it
    is moved toward where it has one, the farther the less the slope. The true network judges steps.
    """
    nodes = tuple(
        replace(n, op="leaky_relu", attrs={"alpha": slope}) if n.op == "relu" else n
        for n in graph.nodes
    )
    return replace(graph, nodes=nodes)


def _multipliers(unit: Tensor, lift: Tensor) -> Tensor:
    """Roughly the ``u >= 0`` with ``unit u >= lift``, equal where u > 0.

    By a primal-dual active set (Hintermueller, Ito and Kunisch, SIAM J. Optim. 13, 2002), cut off
    after a few rounds: a step is judged by what it does, and ``solvers.project``, exact, takes ten
    times as long for rows that nearly depend on each other.
    """
    active, found = lift > 0, torch.zeros_like(lift)
    for _ in range(ROUNDS):
        inside = active.nonzero().flatten()
        factor, failed = torch.linalg.cholesky_ex(unit[inside][:, inside])
        if int(failed):
            break
        found = torch.zeros_like(lift)
        found[inside] = torch.cholesky_solve(lift[inside, None], factor)[:, 0]
        following = found + lift - unit @ found > 0
        if bool((following == active).all()):
            break
        active = following
    return found.clamp_min(0)


def _inverse(matrix: Tensor) -> Tensor:
    """Of a damped positive semidefinite matrix, in float32."""
    damping = max(DAMPING * float(matrix.diagonal().mean()), 1e-30)
    made: Tensor = torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype))
    return made.float()
