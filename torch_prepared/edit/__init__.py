"""Editors: networks changed so that properties provably hold.

Pointwise edits and audits are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from torch_prepared.edit._base import Candidate, EditOptions, Editor, EditProblem, Norm
from torch_prepared.edit._behavior import Drawdown, Reference
from torch_prepared.edit._report_locality import DistanceBand, Locality
from torch_prepared.edit._result import Attempt, Delta, EditReport, EditResult, LayerDelta
from torch_prepared.edit.api import EDITORS, edit_network
from torch_prepared.edit.one_shot import OneShotEditor
from torch_prepared.edit.report import Generalization, PropertyReport, Role, Standing, State

if TYPE_CHECKING:
    from torch_prepared.edit.audit import Audit, audit_networks
    from torch_prepared.edit.pointwise import PointEditResult, edit_points, lift_to_balls

__all__ = [
    "EDITORS",
    "Attempt",
    "Audit",
    "Candidate",
    "Delta",
    "DistanceBand",
    "Drawdown",
    "EditOptions",
    "EditProblem",
    "EditReport",
    "EditResult",
    "Editor",
    "Generalization",
    "LayerDelta",
    "Locality",
    "Norm",
    "OneShotEditor",
    "PointEditResult",
    "PropertyReport",
    "Reference",
    "Role",
    "Standing",
    "State",
    "audit_networks",
    "edit_network",
    "edit_points",
    "lift_to_balls",
]

_LATER = {
    "Audit": "audit",
    "PointEditResult": "pointwise",
    "audit_networks": "audit",
    "edit_points": "pointwise",
    "lift_to_balls": "pointwise",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        module = importlib.import_module(f"torch_prepared.edit.{_LATER[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'torch_prepared.edit' has no attribute {name!r}")
