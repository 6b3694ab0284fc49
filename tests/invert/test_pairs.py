"""Branch and bound over pairs of boxes, its certificates, and what the checker refuses."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers import Net
from torch_prepared.certify import RadiusCertificate, RadiusClaim, check_radius
from torch_prepared.certify.pairs import BoxTree, PairTests, Step, distance_below
from torch_prepared.certify.secants import BoxFacts, SecantNetwork
from torch_prepared.errors import CertificateError, UnsupportedOperationError
from torch_prepared.invert import (
    Effort,
    Evidence,
    Outcome,
    injectivity_radius,
    matching_radius,
    nearest_preimage,
)
from torch_prepared.invert._exact import jacobian
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.specs import Box

from .nets import absolute, affine, chain, colliding_on_grid, fold, on_line, random_net

QUICK = Effort(time_limit=8.0, threads=1)


def record(graph):
    return PiecewiseNetwork.of(graph, graph.input_size).record


def certificate_of(answer):
    assert answer.certified is not None
    return answer.certified.certificate


class TestSecants:
    @pytest.mark.parametrize("seed", range(4))
    def test_slopes_hold_every_difference_of_outputs(self, seed):
        graph = random_net((3, 7, 6, 2), seed)
        net, rng = PiecewiseNetwork.of(graph, 3), np.random.default_rng(seed)
        secant = SecantNetwork(net.record, np.eye(2))
        low = rng.normal(size=(2, 3))
        high = low + rng.uniform(0.0, 0.8, size=(2, 3))
        x = rng.uniform(low[0], high[0], size=(400, 3))
        y = rng.uniform(low[1], high[1], size=(400, 3))
        facts = secant.enclose(low, high)
        one, two = (facts.take(np.array([i])) for i in (0, 1))
        low_s, high_s = secant.secants(one, two)
        assert bool((low_s <= high_s).all() and (low_s >= 0).all() and (high_s <= 1).all())
        slopes = secant.slopes((low_s, high_s))
        d = x - y
        size = np.abs(d) @ slopes.radius[0].T
        gap = net.values(x) - net.values(y) - d @ slopes.center[0].T
        assert bool((np.abs(gap) <= size + 1e-12).all())
        for points, box in ((x, one), (y, two)):
            values = net.values(points)
            assert bool((values >= box.along[0] - 1e-12).all())
            assert bool((values <= box.along[1] + 1e-12).all())

    def test_secants_of_a_settled_unit_are_exact(self):
        net = chain(([[1.0]], [0.0]), ([[1.0]], None))
        secant = SecantNetwork(record(net), np.eye(1))
        facts = secant.enclose(np.array([[1.0], [-3.0], [-1.0]]), np.array([[2.0], [-2.0], [0.5]]))
        at = [facts.take(np.array([i])) for i in range(3)]
        for i, j, want in ((0, 0, (1.0, 1.0)), (1, 1, (0.0, 0.0)), (2, 2, (0.0, 1.0))):
            low, high = secant.secants(at[i], at[j])
            assert (low[0, 0], high[0, 0]) == want
        low, high = secant.secants(at[0], at[1])  # from 1..2 to -3..-2
        assert low[0, 0] == pytest.approx(1 / 4)
        assert low[0, 0] <= 1 / 4
        assert high[0, 0] == pytest.approx(2 / 4)
        assert high[0, 0] >= 2 / 4

    def test_units_that_read_nothing_but_zero_have_every_secant(self):
        """From a point to itself all differences are 0, and any slope tells the truth."""
        net = chain(([[1.0], [-1.0]], [0.0, 0.0]), ([[1.0, -1.0]], None))
        secant = SecantNetwork(record(net), np.eye(1))
        zeros = (np.zeros((1, 2)), np.zeros((1, 2)))
        facts = BoxFacts(zeros, (np.zeros((1, 1)), np.zeros((1, 1))))
        low, high = secant.secants(facts, facts)
        assert bool((low <= high).all())
        slopes = secant.slopes((low, high))
        assert bool((slopes.radius >= 0).all())
        unknown = replace(facts, before=(np.full((1, 2), np.nan), zeros[1]))
        low, high = secant.secants(unknown, facts)
        assert bool(np.isnan(low).all())
        assert not secant.one_sign((low, high), np.ones((1, 1, 1)))[0]

    @pytest.mark.parametrize(
        ("slope", "want"), [(0.5, True), (9.0, True), (-0.5, True), (-2.0, False)]
    )
    def test_one_sign_tells_folds_from_bends(self, slope, want):
        """f(x, y) = (x, y + slope max(y, 0)) folds exactly when ``1 + slope < 0``."""
        first = ([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [5.0, 5.0, 0.0])
        net = chain(first, ([[1.0, 0.0, 0.0], [0.0, 1.0, slope]], None))
        secant = SecantNetwork(record(net), np.eye(2))
        facts = secant.enclose(np.full((1, 2), -0.1), np.full((1, 2), 0.1))
        secants = secant.secants(facts, facts)
        inverse = np.linalg.pinv(secant.slopes(secants).center)
        assert bool(secant.one_sign(secants, inverse)[0]) is want

    def test_networks_without_convex_activations_are_refused(self):
        net = Net((4,), seed=0)
        net.linear(3)
        net.act("tanh")
        net.linear(2)
        with pytest.raises(UnsupportedOperationError):
            SecantNetwork(net.graph().record(), np.eye(2))


class TestTree:
    def test_children_cover_their_pair(self):
        rng = np.random.default_rng(0)
        tree = BoxTree(np.array([-1.0, 0.0]), np.array([1.0, 3.0]), None)
        x, y = tree.root
        for _ in range(7):
            parent, a, b = tree.children(x, y)
            for k in range(len(x)):
                p = rng.uniform(tree.lower[x[k]], tree.upper[x[k]], size=(30, 2))
                q = rng.uniform(tree.lower[y[k]], tree.upper[y[k]], size=(30, 2))
                inside = np.zeros(30, dtype=bool)
                for i in np.flatnonzero(parent == k):
                    for first, second in ((p, q), (q, p)):
                        good = ((tree.lower[a[i]] <= first) & (first <= tree.upper[a[i]])).all(1)
                        good &= ((tree.lower[b[i]] <= second) & (second <= tree.upper[b[i]])).all(1)
                        inside |= good & ((x[k] == y[k]) | (first is p))
                assert bool(inside.all())
            keep = rng.permutation(len(a))[:12]
            x, y = a[keep], b[keep]

    @pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
    def test_distances_are_never_above_the_true_ones(self, norm):
        rng = np.random.default_rng(1)
        low = rng.normal(size=(200, 3))
        high = low + rng.uniform(0, 1, size=(200, 3))
        center = rng.normal(size=3)
        nearest = np.linalg.norm(np.clip(center, low, high) - center, norm, axis=1)
        found = distance_below(center, norm, low, high)
        assert bool((found <= nearest * (1 + 1e-15)).all())
        assert bool((found >= nearest * (1 - 1e-12)).all())


class TestProofs:
    @pytest.mark.parametrize("seed", range(6))
    def test_one_input_agrees_with_the_grid(self, seed):
        net = random_net((1, 8, 8, 1), seed)
        center = next(c for c in (0.1, 0.4, -0.3, 0.8) if abs(slope_at(net, c)) > 1e-6)
        want, big, step = on_line(net, center, 2.0)
        pair = injectivity_radius(net, [center], r_max=2.0, effort=QUICK)
        near = nearest_preimage(net, [center], r_max=2.0, method="split", effort=QUICK)
        for found, truth in ((pair, want), (near, big)):
            assert found.evidence is Evidence.CERTIFIED
            assert found.lower == found.proved <= truth + 2 * step
            if math.isfinite(truth):
                assert found.upper == pytest.approx(truth, rel=2e-3, abs=2 * step)
                assert found.outcome is Outcome.SOLVED
            else:
                assert found.outcome is Outcome.EXCLUDED

    @pytest.mark.parametrize("norm", [1, 2, math.inf])
    def test_the_folded_plane_turned(self, norm):
        c, s = math.cos(0.5), math.sin(0.5)
        center = np.array([0.4, 0.3])
        distance = c * center[0] + s * center[1]
        dual = np.linalg.norm([c, s], {1: math.inf, 2: 2, math.inf: 1}[norm])
        found = injectivity_radius(fold(0.5), center, r_max=1.0, norm=norm, effort=QUICK)
        assert found.evidence is Evidence.CERTIFIED
        assert found.proved <= distance / dual <= found.upper
        assert found.gap <= 1e-3

    @pytest.mark.parametrize("seed", range(2))
    def test_brute_force_meets_no_collision_in_a_certified_ball(self, seed):
        net, center = random_net((2, 8, 8, 2), seed), np.array([0.2, 0.3])
        found = injectivity_radius(net, center, r_max=1.5, effort=QUICK)
        assert found.proved > 0.0
        assert not colliding_on_grid(net, center, 0.98 * found.proved, 0.05 * found.proved)

    def test_three_and_four_inputs_are_closed(self):
        for n in (3, 4):
            net = random_net((n, 8, 8, n), 3)
            found = nearest_preimage(net, [0.2] * n, r_max=0.3, method="split", effort=QUICK)
            assert found.evidence is Evidence.CERTIFIED
            assert found.proved == found.lower <= found.upper
            assert found.outcome is not Outcome.OPEN

    def test_many_inputs_get_the_radius_of_one_test(self):
        rng = np.random.default_rng(0)
        matrix = np.eye(20) + 0.02 * rng.normal(size=(20, 20))
        net = chain((matrix, np.full(20, 0.3)), (matrix, None))
        found = injectivity_radius(net, np.zeros(20), r_max=0.1, effort=QUICK)
        assert found.evidence is Evidence.CERTIFIED
        assert found.certified is not None
        assert found.certified.check.pairs == 1

    def test_matching_says_its_tolerance(self):
        plane = affine([[1.0, 0.0], [0.0, 1.0]])
        found = matching_radius(fold(), plane, [0.3, 0.0], r_max=1.0, effort=QUICK)
        assert found.certified is not None
        assert found.separation == 1e-3
        assert 0.299 <= found.proved <= 0.3005 <= found.upper * (1 + 1e-9)
        assert found.upper == pytest.approx(0.3005, abs=2e-4)

    def test_a_kink_at_the_center_is_no_obstacle_to_a_certificate(self):
        bent = chain(([[1.0], [1.0]], [9.0, 0.0]), ([[1.0, 1.0]], None))  # slopes 1 and 2
        found = nearest_preimage(bent, [0.0], r_max=1.0, effort=QUICK)
        assert found.outcome is Outcome.EXCLUDED
        assert found.evidence is Evidence.CERTIFIED
        assert found.separation == 0.0


def slope_at(net, x):
    return float(jacobian(PiecewiseNetwork.of(net, 1), np.array([[x]]))[0, 0, 0])


class TestCertificates:
    @pytest.fixture
    def answer(self):
        return injectivity_radius(fold(0.5), [0.4, 0.3], r_max=0.45, norm=2, effort=QUICK)

    def test_it_survives_a_file(self, answer, tmp_path):
        path = tmp_path / "c.json.gz"
        certificate_of(answer).save(path)
        read = RadiusCertificate.load(path)
        check = check_radius(read, [record(fold(0.5))])
        assert check.status.value == "certified", check.reason
        assert check.claim.radius == answer.proved
        assert "2-norm" in check.claim.sentence

    def test_other_networks_are_refused(self, answer):
        with pytest.raises(CertificateError, match="weights"):
            check_radius(certificate_of(answer), [record(fold(0.4))])
        with pytest.raises(CertificateError, match="structure"):
            check_radius(certificate_of(answer), [record(absolute())])
        with pytest.raises(CertificateError, match="2"):
            check_radius(certificate_of(answer), [record(fold(0.5))] * 2)

    def test_larger_claims_fail(self, answer):
        good = certificate_of(answer)
        for change in (
            {"radius": 1.01 * good.claim.radius},
            {"norm": math.inf},
            {"center": good.claim.center + 0.1},
        ):
            wrong = replace(good, claim=replace(good.claim, **change))
            assert check_radius(wrong, [record(fold(0.5))]).status.value == "unknown"

    def test_every_changed_step_is_noticed(self, answer):
        good = certificate_of(answer)
        for place in range(0, len(good.steps), max(1, len(good.steps) // 12)):
            for step in Step:
                if good.steps[place] == step:
                    continue
                steps = good.steps.copy()
                steps[place] = step
                check = check_radius(replace(good, steps=steps), [record(fold(0.5))])
                if check.status.value != "certified":
                    continue
                # another test that holds as well is as good a proof
                assert step not in (Step.SPLIT, Step.OUTSIDE)
                assert good.steps[place] != Step.SPLIT

    def test_trees_that_are_cut_short_or_too_long_fail(self, answer):
        good = certificate_of(answer)
        for steps in (good.steps[:-1], good.steps[:0], np.append(good.steps, good.steps[-1:])):
            check = check_radius(replace(good, steps=steps), [record(fold(0.5))])
            assert check.status.value == "unknown"
            assert check.reason

    def test_a_box_that_does_not_cover_the_ball_fails(self, answer):
        good = certificate_of(answer)
        small = replace(good, upper=good.claim.center + 0.5 * good.claim.radius)
        check = check_radius(small, [record(fold(0.5))])
        assert "cover" in check.reason

    def test_time_over_proves_nothing(self, answer):
        check = check_radius(certificate_of(answer), [record(fold(0.5))], time_limit=0.0)
        assert check.status.value == "unknown"

    def test_numbers_that_are_not_finite_are_refused(self, answer):
        good = certificate_of(answer)
        for change in ({"radius": math.nan}, {"radius": 0.0}, {"norm": 3.0}, {"tolerance": -1.0}):
            with pytest.raises(CertificateError):
                replace(good.claim, **change)
        with pytest.raises(CertificateError):
            replace(good, lower=np.array([-math.inf, 0.0]))
        with pytest.raises(CertificateError):
            replace(good, steps=np.array([9], dtype=np.int32))

    def test_arrays_of_other_sizes_are_refused(self, answer):
        good = certificate_of(answer)
        three = np.append(good.claim.center, 0.0)
        claim = RadiusClaim(three, good.claim.radius, 2.0, three - 9.0, three + 9.0)
        wide = replace(good, claim=claim, lower=three - 9.0, upper=three + 9.0)
        flat = replace(good, directions=np.ones((1, 5)))
        for wrong, match in ((wide, "3 inputs"), (flat, "5 outputs")):
            read = RadiusCertificate.from_json(wrong.to_json())  # with a fitting digest
            with pytest.raises(CertificateError, match=match):
                check_radius(read, [record(fold(0.5))])

    def test_altered_files_are_refused(self, answer, tmp_path):
        data = certificate_of(answer).to_json()
        data["claim"]["radius"] *= 2
        path = tmp_path / "c.json"
        path.write_text(json.dumps(data))
        with pytest.raises(CertificateError, match="altered"):
            RadiusCertificate.load(path)

    def test_weights_that_are_not_finite_prove_nothing(self):
        good = record(affine([[1.0, 0.0], [0.0, 1.0]]))
        weights = {k: np.where(np.eye(2) > 0, np.nan, v) if v.ndim == 2 else v
                   for k, v in good.weights.items()}  # fmt: skip
        claim = RadiusClaim(np.zeros(2), 1.0, math.inf, np.full(2, -math.inf), np.full(2, math.inf))
        broken = replace(good, weights=weights)
        for step in (Step.APART, Step.STEEP, Step.SIGN):
            made = RadiusCertificate.create(
                [broken], claim, np.full(2, -1.0), np.full(2, 1.0), np.eye(2), [int(step)]
            )
            try:
                check = check_radius(made, [broken])
            except CertificateError:
                continue
            assert check.status.value == "unknown"

    def test_no_test_excludes_a_true_collision(self):
        """Points with equal outputs lie in pairs of boxes that every test leaves open."""
        rng = np.random.default_rng(0)
        net = record(fold(0.3))
        c, s = math.cos(0.3), math.sin(0.3)
        normal = np.array([c, s])
        for _ in range(40):
            x = rng.normal(size=2)
            y = x - 2 * (normal @ x) * normal  # the mirror image has the same output, roughly
            size = rng.uniform(1e-6, 0.3)
            low = np.minimum(x, y) - size
            tree = BoxTree(low, np.maximum(x, y) + size, None)
            tree.lower = np.stack([x - size, y - size])
            tree.upper = np.stack([x + size, y + size])
            tree.left = np.full(2, -1)
            tests = PairTests(tree, [net], np.eye(2), 0.0)
            for step in (Step.APART, Step.STEEP, Step.SIGN):
                assert not tests.holds(step, np.array([0]), np.array([1]))[0]


def test_a_domain_and_its_certificate():
    found = nearest_preimage(
        absolute(), [0.3], r_max=2.0, domain=Box([0.0], [1.0]), method="split", effort=QUICK
    )
    assert found.outcome is Outcome.EXCLUDED
    claim = certificate_of(found).claim
    assert (claim.lower[0], claim.upper[0]) == (0.0, 1.0)
    free = replace(claim, lower=np.array([-math.inf]), upper=np.array([math.inf]))
    wrong = replace(certificate_of(found), claim=free)
    assert check_radius(wrong, [record(absolute())]).status.value == "unknown"


def test_float32_weights_are_taken_as_stored():
    net = fold(0.5)
    single = net.to(torch.float32, "cpu")
    found = injectivity_radius(single, [0.4, 0.3], r_max=1.0, effort=QUICK)
    certificate = certificate_of(found)
    assert check_radius(certificate, [record(single)]).status.value == "certified"
    with pytest.raises(CertificateError):
        check_radius(certificate, [record(net)])
