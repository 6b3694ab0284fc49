"""Provable edits of neural networks: change weights so that properties hold, with certificates.

Names are loaded on first use, so that importing the package (and the command line's help) is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from torch_prepared._version import __version__

if TYPE_CHECKING:
    from torch_prepared import bounds, calibrate, certify, edit, hooks, interpret, invert, specs
    from torch_prepared.certify import Certificate, Verdict, check_certificate
    from torch_prepared.core.capture import capture_module
    from torch_prepared.core.graph import Graph
    from torch_prepared.core.onnx import OnnxNetwork, load_onnx, save_onnx
    from torch_prepared.edit import EditResult, edit_network
    from torch_prepared.hooks import EditHook, PreparedModule
    from torch_prepared.ops import build_info
    from torch_prepared.relax.module import graph_to_module
    from torch_prepared.specs import Property, SafeSet

__all__ = [
    "Certificate",
    "EditHook",
    "EditResult",
    "Graph",
    "OnnxNetwork",
    "PreparedModule",
    "Property",
    "SafeSet",
    "Verdict",
    "__version__",
    "bounds",
    "build_info",
    "calibrate",
    "capture_module",
    "certify",
    "check_certificate",
    "edit",
    "edit_network",
    "graph_to_module",
    "hooks",
    "interpret",
    "invert",
    "load_onnx",
    "save_onnx",
    "specs",
]

_HOMES = {
    "Certificate": "certify",
    "EditHook": "hooks",
    "EditResult": "edit",
    "Graph": "core.graph",
    "OnnxNetwork": "core.onnx",
    "PreparedModule": "hooks",
    "Property": "specs",
    "SafeSet": "specs",
    "Verdict": "certify",
    "build_info": "ops",
    "capture_module": "core.capture",
    "check_certificate": "certify",
    "edit_network": "edit",
    "graph_to_module": "relax.module",
    "load_onnx": "core.onnx",
    "save_onnx": "core.onnx",
}
_PACKAGES = ("bounds", "calibrate", "certify", "edit", "hooks", "interpret", "invert", "specs")


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return importlib.import_module(f"torch_prepared.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"torch_prepared.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'torch_prepared' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
