"""``EditCallback`` for Lightning's ``Trainer``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from torch_prepared.errors import MissingDependencyError
from torch_prepared.hooks.core import EditHook, Finished

try:
    from lightning.pytorch import Callback
except ImportError as missing:
    raise MissingDependencyError(
        "EditCallback needs Lightning; install it with 'pip install torch_prepared[lightning]'"
    ) from missing

__all__ = ["EditCallback"]


class EditCallback(Callback):
    """Calls a hook after optimizer steps, certifies when training ends, survives checkpoints.

    Args:
        hook: what to call.
        select: the part of the LightningModule that the properties speak of; all of it when None.
        finish: whether the end of training edits and certifies; ``result`` is what came of it.
    """

    def __init__(
        self,
        hook: EditHook,
        *,
        select: Callable[[Any], nn.Module] | None = None,
        finish: bool = True,
    ) -> None:
        self.hook, self.finish = hook, finish
        self.select = select or (lambda module: module)
        self.result: Finished | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        """After a batch; ``global_step`` counts optimizer steps, repeats are ignored."""
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        self.hook.after_step(self.select(pl_module), trainer.global_step, optimizer=optimizer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Certify."""
        self.result = self.hook.finish(self.select(pl_module)) if self.finish else None

    def state_dict(self) -> dict[str, Any]:
        """The hook's state."""
        return self.hook.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the hook."""
        self.hook.load_state_dict(state_dict)
