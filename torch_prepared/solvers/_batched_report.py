"""What a batched solve says about each of its samples, and what becomes of those it failed on."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import torch
from torch import Tensor

from torch_prepared.errors import PreparedWarning, SolverError
from torch_prepared.solvers._result import Status

__all__ = ["BatchReport", "OnFailure", "announce", "check_floating", "eager", "relative_violation"]


class OnFailure(StrEnum):
    """What a layer returns for a sample without an answer; gradients from it are zero."""

    KEEP = "keep"  #: the input point unchanged (a cost-only program: zeros), with a warning
    NAN = "nan"  #: NaN
    RAISE = "raise"  #: nothing: :class:`SolverError` for the batch


@dataclass(frozen=True, eq=False)
class BatchReport:
    """Per-sample outcome of a batched solve; tensors are detached and on the input's device.

    Attributes:
        statuses: b entries: ``OPTIMAL``, ``INFEASIBLE``, ``UNBOUNDED`` or ``UNKNOWN``.
        violation: (b,) float64, largest violation of a row or bound at the returned point, over
            ``max(1, |right-hand side|)``; inf without an answer.
        multipliers: (b, m) float64 row multipliers, 0 without an answer.
        active: (b, m) rows that hold with equality and a positive multiplier (equality rows
            always): what the gradient goes through, and the warm start of the next call.
        ray: (b, m) float64 Farkas ray of infeasible samples, else 0: nonnegative on
            inequalities ``A x <= b``, with ``ray @ A`` zero up to rounding (with bounds: never
            above ``ray @ b`` within them) and ``ray @ b < 0``.
    """

    statuses: tuple[Status, ...]
    violation: Tensor
    multipliers: Tensor
    active: Tensor
    ray: Tensor

    @property
    def solved(self) -> Tensor:
        """(b,) whether each sample has an answer."""
        flags = [status is Status.OPTIMAL for status in self.statuses]
        return torch.tensor(flags, dtype=torch.bool, device=self.violation.device)


_Call = TypeVar("_Call", bound=Callable[..., object])


def eager(call: _Call) -> _Call:
    """Keep ``torch.compile`` out of a solver: one clean graph break around the call."""
    plain: Callable[[_Call], _Call] = torch.compiler.disable
    return plain(call)


def announce(statuses: tuple[Status, ...], on_failure: OnFailure, where: str) -> None:
    """Warn or raise when samples have no answer."""
    failed = [i for i, status in enumerate(statuses) if status is not Status.OPTIMAL]
    if not failed or on_failure is OnFailure.NAN:
        return
    words = ", ".join(f"{i} {statuses[i].value}" for i in failed[:5])
    more = ", ..." if len(failed) > 5 else ""
    message = f"{where}: got {len(failed)} of {len(statuses)} samples without an answer ({words}"
    if on_failure is OnFailure.RAISE:
        raise SolverError(f"{message}{more}); expected feasible rows; relax the right-hand side")
    warnings.warn(
        f"{message}{more}); they are returned unchanged and carry no gradient",
        PreparedWarning,
        stacklevel=4,  # past the wrapper of torch.compiler.disable
    )


def relative_violation(excess: Tensor, rhs: Tensor, equal: Tensor | None) -> Tensor:
    """Largest violation (b,) from ``excess = A x - b`` (b, m), relative to ``max(1, |b|)``."""
    lack = excess.clamp_min(0.0) if equal is None else torch.where(equal, excess.abs(), excess)
    lack = lack.clamp_min(0.0) / rhs.abs().clamp_min(1.0)
    worst = lack.amax(1) if lack.shape[1] else lack.new_zeros(len(lack))
    return torch.where(excess.isnan().any(1), torch.inf, worst)


def check_floating(where: str, **tensors: Tensor | None) -> None:
    """Refuse anything but float32 and float64, and mixed devices.

    Raises:
        SolverError: naming the argument.
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            raise SolverError(
                f"{where}: got {name} of {tensor.dtype}; expected float32 or float64; convert it"
            )
        if device is not None and tensor.device != device:
            raise SolverError(
                f"{where}: got {name} on {tensor.device}; expected {device}, as the others"
            )
        device = tensor.device
