"""Ways to let a training loop call an :class:`~torch_prepared.hooks.EditHook`."""
