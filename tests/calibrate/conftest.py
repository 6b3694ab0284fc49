"""One thread: these networks are tiny, and waiting for a second one costs more than it gains."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_reproducible: None) -> None:
    torch.set_num_threads(1)
