import math

import numpy as np
import pytest
import torch

from torch_prepared.errors import SpecError
from torch_prepared.invert import (
    Effort,
    Evidence,
    Outcome,
    injectivity_certificate_fast,
    injectivity_radius,
    matching_radius,
    max_collision,
    nearest_preimage,
)
from torch_prepared.invert._network import PiecewiseNetwork

from .nets import absolute, affine, colliding_on_grid, fold, on_line, random_net
from .test_preimage import exact_collision

QUICK = Effort(time_limit=20.0, threads=2)
ETA = 1e-3


class TestCollision:
    def test_invertible_maps_have_none(self):
        for matrix in ([[1.0, 0.0], [0.0, 1.0]], [[2.0, 1.0], [-1.0, 1.0]]):
            found = max_collision(affine(matrix), [0.1, 0.2], 1.0, effort=QUICK)
            assert found.lower == 0.0
            assert found.upper <= 1e-5

    def test_a_projection_has_the_balls_diameter(self):
        found = max_collision(affine([[1.0, 0.0]]), [0.0, 0.0], 0.5, effort=QUICK)
        assert found.upper == pytest.approx(1.0, abs=1e-5)
        assert found.lower == pytest.approx(1.0, abs=1e-4)

    @pytest.mark.parametrize("anchor", [False, True])
    def test_one_program_and_one_per_coordinate_agree(self, anchor):
        net, center = fold(), [0.3, 0.1]
        both = [
            max_collision(net, center, 0.8, anchor=anchor, split_coordinates=s, effort=QUICK)
            for s in (True, False)
        ]
        want = 0.6 if anchor else 1.0
        for found in both:
            assert found.outcome is Outcome.SOLVED
            assert found.upper == pytest.approx(want, abs=1e-3)
            assert found.lower == pytest.approx(want, abs=1e-3)

    def test_it_grows_with_the_radius_and_bounds_do_not_change_it(self):
        net = random_net((2, 5, 5, 2), 2)
        values = [
            max_collision(net, [0.2, 0.1], r, effort=Effort(20.0, 2, bounds))
            for r in (0.5, 1.5)
            for bounds in ("crown", "ibp")
        ]
        assert values[0].upper <= values[2].upper + 1e-4
        for crown, ibp in (values[:2], values[2:]):
            assert crown.upper == pytest.approx(ibp.upper, abs=2e-3)
            assert crown.lower <= ibp.upper


class TestInjectivity:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("method", ["oneshot", "bisect"])
    def test_one_input_agrees_with_the_grid(self, seed, method):
        net = random_net((1, 6, 6, 1), seed)
        want, _, step = on_line(net, 0.1, 2.0)
        found = injectivity_radius(
            net, [0.1], r_max=2.0, separation=ETA, method=method, effort=QUICK
        )
        assert found.upper > 0.0
        assert found.proved <= want + 2 * step
        assert found.lower <= want + ETA + 2 * step
        if math.isfinite(want):
            assert want - 2 * step <= found.upper <= want + ETA + 2 * step
            assert found.lower >= want - 2 * ETA
            assert exact_collision(net, found)
        else:
            assert found.outcome is Outcome.EXCLUDED

    def test_never_above_the_nearest_preimage(self):
        net, center = random_net((2, 6, 6, 2), 4), [0.2, 0.3]
        pair = injectivity_radius(net, center, r_max=2.0, effort=QUICK)
        near = nearest_preimage(net, center, r_max=2.0, effort=QUICK)
        assert pair.lower <= near.upper * (1 + 1e-6)
        assert pair.proved <= pair.upper

    def test_brute_force_meets_no_collision_in_a_claimed_ball(self):
        for seed in range(3):
            net, center = random_net((2, 6, 6, 2), seed), np.array([0.2, 0.3])
            found = injectivity_radius(net, center, r_max=1.5, separation=0.05, effort=QUICK)
            if found.lower > 0.05:
                assert not colliding_on_grid(net, center, 0.98 * found.lower, 0.1)

    def test_the_folded_plane(self):
        found = injectivity_radius(fold(), [0.4, 5.0], r_max=1.0, effort=QUICK)
        assert found.lower == pytest.approx(0.4, abs=2e-3)
        assert 0.4 <= found.upper <= 0.402
        assert found.proved <= 0.4
        assert found.proved > 0.39

    def test_fewer_outputs_than_inputs(self):
        found = injectivity_radius(random_net((3, 5, 2), 0), [0.1, 0.2, 0.3], r_max=1.0)
        assert found.upper == 0.0

    def test_interval_jacobians_imply_the_program(self):
        net = random_net((2, 6, 6, 2), 1)
        radius = 0.4
        while not injectivity_certificate_fast(net, [0.1, 0.2], radius):
            radius /= 2
        found = max_collision(net, [0.1, 0.2], radius, effort=QUICK)
        assert found.upper <= ETA
        assert not injectivity_certificate_fast(absolute(), [0.3], 0.31)
        assert injectivity_certificate_fast(absolute(), [0.3], 0.29)

    def test_bad_separations_are_refused(self):
        for separation in (0.0, -1.0, 2.5, math.nan):
            with pytest.raises(SpecError, match="separation"):
                injectivity_radius(absolute(), [0.1], r_max=1.0, separation=separation)
        with pytest.raises(SpecError, match="method"):
            injectivity_radius(absolute(), [0.1], r_max=1.0, method="magic")


class TestMatching:
    def test_a_network_is_a_function_of_itself(self):
        found = matching_radius(fold(), fold(), [0.2, 0.1], r_max=1.0, effort=QUICK)
        assert found.outcome is Outcome.EXCLUDED

    def test_everything_is_a_function_of_an_injective_network(self):
        first, second = affine([[1.0, 1.0], [0.0, 1.0]]), random_net((2, 5, 1), 1)
        found = matching_radius(first, second, [0.0, 0.0], r_max=2.0, effort=QUICK)
        assert found.outcome is Outcome.EXCLUDED
        assert found.evidence is Evidence.CERTIFIED
        assert found.proved == 2.0

    def test_what_a_fold_loses_cannot_be_recovered(self):
        plane = affine([[1.0, 0.0], [0.0, 1.0]])
        there = matching_radius(fold(), plane, [0.3, 0.0], r_max=1.0, effort=QUICK)
        assert there.lower == pytest.approx(0.3, abs=2e-3)
        assert there.upper == pytest.approx(0.3, abs=2e-3)
        x, y = there.witness.floats
        assert abs(x[0] - y[0]) > 0
        back = matching_radius(plane, fold(), [0.3, 0.0], r_max=1.0, effort=QUICK)
        assert back.outcome is Outcome.EXCLUDED

    def test_of_a_constant_only_constants_are_functions(self):
        constant = affine([[0.0, 0.0]])
        found = matching_radius(
            constant, affine([[1.0, 0.0]]), [0.0, 0.0], r_max=1.0, tolerance=0.5, effort=QUICK
        )
        assert found.lower <= 0.25 * (1 + 1e-6) <= found.upper * (1 + 2e-6)
        assert found.lower == pytest.approx(0.25, abs=1e-3)
        assert found.upper == pytest.approx(0.25, abs=1e-2)

    def test_the_witness_agrees_in_one_and_differs_in_the_other(self):
        first, second = random_net((2, 5, 5, 2), 3), random_net((2, 5, 5, 2), 4)
        found = matching_radius(first, second, [0.1, 0.0], r_max=3.0, effort=QUICK)
        assert found.proved <= found.lower <= found.upper
        if found.witness is not None:
            assert exact_collision(first, found)
            there = PiecewiseNetwork.of(second, 2).values(np.stack(found.witness.floats))
            assert np.abs(there[0] - there[1]).max() >= found.separation * (1 - 1e-9)

    def test_networks_of_other_inputs_are_refused(self):
        with pytest.raises(SpecError, match="second network"):
            matching_radius(fold(), PiecewiseNetwork.of(absolute(), 1).graph, [0.0, 0.0], r_max=1.0)
        with pytest.raises(SpecError, match="tolerance"):
            matching_radius(fold(), fold(), [0.0, 0.0], r_max=1.0, tolerance=torch.nan)
