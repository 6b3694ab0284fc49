"""What a hook returns at the end: the cheap way where it costs little, else an editor's work."""

from __future__ import annotations

import copy
import dataclasses

from torch import Tensor, nn

from torch_prepared.certify import Verdict
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork
from torch_prepared.edit import EditResult
from torch_prepared.edit._behavior import Reference
from torch_prepared.edit._result import Delta
from torch_prepared.hooks._live import LiveModel

__all__ = ["Finished", "better", "compared", "moved_copy"]

Finished = EditResult[nn.Module | OnnxNetwork | Graph]


def moved_copy(live: LiveModel, theta: Tensor) -> nn.Module:
    """A copy of the module with the weights ``theta`` (p,)."""
    near = dataclasses.replace(live, module=copy.deepcopy(live.module))
    near.install(theta)
    return near.module


def compared(live: LiveModel, reference: Reference, result: Finished) -> Finished:
    """The result, its report telling what changed since training ended.

    Args:
        live: the module as training left it.
        reference: its behavior.
        result: certified; of a module moved by projections before it was edited.
    """
    if not isinstance(result.model, nn.Module):
        return result
    graph, stored = live.current(), dict(result.model.named_parameters(remove_duplicate=False))
    changed = {name: stored[name].detach() for name in graph.editable if name in stored}
    after = graph.with_parameters(changed)
    report = dataclasses.replace(
        result.report,
        method="hook" if result.report.method == "none" else result.report.method,
        delta=Delta.between(graph, changed),
        drawdown=reference.drawdown(after),
        message=f"certified after the hook's projections; {result.report.message}",
    )
    return dataclasses.replace(result, report=report)


def better(first: Finished | None, second: Finished) -> Finished:
    """The certified one that keeps more of the behavior; the second where none is."""
    if first is None or first.report.drawdown is None:
        return second
    if second.status is not Verdict.CERTIFIED or second.report.drawdown is None:
        return first
    return min(first, second, key=lambda r: r.report.drawdown.total)  # type: ignore[union-attr]
