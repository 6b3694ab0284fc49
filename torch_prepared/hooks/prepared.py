"""``PreparedModule``: a network whose forward pass uses weights projected onto a provable set."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torch_prepared.bounds import PropertyBatch
from torch_prepared.edit import edit_network
from torch_prepared.errors import PreparedWarning, SpecError
from torch_prepared.hooks._halfspaces import HalfSpaces
from torch_prepared.hooks._live import LiveModel, no_autocast
from torch_prepared.hooks._margins import LiveMargins
from torch_prepared.hooks.core import RELATIVE_MARGIN, Finished
from torch_prepared.solvers._batched_report import eager
from torch_prepared.specs import Property

__all__ = ["PreparedModule"]

INNER = "inner."


class PreparedModule(nn.Module):
    """A copy of ``model`` that computes with provable weights while its raw ones are trained.

    In ``forward`` the raw weights are projected, in the 2-norm, onto the linearized set of weights
    whose certified margins reach ``margin``; gradients flow through the projection to the raw
    weights (implicitly, through the active half-spaces). Linearizations are made anew where a true
    bound misses, so the weights in use have positive certified margins in the working precision
    unless a warning says otherwise. The projection is kept while no weight is written to; changes
    through ``.data`` are not seen, call :meth:`invalidate` after them.

    ``state_dict`` holds the raw weights under the names that ``model`` uses, so the two load each
    other's. In training mode with batch normalization the properties are those of evaluation mode.

    Args:
        model: float32 or float64 network; copied, never changed.
        properties: all that must hold, for every input of their regions.
        preserve: inputs (q, ...) on which :meth:`bake` keeps the network as training left it.
        labels: right classes (q,) of ``preserve``, to report accuracy.
        margin: safety margin aimed at, in output units; None: 5 % of the output rows' usual size.
        rounds: linearizations at most per change of the weights.
        example_input: (1, ...) input to trace the model with; defaults to ``preserve[:1]``.
        seed: of :meth:`bake`.

    Raises:
        SpecError: no properties, or properties that do not fit the model.
        UnsupportedOperationError: an operator without a sound treatment.

    Soundness: during training a guide, no proof; :meth:`bake` certifies.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> prop = Property(Box([0.0, 0.0], [0.1, 0.1]), SafeSet.argmax(0, classes=2))
        >>> prepared = PreparedModule(model, prop)
        >>> prepared(torch.zeros(1, 2)).argmax().item()
        0
    """

    def __init__(
        self,
        model: nn.Module,
        properties: Property | Sequence[Property],
        *,
        preserve: Tensor | None = None,
        labels: Tensor | None = None,
        margin: float | None = None,
        rounds: int = 10,
        example_input: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        several = (properties,) if isinstance(properties, Property) else tuple(properties)
        if not several:
            raise SpecError("PreparedModule properties: got none; expected at least one")
        if margin is not None and not 0.0 < margin < float("inf"):
            raise SpecError(f"PreparedModule margin: got {margin}; expected a positive number")
        if rounds < 1:
            raise SpecError(f"PreparedModule rounds: got {rounds}; expected at least 1")
        self.inner = copy.deepcopy(model)
        self.training = model.training
        self.properties = several
        self.margin, self.rounds, self.seed = margin, rounds, seed
        self._preserve, self._labels = preserve, labels
        example = preserve if example_input is None else example_input
        self._live = LiveModel.of(self.inner, several, example)
        self._settled: tuple[Tensor, HalfSpaces] | None = None
        self._versions: object = None
        self._register_state_dict_hook(_strip_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes with the projected weights."""
        return functional_call(self.inner, self.projected_weights(), args, kwargs)

    @eager
    def projected_weights(self) -> dict[str, Tensor]:
        """The weights in use by name, differentiable in the raw ones."""
        vector = self._live.vector
        with no_autocast(self._live.sample()):
            if not torch.is_grad_enabled():
                return vector.split(self._settle()[0].detach())
            raw = vector.flatten(dict(zip(vector.names, self._live.parameters(), strict=True)))
            return vector.split(self._settle(raw)[0])

    def certified_margins(self) -> Tensor:
        """Certified lower bounds (b,) of the margins of the weights in use."""
        point, _ = self._settle()
        return self._margins().value(point)

    def invalidate(self) -> None:
        """Forget the projection, as after a write through ``.data``."""
        self._versions = None

    def bake(
        self,
        *,
        time_limit: float | None = 60.0,
        method: str = "sequential",
        threads: int | None = None,
        raise_on_failure: bool = True,
    ) -> Finished:
        """A plain copy of the model with provable weights, and its certificate.

        Args:
            time_limit: wall seconds.
            method: editor that closes what the projection left open.
            threads: CPU threads of LP solvers.
            raise_on_failure: raise when nothing was certified; else the status says so.

        Raises:
            InfeasibleEditError: nothing was certified and ``raise_on_failure`` is set.
        """
        point, _ = self._settle()
        plain = copy.deepcopy(self.inner)
        state = plain.state_dict()
        with torch.no_grad():
            for name, value in self._live.vector.split(point).items():
                state[name].copy_(value)
        with torch.inference_mode(False), torch.enable_grad(), no_autocast(self._live.sample()):
            return edit_network(
                plain,
                self.properties,
                method=method,
                preserve=self._preserve,
                labels=self._labels,
                layers=self._live.layers,
                margin=self.margin,
                time_limit=time_limit,
                example_input=self._live.sample(),
                threads=threads,
                seed=self.seed,
                raise_on_failure=raise_on_failure,
            )

    def _settle(self, raw: Tensor | None = None) -> tuple[Tensor, HalfSpaces]:
        """The projection (p,) of the raw weights as they are, and what they are projected onto.

        Args:
            raw: (p,) the raw weights, to reach them with gradients; None: without.
        """
        now = self._live.versions()
        if self._settled is not None and self._versions == now:
            point, spaces = self._settled
            return (point if raw is None else spaces.project(raw)), spaces
        margins, given = self._margins(), self._live.theta() if raw is None else raw
        if self._settled is None:
            aim = self.margin or RELATIVE_MARGIN * margins.usual_size(given.detach())
            spaces = HalfSpaces(aim, self.rounds)
        else:
            spaces = self._settled[1].to(given)
        point, value = spaces.settle(margins, given)
        lowest = float(value.min())
        if not lowest > 0:
            warnings.warn(
                f"PreparedModule: the lowest certified margin of the projected weights is "
                f"{lowest:g} after {self.rounds} rounds; expected a positive one; shrink the "
                "regions, lower the learning rate or raise rounds",
                PreparedWarning,
                stacklevel=4,
            )
        self._settled, self._versions = (point.detach(), spaces), now
        return point, spaces

    def _margins(self) -> LiveMargins:
        graph = self._live.current()
        batch = PropertyBatch.of(self.properties, graph.dtype, graph.device)
        return LiveMargins(graph, batch, self._live.vector)

    def __getstate__(self) -> dict[str, Any]:
        """Plain state; whether the projection is current survives a copy, addresses do not."""
        current = self._settled is not None and self._versions == self._live.versions()
        return {**self.__dict__, "_versions": current}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._versions = self._live.versions() if state["_versions"] else None


def _strip_prefix(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    """Give the inner module's tensors the names that the wrapped model uses."""
    _rename(state, prefix + INNER, prefix)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: object) -> None:
    """Undo :func:`_strip_prefix` before loading."""
    _rename(state, prefix, prefix + INNER)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for key in [key for key in state if key.startswith(old)]:
        state[new + key.removeprefix(old)] = state.pop(key)
