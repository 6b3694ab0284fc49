"""The entry point: what it changes before a command runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from torch_prepared.cli.main import share_cores


def test_idle_threads_sleep_soon_unless_the_user_decided_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    share_cores()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    share_cores()
    assert 1000 <= int(os.environ["GOMP_SPINCOUNT"]) <= 100_000
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    share_cores()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_entry_point_loads_torch_after_that() -> None:
    code = "import sys, torch_prepared.cli.main; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
