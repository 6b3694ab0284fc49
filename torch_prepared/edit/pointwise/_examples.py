"""Finite sets of examples as rows over the network's output."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torch_prepared.certify import PointClaims
from torch_prepared.core.graph import Graph
from torch_prepared.core.rows import Floats
from torch_prepared.errors import SpecError
from torch_prepared.specs import SafeSet

__all__ = ["best_rows", "contradictions", "make_claims", "point_margins", "row_values"]

Integers = NDArray[np.int64]
Targets = Tensor | Sequence[int] | Sequence[SafeSet]


def make_claims(graph: Graph, inputs: Tensor, targets: Targets, what: str) -> PointClaims:
    """Claims about inputs (m, ...) as the network reads them, i.e. rounded to its dtype.

    Args:
        graph: the network.
        inputs: m >= 1 inputs of the network's size.
        targets: right classes (m,), or one safe set per input.
        what: word for messages.

    Raises:
        SpecError: shapes that do not fit, classes out of range, entries that are not finite.
    """
    flat = torch.as_tensor(inputs).detach().cpu().reshape(len(inputs), -1)
    if flat.shape[1] != graph.input_size or len(targets) != len(flat):
        raise SpecError(
            f"{what}: got inputs {tuple(inputs.shape)} and {len(targets)} targets; expected one "
            f"target for each input of {graph.input_size} numbers"
        )
    x = flat.to(graph.dtype).double().numpy()
    if not np.isfinite(x).all():
        raise SpecError(f"{what}: got NaN or infinite entries; expected finite inputs")
    if len(targets) and isinstance(targets[0], SafeSet):
        return _from_safe_sets(x, [s for s in targets if isinstance(s, SafeSet)], graph, what)
    labels = torch.as_tensor(targets)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() != 1:
        raise SpecError(f"{what}: got targets of type {labels.dtype}; expected whole classes (m,)")
    classes = graph.output_size
    if classes < 2 or not bool(((labels >= 0) & (labels < classes)).all()):
        raise SpecError(
            f"{what}: got a class outside of 0 to {classes - 1}; expected one of the network's "
            f"{classes} outputs, and at least two of them"
        )
    return PointClaims.labels(x, labels.tolist(), classes)


def _from_safe_sets(x: Floats, safe: list[SafeSet], graph: Graph, what: str) -> PointClaims:
    rows, offsets, points, clauses = [], [], [], []
    if len(safe) != len(x) or len({s.strict for s in safe}) > 1:
        raise SpecError(f"{what}: expected one safe set per input, all strict or none")
    for i, each in enumerate(safe):
        if each.size != graph.output_size:
            raise SpecError(
                f"{what}: got a safe set over {each.size} outputs; expected {graph.output_size}"
            )
        for c, (matrix, offset) in enumerate(each.record()):
            rows.append(matrix)
            offsets.append(offset)
            points.append(np.full(len(offset), i, dtype=np.int64))
            clauses.append(np.full(len(offset), c, dtype=np.int64))
    return PointClaims(
        x,
        np.concatenate(rows),
        np.concatenate(offsets),
        np.concatenate(points),
        np.concatenate(clauses),
        safe[0].strict,
    )


def row_values(claims: PointClaims, outputs: Floats) -> Floats:
    """``rows @ y + offset`` (r,) for outputs (b, m)."""
    return np.asarray((outputs[claims.point] * claims.rows).sum(axis=1) + claims.offset)


def point_margins(claims: PointClaims, values: Floats) -> Floats:
    """Least over clauses of the largest row, per point (b,); NaN stays NaN."""
    width = int(claims.clause.max()) + 1
    key = claims.point * width + claims.clause
    best = np.full(len(claims.inputs) * width, -np.inf)
    np.maximum.at(best, key, values)
    listed = np.zeros(len(best), dtype=bool)
    listed[key] = True
    best[~listed] = np.inf
    return np.asarray(best.reshape(-1, width).min(axis=1))


def best_rows(claims: PointClaims, values: Floats) -> Integers:
    """One row per point and clause: the one with the largest value now."""
    width = int(claims.clause.max()) + 1
    key = claims.point * width + claims.clause
    order = np.lexsort((-values, key))
    first = np.concatenate([[True], key[order][1:] != key[order][:-1]])
    return np.sort(order[first]).astype(np.int64)


def contradictions(inputs: Floats, targets: Targets) -> tuple[int, ...]:
    """Positions of equal inputs that are given different classes."""
    if not len(targets) or isinstance(targets[0], SafeSet):
        return ()
    labels = torch.as_tensor(targets).tolist()
    seen: dict[bytes, int] = {}
    found: set[int] = set()
    for i, x in enumerate(inputs + 0.0):
        first = seen.setdefault(x.tobytes(), i)
        if labels[first] != labels[i]:
            found |= {first, i}
    return tuple(sorted(found))
