"""A flow map and pruned copies of it: what the map itself confuses limits what it determines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from torch_prepared.invert import Effort, Outcome, injectivity_radius, matching_radius

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import _invertibility_systems as systems

CENTER = [0.0, 0.0]
LIMITED = Effort(time_limit=8.0, threads=1)


@pytest.mark.slow
def test_all_copies_are_functions_of_the_map_up_to_its_own_radius():
    """Cui et al., section 5: r_AB is the same for every pruned copy B of A, where A folds first."""
    model, x, y = systems.van_der_pol(0, 300, 6)
    own = injectivity_radius(model, CENTER, r_max=3.0, effort=LIMITED)
    assert own.gap <= 0.01 * own.upper
    radii = []
    for sparsity in (0.2, 0.4):
        copy = systems.pruned(model, x, y, sparsity, 150, 1)
        theirs = injectivity_radius(copy, CENTER, r_max=1.05 * own.upper, effort=LIMITED)
        assert theirs.outcome is Outcome.EXCLUDED  # the copy folds later than the map
        found = matching_radius(model, copy, CENTER, r_max=3.0, tolerance=1e-3, effort=LIMITED)
        assert found.lower <= found.upper
        radii.append(found.upper)
        back = matching_radius(copy, model, CENTER, r_max=own.upper, effort=LIMITED)
        assert back.outcome is Outcome.EXCLUDED
    # Beyond its own radius the map confuses points that every copy tells apart.
    assert min(radii) >= own.lower
    assert max(radii) <= 1.01 * own.upper
    assert max(radii) <= 1.01 * min(radii)
