"""Input regions: validation of a property's region and its support function."""

from __future__ import annotations

import math

import numpy as np

from torch_prepared.certify.records import InputRecord
from torch_prepared.certify.rounding import INFLATION, FloatArray, gamma, sum_below
from torch_prepared.errors import CertificateError

__all__ = ["bound_on_region", "check_region"]


def check_region(region: InputRecord, size: int, where: str) -> None:
    """Refuse a region that is malformed or does not fit an input of ``size`` scalars.

    Raises:
        CertificateError: wrong kind, shape, sign or order, or an entry that is not finite.
    """

    def refuse(got: str, expected: str) -> CertificateError:
        return CertificateError(f"{where}: region has {got}; expected {expected}; fix the property")

    arrays = {"lower": region.lower, "upper": region.upper}
    shapes: dict[str, tuple[int, ...]] = {"lower": (size,), "upper": (size,)}
    if region.kind == "lp_ball":
        if region.center is None or region.radius is None or region.p not in (1.0, 2.0, math.inf):
            raise refuse("no center, radius or p", "an lp_ball with p 1, 2 or inf")
        if not (math.isfinite(region.radius) and region.radius >= 0):
            raise refuse(f"radius {region.radius}", "a finite radius >= 0")
        arrays["center"], shapes["center"] = region.center, (size,)
    elif region.kind == "v_polytope":
        if region.vertices is None or region.vertices.ndim != 2 or not len(region.vertices):
            raise refuse("no vertices", "a non-empty (v, n) array")
        arrays["vertices"] = region.vertices
        shapes["vertices"] = (len(region.vertices), size)
    elif region.kind != "box":
        raise refuse(f"kind {region.kind!r}", "box, lp_ball or v_polytope")
    for key, value in arrays.items():
        if value.dtype != np.float64 or value.shape != shapes[key]:
            raise refuse(f"{key} {value.dtype} {value.shape}", f"float64 {shapes[key]}")
        if not np.isfinite(value).all():
            raise refuse(f"NaN or infinity in {key}", "finite numbers")
    if not np.all(region.lower <= region.upper):
        raise refuse("lower > upper somewhere", "lower <= upper")
    if region.vertices is not None and region.kind == "v_polytope":
        inside = (region.lower <= region.vertices) & (region.vertices <= region.upper)
        if not inside.all():  # the leaves cover the box, so the hull must lie within
            raise refuse("a vertex outside of its box", "vertices within [lower, upper]")


def bound_on_region(region: InputRecord, rows: FloatArray) -> FloatArray | None:
    """Lower bounds (r,) of ``rows @ x`` over the region's curved or polyhedral part.

    For a ball, ``a @ x >= a @ center - radius * dual_norm(a)``; for a hull, the minimum over the
    vertices. None for a box, whose bound the caller has already.

    Args:
        region: as accepted by :func:`check_region`.
        rows: (r, n).
    """
    rounding, magnitude = gamma(rows.shape[1]), np.abs(rows)
    if region.kind == "lp_ball" and region.center is not None and region.radius is not None:
        if region.p == math.inf:
            dual = magnitude.sum(axis=1)
        elif region.p == 1.0:
            dual = magnitude.max(axis=1)
        else:
            # scaled, so that squares neither overflow nor underflow harmfully
            scale = np.maximum(magnitude.max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
            dual = np.sqrt(np.square(magnitude / scale).sum(axis=1)) * scale[:, 0]
        error = rounding * (magnitude @ np.abs(region.center)) * INFLATION
        deviation = region.radius * dual * (1.0 + rounding)
        return sum_below(rows @ region.center, -error, -deviation)
    if region.kind == "v_polytope" and region.vertices is not None:
        sizes = np.abs(region.vertices).max(axis=0)
        error = rounding * (magnitude @ sizes) * INFLATION
        return sum_below((rows @ region.vertices.T).min(axis=1), -error)
    return None
