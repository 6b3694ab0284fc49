"""Rows of linearized margins, the newest of every property, from one look at a model to the next.

Training moves weights by a percent or so between two looks, and gradients of margins hardly turn
meanwhile; so yesterday's rows often suffice for today's projection, at the cost of one evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torch_prepared.errors import SpecError
from torch_prepared.hooks._margins import LiveMargins
from torch_prepared.solvers import Status, gram_matrix, project

__all__ = ["RowMemory"]

BYTES = 1 << 28  #: rows that take more are not kept from look to look
OLDEST = 25  #: edits after which a row is computed anew


@dataclass
class RowMemory:
    """Gradients (k, p) of the margins of properties ``owner`` (k,), each ``age`` (k,) edits old."""

    rows: Tensor | None = None
    owner: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    age: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    _gram: Tensor | None = None

    def missing(self, which: Tensor) -> Tensor:
        """Those of the positions ``which`` without a row that is young enough."""
        which = which.cpu()
        return which[~torch.isin(which, self.owner[self.age < OLDEST])]

    def grow_old(self) -> None:
        """One more edit."""
        self.age = self.age + 1

    def refresh(self, margins: LiveMargins, theta: Tensor, which: Tensor) -> bool:
        """Compute the rows of properties ``which`` at ``theta``; False where they overflow."""
        if not len(which):
            return True
        fresh = margins.gradients(theta, which)
        if not bool(torch.isfinite(fresh).all()):
            return False
        kept = ~torch.isin(self.owner, which)
        old = None if self.rows is None else self.rows[kept.to(self.rows.device)]
        self.rows = fresh if old is None else torch.cat([old.to(fresh), fresh])
        self.owner = torch.cat([self.owner[kept], which])
        self.age = torch.cat([self.age[kept], torch.zeros_like(which)])
        self._gram = None
        return True

    def step(self, lack: Tensor) -> Tensor | None:
        """The shortest step (p,) along which margins rise by ``lack`` (b,), where rows are known.

        A negative lack is what a margin may fall by. None where no such step was found.
        """
        if self.rows is None or not len(self.owner):
            return None
        if self._gram is None:
            self._gram = gram_matrix(self.rows)
        answer = project(self._gram, lack.cpu().double()[self.owner])
        if answer.status is Status.INFEASIBLE:
            return None
        return torch.from_numpy(answer.multipliers).to(self.rows) @ self.rows

    def fit(self, count: int) -> None:
        """Forget rows that take too much memory.

        Raises:
            SpecError: rows of another number of weights, as from another model's checkpoint.
        """
        if self.rows is None:
            return
        if self.rows.shape[1] != count:
            raise SpecError(
                f"EditHook: got rows over {self.rows.shape[1]} weights for a model of {count}; "
                "expected the checkpoint of the same model"
            )
        if self.rows.numel() * self.rows.element_size() > BYTES:
            self.rows, self.owner, self.age, self._gram = None, self.owner[:0], self.age[:0], None

    def state_dict(self) -> dict[str, Tensor | None]:
        """The rows, whose they are and how old."""
        return {"rows": self.rows, "owner": self.owner, "age": self.age}

    @classmethod
    def from_state(cls, state: Mapping[str, object], properties: int) -> RowMemory:
        """What :meth:`state_dict` gave; nothing remembered where it is absent.

        Raises:
            SpecError: other data.
        """
        rows, owner, age = state.get("rows"), state.get("owner"), state.get("age")
        if rows is None:
            return cls()
        if (
            not (isinstance(rows, Tensor) and isinstance(owner, Tensor) and isinstance(age, Tensor))
            or rows.dim() != 2
            or not owner.shape == age.shape == rows.shape[:1]
            or not bool(((owner >= 0) & (owner < properties)).all())
            or not bool(torch.isfinite(rows).all())
        ):
            raise SpecError(
                "EditHook.load_state_dict: got malformed rows; expected (k, p) and (k,)"
            )
        return cls(rows.clone(), owner.cpu().clone(), age.cpu().clone())
