"""A small network with a property to edit for and others to keep."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch import nn

from torch_prepared.specs import Box, Property, SafeSet

CENTER = torch.tensor([0.3, -0.2, 0.5])


def network(seed: int = 0, sizes: tuple[int, ...] = (3, 12, 10, 3)) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for n, m in pairwise(sizes):
        layer = nn.Linear(n, m)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(m, n, generator=generator) / n**0.5)
            layer.bias.copy_(0.1 * torch.randn(m, generator=generator))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def ball(x: torch.Tensor, eps: float) -> Box:
    return Box(x.double() - eps, x.double() + eps)


def flipped(model: nn.Module) -> Property:
    """The runner-up shall win around CENTER."""
    label = int(model(CENTER[None])[0].argsort()[-2])
    return Property(ball(CENTER, 0.05), SafeSet.argmax(label, 3), "flip")


def steady(model: nn.Module, count: int = 3, eps: float = 0.01) -> list[Property]:
    """Robustness at inputs whose decision is not the one that ``flipped`` asks for."""
    wanted = int(model(CENTER[None])[0].argsort()[-2])
    found = []
    for x in 2 * torch.randn(400, 3, generator=torch.Generator().manual_seed(5)):
        y = model(x[None])[0]
        first, second = y.topk(2).values.tolist()
        label = int(y.argmax())
        if label != wanted and first - second > 0.3 and (x - CENTER).abs().max() > 0.5:
            found.append(Property(ball(x, eps), SafeSet.argmax(label, 3), f"steady {len(found)}"))
        if len(found) == count:
            return found
    raise AssertionError("the test's network has no such inputs")


def threatened(model: nn.Module, count: int = 3) -> list[Property]:
    """Robustness at inputs beside the edited region, where a careless edit changes the decision."""
    wanted = int(model(CENTER[None])[0].argsort()[-2])
    found: list[Property] = []
    offsets = 0.25 * torch.randn(2000, 3, generator=torch.Generator().manual_seed(7))
    for x in CENTER + offsets:
        with torch.no_grad():
            best = model(x[None])[0].topk(2)
        gap, label = float(best.values[0] - best.values[1]), int(best.indices[0])
        apart = float((x - CENTER).abs().max())
        if label != wanted and 0.15 < gap < 0.5 and 0.1 < apart < 0.6:
            name = f"near {len(found)}"
            found.append(Property(ball(x, 0.005), SafeSet.argmax(label, 3), name))
        if len(found) == count:
            return found
    raise AssertionError("the test's network has no such inputs")


def sampled(model: nn.Module, prop: Property) -> float:
    x = prop.region.sample(2000, torch.Generator().manual_seed(1))
    with torch.no_grad():
        return float(prop.safe.margin(copy.deepcopy(model).double()(x)).min())
