"""From examples to small balls around them, through the editors for regions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork
from torch_prepared.edit._result import EditResult
from torch_prepared.edit._source import Network, read_network
from torch_prepared.edit.api import edit_network
from torch_prepared.errors import SpecError
from torch_prepared.specs import Property, local_robustness

__all__ = ["ball_properties", "lift_to_balls"]


def ball_properties(
    graph: Graph,
    inputs: Tensor,
    labels: Tensor,
    radius: float,
    clip: tuple[float, float] | None = None,
) -> tuple[Property, ...]:
    """One property per example: its class on the whole ball of the maximum norm around it.

    Args:
        graph: the network; inputs are rounded to its dtype first.
        inputs: (m, ...).
        labels: (m,) classes.
        radius: of the balls, in units of the inputs.
        clip: limits of valid inputs.

    Raises:
        SpecError: malformed numbers.
    """
    flat = torch.as_tensor(inputs).reshape(len(inputs), -1).to(graph.dtype).double()
    wanted = torch.as_tensor(labels).tolist()
    if len(wanted) != len(flat) or not len(flat):
        raise SpecError(
            f"balls: got {len(flat)} inputs and {len(wanted)} labels; expected one each"
        )
    return tuple(
        local_robustness(x, int(y), radius, graph.output_size, clip=clip, name=f"ball-{i}-{y}")
        for i, (x, y) in enumerate(zip(flat, wanted, strict=True))
    )


def lift_to_balls(
    model: Network,
    inputs: Tensor,
    labels: Tensor,
    radius: float,
    *,
    method: str = "sequential",
    clip: tuple[float, float] | None = None,
    preserve: Tensor | None = None,
    preserve_labels: Tensor | None = None,
    time_limit: float | None = None,
    threads: int | None = None,
    seed: int = 0,
    raise_on_failure: bool = True,
) -> EditResult[nn.Module | OnnxNetwork | Graph]:
    """Make examples' classes hold on balls around them, starting from a network edited at them.

    With ``method="one_shot"`` and features h in [l, u] over a ball this is the linear program with
    ``p_k <= c_k l_k`` and ``p_k <= c_k u_k`` for c = the difference of two output rows, exact for
    the box of features; balls of radius 0 give back the rows of the examples themselves.

    Args:
        model: the result of :func:`edit_points`, or any network. Never mutated.
        inputs: (m, ...).
        labels: (m,).
        radius: in the maximum norm, units of the inputs.
        method: an editor of ``edit_network``.
        clip: limits of valid inputs.
        preserve: inputs on which the network should stay.
        preserve_labels: their classes.
        time_limit: wall seconds.
        threads: CPU threads.
        seed: of everything random.
        raise_on_failure: raise when nothing was certified.

    Returns:
        As :func:`edit_network`: its certificate speaks of the balls.

    Raises:
        SpecError: malformed examples.
        InfeasibleEditError: nothing was certified and ``raise_on_failure`` is set.
    """
    graph = read_network(model, inputs, inputs[:1].numel()).graph
    return edit_network(
        model,
        ball_properties(graph, inputs, labels, radius, clip),
        method=method,
        preserve=preserve,
        labels=preserve_labels,
        example_input=inputs[:1],
        time_limit=time_limit,
        threads=threads,
        seed=seed,
        raise_on_failure=raise_on_failure,
    )
