"""Networks of GELU and SiLU are edited by every method and the independent checker agrees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_prepared as tp
from torch_prepared.certify import Verdict
from torch_prepared.specs import Box, Property, SafeSet


@pytest.mark.parametrize(
    ("method", "activation"),
    [
        ("one_shot", nn.GELU()),
        ("one_shot", nn.GELU("tanh")),
        ("one_shot", nn.SiLU()),
        ("sequential", nn.GELU()),
        ("refine", nn.SiLU()),
    ],
    ids=str,
)
def test_a_small_network_is_edited_and_certified(method: str, activation: nn.Module) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Linear(4, 16), activation, nn.Linear(16, 12), activation, nn.Linear(12, 3)
    )
    center = torch.zeros(4, dtype=torch.float64)
    wanted = int(model(center.float()[None])[0].argmin())
    prop = Property(Box(center - 0.1, center + 0.1), SafeSet.argmax(wanted, 3))
    preserve = torch.randn(50, 4)
    result = tp.edit_network(model, [prop], method=method, preserve=preserve, time_limit=60)
    assert result.status is Verdict.CERTIFIED
    assert result.certificate is not None
    record = tp.capture_module(result.model, preserve[:1]).record()
    again = tp.check_certificate(result.certificate, record, [prop.record()])
    assert again.status is Verdict.CERTIFIED
    points = prop.region.sample(400, torch.Generator().manual_seed(0)).float()
    assert bool((result.model(points).argmax(dim=1) == wanted).all())
