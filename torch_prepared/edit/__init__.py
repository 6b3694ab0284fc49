"""Editors: networks changed so that properties provably hold."""

from torch_prepared.edit._base import Candidate, EditOptions, Editor, EditProblem, Norm
from torch_prepared.edit._behavior import Drawdown, Reference
from torch_prepared.edit._result import Attempt, Delta, EditReport, EditResult
from torch_prepared.edit.api import EDITORS, edit_network
from torch_prepared.edit.one_shot import OneShotEditor

__all__ = [
    "EDITORS",
    "Attempt",
    "Candidate",
    "Delta",
    "Drawdown",
    "EditOptions",
    "EditProblem",
    "EditReport",
    "EditResult",
    "Editor",
    "Norm",
    "OneShotEditor",
    "Reference",
    "edit_network",
]
