import math

import numpy as np
import pytest

from tests.helpers import Net
from torch_prepared.certify import check_radius
from torch_prepared.certify.exact import evaluate_exactly
from torch_prepared.errors import SpecError
from torch_prepared.invert import Effort, Evidence, Outcome, nearest_preimage
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.specs import Box

from .nets import absolute, affine, fold, on_line, random_net

QUICK = Effort(time_limit=20.0, threads=2)


def exact_collision(model, answer) -> bool:
    record = PiecewiseNetwork.of(model, len(answer.witness.x)).record
    same = evaluate_exactly(record, answer.witness.x) == evaluate_exactly(record, answer.witness.y)
    return bool(same.all()) and any(answer.witness.x - answer.witness.y)


@pytest.mark.parametrize("method", ["auto", "milp", "split"])
def test_absolute_value(method):
    found = nearest_preimage(absolute(), [0.3], r_max=2.0, method=method, effort=QUICK)
    assert found.outcome is Outcome.SOLVED
    assert found.lower <= 0.6 <= found.upper
    assert found.gap < 1e-3
    assert exact_collision(absolute(), found)
    want = Evidence.CLAIMED if method == "milp" else Evidence.CERTIFIED
    assert found.evidence is want


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", ["milp", "split"])
def test_one_input_agrees_with_the_grid(seed, method):
    net = random_net((1, 8, 8, 1), seed)
    _, want, step = on_line(net, 0.1, 3.0)
    found = nearest_preimage(net, [0.1], r_max=3.0, method=method, effort=QUICK)
    assert found.upper > 0.0
    assert found.lower <= want + 2 * step
    if math.isfinite(want):
        assert found.upper == pytest.approx(want, abs=1e-3)
        assert found.gap <= 1e-3
        assert exact_collision(net, found)
    else:
        assert found.upper == math.inf
        assert found.outcome is Outcome.EXCLUDED


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_round_and_square_balls_around_a_folded_plane(norm):
    # Turned by 30 degrees, so that no face of a ball is parallel to the fold.
    c, s = math.cos(0.5), math.sin(0.5)
    net = fold(0.5)
    center = np.array([0.4, 0.3])
    found = nearest_preimage(net, center, r_max=3.0, norm=norm, effort=QUICK)
    distance = 2 * (c * center[0] + s * center[1])
    length = np.linalg.norm(distance * np.array([c, s]), norm)
    assert found.lower <= length * (1 + 1e-6)
    assert found.upper == pytest.approx(length, rel=1e-3)
    assert found.lower == pytest.approx(length, rel=2e-3)
    assert exact_collision(net, found)


def test_the_certificate_replays_and_speaks_of_the_ball():
    net = random_net((2, 12, 12, 2), 1)
    found = nearest_preimage(net, [0.1, 0.2], r_max=1.5, method="split", effort=QUICK)
    assert found.evidence is Evidence.CERTIFIED
    assert found.certified is not None
    record = PiecewiseNetwork.of(net, 2).record
    again = check_radius(found.certified.certificate, [record])
    assert again.status.value == "certified"
    assert again.claim.kind == "preimage"
    assert again.claim.radius == found.proved
    assert again.claim.center.tolist() == [0.1, 0.2]


@pytest.mark.parametrize("seed", range(2))
def test_programs_agree_with_certificates(seed):
    net = random_net((2, 6, 6, 2), seed)
    both = [
        nearest_preimage(net, [0.3, 0.1], r_max=2.0, method=m, effort=QUICK)
        for m in ("milp", "split")
    ]
    assert max(b.lower for b in both) <= min(b.upper for b in both)
    assert both[1].proved <= both[0].upper


def test_overlapping_pooling_windows_have_a_pattern_each():
    net = Net((1, 4), seed=3)
    net.conv(6, (2,))
    net.pool("max_pool", 2, 1)
    net.flatten()
    net.linear(4)
    graph = net.graph()
    center = np.array([0.3, -0.2, 0.5, 0.1])
    effort = Effort(time_limit=5.0, threads=2)
    found = nearest_preimage(graph, center, r_max=0.2, method="milp", effort=effort)
    proved = nearest_preimage(graph, center, r_max=0.2, method="split", effort=effort)
    assert found.lower > 1.5 * found.proved > 0.0
    assert found.lower <= found.upper
    assert proved.proved <= found.upper


def test_flat_directions_make_the_radius_zero():
    found = nearest_preimage(affine([[1.0, 1.0]]), [0.0, 0.0], r_max=1.0)
    assert (found.lower, found.upper) == (0.0, 0.0)
    assert exact_collision(affine([[1.0, 1.0]]), found)


def test_a_center_on_a_kink_has_separated_claims_only():
    found = nearest_preimage(
        absolute(), [0.0], r_max=1.0, separation=1e-2, method="milp", effort=QUICK
    )
    assert found.upper == math.inf
    assert found.evidence is Evidence.CLAIMED
    assert found.separation == 1e-2
    assert found.proved == 0.0


def test_the_output_of_another_point():
    found = nearest_preimage(absolute(), [0.5], of=[-2.0], r_max=3.0, effort=QUICK)
    assert found.upper == pytest.approx(1.5, rel=1e-6)
    assert found.lower == pytest.approx(1.5, rel=1e-3)
    found = nearest_preimage(absolute(), [0.5], of=[-2.0], r_max=1.0, effort=QUICK)
    assert found.outcome is Outcome.EXCLUDED
    assert nearest_preimage(absolute(), [0.5], of=[-0.5], r_max=1.0).upper == 0.0


def test_a_domain_leaves_preimages_out():
    domain = Box([0.0], [1.0])
    found = nearest_preimage(absolute(), [0.3], r_max=2.0, domain=domain, effort=QUICK)
    assert found.outcome is Outcome.EXCLUDED
    with pytest.raises(SpecError, match="does not hold the center"):
        nearest_preimage(absolute(), [3.0], r_max=2.0, domain=domain)


def test_time_over_leaves_valid_bounds():
    net = random_net((2, 40, 40, 2), 0)
    found = nearest_preimage(net, [0.1, 0.1], r_max=5.0, method="milp", effort=Effort(0.5, 1))
    assert found.seconds < 20
    assert 0.0 <= found.lower <= found.upper
    tiny = nearest_preimage(net, [0.1, 0.1], r_max=5.0, effort=Effort(1e-6, 1))
    assert tiny.outcome is not Outcome.EXCLUDED
    assert tiny.lower <= tiny.upper


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"r_max": -1.0}, "radius"),
        ({"r_max": math.nan}, "radius"),
        ({"r_max": math.inf}, "radius"),
        ({"norm": 3}, "norm"),
        ({"norm": "two"}, "norm"),
        ({"method": "magic"}, "method"),
        ({"separation": 0.0}, "separation"),
        ({"center": [math.nan]}, "center"),
        ({"center": []}, "center"),
        ({"of": [1.0, 2.0]}, "of"),
        ({"domain": Box([0.0, 0.0], [1.0, 1.0])}, "domain"),
    ],
)
def test_bad_questions_are_refused(changes, word):
    asked = {"center": [0.5], "r_max": 1.0, **changes}
    with pytest.raises(SpecError, match=word):
        nearest_preimage(absolute(), asked.pop("center"), **asked)


def test_a_point_of_the_wrong_size_and_bad_limits():
    with pytest.raises(SpecError, match="takes 2 numbers"):
        nearest_preimage(PiecewiseNetwork.of(fold(), 2).graph, [0.5], r_max=1.0)
    for wrong in ({"time_limit": 0.0}, {"threads": 0}, {"bounds": "magic"}, {"mip_gap": 1.0}):
        with pytest.raises(SpecError):
            Effort(**wrong)
