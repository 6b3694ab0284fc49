"""PyTorch modules against the graphs captured from them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_prepared.core.capture import apply_parameters, capture_module
from torch_prepared.core.graph import Graph
from torch_prepared.errors import ModelFormatError, UnsupportedOperationError
from torch_prepared.relax import evaluate_graph


class Apply(nn.Module):
    """A function of the input and of one parameter of the given shape."""

    def __init__(self, function, *shape: int) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


def check(model: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> Graph:
    """Capture ``model`` and compare it with itself in evaluation mode, on another batch size."""
    torch.manual_seed(1)
    model = model.to(dtype)
    state = copy.deepcopy(model.state_dict())
    training = model.training
    graph = capture_module(model, torch.randn(1, *shape, dtype=dtype))
    assert model.training == training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    x = torch.randn(5, *shape, dtype=dtype)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
        got = evaluate_graph(graph, x)
    assert got.dtype == expected.dtype == dtype
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    torch.testing.assert_close(
        got.flatten(1), expected.reshape(5, -1), rtol=tolerance, atol=tolerance
    )
    return graph


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_var.uniform_(0.5, 2.0)
        self.norm.running_mean.uniform_(-1.0, 1.0)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x))
        r = self.drop(self.relu(h))
        return self.head(F.adaptive_avg_pool2d(r + h, 1).flatten(1))


def test_residual_network_with_in_place_activation() -> None:
    graph = check(Residual(), 3, 8, 8)
    assert graph.input_shape == (3, 8, 8)
    assert graph.output_shape == (5,)
    assert graph.editable == {"conv.weight", "conv.bias", "head.weight", "head.bias"}
    assert set(graph.parameters) <= set(Residual().state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(dtype: torch.dtype, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2))
    graph = check(model, 3, dtype=dtype)
    assert graph.dtype == dtype
    assert graph.editable == {k for k, _ in model.named_parameters()}
    assert [n.op for n in graph.nodes] == ["input", "linear", "tanh", "linear"]


LINEAR_FORMS = [
    (lambda x, w: x @ w, (6,), (6, 3)),
    (lambda x, w: torch.mm(x, w), (6,), (6, 3)),
    (lambda x, w: x @ w.t(), (6,), (3, 6)),
    (lambda x, w: x @ w, (4, 6), (6, 3)),
    (lambda x, w: w @ x, (6, 3), (4, 6)),
    (lambda x, w: x @ w, (6,), (6,)),
    (lambda x, w: F.linear(x, w) + 1.5, (2, 6), (3, 6)),
    (lambda x, w: torch.addmm(torch.ones(3), x, w, beta=2, alpha=0.5), (6,), (6, 3)),
    (lambda x, w: F.conv1d(x, w, stride=2, padding=1, dilation=2), (2, 9), (4, 2, 3)),
    (lambda x, w: F.conv2d(x, w, padding=(0, 2), groups=2), (4, 5, 6), (4, 2, 3, 2)),
    (lambda x, w: F.conv1d(x, w, padding="same"), (2, 9), (4, 2, 4)),
    (lambda x, w: F.conv1d(x, w, padding="valid"), (2, 9), (4, 2, 4)),
]


@pytest.mark.parametrize(("function", "shape", "weight"), LINEAR_FORMS)
def test_functional_linear_forms(function, shape, weight) -> None:
    assert "w" in check(Apply(function, *weight), *shape).editable


def test_an_added_constant_becomes_the_bias() -> None:
    model = Apply(lambda x, w: x @ w[:, :3] + w[0, 3:], 6, 6)
    assert check(model, 6).editable == frozenset()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w + self.b

    graph = check(Plain(), 6)
    assert [n.op for n in graph.nodes] == ["input", "linear"]
    assert graph.editable == {"w", "b"}


ACTIVATIONS = [
    nn.ReLU(),
    nn.LeakyReLU(),
    nn.LeakyReLU(0.2),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.ELU(),
    nn.ELU(0.5),
    nn.Identity(),
    nn.Dropout().eval(),
]


def test_activations() -> None:
    forms = [lambda x, w, m=module: m(3 * x) for module in ACTIVATIONS]
    ops = [n.op for n in check(Apply(joined(forms), 1), 4).nodes]
    for op in ("relu", "leaky_relu", "tanh", "sigmoid", "softplus", "elu"):
        assert op in ops


@pytest.mark.parametrize(
    ("module", "op", "attrs"),
    [
        (nn.GELU(), "gelu", {"approximate": "none"}),
        (nn.GELU("tanh"), "gelu", {"approximate": "tanh"}),
        (nn.SiLU(), "silu", {}),
    ],
)
def test_smooth_activations_are_named(module: nn.Module, op: str, attrs) -> None:
    last = capture_module(module, torch.zeros(1, 3)).nodes[-1]
    assert (last.op, dict(last.attrs)) == (op, attrs)


POOLS = [
    nn.MaxPool2d(2),
    nn.MaxPool2d(3, stride=2, padding=1),
    nn.MaxPool2d(2, dilation=2),
    nn.AvgPool2d(2),
    nn.AvgPool2d(3, stride=2, padding=1),
    nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    nn.AdaptiveAvgPool2d(1),
    nn.AdaptiveAvgPool2d((4, 2)),
]


@pytest.mark.parametrize("start", range(0, len(POOLS), 4))
def test_pools(start: int) -> None:
    forms = [lambda x, w, m=module: m(x) for module in POOLS[start : start + 4]]
    check(Apply(joined(forms), 1), 3, 8, 8)


@pytest.mark.parametrize("module", [nn.MaxPool1d(2), nn.AvgPool1d(3, 1, 1), nn.BatchNorm1d(3)])
def test_one_axis(module: nn.Module) -> None:
    check(module, 3, 8)


SHAPES = [
    lambda x, w: x.flatten(1),
    lambda x, w: x.view(x.size(0), -1),
    lambda x, w: x.reshape(-1, 24),
    lambda x, w: x.flatten(1).unflatten(1, (4, 6)),
    lambda x, w: x.unsqueeze(1).squeeze(1),
    lambda x, w: x.permute(0, 3, 1, 2),
    lambda x, w: x.transpose(0, 1).transpose(0, 1),
    lambda x, w: x[:, 0, 1:, ::2],
    lambda x, w: x[..., -1],
    lambda x, w: x[:, [1, 0, 1]],
    lambda x, w: torch.index_select(x, 2, torch.tensor([2, 0])),
    lambda x, w: torch.cat(x.chunk(2, dim=3), dim=1),
    lambda x, w: torch.cat(x.split([1, 2], dim=2)[::-1], dim=2),
    lambda x, w: torch.stack([x[:, 0], x[:, 1]], dim=-1),
    lambda x, w: x.flip(2) + x.narrow(2, 0, 1),
    lambda x, w: x[:, :1].expand(-1, 5, -1, -1),
    lambda x, w: x.clone().detach().contiguous().to(x.dtype),
    lambda x, w: x.sum(1) - x.mean((1,)),
    lambda x, w: x.mean((-1, -2), keepdim=True),
    lambda x, w: x.flatten(1).sum(-1),
    lambda x, w: (2 - x) * w / 3 - w + x.neg(),
    lambda x, w: torch.sub(x, x * 2, alpha=3) + torch.add(w, x, alpha=2),
    lambda x, w: x / 7 + torch.arange(4),
]


def joined(functions):
    """One function that applies all ``functions``, so that a test exports only once."""

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([f(x, w).reshape(x.shape[0], -1) for f in functions], dim=1)

    return forward


@pytest.mark.parametrize("start", range(0, len(SHAPES), 6))
def test_shapes_and_arithmetic(start: int) -> None:
    check(Apply(joined(SHAPES[start : start + 6]), 3, 4), 2, 3, 4)


def test_folded_weights_are_not_editable() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    assert check(model, 3).editable == {"bias"}


def test_tied_weights_keep_one_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    graph = check(model, 3)
    assert graph.editable == {"0.weight", "0.bias", "2.bias"}
    edited = apply_parameters(model, {"0.weight": torch.eye(3)})
    assert edited[2].weight is edited[0].weight
    assert torch.equal(edited[2].weight, torch.eye(3))
    with pytest.raises(ModelFormatError, match="tied"):
        apply_parameters(model, {"0.weight": torch.eye(3), "2.weight": torch.zeros(3, 3)})


def test_the_graph_does_not_share_memory_with_the_module() -> None:
    model = nn.Linear(3, 2)
    graph = capture_module(model, torch.zeros(2, 3))
    before = graph.parameters["weight"].clone()
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(graph.parameters["weight"], before)


def test_apply_parameters_returns_an_edited_copy() -> None:
    model = Residual().double().train()
    state = copy.deepcopy(model.state_dict())
    graph = capture_module(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    changed = {k: graph.parameters[k].float() + 0.5 for k in graph.editable}
    edited = apply_parameters(model, changed)
    assert edited.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for name, value in edited.state_dict().items():
        assert value.dtype == state[name].dtype
        assert torch.equal(value, changed[name].double() if name in changed else state[name])
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = edited.eval()(x)
        again = evaluate_graph(graph, x, {k: v.double() for k, v in changed.items()})
    torch.testing.assert_close(again, expected)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"w": torch.zeros(2)}, "does not exist"),
        ({"bias": torch.zeros(3)}, r"got shape \(3,\); expected \(2,\)"),
        ({"bias": torch.tensor([0.0, torch.nan])}, "NaN"),
        ({"bias": torch.tensor([0.0, 1e300], dtype=torch.float64)}, "infinite"),
    ],
)
def test_apply_parameters_refuses(parameters, message: str) -> None:
    with pytest.raises(ModelFormatError, match=message):
        apply_parameters(nn.Linear(3, 2), parameters)


def data_dependent(x: Tensor, w: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


UNSUPPORTED = [
    (data_dependent, "cannot be exported: Could not guard on data-dependent expression"),
    (lambda x, w: x.view(1, -1), "batch|constant"),
    (lambda x, w: x - x.mean(0), "batch axis"),
    (lambda x, w: x.flip(0), "batch axis"),
    (lambda x, w: x / x.shape[0], "batch size"),
    (lambda x, w: x + torch.zeros(x.shape[0], 3), "batch size"),
    (lambda x, w: x.reshape(x.shape[0] * 3, 1), "batch axis"),
    (lambda x, w: x * x, "computes a power of a value"),
    (lambda x, w: w / x, "divides by a value"),
    (lambda x, w: x.sin(), r"aten\.sin\.default in the module itself.*line \d+.*supported.*relu"),
    (lambda x, w: x.softmax(-1), r"softmax"),
    (lambda x, w: F.softplus(x, beta=2), "beta"),
    (lambda x, w: F.leaky_relu(x, 2.0), "alpha"),
    (lambda x, w: x.double(), "converts"),
    (lambda x, w: x + torch.rand(3), "random"),
    (lambda x, w: F.dropout(x, training=True), "random|training"),
    (lambda x, w: torch.cat([x, torch.zeros(1, 3).expand(x.shape[0], 3)], 1), "batch|constant"),
]


@pytest.mark.parametrize(("function", "message"), UNSUPPORTED)
def test_unsupported_modules(function, message: str) -> None:
    with pytest.raises(UnsupportedOperationError, match=message) as caught:
        capture_module(Apply(function, 3), torch.randn(2, 3))
    assert "\n" not in str(caught.value)


def test_the_error_names_the_module_path() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Softmax(dim=1)))
    with pytest.raises(UnsupportedOperationError, match=r"aten\.softmax\.int in 1\.0"):
        capture_module(model, torch.zeros(1, 3))


def test_softplus_in_double_precision_needs_a_larger_threshold() -> None:
    with pytest.raises(UnsupportedOperationError, match="threshold=40"):
        capture_module(nn.Softplus().double(), torch.zeros(1, 3, dtype=torch.float64))
    check(nn.Softplus(threshold=40), 3, dtype=torch.float64)


def test_batch_statistics_are_refused() -> None:
    with pytest.raises(UnsupportedOperationError, match=r"no_stats.*no support"):
        capture_module(nn.BatchNorm1d(3, track_running_stats=False), torch.zeros(2, 3))


@pytest.mark.parametrize(
    "example", [torch.zeros(0, 3), torch.tensor(1.0), torch.zeros(1, 3, dtype=torch.float16)]
)
def test_bad_examples(example: Tensor) -> None:
    with pytest.raises((ModelFormatError, UnsupportedOperationError), match="example input"):
        capture_module(nn.Linear(3, 2), example)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.bias[0] = torch.inf
    with pytest.raises(ModelFormatError, match=r"'bias'.*infinite"):
        capture_module(model, torch.zeros(1, 3))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_several_or_constant_results_are_refused() -> None:
    with pytest.raises(ModelFormatError, match="returns 2 values"):
        capture_module(Pair(), torch.zeros(1, 3))
    with pytest.raises(ModelFormatError, match="does not depend"):
        capture_module(Apply(lambda x, w: w * 2, 3), torch.zeros(1, 3))
