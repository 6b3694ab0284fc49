"""Plain NumPy descriptions of a network and a property: all that the checker knows of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["InputRecord", "NetworkRecord", "PropertyRecord"]


@dataclass(frozen=True)
class NetworkRecord:
    """Structure (JSON data, see ``core.graph``) and the weights exactly as stored."""

    structure: Mapping[str, object]
    weights: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class InputRecord:
    """Region of inputs: always inside ``[lower, upper]``, float64, flattened row-major (n,).

    ``kind`` is ``"box"``; or ``"lp_ball"`` with ``center`` (n,), ``radius`` and ``p`` (1, 2 or
    inf), the region being the ball intersected with the box; or ``"v_polytope"`` with
    ``vertices`` (v, n), the region being their convex hull.
    """

    kind: str
    lower: np.ndarray
    upper: np.ndarray
    center: np.ndarray | None = None
    radius: float | None = None
    p: float | None = None
    vertices: np.ndarray | None = None


@dataclass(frozen=True)
class PropertyRecord:
    """For all x of ``region`` the flattened output y is safe.

    Safe means: for every clause ``(rows (r, m), offset (r,))`` some row i has
    ``rows[i] @ y + offset[i] > 0`` (``>= 0`` when not ``strict``).
    """

    region: InputRecord
    clauses: Sequence[tuple[np.ndarray, np.ndarray]]
    strict: bool = True
    name: str = "property"
