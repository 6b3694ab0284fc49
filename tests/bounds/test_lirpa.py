"""The auto_LiRPA adapter, and our bounds beside auto_LiRPA's."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch
from helpers import Net, attack, mlp, random_boxes
from torch import Tensor, nn

from torch_prepared.bounds import compute_bounds, lirpa
from torch_prepared.bounds.lirpa import lirpa_available, lirpa_bounds
from torch_prepared.core.graph import Graph
from torch_prepared.core.interval import Interval
from torch_prepared.errors import (
    MissingDependencyError,
    SpecError,
    UnsupportedOperationError,
)
from torch_prepared.relax import evaluate_graph
from torch_prepared.relax.module import GraphModule, graph_to_module
from torch_prepared.specs import Box

needs_lirpa = [
    pytest.mark.optional,
    pytest.mark.skipif(not lirpa_available(), reason="auto_LiRPA is not installed"),
]


def conv(op: str) -> Graph:
    """As conv_net, but with equal padding on both sides, which auto_LiRPA 0.3 needs."""
    net = Net((2, 6, 6), 3)
    net.conv(4, (3, 3), stride=2, padding=1)
    net.act(op)
    net.conv(4, (2, 2))
    net.act(op)
    net.flatten()
    net.linear(5)
    net.act(op)
    net.linear(3)
    return net.graph(torch.float32)


def residual(op: str) -> Graph:
    """A block with a shortcut, without batch norm, which auto_LiRPA 0.3 cannot read as written."""
    net = Net((2, 4, 4), 4)
    net.conv(3, (3, 3), padding=1)
    skip = net.act(op)
    net.conv(3, (3, 3), padding=1)
    net.act(op)
    net.conv(3, (1, 1))
    net.join(net.last, skip)
    net.act(op)
    net.flatten()
    net.linear(3)
    return net.graph(torch.float32)


GRAPHS = {
    "mlp": lambda op: mlp((4, 8, 6, 3), op, 0, torch.float32),
    "deep": lambda op: mlp((4, 10, 10, 10, 3), op, 1, torch.float32),
    "conv": conv,
    "residual": residual,
}


def boxed(graph: Graph, radius: float = 0.2, count: int = 3) -> tuple[list[Box], Interval]:
    """The same float32 boxes in both forms."""
    regions = random_boxes(graph.input_size, count, 9, radius)
    lower, upper = (
        torch.stack(e).float() for e in zip(*((r.lower, r.upper) for r in regions), strict=True)
    )
    shape = (count, *graph.input_shape)
    box = Interval(lower.reshape(shape), upper.reshape(shape))
    return [Box(lo, up) for lo, up in zip(lower, upper, strict=True)], box


class TestAgainstLirpa:
    pytestmark = needs_lirpa

    @pytest.mark.parametrize("name", sorted(GRAPHS))
    @pytest.mark.parametrize("op", ["relu", "tanh", "sigmoid"])
    def test_intervals_are_equal_or_tighter(self, name: str, op: str) -> None:
        graph = GRAPHS[name](op)
        regions, box = boxed(graph)
        ours = compute_bounds(graph, regions, method="ibp")
        theirs = lirpa_bounds(graph_to_module(graph), box, method="IBP")
        self.assert_as_tight(ours, theirs)

    @pytest.mark.parametrize("name", sorted(GRAPHS))
    @pytest.mark.parametrize(("ours", "theirs"), [("crown-ibp", "CROWN-IBP"), ("crown", "CROWN")])
    def test_backward_bounds_of_relu_networks_are_equal_or_tighter(
        self, name: str, ours: str, theirs: lirpa.LirpaMethod
    ) -> None:
        graph = GRAPHS[name]("relu")
        regions, box = boxed(graph)
        mine = compute_bounds(graph, regions, method=ours)
        other = lirpa_bounds(graph_to_module(graph), box, method=theirs)
        if name in ("mlp", "conv"):
            self.assert_as_tight(mine, other)
        # Tighter intermediate intervals may pick other slopes, so deeper nets compare on average.
        assert float(mine.width.mean()) <= float(other.width.mean()) * 1.001

    @pytest.mark.parametrize("name", sorted(GRAPHS))
    @pytest.mark.parametrize("op", ["tanh", "sigmoid"])
    def test_backward_bounds_of_smooth_networks_are_as_tight_on_average(
        self, name: str, op: str
    ) -> None:
        """Both tools choose tangent points by rules of their own; mean widths agree to 3 %."""
        graph = GRAPHS[name](op)
        regions, box = boxed(graph)
        ours = compute_bounds(graph, regions, method="crown")
        theirs = lirpa_bounds(graph_to_module(graph), box, method="CROWN")
        assert float(ours.width.mean()) <= 1.03 * float(theirs.width.mean())

    @pytest.mark.parametrize("name", ["deep", "residual"])
    @pytest.mark.parametrize("op", ["relu", "tanh"])
    def test_every_method_encloses_outputs(self, name: str, op: str) -> None:
        graph = GRAPHS[name](op)
        exact = graph.to(torch.float64)
        regions, box = boxed(graph)
        rows = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
        methods = ["IBP", "CROWN", "CROWN-IBP"]
        # With rows on a smooth convolutional net alpha-CROWN of 0.3 mixes up its shapes.
        methods += ["alpha-CROWN"] if name == "deep" or op == "relu" else []
        for method in methods:
            bound = lirpa_bounds(graph_to_module(graph), box, rows, method=method)
            assert bound.lower.shape == (3, 2)
            for i, region in enumerate(regions):

                def value(x: Tensor) -> Tensor:
                    return evaluate_graph(exact, x) @ rows.double().T

                y = value(attack(value, region, count=16))
                assert bool((bound.lower[i] <= y.amin(0) + 1e-5).all())
                assert bool((y.amax(0) <= bound.upper[i] + 1e-5).all())

    def test_optimized_slopes_are_tighter_than_fixed_ones(self) -> None:
        graph = GRAPHS["deep"]("relu")
        _, box = boxed(graph, 0.5)
        fixed = lirpa_bounds(graph_to_module(graph), box, method="CROWN")
        optimized = lirpa_bounds(graph_to_module(graph), box, method="alpha-CROWN")
        assert float(optimized.width.mean()) < float(fixed.width.mean())

    def test_module_and_environment_are_left_as_they_were(self) -> None:
        module = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 2)).train()
        before = {n: p.clone() for n, p in module.state_dict().items()}
        helper = importlib.import_module("torch.onnx.symbolic_helper")
        names = hasattr(helper, "_set_opset_version"), hasattr(torch._C.Node, "__getitem__")
        center = torch.randn(2, 4)
        lirpa_bounds(module, Interval(center - 0.1, center + 0.1))
        assert module.training
        assert all(torch.equal(before[n], p) for n, p in module.state_dict().items())
        after = hasattr(helper, "_set_opset_version"), hasattr(torch._C.Node, "__getitem__")
        assert after == names
        assert isinstance(sys.modules.get("numpy.lib.arraysetops"), type(None)) or names[0]

    def test_unsupported_modules_are_named_errors(self) -> None:
        class Strange(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.special.i0(x)

        with pytest.raises(UnsupportedOperationError, match="auto_LiRPA: cannot"):
            lirpa_bounds(Strange(), Interval(torch.zeros(1, 2), torch.ones(1, 2)))

    def test_bad_arguments_are_named_errors(self) -> None:
        box = Interval(torch.zeros(1, 2), torch.ones(1, 2))
        with pytest.raises(SpecError, match="method: got 'magic'; expected one of IBP, CROWN"):
            lirpa_bounds(nn.Linear(2, 2), box, method="magic")  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="lirpa_bounds box: got lower nan"):
            lirpa_bounds(nn.Linear(2, 2), Interval(box.lower * torch.nan, box.upper))

    @staticmethod
    def assert_as_tight(ours: Interval, theirs: Interval) -> None:
        """Not looser by more than 1e-5 of the magnitudes."""
        scale = 1e-5 * torch.maximum(theirs.lower.abs(), theirs.upper.abs()).clamp_min(1.0)
        assert bool((ours.lower >= theirs.lower - scale).all())
        assert bool((ours.upper <= theirs.upper + scale).all())


def test_absence_names_the_installation_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "auto_LiRPA"]:
        monkeypatch.delitem(sys.modules, name)
    real = importlib.import_module

    def refuse(name: str, package: str | None = None) -> object:
        if name == "auto_LiRPA":
            raise ImportError("No module named 'auto_LiRPA'")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert not lirpa_available()
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps auto-LiRPA==0\.3"):
        lirpa_bounds(nn.Linear(2, 2), Interval(torch.zeros(1, 2), torch.ones(1, 2)))


class TestGraphModule:
    def test_computes_the_graph_and_trains_a_copy(self) -> None:
        graph = residual("relu")
        module = graph_to_module(graph)
        x = torch.randn(3, *graph.input_shape)
        assert torch.equal(module(x), evaluate_graph(graph, x))
        module(x).sum().backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.1 * parameter.grad
        assert not torch.equal(module(x), evaluate_graph(graph, x))
        assert torch.equal(evaluate_graph(module.graph, x), module(x))

    def test_only_editable_parameters_are_trainable(self) -> None:
        net = Net((3, 2, 2))
        net.batch_norm()
        net.conv(2, (1, 1))
        module = graph_to_module(net.graph())
        assert sum(p.requires_grad for p in module.parameters()) == 2
        assert len(list(module.parameters())) == 6

    def test_copies_share_nothing(self) -> None:
        module = GraphModule(mlp()).eval()
        twin = copy.deepcopy(module)
        assert not twin.training
        with torch.no_grad():
            next(twin.parameters()).zero_()
        x = torch.randn(2, 4, dtype=torch.float64)
        assert not torch.equal(module(x), twin(x))
        twin.load_state_dict(module.state_dict())
        assert torch.equal(module(x), twin(x))
