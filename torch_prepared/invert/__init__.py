"""Where is a network invertible? Radii of injectivity, nearest preimages, maps between networks."""

from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.invert._result import CollisionBound, Evidence, Outcome, Pair, RadiusBound
from torch_prepared.invert._solve import Effort
from torch_prepared.invert.collision import max_collision, max_mismatch
from torch_prepared.invert.dynamics import (
    Preimages,
    RadiusMap,
    fix_inputs,
    list_preimages,
    map_radii,
)
from torch_prepared.invert.jacobian import injectivity_certificate_fast
from torch_prepared.invert.preimage import nearest_preimage
from torch_prepared.invert.radius import injectivity_radius, matching_radius

__all__ = [
    "CollisionBound",
    "Effort",
    "Evidence",
    "Outcome",
    "Pair",
    "PiecewiseNetwork",
    "Preimages",
    "RadiusBound",
    "RadiusMap",
    "fix_inputs",
    "injectivity_certificate_fast",
    "injectivity_radius",
    "list_preimages",
    "map_radii",
    "matching_radius",
    "max_collision",
    "max_mismatch",
    "nearest_preimage",
]
