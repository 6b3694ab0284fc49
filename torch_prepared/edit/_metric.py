"""Metrics on weight space: how far apart two networks are, to second order.

The behavior metric is ``M = damping I + R' R``, ``R' R`` being an unbiased sketch of the
Gauss-Newton matrix of the outputs' mean cost on reference inputs (:class:`Importance`): one random
direction ``g`` of the output per input gives one row ``g' J(x) / sqrt(q)``, and
``E[(g' J)' (g' J)] = J' E[g g'] J``. With k rows all is done in k dimensions by the Woodbury
identity; no p x p matrix exists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torch_prepared.core.graph import Graph
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._importance import Importance
from torch_prepared.edit._sketch import FlatSketch, Sketch, row_scalars, sketch_rows
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.solvers import Gram

__all__ = ["Metric", "MetricGram", "behavior_metric", "euclidean_metric"]

MOST_ROWS, FEWEST_ROWS = 1000, 16
GRAM_FLOPS = 1e11  #: worth spending on the rows' inner products
DENSE_BYTES = 1 << 30
FEWEST_DIRECTIONS = 200
SUBSPACE = 400
SUBSPACE_ITERATIONS = 4
FLAT_ENTRIES = 60_000_000
NEGLIGIBLE = 0.1


@dataclass(frozen=True)
class Metric:
    """``<a, b> = a' (damping I + R' R) b``; Euclidean without a sketch R.

    Args:
        damping: positive weight of the Euclidean part.
        sketch: R (k, p).
        spectrum: (k,) the diagonal of ``R R'`` where that is diagonal, up to rounding.
        factor: Cholesky factor (k, k) of ``damping I + R R'`` where it is not.
    """

    damping: float
    sketch: Sketch | None = None
    spectrum: Tensor | None = None
    factor: Tensor | None = None

    def damped(self, damping: float) -> Metric:
        """The same sketch with another damping."""
        if self.sketch is None or self.spectrum is not None:
            return replace(self, damping=damping)
        return replace(self, damping=damping, factor=_factor(self.sketch, damping))

    def image(self, rows: Tensor) -> Tensor:
        """``rows R'``: (m, p) to (m, k), float64; k is 0 without a sketch."""
        if self.sketch is None:
            return torch.zeros(len(rows), 0, dtype=torch.float64)
        return self.sketch.times(rows).double()

    def gram(self, products: Tensor, image: Tensor) -> Tensor:
        """``rows M^-1 rows'`` from ``rows rows'`` (m, m) and :meth:`image` (m, k), float64."""
        return MetricGram(self, products, image).whole()[0]

    def solve(self, rows: Tensor, image: Tensor | None = None) -> Tensor:
        """``rows M^-1``: (m, p) to (m, p), by Woodbury; ``image`` is computed when None."""
        if self.sketch is None or not len(rows):
            return rows / self.damping
        inner = self._inner(self.image(rows) if image is None else image)
        return (rows - self.sketch.combine(inner).to(rows)) / self.damping

    def _inner(self, image: Tensor) -> Tensor:
        """``image (damping I + R R')^-1``: (m, k) to (m, k)."""
        if self.spectrum is not None:
            return image / (self.damping + self.spectrum)
        if self.factor is None or not len(image):
            return image
        return torch.cholesky_solve(image.T, self.factor).T

    def norm_squared(self, delta: Tensor) -> float:
        """``delta' M delta`` of a vector (p,)."""
        value = self.damping * float(delta.square().sum())
        if self.sketch is not None:
            value += float(self.sketch.times(delta[None]).double().square().sum())
        return value


class MetricGram(Gram):
    """``S J M^-1 J' S`` of rows J, and 1 on the diagonal where ``dead``; one sample.

    Args:
        metric: M.
        products: ``J J'`` (m, m), float64.
        image: of the rows, (m, k), float64.
        scale: the diagonal of S, (1, m); None: the identity.
        dead: (1, m).
    """

    def __init__(
        self, metric: Metric, products: Tensor, image: Tensor,
        scale: Tensor | None = None, dead: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._metric, self._products, self._image = metric, products, image
        ones = products.new_ones(1, len(products))
        self._scale = ones if scale is None else scale
        self._dead = ones == 0 if dead is None else dead

    def norms(self) -> Tensor:
        inner = (self._metric._inner(self._image) * self._image).sum(dim=1)
        squares = (self._products.diagonal() - inner) / self._metric.damping
        return squares.clamp_min(0.0).sqrt()[None] * self._scale

    def scaled(self, scale: Tensor, dead: Tensor) -> MetricGram:
        both = self._scale * scale
        return MetricGram(self._metric, self._products, self._image, both, dead)

    def times(self, x: Tensor) -> Tensor:
        weights = x * self._scale
        inner = self._metric._inner(weights @ self._image) @ self._image.T
        image = (weights @ self._products - inner) / self._metric.damping
        return image * self._scale + torch.where(self._dead, x, 0.0)

    def block(self, index: Tensor, valid: Tensor) -> Tensor:
        rows = index[0]
        image, scale = self._image[rows], self._scale[0, rows]
        inner = self._metric._inner(image) @ image.T
        block = (self._products[rows][:, rows] - inner) / self._metric.damping
        block = 0.5 * (block + block.T) * scale[:, None] * scale
        block.diagonal().add_(self._dead[0, rows].to(block))
        return block[None]

    def take(self, samples: Tensor) -> MetricGram:
        return self

    def whole(self) -> Tensor:
        every = torch.arange(len(self._products))[None]
        return self.block(every, torch.ones_like(every, dtype=torch.bool))


def euclidean_metric() -> Metric:
    """The 2-norm."""
    return Metric(1.0)


def behavior_metric(
    graph: Graph,
    vector: ParameterVector,
    reference: Reference,
    seed: int,
    damping: float,
    *,
    relative: bool = True,
) -> Metric:
    """Gauss-Newton metric of the outputs' mean cost on reference inputs.

    Args:
        graph: the network, original or changed; the sketch is computed in float32.
        vector: which parameters move.
        reference: inputs whose outputs should stay, with the original outputs.
        seed: of the inputs and the random output directions.
        damping: weight of the 2-norm.
        relative: whether ``damping`` counts in mean squared sketch entries per weight.

    Returns:
        A metric whose unit is that of :class:`Importance`.
    """
    single = graph.to(torch.float32, "cpu")
    generator = torch.Generator().manual_seed(seed)
    total = len(reference.inputs)
    count = min(total, max(FEWEST_ROWS, _affordable_rows(single, vector)))
    chosen = reference.choose(count, generator)
    directions = Importance.of(reference, chosen).directions(graph.output_size, count, generator)
    sketch = sketch_rows(single, vector, reference.inputs[chosen].float(), directions / count**0.5)
    gram = sketch.gram()
    unit = float(gram.diagonal().sum()) / vector.count if relative else 1.0
    absolute = max(damping * unit, 1e-30)
    principal = _principal(sketch, gram, absolute, vector.count)
    if principal is not None:
        return Metric(absolute, *principal)
    return Metric(absolute, sketch, factor=_factor(sketch, absolute))


def _factor(sketch: Sketch, damping: float) -> Tensor:
    """Cholesky factor (k, k) of ``damping I + R R'``."""
    gram = sketch.gram()
    gram.diagonal().add_(damping)
    factor: Tensor = torch.linalg.cholesky(gram)
    return factor


def _affordable_rows(graph: Graph, vector: ParameterVector) -> int:
    """Rows that are quickly multiplied with each other and fit into memory."""
    dense, factors = row_scalars(graph, vector)
    products = (GRAM_FLOPS / (2.0 * max(1, dense + factors))) ** 0.5
    return int(min(MOST_ROWS, products, DENSE_BYTES / (4 * max(1, dense))))


def _principal(
    sketch: Sketch, gram: Tensor, damping: float, count: int
) -> tuple[FlatSketch, Tensor] | None:
    """The directions that weigh more than a tenth of the damping, and how much each weighs.

    None where storing them is not cheap. In these directions the Gram matrix is diagonal.
    """
    if FEWEST_DIRECTIONS * count > FLAT_ENTRIES:
        return None
    values, vectors = _largest_eigenpairs(gram, NEGLIGIBLE * damping)
    large = values > NEGLIGIBLE * damping
    kept = vectors[:, large]
    if kept.shape[1] * count > FLAT_ENTRIES:
        return None
    return FlatSketch(sketch.combine(kept.T)), values[large].double()


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
