"""Metrics on weight space: how far apart two networks are.

The behavior metric is ``M = damping I + R' R``, ``R' R`` being an unbiased sketch of the
Gauss-Newton matrix ``J' J / q`` of the outputs on q reference inputs: one random direction
``g ~ N(0, I)`` of the output per input gives one row ``g' J(x) / sqrt(q)``, and
``E[(g' J)' (g' J)] = J' J``. With k rows all is done in k dimensions by the Woodbury identity; no
p x p matrix exists. A row's part in a linear layer is an outer product of what the layer read and
of the gradient at its output, and is kept as these two factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.relax import lookup
from torch_prepared.relax.conv import pad_values, window

__all__ = ["Metric", "behavior_metric", "euclidean_metric"]

MAX_ROWS = 3000
FEWEST_DIRECTIONS = 200
SUBSPACE = 400
SUBSPACE_ITERATIONS = 4
DENSE_BYTES = 1 << 30
FLAT_ENTRIES = 60_000_000
NEGLIGIBLE = 0.1
LEAST_LEAD = 0.3  #: of the median lead of a decision; thinner ones weigh no more than this
LEAST_GAP = 0.1  #: of the outputs' spread; likewise where no labels tell what decides


class _Block(ABC):
    """Sketch rows restricted to one parameter: k matrices of the parameter's shape."""

    name: str

    @abstractmethod
    def gram(self) -> Tensor:
        """Inner products of the rows (k, k)."""

    @abstractmethod
    def times(self, directions: Tensor) -> Tensor:
        """Inner products with directions (m, *shape): (m, k)."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """Sums of rows by weights (m, k): (m, *shape)."""


@dataclass(frozen=True)
class _OuterBlock(_Block):
    """Rows ``outer[i] x inner[i]`` of a linear layer's weight, in the operator's layout."""

    name: str
    ref: ParameterRef
    outer: Tensor
    inner: Tensor
    shape: torch.Size

    def gram(self) -> Tensor:
        return (self.outer @ self.outer.T) * (self.inner @ self.inner.T)

    def times(self, directions: Tensor) -> Tensor:
        table = {self.ref.name: directions}
        return torch.stack(
            [
                ((self.outer @ _read(self.ref, d)) * self.inner).sum(dim=1)
                for d in table[self.ref.name]
            ]
        )

    def combine(self, weights: Tensor) -> Tensor:
        made = [(self.outer * w[:, None]).T @ self.inner for w in weights]
        return torch.stack([_unread(self.ref, m, self.shape) for m in made])


@dataclass(frozen=True)
class _DenseBlock(_Block):
    """Rows (k, *shape) of any parameter, stored."""

    name: str
    rows: Tensor

    def gram(self) -> Tensor:
        flat = self.rows.flatten(1)
        return flat @ flat.T

    def times(self, directions: Tensor) -> Tensor:
        return directions.flatten(1) @ self.rows.flatten(1).T

    def combine(self, weights: Tensor) -> Tensor:
        return (weights @ self.rows.flatten(1)).reshape(len(weights), *self.rows.shape[1:])


class _Sketch(ABC):
    """Sketch rows R (k, p) over a whole parameter vector."""

    @abstractmethod
    def gram(self) -> Tensor:
        """``R R'`` (k, k), float64."""

    @abstractmethod
    def times(self, rows: Tensor) -> Tensor:
        """``rows R'``: (m, p) to (m, k), float32."""

    @abstractmethod
    def combine(self, weights: Tensor) -> Tensor:
        """``weights R``: (m, k) to (m, p), float32."""


@dataclass(frozen=True)
class _BlockSketch(_Sketch):
    """Rows parameter by parameter, outer products kept as factors."""

    vector: ParameterVector
    blocks: tuple[_Block, ...]

    def gram(self) -> Tensor:
        return torch.stack([block.gram().double() for block in self.blocks]).sum(dim=0)

    def times(self, rows: Tensor) -> Tensor:
        parts = self._split(rows.float())
        return torch.stack([block.times(parts[block.name]) for block in self.blocks]).sum(dim=0)

    def combine(self, weights: Tensor) -> Tensor:
        made = {block.name: block.combine(weights.float()).flatten(1) for block in self.blocks}
        missing = torch.zeros(len(weights), 1)
        return torch.cat(
            [
                made[name] if name in made else missing.expand(-1, shape.numel())
                for name, shape in zip(self.vector.names, self.vector.shapes, strict=True)
            ],
            dim=1,
        )

    def _split(self, rows: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self.vector.shapes]
        named = zip(self.vector.names, self.vector.shapes, rows.split(sizes, dim=1), strict=True)
        return {name: part.reshape(-1, *shape) for name, shape, part in named}


@dataclass(frozen=True)
class _FlatSketch(_Sketch):
    """Rows (k, p), float32: the principal directions of a small network's sketch."""

    rows: Tensor

    def gram(self) -> Tensor:
        return (self.rows @ self.rows.T).double()

    def times(self, rows: Tensor) -> Tensor:
        return rows.float() @ self.rows.T

    def combine(self, weights: Tensor) -> Tensor:
        return weights.float() @ self.rows


@dataclass(frozen=True)
class Metric:
    """``<a, b> = a' (damping I + R' R) b``; Euclidean without a sketch R.

    Args:
        damping: positive weight of the Euclidean part.
        sketch: R (k, p).
        factor: Cholesky factor (k, k) of ``damping I + R R'``.
    """

    damping: float
    sketch: _Sketch | None = None
    factor: Tensor | None = None

    def solve(self, rows: Tensor) -> Tensor:
        """``rows M^-1``: (m, p) to (m, p), by Woodbury."""
        if self.sketch is None or self.factor is None or not len(rows):
            return rows / self.damping
        inner = torch.cholesky_solve(self.sketch.times(rows).T.to(self.factor), self.factor).T
        return (rows - self.sketch.combine(inner).to(rows)) / self.damping

    def norm_squared(self, delta: Tensor) -> float:
        """``delta' M delta`` of a vector (p,)."""
        value = self.damping * float(delta.square().sum())
        if self.sketch is not None:
            value += float(self.sketch.times(delta[None]).double().square().sum())
        return value


def euclidean_metric() -> Metric:
    """The 2-norm."""
    return Metric(1.0)


def behavior_metric(
    graph: Graph, vector: ParameterVector, reference: Reference, seed: int, damping: float
) -> Metric:
    """Gauss-Newton metric of the outputs on reference inputs.

    Args:
        graph: the original network; the sketch is computed in float32.
        vector: which parameters move.
        reference: inputs whose outputs should stay.
        seed: of the random output directions.
        damping: weight of the 2-norm, relative to the mean squared sketch entry per weight.

    Returns:
        A metric whose unit is the outputs' mean standard deviation on the reference, and in which
        changes weigh most where they would change a decision: see :func:`_decision_directions`.
    """
    single = graph.to(torch.float32, "cpu")
    generator = torch.Generator().manual_seed(seed)
    total = len(reference.inputs)
    count = min(total, MAX_ROWS, max(16, DENSE_BYTES // (4 * max(1, _dense_size(single, vector)))))
    chosen = torch.randperm(total, generator=generator)[:count]
    directions = torch.randn(count, graph.output_size, generator=generator)
    spread = float(reference.outputs.float().std(dim=0).mean()) if total > 1 else 1.0
    directions = _decision_directions(directions, reference, chosen)
    directions = directions / (max(spread, 1e-12) * count**0.5)
    blocks = _sketch(single, vector, reference.inputs[chosen].float(), directions)
    sketch: _Sketch = _BlockSketch(vector, tuple(blocks))
    gram = sketch.gram()
    absolute = max(damping * float(gram.diagonal().sum()) / vector.count, 1e-30)
    sketch = _principal(sketch, gram, absolute, vector.count)
    gram = sketch.gram()
    gram.diagonal().add_(absolute)
    return Metric(absolute, sketch, torch.linalg.cholesky(gram))


def _decision_directions(noise: Tensor, reference: Reference, chosen: Tensor) -> Tensor:
    """Random output directions (k, m) that weigh most where a decision is thin.

    Labels show that the decision is the largest output. Without labels it may be either end, or
    there may be none and all outputs count: a mixture of the three.
    """
    outputs = reference.outputs[chosen].float()
    spread = float(reference.outputs.float().std(dim=0).mean()) if len(chosen) > 1 else 1.0
    if outputs.shape[1] == 1:
        return noise
    if reference.labels is not None:
        lead = outputs.topk(2, dim=1).values
        floor = LEAST_LEAD * float((lead[:, 0] - lead[:, 1]).median())
        return spread * _lead_directions(noise, outputs, floor)
    floor = LEAST_GAP * spread
    generator = torch.Generator().manual_seed(0)
    again, third = torch.randn(2, *noise.shape, generator=generator)
    both = _lead_directions(noise, outputs, floor) + _lead_directions(again, -outputs, floor)
    mixed: Tensor = floor * both + LEAST_GAP * third
    return mixed


def _lead_directions(noise: Tensor, outputs: Tensor, floor: float) -> Tensor:
    """Random combinations (k, m) of every input's leads ``y_top - y_j``, over their sizes.

    With independent noise ``g_j`` the row ``sum_j g_j (e_top - e_j) / (lead_j + floor)`` has the
    second moment ``sum_j (e_top - e_j) (e_top - e_j)' / (lead_j + floor)^2``.
    """
    top = outputs.argmax(dim=1, keepdim=True)
    lead = outputs.gather(1, top) - outputs
    share = noise / (lead + floor + torch.finfo(outputs.dtype).tiny)
    share = share.scatter(1, top, 0.0)
    return (-share).scatter(1, top, share.sum(dim=1, keepdim=True))


def _principal(sketch: _Sketch, gram: Tensor, damping: float, count: int) -> _Sketch:
    """The directions that weigh more than a tenth of the damping, when storing them is cheap."""
    if FEWEST_DIRECTIONS * count > FLAT_ENTRIES:
        return sketch
    values, vectors = _largest_eigenpairs(gram, NEGLIGIBLE * damping)
    kept = vectors[:, values > NEGLIGIBLE * damping]
    if kept.shape[1] * count > FLAT_ENTRIES:
        return sketch
    return _FlatSketch(sketch.combine(kept.T))


def _largest_eigenpairs(gram: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of a positive semidefinite matrix, at least all above ``least``.

    By subspace iteration where few are that large (Halko, Martinsson and Tropp, 2011), else all.
    In float32: a metric needs no more, and it is twice as fast.
    """
    k, wide = len(gram), gram.dtype
    gram = gram.float()
    if k > 2 * SUBSPACE:
        generator = torch.Generator().manual_seed(0)
        basis = torch.randn(k, SUBSPACE, generator=generator, dtype=gram.dtype)
        for _ in range(SUBSPACE_ITERATIONS):
            basis = torch.linalg.qr(gram @ basis).Q
        values, inner = torch.linalg.eigh(basis.T @ gram @ basis)
        if float(values[0]) < 0.5 * least:
            return values.to(wide), (basis @ inner).to(wide)
    values, vectors = torch.linalg.eigh(gram)
    return values.to(wide), vectors.to(wide)


def _sketch(
    graph: Graph, vector: ParameterVector, inputs: Tensor, directions: Tensor
) -> list[_Block]:
    """One backward pass for all rows: the gradient at every layer's output, by sample."""
    values: dict[str, Tensor] = {graph.nodes[0].name: inputs.reshape(-1, *graph.input_shape)}
    layers = [n for n in graph.nodes if any(r.name in vector.names for r in n.params.values())]
    with torch.enable_grad():
        for node in graph.nodes[1:]:
            value = lookup(node.op).value(node, [values[i] for i in node.inputs], graph.parameters)
            needs = node in layers and not value.requires_grad
            values[node.name] = value.requires_grad_() if needs else value
        response = (values[graph.nodes[-1].name].flatten(1) * directions).sum()
        grads = torch.autograd.grad(response, [values[n.name] for n in layers])
    found: dict[str, _Block] = {}
    for node, gradient in zip(layers, grads, strict=True):
        for block in _layer_blocks(graph, node, values[node.inputs[0]].detach(), gradient, vector):
            earlier = found.get(block.name)
            found[block.name] = block if earlier is None else _merge(earlier, block)
    return list(found.values())


def _layer_blocks(
    graph: Graph, node: Node, x: Tensor, gradient: Tensor, vector: ParameterVector
) -> list[_Block]:
    blocks: list[_Block] = []
    for role, ref in node.params.items():
        if ref.name not in vector.names:
            continue
        shape = graph.parameters[ref.name].shape
        if node.op == "linear" and role == "weight" and x.dim() == 2:
            blocks.append(_OuterBlock(ref.name, ref, gradient, x, shape))
            continue
        if role == "weight":
            rows = _weight_rows(graph, node, x, gradient)
        else:
            along = {"linear": gradient.dim() - 1}.get(node.op, 1)
            axes = [a for a in range(1, gradient.dim()) if a != along]
            rows = gradient.sum(dim=axes) if axes else gradient
            if node.op == "scale":
                rows = _scale_rows(graph, ref, x if role == "scale" else None, gradient)
        blocks.append(_DenseBlock(ref.name, torch.stack([_unread(ref, r, shape) for r in rows])))
    return blocks


def _weight_rows(graph: Graph, node: Node, x: Tensor, gradient: Tensor) -> Tensor:
    """Per-sample gradients (k, *weight shape) of a layer's weight."""
    if node.op == "linear":
        return torch.einsum("k...o,k...i->koi", gradient, x)
    groups = int(node.attrs["groups"])  # type: ignore[arg-type]
    weight = node.params["weight"].read(graph.parameters)
    kernel, stride, dilation = (
        tuple(weight.shape[2:]),
        window(node, "stride"),
        window(node, "dilation"),
    )
    x = pad_values(x, window(node, "padding"))
    if len(kernel) == 1:
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(x, kernel, dilation=dilation, stride=stride)
    columns = columns.reshape(len(x), groups, -1, columns.shape[-1])
    by_group = gradient.reshape(len(x), groups, weight.shape[0] // groups, -1)
    return torch.einsum("kgop,kgip->kgoi", by_group, columns).reshape(len(x), *weight.shape)


def _scale_rows(graph: Graph, ref: ParameterRef, x: Tensor | None, gradient: Tensor) -> Tensor:
    """Per-sample gradients of a broadcast factor or shift."""
    made = gradient if x is None else gradient * x
    shape = ref.read(graph.parameters).shape
    return torch.stack([row.sum_to_size(shape) for row in made])


def _merge(a: _Block, b: _Block) -> _Block:
    """Rows of a parameter that two nodes read."""
    count = len(a.outer if isinstance(a, _OuterBlock) else a.rows)  # type: ignore[attr-defined]
    unit = torch.eye(count)
    return _DenseBlock(a.name, a.combine(unit) + b.combine(unit))


def _dense_size(graph: Graph, vector: ParameterVector) -> int:
    """Scalars per sketch row that are stored without factoring."""
    outer = {
        n.params["weight"].name
        for n in graph.nodes
        if n.op == "linear" and len(n.shape) == 1 and "weight" in n.params
    }
    return sum(
        s.numel() for n, s in zip(vector.names, vector.shapes, strict=True) if n not in outer
    )


def _read(ref: ParameterRef, value: Tensor) -> Tensor:
    return ref.read({ref.name: value})


def _unread(ref: ParameterRef, value: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of ``ref.read``: back to the stored layout."""
    stored = torch.empty(shape).permute(ref.permute).shape if ref.permute else tuple(shape)
    back = value.reshape(stored)
    if ref.permute is not None:
        inverse = [0] * len(ref.permute)
        for position, axis in enumerate(ref.permute):
            inverse[axis] = position
        back = back.permute(inverse)
    return back
