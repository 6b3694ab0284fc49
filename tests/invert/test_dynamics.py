import numpy as np
import pytest
import torch

from torch_prepared.errors import SpecError
from torch_prepared.invert import (
    Effort,
    fix_inputs,
    injectivity_radius,
    list_preimages,
    map_radii,
    nearest_preimage,
)
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.invert.pictures import draw_curve, draw_map, save_answer
from torch_prepared.relax import evaluate_graph

from .nets import absolute, chain, fold, random_net

QUICK = Effort(time_limit=20.0, threads=2)


def test_fixing_a_parameter_is_evaluating_at_it():
    net = random_net((3, 6, 2), 0)
    graph = fix_inputs(net, 3, {1: 0.25})
    x = torch.randn(5, 2, dtype=torch.float64)
    whole = torch.stack([x[:, 0], torch.full((5,), 0.25, dtype=torch.float64), x[:, 1]], dim=1)
    with torch.no_grad():
        want = evaluate_graph(net, whole)
        torch.testing.assert_close(evaluate_graph(graph, x), want, rtol=1e-12, atol=1e-12)
    for wrong in ({3: 0.0}, {-1: 0.0}, {0: 0.0, 1: 0.0, 2: 0.0}, {0: float("nan")}):
        with pytest.raises(SpecError, match="fixed"):
            fix_inputs(net, 3, wrong)


def test_all_preimages_of_a_doubly_folded_line():
    # f(x) = ||x| - 1| takes the value 0.5 at -1.5, -0.5, 0.5 and 1.5.
    first, second = [[1.0], [-1.0]], [[1.0, 1.0], [-1.0, -1.0]]
    net = chain((first, None), (second, [-1.0, 1.0]), ([[1.0, 1.0]], None))
    found = list_preimages(net, [0.5], center=[0.0], r_max=2.0, effort=QUICK)
    assert found.complete
    np.testing.assert_allclose(sorted(found.points[:, 0]), [-1.5, -0.5, 1.5], atol=1e-12)
    some = list_preimages(net, [0.5], center=[0.0], r_max=2.0, most=1, effort=QUICK)
    assert len(some.pairs) == 1
    assert not some.complete


def test_a_map_of_radii_follows_the_fold():
    centers = np.array([[0.2, 0.0], [0.5, 0.3], [-0.4, 0.1]])
    asked = []
    found = map_radii(
        lambda c, e: nearest_preimage(fold(), c, r_max=2.0, effort=e),
        centers,
        effort=QUICK,
        progress=lambda done, count: asked.append((done, count)),
    )
    np.testing.assert_allclose(found.upper, 2 * np.abs(centers[:, 0]), rtol=1e-9)
    np.testing.assert_allclose(found.lower, found.upper, rtol=1e-3)
    assert asked == [(1, 3), (2, 3), (3, 3)]
    none = map_radii(lambda c, e: pytest.fail("no time"), centers, effort=Effort(1e-9))
    assert not none.reached.any()
    assert np.isnan(none.lower).all()


def test_pictures_are_drawn_for_one_two_and_more_inputs(tmp_path):
    for name, net, n in (("one", absolute(), 1), ("two", fold(), 2), ("more", None, 3)):
        model = net if net is not None else random_net((3, 4, 3), 0)
        center = np.full(n, 0.3)
        for norm in (1, 2):
            answer = injectivity_radius(model, center, r_max=0.5, norm=norm, effort=QUICK)
            path = tmp_path / f"{name}{norm}.png"
            save_answer(path, PiecewiseNetwork.of(model, n).graph, center, answer)
            assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SpecError, match="cannot be drawn"):
        save_answer(tmp_path / "x.nonsense", absolute(), np.array([0.3]), answer)


def test_maps_and_curves_are_drawn(tmp_path):
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, 2)
    draw_map(axes[0], np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([1.0, 2.0]), "R")
    draw_curve(axes[1], [0.0, 1.0], [0.5, 0.6], [0.7, float("inf")])
    drawing.savefig(tmp_path / "x.png")
    pyplot.close(drawing)
    assert (tmp_path / "x.png").stat().st_size > 1000
