"""Provable edits of neural networks: change weights so that properties hold, with certificates."""

from torch_prepared import bounds, certify, edit, specs
from torch_prepared._version import __version__
from torch_prepared.certify import Certificate, Verdict, check_certificate
from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork, load_onnx, save_onnx
from torch_prepared.edit import EditResult, edit_network
from torch_prepared.ops import build_info
from torch_prepared.specs import Property, SafeSet

__all__ = [
    "Certificate",
    "EditResult",
    "Graph",
    "OnnxNetwork",
    "Property",
    "SafeSet",
    "Verdict",
    "__version__",
    "bounds",
    "build_info",
    "capture_module",
    "certify",
    "check_certificate",
    "edit",
    "edit_network",
    "load_onnx",
    "save_onnx",
    "specs",
]
