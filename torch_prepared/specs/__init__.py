"""Regions of inputs, safe sets of outputs, and the files that describe them."""

from torch_prepared.specs._base import InputSet
from torch_prepared.specs.box import Box
from torch_prepared.specs.lp_ball import LpBall
from torch_prepared.specs.output import Property, SafeSet
from torch_prepared.specs.robustness import local_robustness, local_robustness_batch
from torch_prepared.specs.vnnlib import load_vnnlib, save_vnnlib
from torch_prepared.specs.vpolytope import VPolytope

__all__ = [
    "Box",
    "InputSet",
    "LpBall",
    "Property",
    "SafeSet",
    "VPolytope",
    "load_vnnlib",
    "local_robustness",
    "local_robustness_batch",
    "save_vnnlib",
]
