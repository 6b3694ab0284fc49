"""Provable fine-tuning inside ordinary training loops.

:class:`EditHook` keeps properties provable while any loop trains; :class:`attach`,
``EditCallback`` (Lightning) and ``EditTrainerCallback`` (transformers) call it, the last two loaded
on first use. :class:`PreparedModule` computes with provable weights at every step.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from torch_prepared.hooks._record import HookRecord, OnFailure, OptimizerState, Outcome
from torch_prepared.hooks.adapters.plain import attach
from torch_prepared.hooks.core import EditHook
from torch_prepared.hooks.prepared import PreparedModule
from torch_prepared.hooks.schedule import AtEnd, EverySteps, Schedule, WhenMarginBelow

if TYPE_CHECKING:
    from torch_prepared.hooks.adapters.hf import EditTrainerCallback as EditTrainerCallback
    from torch_prepared.hooks.adapters.lightning import EditCallback as EditCallback

__all__ = [
    "AtEnd",
    "EditHook",
    "EverySteps",
    "HookRecord",
    "OnFailure",
    "OptimizerState",
    "Outcome",
    "PreparedModule",
    "Schedule",
    "WhenMarginBelow",
    "attach",
]

_LATER = {"EditCallback": "lightning", "EditTrainerCallback": "hf"}


def __getattr__(name: str) -> object:
    if name in _LATER:
        module = importlib.import_module(f"torch_prepared.hooks.adapters.{_LATER[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'torch_prepared.hooks' has no attribute {name!r}")
