"""``explain_proof``, ``compare_proofs`` and the page made of them."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch import nn

from tests.helpers import mlp
from torch_prepared.edit import edit_network
from torch_prepared.errors import SpecError
from torch_prepared.interpret import (
    Choices,
    compare_proofs,
    explain_proof,
)
from torch_prepared.interpret._pictures import image_shape
from torch_prepared.interpret.page import render_page
from torch_prepared.specs import local_robustness

from .cases import property_at_center


def test_a_module_is_explained_and_not_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.rand(4)
    prop = local_robustness(x, int(model(x[None]).argmax()), 1e-3, 3)
    found = explain_proof(model, prop, extract="exact", maps="alpha")
    assert found.selected.sufficient
    assert found.maps.shape == (len(found.shown), 4)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    json.dumps(found.to_json())


@pytest.mark.parametrize("mode", ["prune", "coarsen"])
def test_unproved_properties_show_leading_features(mode: str) -> None:
    graph = mlp(seed=1)
    found = explain_proof(graph, property_at_center(graph, radius=9.0), mode=mode)
    assert not found.selected.sufficient
    assert len(found.shown) > 0
    assert "not proved" in render_page("t", [found]).lower()


def test_a_network_compared_with_itself_is_the_same() -> None:
    graph = mlp(seed=1)
    same = compare_proofs(graph, graph, property_at_center(graph))
    assert same.fraction == (1.0, 1.0)
    assert same.jaccard == 1.0
    assert same.rank_correlation == pytest.approx(1.0)
    assert same.map_cosine == pytest.approx(1.0) or math.isnan(same.map_cosine)
    assert same.change is not None
    assert same.change.constant == 0.0
    assert not same.change.features.any()
    assert same.shared is None


def test_networks_with_other_layers_are_compared_on_the_input_only() -> None:
    first, second = mlp((4, 8, 6, 3), seed=1), mlp((4, 8, 9, 3), seed=1)
    found = compare_proofs(first, second, property_at_center(first))
    assert math.isnan(found.jaccard)
    assert math.isnan(found.rank_correlation)
    assert found.change is None
    json.dumps(found.to_json())


def test_an_edit_s_margin_is_told_apart_by_feature() -> None:
    graph = mlp((3, 12, 10, 3), seed=2)
    held = property_at_center(graph, 0, 0.15)
    center = (held.region.lower + held.region.upper) / 2
    others = [k for k in range(3) if graph_label(graph, center) != k]
    wrong = local_robustness(center, others[0], 0.05, 3)
    result = edit_network(graph, wrong, method="one_shot", time_limit=20)
    found = compare_proofs(graph, result.model, wrong, Choices(extract="exact"))
    assert not found.before.selected.sufficient
    assert found.after.selected.sufficient
    assert found.fraction == (0.0, 1.0)
    change = found.change
    assert change is not None
    total = change.constant + float(change.features.sum())
    assert total == pytest.approx(change.after - change.before, abs=1e-9)
    page = render_page("edit", [found.after], [found], names=("old <b>", "new"))
    assert "old &lt;b&gt;" in page
    assert "Where the difference comes from" in page


def graph_label(graph, center) -> int:
    from torch_prepared.relax import evaluate_graph

    return int(evaluate_graph(graph, center[None]).argmax())


def test_partly_proved_networks_are_compared_where_both_are_proved() -> None:
    graph = mlp((4, 10, 8, 3), seed=3)
    prop = property_at_center(graph, 1, 0.02)
    bias = graph.nodes[-1].params["bias"].name
    label = graph_label(graph, (prop.region.lower + prop.region.upper) / 2)
    lift = torch.zeros(3, dtype=torch.float64)
    lift[label] = 0.5
    better = graph.with_parameters({bias: graph.parameters[bias] + lift})
    wide = None
    for radius in torch.logspace(-2, 1, 30).tolist():
        trial = property_at_center(graph, 1, radius)
        if (
            explain_proof(better, trial).selected.sufficient
            and not explain_proof(graph, trial).features.proved
        ):
            wide = trial
            break
    assert wide is not None
    found = compare_proofs(graph, better, wide)
    assert 0 < found.fraction[0] < 1
    assert found.fraction[1] == 1.0
    assert found.shared is not None
    assert not math.isnan(found.jaccard)


def test_the_page_is_one_file_without_scripts_or_links() -> None:
    graph = mlp(seed=1)
    prop = property_at_center(graph)
    named = type(prop)(prop.region, prop.safe, "<script>alert(1)</script>")
    page = render_page("proof & <more>", [explain_proof(graph, named)])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', page)
    assert page.count("<img") == 2


def test_shapes_that_are_images() -> None:
    assert image_shape((1, 784, 1)) == (1, 28, 28)
    assert image_shape((784,)) == (1, 28, 28)
    assert image_shape((1, 28, 28)) == (1, 28, 28)
    assert image_shape((3, 32, 32)) == (3, 32, 32)
    assert image_shape((5,)) is None
    assert image_shape((2, 6, 6)) is None


def test_bad_choices_are_refused_before_any_work() -> None:
    with pytest.raises(SpecError, match="proof method: got 'x'"):
        Choices(method="x")
    with pytest.raises(SpecError, match="time_limit"):
        explain_proof(mlp(), property_at_center(mlp()), time_limit=0)
