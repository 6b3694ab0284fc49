"""One thread: these networks are so small that threads only wait for each other."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_reproducible: None) -> None:
    torch.set_num_threads(1)
