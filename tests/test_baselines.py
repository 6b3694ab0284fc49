"""The trained baselines, on regions of few and of many inputs."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch_prepared as tp
from benchmarks.baselines import BASELINES, _training
from torch_prepared.edit import EDITORS
from torch_prepared.specs import Box, Property, SafeSet


def network(sizes):
    generator = torch.Generator().manual_seed(0)
    layers = []
    for n, m in pairwise(sizes):
        layer = nn.Linear(n, m)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(m, n, generator=generator) / n**0.5)
            layer.bias.copy_(0.1 * torch.randn(m, generator=generator))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(BASELINES))
@pytest.mark.parametrize(("inputs", "eps"), [(3, 0.1), (20, 0.02)])
def test_baselines_certify_and_keep_what_the_network_does(method, inputs, eps, monkeypatch):
    monkeypatch.setitem(EDITORS, method, BASELINES[method])
    monkeypatch.setattr(_training, "LEARNING_RATE", 0.01)
    monkeypatch.setattr(_training, "MOST_STEPS", 600)
    model = network((inputs, 16, 16, 3))
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(300, inputs, generator=generator)
    x = reference[0]
    label = int(model(x[None])[0].argsort()[-2])
    prop = Property(Box(x.double() - eps, x.double() + eps), SafeSet.argmax(label, 3), "flip")
    result = tp.edit_network(model, prop, method=method, preserve=reference, time_limit=300)
    assert result.status is tp.Verdict.CERTIFIED
    assert result.report.properties[0].before.state == "violated"
    assert result.report.drawdown.agreement > 0.6
    points = prop.region.sample(2000, generator)
    with torch.no_grad():
        assert float(prop.safe.margin(result.model.double()(points)).min()) > 0
