"""Bounds of a network's values over regions: for given weights and for unknown ones."""

from torch_prepared.bounds._properties import PropertyBatch
from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.bounds.alpha_crown import AlphaOptions
from torch_prepared.bounds.api import MarginBounds, Method, certified_margin, compute_bounds
from torch_prepared.bounds.crown import RowBound, bound_nodes, bound_rows
from torch_prepared.bounds.forward import AffineForm, propagate_forms
from torch_prepared.bounds.ibp import propagate_intervals
from torch_prepared.bounds.parametric import ParametricBounds, editable_layers
from torch_prepared.bounds.split import bound_rows_split

__all__ = [
    "AffineForm",
    "AlphaOptions",
    "MarginBounds",
    "Method",
    "ParametricBounds",
    "PropertyBatch",
    "RegionBatch",
    "RowBound",
    "bound_nodes",
    "bound_rows",
    "bound_rows_split",
    "certified_margin",
    "compute_bounds",
    "editable_layers",
    "propagate_forms",
    "propagate_intervals",
]
