"""Outputs that count as the same within a tolerance: radii, distances, certificates."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from torch_prepared.certify import RadiusCertificate, RadiusClaim, check_radius
from torch_prepared.certify.exact import evaluate_exactly
from torch_prepared.certify.pairs import BoxTree, PairTests, Step
from torch_prepared.errors import CertificateError, SpecError
from torch_prepared.invert import (
    Effort,
    Evidence,
    Outcome,
    injectivity_radius,
    matching_radius,
    max_collision,
    nearest_preimage,
)
from torch_prepared.invert._network import PiecewiseNetwork

from .nets import absolute, affine, chain, fold, random_net

QUICK = Effort(time_limit=20.0, threads=1)
CENTER = 0.1


def by_grid(net, separation, within, reach, anchored):
    """The radius of a one-input net by brute force, and how far off it may be."""
    count = 100_001 if anchored else 1601
    x = np.linspace(CENTER - reach, CENTER + reach, count)
    y = PiecewiseNetwork.of(net, 1).values(x[:, None])[:, 0]
    away = np.abs(x - CENTER)
    if anchored:
        there = y[count // 2]
        good = (np.abs(y - there) <= within) & (away >= separation * (1 - 1e-12))
        return float(away[good].min(initial=math.inf))
    apart = np.abs(x[:, None] - x) >= separation * (1 - 1e-12)
    good = apart & (np.abs(y[:, None] - y) <= within)
    return float(np.maximum(away[:, None], away)[good].min(initial=math.inf))


def collides(net, answer):
    """Whether the witness is one, exactly."""
    x, y = answer.witness.x, answer.witness.y
    record = PiecewiseNetwork.of(net, len(x)).record
    gap = np.abs(evaluate_exactly(record, x) - evaluate_exactly(record, y))
    return max(gap) <= Fraction(answer.output_tolerance)


@pytest.mark.parametrize("seed", range(3))
def test_one_input_agrees_with_brute_force_and_shrinks_with_the_tolerance(seed):
    net, last = random_net((1, 6, 6, 1), seed), {True: math.inf, False: math.inf}
    for within in (1e-3, 0.02, 0.1):
        for anchored in (True, False):
            ask = nearest_preimage if anchored else injectivity_radius
            found = ask(
                net, [CENTER], r_max=2.0, separation=0.3, output_tolerance=within, effort=QUICK
            )
            want = by_grid(net, 0.3, within, 2.0, anchored)
            assert found.evidence is Evidence.CERTIFIED
            assert found.lower == found.proved <= want
            assert found.lower <= last[anchored]
            last[anchored] = found.upper
            if math.isinf(want):
                assert found.outcome is Outcome.EXCLUDED
                continue
            assert found.outcome is Outcome.SOLVED
            assert want - 0.02 <= found.upper <= want * (1 + 1e-3)
            assert collides(net, found)
            assert found.separation == 0.3
            assert max(abs(found.witness.x - found.witness.y)) >= Fraction(0.3)


@pytest.mark.parametrize("seed", [0, 2])
def test_programs_agree_with_certificates(seed):
    net = random_net((1, 6, 6, 1), seed)
    asked = {"r_max": 2.0, "separation": 0.2, "output_tolerance": 0.02, "effort": QUICK}
    program = nearest_preimage(net, [CENTER], method="milp", **asked)
    split = nearest_preimage(net, [CENTER], method="split", **asked)
    assert program.evidence is Evidence.CLAIMED
    assert program.lower <= split.upper
    assert split.proved <= program.upper
    assert collides(net, program)
    assert program.gap <= 1e-3 * program.upper


def test_no_tolerance_is_the_question_without_one():
    net = random_net((2, 6, 6, 2), 4)
    for ask in (nearest_preimage, injectivity_radius):
        plain = ask(net, [0.2, 0.3], r_max=1.0, effort=QUICK)
        zero = ask(net, [0.2, 0.3], r_max=1.0, output_tolerance=0.0, effort=QUICK)
        assert (plain.lower, plain.upper) == (zero.lower, zero.upper)
        assert plain.certified.certificate.to_json() == zero.certified.certificate.to_json()


@pytest.mark.parametrize("method", ["oneshot", "bisect"])
def test_many_inputs_are_left_to_programs(method):
    """(|x_0|, x_1, ..., x_4): a - b >= 0.2 and a + b <= 0.05 at best, so b = -0.075."""
    first = np.concatenate([[[1.0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0]], np.eye(5)[1:], -np.eye(5)[1:]])
    last = np.zeros((5, 10))
    last[0, :2] = 1.0
    last[1:, 2:6], last[1:, 6:] = np.eye(4), -np.eye(4)
    net = chain((first, None), (last, None))
    center = np.array([0.4, 0.0, 0.1, 0.2, -0.1])
    found = injectivity_radius(
        net, center, r_max=0.8, separation=0.2, output_tolerance=0.05, method=method, effort=QUICK
    )
    assert found.lower <= 0.475 * (1 + 1e-6) <= found.upper * (1 + 2e-6)
    assert found.upper - found.lower <= 2e-3 if method == "oneshot" else 0.25
    assert found.evidence is Evidence.CLAIMED
    assert collides(net, found)


def test_distances_grow_with_the_tolerance():
    """|x| around 0.3 up to 1 away: 0.7 and -0.7; with 0.1 more, 0.8 and -0.7."""
    for within, want in ((0.0, 1.4), (0.1, 1.5), (0.4, 1.8)):
        found = max_collision(absolute(), [0.3], 1.0, output_tolerance=within, effort=QUICK)
        assert found.outcome is Outcome.SOLVED
        assert found.lower <= want <= found.upper
        assert found.upper - found.lower <= 1e-3
        assert collides(absolute(), found)
    anchored = max_collision(
        absolute(), [0.3], 1.0, anchor=True, output_tolerance=0.2, effort=QUICK
    )
    assert anchored.upper == pytest.approx(0.8, abs=1e-3)
    plane = affine([[2.0, 0.0], [0.0, 4.0]])
    found = max_collision(plane, [0.0, 0.0], 1.0, output_tolerance=0.5, effort=QUICK)
    assert found.upper == pytest.approx(0.25, abs=1e-5)


def test_matching_within_a_tolerance():
    """x of (2 x) is known up to 0.1 where 2 x is up to 0.2."""
    double, plain = affine([[2.0]]), affine([[1.0]])
    asked = {"r_max": 1.0, "output_tolerance": 0.2, "effort": QUICK}
    kept = matching_radius(double, plain, [0.0], tolerance=0.11, **asked)
    assert kept.outcome is Outcome.EXCLUDED
    assert kept.evidence is Evidence.CERTIFIED
    lost = matching_radius(double, plain, [0.0], tolerance=0.09, **asked)
    assert lost.lower == pytest.approx(0.045, abs=1e-3)
    assert lost.lower <= 0.045 <= lost.upper
    assert lost.upper == pytest.approx(0.045, abs=1e-3)
    assert collides(double, lost)


class TestCertificates:
    @pytest.fixture
    def answer(self):
        return injectivity_radius(
            fold(0.5), [0.4, 0.3], r_max=1.0, separation=0.1, output_tolerance=0.02, effort=QUICK
        )

    def test_it_survives_a_file_and_says_what_it_means(self, answer, tmp_path):
        path = tmp_path / "c.json"
        answer.certified.certificate.save(path)
        read = RadiusCertificate.load(path)
        record = PiecewiseNetwork.of(fold(0.5), 2).record
        check = check_radius(read, [record])
        assert check.status.value == "certified", check.reason
        assert (check.claim.output_tolerance, check.claim.separation) == (0.02, 0.1)
        assert "differ by at least 0.1 have no outputs within 0.02" in check.claim.sentence
        assert read.claim.kind == "injectivity"

    def test_stronger_claims_fail(self, answer):
        good = answer.certified.certificate
        record = PiecewiseNetwork.of(fold(0.5), 2).record
        for change in (
            {"output_tolerance": 0.05},
            {"separation": 0.01},
            {"radius": 1.02 * good.claim.radius},
        ):
            wrong = replace(good, claim=replace(good.claim, **change))
            assert check_radius(wrong, [record]).status.value == "unknown"
        weaker = replace(good, claim=replace(good.claim, output_tolerance=0.01))
        assert check_radius(weaker, [record]).status.value == "certified"

    def test_claims_that_mean_nothing_are_refused(self):
        ends = np.array([-math.inf]), np.array([math.inf])
        for within, separation in ((0.1, 0.0), (0.0, 0.1), (-0.1, 0.1), (math.nan, 0.1),
                                   (0.1, math.nan), (math.inf, 0.1), (0.1, -1.0)):  # fmt: skip
            with pytest.raises(CertificateError, match="output tolerance"):
                RadiusClaim(np.zeros(1), 1.0, math.inf, *ends, None, 0.0, within, separation)
        with pytest.raises(CertificateError, match="output tolerance"):
            RadiusClaim(np.zeros(1), 1.0, math.inf, *ends, None, 0.5, 0.1, 0.1)

    def test_no_test_excludes_a_pair_within_the_tolerance(self):
        """Points that are far enough apart and whose outputs agree stay open, however small."""
        rng, within, separation = np.random.default_rng(0), 0.05, 0.1
        net = PiecewiseNetwork.of(random_net((2, 8, 8, 2), 1), 2)
        x, y = rng.normal(size=(2, 4000, 2))
        y[2000:] = x[2000:] + rng.uniform(-0.2, 0.2, size=(2000, 2))
        gap = np.abs(net.values(x) - net.values(y)).max(axis=1)
        meant = (np.abs(x - y).max(axis=1) >= separation) & (gap <= within)
        assert meant.sum() > 20
        for a, b in zip(x[meant][:60], y[meant][:60], strict=True):
            size = rng.uniform(1e-9, 0.1)
            tree = BoxTree(np.minimum(a, b) - size, np.maximum(a, b) + size, None)
            tree.lower, tree.upper = np.stack([a, b]) - size, np.stack([a, b]) + size
            tree.left = np.full(2, -1)
            tests = PairTests(
                tree, [net.record], np.eye(2), 0.0, output_tolerance=within, separation=separation
            )
            assert tests.useful == (Step.CLOSE, Step.APART, Step.STEEP)
            for step in (*tests.useful, Step.SIGN):
                assert not tests.holds(step, np.array([0]), np.array([1]))[0]


@pytest.mark.parametrize("wrong", [-1.0, math.nan, math.inf])
def test_bad_tolerances_are_refused(wrong):
    plain = absolute()
    for ask in (
        lambda: injectivity_radius(plain, [0.1], r_max=1.0, output_tolerance=wrong),
        lambda: nearest_preimage(plain, [0.1], r_max=1.0, output_tolerance=wrong),
        lambda: matching_radius(plain, plain, [0.1], r_max=1.0, output_tolerance=wrong),
        lambda: max_collision(plain, [0.1], 1.0, output_tolerance=wrong),
    ):
        with pytest.raises(SpecError, match="output_tolerance"):
            ask()
