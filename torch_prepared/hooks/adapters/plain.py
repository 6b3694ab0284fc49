"""Any loop that calls ``optimizer.step()``, with gradient scalers, accumulation and clipping."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torch_prepared.hooks.core import EditHook, Finished

__all__ = ["attach"]


class attach:  # noqa: N801 - a verb, used as ``with attach(...)``
    """Call ``hook`` after every step that ``optimizer`` takes, and ``finish`` at the end.

    Steps that a ``GradScaler`` skips are not taken and not counted. A resumed hook counts on.

    Args:
        hook: what to call.
        model: the model whose weights the optimizer moves.
        optimizer: counted; also settled, see ``EditHook``.
        finish: whether leaving the block without an exception edits and certifies.

    Attributes:
        result: of ``finish``, once it ran.
    """

    def __init__(
        self, hook: EditHook, model: nn.Module, optimizer: Optimizer, *, finish: bool = True
    ) -> None:
        self.hook, self.model, self.optimizer, self.finish = hook, model, optimizer, finish
        self.result: Finished | None = None
        self._steps = hook.last_step

    def __enter__(self) -> attach:
        """Start counting."""
        self._handle = self.optimizer.register_step_post_hook(self._count)
        return self

    def _count(self, *_: Any) -> None:
        self._steps += 1
        self.hook.after_step(self.model, self._steps, optimizer=self.optimizer)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop counting; certify unless the loop failed."""
        self._handle.remove()
        if kind is None and self.finish:
            self.result = self.hook.finish(self.model)
