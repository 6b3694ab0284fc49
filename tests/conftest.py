"""Shared fixtures: reproducible random numbers, at most two threads, skipping without a GPU."""

import signal
from pathlib import Path

import numpy as np
import pytest

from torch_prepared.cli.main import share_cores

share_cores()  # before torch is loaded: tests run in several processes at once

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("default")

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def pytest_configure() -> None:
    """Let interrupts arrive: shells start jobs in the background with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``cuda`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real networks and properties; the test is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no benchmark data at {DATA}")
    return DATA
