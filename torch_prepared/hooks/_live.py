"""A module in training as a graph: its structure read once, its weights as they are now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torch_prepared.core.capture import capture_module
from torch_prepared.core.graph import Graph
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.errors import SpecError, UnsupportedOperationError
from torch_prepared.specs import Property

__all__ = ["LiveModel", "unwrap"]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside of ``torch.compile``, ``DistributedDataParallel`` and averages."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    averaged = (torch.optim.swa_utils.AveragedModel,)
    while True:
        if isinstance(model, (*wrappers, *averaged)):
            model = model.module
        elif isinstance(inner := model.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


@dataclass(frozen=True)
class LiveModel:
    """What a hook sees of a model in training.

    Args:
        module: the user's module, unwrapped.
        example: (1, ...) an input to trace it with.
        graph: its structure in evaluation mode; the tensors in it are those of the capture.
        vector: the parameters that an edit may move: editable and trained; p scalars.
        layers: names of the nodes whose editable parameters are all trained; None means all.
        frozen: whether the graph holds constants computed from stored tensors, which a capture
            fixes; then every look captures anew.
    """

    module: nn.Module
    example: Tensor
    graph: Graph
    vector: ParameterVector
    layers: tuple[str, ...] | None
    frozen: bool

    @classmethod
    def of(
        cls, model: nn.Module, properties: tuple[Property, ...], example: Tensor | None
    ) -> LiveModel:
        """Capture ``model``, which is not changed.

        Raises:
            UnsupportedOperationError: an operator without support, or sharded parameters.
            SpecError: properties of other sizes, or no parameter that is trained and editable.
            ModelFormatError: not a single-tensor network, or non-finite weights.
        """
        module = unwrap(model)
        stored = _tensors(module)
        if any(hasattr(value, "placements") for value in stored.values()):
            raise UnsupportedOperationError(
                f"{type(module).__name__}: got sharded parameters; expected whole ones on every "
                "rank, as with DistributedDataParallel"
            )
        example = _example(module, example, properties[0].region.size)
        with no_autocast(example):
            graph = capture_module(module, example)
        for prop in properties:
            prop.check_against(graph.input_size, graph.output_size)
        whole = ParameterVector.of(graph)
        trained = {n for n in whole.names if stored[n].requires_grad}
        names = tuple(name for name in whole.names if name in trained)
        if not names:
            raise SpecError(
                f"{type(module).__name__}: got no parameter that is both trained and editable; "
                "expected weights or biases of linear or convolution layers with requires_grad"
            )
        vector = ParameterVector(names, tuple(graph.parameters[name].shape for name in names))
        layers = None if len(names) == len(whole.names) else _layers(graph, trained)
        frozen = not set(graph.parameters) <= set(stored)
        return cls(module, example, graph, vector, layers, frozen)

    def current(self) -> Graph:
        """The graph with the weights and statistics as they are now (shared, not copied)."""
        stored = _tensors(self.module)
        like = stored[self.vector.names[0]]
        if like.dtype not in (torch.float32, torch.float64):
            raise UnsupportedOperationError(
                f"{type(self.module).__name__}: got {like.dtype} weights; expected float32 or "
                "float64, with lower precision by autocast"
            )
        if self.frozen:
            with no_autocast(like):
                return capture_module(self.module, self.sample())
        return self.graph.with_parameters({n: stored[n].detach() for n in self.graph.parameters})

    def sample(self) -> Tensor:
        """The example input (1, ...) in the dtype and on the device of the weights now."""
        return self.example.to(self.parameters()[0])

    def theta(self) -> Tensor:
        """A copy (p,) of the parameters that may move."""
        stored = _tensors(self.module)
        return self.vector.flatten({n: stored[n].detach() for n in self.vector.names}).clone()

    def versions(self) -> tuple[tuple[int, int, torch.dtype], ...]:
        """Equal as long as no stored tensor was written to, moved or converted."""
        stored = _tensors(self.module).values()
        return tuple((value._version, value.data_ptr(), value.dtype) for value in stored)

    def install(self, theta: Tensor) -> None:
        """Write a vector (p,) into the module's parameters, in place; their identity is kept."""
        stored = _tensors(self.module)
        with torch.no_grad():
            for name, value in self.vector.split(theta).items():
                stored[name].copy_(value)

    def load(self, other: nn.Module) -> None:
        """Copy the moved parameters of ``other``, a copy of the module, in place."""
        stored, given = _tensors(self.module), _tensors(other)
        with torch.no_grad():
            for name in self.vector.names:
                stored[name].copy_(given[name])

    def parameters(self) -> list[nn.Parameter]:
        """The module's parameters that may move, in the vector's order."""
        stored = _tensors(self.module)
        found = [stored[name] for name in self.vector.names]
        return [value for value in found if isinstance(value, nn.Parameter)]


@contextmanager
def no_autocast(like: Tensor) -> Iterator[None]:
    """Full precision on the CPU and on a tensor's device."""
    with torch.autocast("cpu", enabled=False), torch.autocast(like.device.type, enabled=False):
        yield


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones under each of their names."""
    return {
        **dict(module.named_buffers(remove_duplicate=False)),
        **dict(module.named_parameters(remove_duplicate=False)),
    }


def _example(module: nn.Module, example: Tensor | None, size: int) -> Tensor:
    like = next(module.parameters(), None)
    if like is None:
        raise SpecError(f"{type(module).__name__}: got no parameters; expected a trainable module")
    if example is None:
        return torch.zeros(1, size, dtype=like.dtype, device=like.device)
    return example[:1].detach().to(device=like.device, dtype=like.dtype)


def _layers(graph: Graph, trained: set[str]) -> tuple[str, ...]:
    """Nodes that read editable parameters, all of them trained."""
    found = []
    for node in graph.nodes:
        mine = {ref.name for ref in node.params.values()} & graph.editable
        if mine and mine <= trained:
            found.append(node.name)
    return tuple(found)
