"""``EditTrainerCallback`` for the ``Trainer`` of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_prepared.errors import MissingDependencyError
from torch_prepared.hooks.core import EditHook, Finished

try:
    from transformers import TrainerCallback
except ImportError as missing:
    raise MissingDependencyError(
        "EditTrainerCallback needs transformers; install it with 'pip install torch_prepared[hf]'"
    ) from missing

__all__ = ["EditTrainerCallback"]

STATE = "edit_hook.pt"  #: in every checkpoint folder


class EditTrainerCallback(TrainerCallback):
    """Calls a hook after optimizer steps, certifies when training ends, survives checkpoints.

    ``select`` gives the network, one tensor in and out, inside of the Trainer's model; it is called
    once. With ``finish`` the end of training edits and certifies; ``result`` is what came of it.
    """

    def __init__(
        self, hook: EditHook, *, select: Callable[[Any], nn.Module], finish: bool = True
    ) -> None:
        self.hook, self.select, self.finish = hook, select, finish
        self.result: Finished | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Select the network; resume the hook where the Trainer resumes."""
        self.network = self.select(given["model"])
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if state.global_step and self.hook.last_step != state.global_step and file.exists():
            self.hook.load_state_dict(torch.load(file, weights_only=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After an optimizer step; not called between accumulated batches."""
        self.hook.after_step(self.network, state.global_step, optimizer=given.get("optimizer"))

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Put the hook's state beside the Trainer's."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            torch.save(self.hook.state_dict(), folder / STATE)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Certify."""
        self.result = self.hook.finish(self.network) if self.finish else None
