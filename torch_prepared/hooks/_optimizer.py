"""What becomes of an optimizer's state for weights that an edit moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torch_prepared.hooks._record import OptimizerState
from torch_prepared.solvers import Status, gram_matrix, project

__all__ = ["inverse_metric", "settle_optimizer"]

_MOMENTS = ("exp_avg", "momentum_buffer")  #: directions of travel; second moments stay
_SQUARES = ("exp_avg_sq", "square_avg", "sum")  #: of Adam and kin, of RMSprop, of Adagrad
_TINY = 1e-8  #: as in Adam
DAMPING = 0.1  #: of the metric, relative to the mean


def inverse_metric(
    optimizer: torch.optim.Optimizer | None, parameters: Sequence[nn.Parameter]
) -> Tensor | None:
    """The inverse (p,) of a diagonal metric in which short steps change the loss little.

    An optimizer's running mean of squared gradients is, up to a factor, the diagonal of the
    empirical Fisher matrix, so ``sum(metric * step ** 2)`` grows with the loss. The metric is
    scaled to mean 1 and damped; parameters that the optimizer knows nothing of count as average.

    Returns:
        None where the optimizer keeps no such mean: the metric is the identity then.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (PNAS 2017),
    equation 3; its estimate from optimizers' states is ours.
    """
    if optimizer is None:
        return None
    found = [_squares(optimizer.state.get(parameter, {})) for parameter in parameters]
    known = [part for part in found if part is not None]
    total = sum(float(part.sum()) for part in known)
    count = sum(part.numel() for part in known)
    if not 0.0 < total < float("inf"):
        return None
    parts = [
        torch.ones_like(parameter).reshape(-1)
        if part is None
        else part.reshape(-1).to(parameter) * (count / total)
        for parameter, part in zip(parameters, found, strict=True)
    ]
    return 1.0 / (torch.cat(parts) + DAMPING)


def _squares(state: Mapping[str, object]) -> Tensor | None:
    """The running mean of squared gradients in an optimizer's state of one parameter."""
    for key in _SQUARES:
        value = state.get(key)
        if isinstance(value, Tensor) and value.dim():
            return value
    return None


def settle_optimizer(
    optimizer: torch.optim.Optimizer,
    policy: OptimizerState,
    parameters: Sequence[nn.Parameter],
    rows: Tensor | None,
) -> None:
    """Apply ``policy`` to the state of ``parameters``.

    Args:
        optimizer: in use for them; parameters that it does not know are passed over.
        policy: see :class:`OptimizerState`.
        parameters: those that were moved, p scalars together.
        rows: (k, p) gradients of the margins that the edit raised.
    """
    if policy is OptimizerState.RESET:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
    elif policy is OptimizerState.PROJECT and rows is not None and len(rows):
        for key in _MOMENTS:
            _project_moment(optimizer, key, parameters, rows)


def _project_moment(
    optimizer: torch.optim.Optimizer,
    key: str,
    parameters: Sequence[nn.Parameter],
    rows: Tensor,
) -> None:
    """Bend the momentum so that the step it makes does not lower a margin: ``rows @ step <= 0``.

    Where the optimizer divides momentum by second moments, the step is what is projected, and
    translated back; weights that never had a gradient stay at rest.
    """
    known = [optimizer.state.get(parameter, {}) for parameter in parameters]
    parts = rows.split([parameter.numel() for parameter in parameters], dim=1)
    mine = [(s, r) for s, r in zip(known, parts, strict=True) if isinstance(s.get(key), Tensor)]
    if not mine:
        return
    moment = torch.cat([state[key].reshape(-1) for state, _ in mine])
    scale = torch.cat([_scale(state, key).reshape(-1) for state, _ in mine])
    normals = torch.cat([r for _, r in mine], dim=1).to(moment)
    step = moment / scale.clamp_min(_TINY)
    answer = project(gram_matrix(normals), (normals @ step).double())
    if answer.status is not Status.OPTIMAL:
        return
    moment = moment - scale * (torch.from_numpy(answer.multipliers).to(moment) @ normals)
    with torch.no_grad():
        sizes = [state[key].numel() for state, _ in mine]
        for (state, _), new in zip(mine, moment.split(sizes), strict=True):
            state[key].copy_(new.view_as(state[key]))


def _scale(state: Mapping[str, Tensor], key: str) -> Tensor:
    """What the optimizer divides its momentum by, up to a common factor."""
    squares = state.get("exp_avg_sq")
    return torch.ones_like(state[key]) if squares is None else squares.sqrt()
