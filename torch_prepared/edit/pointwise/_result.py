"""What a pointwise edit returns."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from torch_prepared.certify import PointCertificate
from torch_prepared.edit._behavior import Drawdown
from torch_prepared.edit._result import Delta

__all__ = ["Outcome", "PointEditResult", "PointStatus"]

Model = TypeVar("Model")


class Outcome(enum.Enum):
    """What became of the search. Only ``status`` says what is proved."""

    EDITED = "edited"
    INFEASIBLE = "infeasible"
    TIME_LIMIT = "time limit"
    UNKNOWN = "unknown"


class PointStatus(enum.Enum):
    """The checker's verdict on the weights as stored."""

    VERIFIED_FLOAT = "verified-float"  #: exactly, and in the compute type with any order of sums
    VERIFIED_EXACT = "verified-exact"  #: in exact arithmetic
    UNVERIFIED = "unverified"


@dataclass(frozen=True)
class PointEditResult(Generic[Model]):
    """The outcome of :func:`edit_points`.

    Args:
        outcome: what became of the search.
        status: what the checker proved of ``model``.
        model: the edited network, or an unchanged copy.
        method: what made the edit.
        margins: (m,) lower bounds of the exact margins of the stored network at the examples; NaN
            where there is none.
        margins_float: (m,) lower bounds for any evaluation in ``compute``; NaN where there is none.
        size: the norm of the change as solved for, before rounding to the storage dtype.
        bound: a lower bound of the least possible norm, by the solver; NaN when unknown.
        delta: size of the change as stored.
        drawdown: what was lost on the inputs to preserve.
        conflicting: examples that contradict each other, when infeasible.
        certificate: for ``certify.check_points``; None when nothing was proved.
        manifest: digests of the weights before and after, of the examples, and how it was done.
        stale_layers: the first changed layer and all nodes that depend on changed ones: anything
            cached about them is void.
        seconds: wall time by phase, and ``total``.
        message: one line.
        compute: the type of evaluations that ``margins_float`` and a float verdict speak of.
    """

    outcome: Outcome
    status: PointStatus
    model: Model
    method: str
    margins: np.ndarray
    margins_float: np.ndarray
    size: float
    bound: float
    delta: Delta
    drawdown: Drawdown | None
    conflicting: tuple[int, ...]
    certificate: PointCertificate | None
    manifest: Mapping[str, str]
    stale_layers: tuple[str, ...]
    seconds: Mapping[str, float]
    message: str
    compute: str = "float32"
