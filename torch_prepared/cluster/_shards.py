"""What every rank does of an edit: one function per message, run by all ranks at once.

Properties are dealt to ranks in contiguous blocks, and so are weights: a rank computes the
gradients of its own properties, then hands out their columns, and keeps those of its own weights
for all properties. Inner products ``J J'`` are the sum over ranks of what their columns give.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from torch_prepared.certify import Certificate, check_certificate, weights_digest
from torch_prepared.cluster._group import Group
from torch_prepared.core.graph import Graph
from torch_prepared.edit._base import EditProblem
from torch_prepared.edit._distance import QuadraticDistance, choose_distance
from torch_prepared.edit._driver import Task
from torch_prepared.edit._linearize import MarginFunction
from torch_prepared.edit._steps import Distance
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.errors import ClusterError

__all__ = [
    "NOTHING",
    "OPERATIONS",
    "Operation",
    "Shards",
    "blocks",
    "from_bytes",
    "pack",
    "to_bytes",
    "unpack",
]

Operation = Callable[["Shards", list[Tensor], list[Tensor]], list[Tensor]]
NOTHING = -1  #: in place of rows


@dataclass
class Shards:
    """The state of one rank.

    Args:
        task: the same in every rank.
        group: of the ranks.
        distance: of the current search.
        gradients: (k, p) of the last linearization, of this rank's properties.
        rows: gradients (m, q), of this rank's q weights.
    """

    task: Task
    group: Group
    distance: Distance | None = None
    gradients: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    rows: dict[int, Tensor] = field(default_factory=dict)
    known: dict[tuple[int, ...], MarginFunction] = field(default_factory=dict)
    searched: dict[tuple[int, ...], EditProblem] = field(default_factory=dict)

    def vector(self) -> ParameterVector:
        """The editable parameters."""
        return ParameterVector.chosen(self.task.source.graph, self.task.options.layers)

    def margins(self, index: Tensor, size: float) -> MarginFunction:
        """Margins of the properties at positions ``index``, regions shrunk to ``size``."""
        key = tuple(index.tolist())
        if key not in self.known:
            problem = self.problem(index)
            whole = MarginFunction(problem.exact, problem.batch, self.vector())
            self.known = {key: whole}
        return self.known[key] if size == 1.0 else self.known[key].scaled(size)

    def problem(self, index: Tensor) -> EditProblem:
        """The problem of the properties at positions ``index``."""
        chosen = tuple(self.task.every[i] for i in index.tolist())
        return EditProblem(self.task.source.graph, chosen, self.task.reference, self.task.options)

    def columns(self, count: int) -> slice:
        """This rank's weights, of ``count``."""
        return blocks(count, self.group.size)[self.group.rank]


def choose(state: Shards, shared: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
    """Margins with the operators' own slopes, and these, at theta (p,)."""
    (theta,), (index, size) = shared, mine
    return list(state.margins(index, float(size)).choose(theta)) if len(index) else []


def value(state: Shards, shared: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
    """Margins with given slopes (b, a) at theta (p,)."""
    (theta,), (index, size, slopes) = shared, mine
    return [state.margins(index, float(size)).value(theta, slopes)] if len(index) else []


def linearize(state: Shards, shared: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
    """Gradients of margins ``rows`` (k,); tells their products with theta, or all of them."""
    (theta, whole), (index, size, slopes, rows) = shared, mine
    state.gradients = torch.zeros(0, len(theta))
    if len(rows):
        margins = state.margins(index, float(size))
        line = margins.linearize(theta, slopes, slopes.new_zeros(len(margins.owners)), rows)
        state.gradients = line.jacobian
    return [state.gradients if bool(whole) else state.gradients.double() @ theta]


def share_distance(state: Shards, shared: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
    """Build the metric, in every rank the same."""
    index, damping = shared
    key = tuple(index.tolist())
    if key not in state.searched:
        state.searched = {key: state.problem(index)}
    state.distance = choose_distance(state.searched[key], state.vector(), float(damping))
    return []


def append(state: Shards, shared: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
    """Rows ``old``, then the last gradients, as rows ``new``.

    Tells both new blocks of their inner products, and what a metric asks of the fresh rows.
    """
    old, new = shared[0].tolist()
    if not isinstance(state.distance, QuadraticDistance):
        raise ClusterError("append: got no quadratic distance; expected one")
    parts = blocks(state.gradients.shape[1], state.group.size)
    sent = [state.gradients[:, p].contiguous() for p in parts]
    fresh = torch.cat([p for p in state.group.exchange(sent) if len(p)])
    products = fresh.double() @ fresh.double().T
    if old in state.rows:
        products = torch.cat([products, state.rows[old].double() @ fresh.double().T])
        fresh = torch.cat([state.rows[old], fresh])
    state.rows[new] = fresh
    return [*_total(state, products), state.distance.metric.image(state.gradients)]


def take(state: Shards, shared: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
    """Some of the rows ``old`` as rows ``new``."""
    (old, new), kept = shared[0].tolist(), shared[1]
    state.rows[new] = state.rows[old][kept]
    return []


def effect(state: Shards, shared: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
    """Products of rows with a vector (p,)."""
    rows, vector = int(shared[0]), shared[1]
    own = vector[state.columns(len(vector))]
    return _total(state, (state.rows[rows] @ own.float()).double())


def combine(state: Shards, shared: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
    """This rank's part of the sum of rows by weights (m,)."""
    rows = state.rows[int(shared[0])]
    return [(shared[1].to(rows) @ rows).double()]


def forget(state: Shards, shared: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
    """Drop rows that nobody asks for any more."""
    for number in shared[0].tolist():
        state.rows.pop(number, None)
    return []


def certify(state: Shards, shared: list[Tensor], mine: list[Tensor]) -> list[Tensor]:
    """Replay this rank's part of a certificate on the network as this rank knows it."""
    (names, values, limit), (text, index) = shared, mine
    graph = state.task.source.graph
    record = graph.with_parameters(unpack(graph, names, values)).record()
    if not len(index):
        return [to_bytes([weights_digest(record.weights), []])]
    seconds = float(limit)
    check = check_certificate(
        Certificate.from_json(from_bytes(text)),
        record,
        [state.task.every[i].record() for i in index.tolist()],
        time_limit=None if seconds < 0 else seconds,
        workers=torch.get_num_threads(),
    )
    told = [
        [c.name, c.status.value, c.margin, c.leaves, c.reason, c.failed] for c in check.per_property
    ]
    return [to_bytes([weights_digest(record.weights), told])]


OPERATIONS: tuple[Operation, ...] = (
    choose, value, linearize, share_distance, append, take, effect, combine, forget,
    certify,
)  # fmt: skip


def blocks(count: int, parts: int, weights: Sequence[int] | None = None) -> list[slice]:
    """Contiguous blocks of ``count`` things, of about equal number, or equal sums of weights."""
    if weights is None:
        edges = [count * i // parts for i in range(parts + 1)]
    else:
        total = torch.tensor([0, *weights]).cumsum(0)
        wanted = torch.arange(parts + 1) * int(total[-1]) / parts
        edges = torch.searchsorted(total.double(), wanted.double()).tolist()
        edges[-1] = count
    return [slice(a, b) for a, b in pairwise(edges)]


def to_bytes(value: object) -> Tensor:
    """Plain data as a tensor of bytes."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_bytes(value: Tensor) -> object:
    """Inverse of :func:`to_bytes`."""
    return json.loads(value.numpy().tobytes())


def pack(parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Names, and all numbers in one float64 vector, which holds float32 without loss."""
    flat = [value.detach().double().cpu().reshape(-1) for value in parameters.values()]
    return [to_bytes(list(parameters)), torch.cat([torch.zeros(0, dtype=torch.float64), *flat])]


def unpack(graph: Graph, names: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Inverse of :func:`pack`, in the dtypes that the graph stores."""
    order = from_bytes(names)
    if not isinstance(order, list):
        raise ClusterError("parameters: got no names; expected a list of them")
    stored = [graph.parameters[str(name)] for name in order]
    parts = values.split([value.numel() for value in stored])
    return {
        str(name): part.reshape(old.shape).to(old)
        for name, part, old in zip(order, parts, stored, strict=True)
    }


def _total(state: Shards, value: Tensor) -> list[Tensor]:
    """The sum over ranks, told by the leader."""
    total = state.group.all_reduce(value)
    return [] if state.group.rank else [total]
