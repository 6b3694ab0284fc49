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
    """Gradients (k, p) of the margins of properties ``owner`` (k,), each ``age`` (k,) edits old.

    ``inverse`` (p,), of the metric that steps are measured in: ``sum(step ** 2 / inverse)``; None
    is the 2-norm.
    """

    rows: Tensor | None = None
    owner: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    age: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    inverse: Tensor | None = None
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

    def measure(self, inverse: Tensor | None) -> None:
        """Change the metric."""
        self.inverse, self._gram = inverse, None

    def step(self, lack: Tensor) -> tuple[Tensor, float] | None:
        """The shortest step (p,) along which margins rise by ``lack`` (b,), where rows are known.

        A negative lack is what a margin may fall by. With its length; None where no such step was
        found.
        """
        if self.rows is None or not len(self.owner):
            return None
        inverse = self.inverse
        if self._gram is None:
            scaled = self.rows if inverse is None else self.rows * inverse.sqrt()
            self._gram = gram_matrix(scaled)
        answer = project(self._gram, lack.cpu().double()[self.owner])
        if answer.status is Status.INFEASIBLE:
            return None
        step = torch.from_numpy(answer.multipliers).to(self.rows) @ self.rows
        return step if inverse is None else step * inverse, answer.distance

    def length(self, vector: Tensor) -> float:
        """The length of a vector (p,), measured as steps are."""
        inverse = self.inverse
        return float(vector.norm() if inverse is None else (vector * inverse.rsqrt()).norm())

    def fit(self, count: int) -> None:
        """Forget rows that take too much memory.

        Raises:
            SpecError: data of another number of weights, as from another model's checkpoint.
        """
        for part in (self.rows, self.inverse):
            if part is not None and part.shape[-1] != count:
                raise SpecError(
                    f"EditHook: got rows over {part.shape[-1]} weights for a model of {count}; "
                    "expected the checkpoint of the same model"
                )
        if self.rows is not None and self.rows.numel() * self.rows.element_size() > BYTES:
            self.rows, self.owner, self.age, self._gram = None, self.owner[:0], self.age[:0], None

    def state_dict(self) -> dict[str, Tensor | None]:
        """The rows, whose they are and how old, and the metric."""
        return {"rows": self.rows, "owner": self.owner, "age": self.age, "inverse": self.inverse}

    @classmethod
    def from_state(cls, state: Mapping[str, object], properties: int) -> RowMemory:
        """What :meth:`state_dict` gave; nothing remembered where it is absent.

        Raises:
            SpecError: other data.
        """
        rows, owner, age = state.get("rows"), state.get("owner"), state.get("age")
        inverse = state.get("inverse")
        if inverse is not None and not (
            isinstance(inverse, Tensor)
            and inverse.dim() == 1
            and bool((torch.isfinite(inverse) & (inverse > 0)).all())
        ):
            raise SpecError("EditHook.load_state_dict: got a malformed metric; expected (p,) > 0")
        inverse = None if inverse is None else inverse.clone()
        if rows is None:
            return cls(inverse=inverse)
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
        return cls(rows.clone(), owner.cpu().clone(), age.cpu().clone(), inverse)
