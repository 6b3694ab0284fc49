"""Guaranteed edits of finite sets of examples."""

from torch_prepared.edit.pointwise._linear import PointNorm
from torch_prepared.edit.pointwise._result import Outcome, PointEditResult, PointStatus
from torch_prepared.edit.pointwise.api import edit_points
from torch_prepared.edit.pointwise.lift import ball_properties, lift_to_balls

__all__ = [
    "Outcome",
    "PointEditResult",
    "PointNorm",
    "PointStatus",
    "ball_properties",
    "edit_points",
    "lift_to_balls",
]
