"""Branch and bound in a thread of its own: Ctrl-C is heard, bounds are told."""

import _thread
import signal
import threading
import time

import numpy as np
import pytest

from torch_prepared.core.rows import LinearRows
from torch_prepared.solvers import HighsSolver, LinearProgram


def _hard(columns: int = 60) -> LinearProgram:
    """A market-split instance: equalities over binaries with large random coefficients."""
    rng = np.random.default_rng(0)
    matrix = rng.integers(1, 100, (6, columns)).astype(np.float64)
    slack = np.kron(np.eye(6), [[1.0, -1.0]])
    rows = LinearRows(
        np.concatenate([matrix, slack], axis=1),
        np.floor(matrix.sum(axis=1) / 2),
        np.ones(6, dtype=bool),
    )
    cost = np.concatenate([np.zeros(columns), np.ones(12)])
    upper = np.concatenate([np.ones(columns), np.full(12, np.inf)])
    whole = np.arange(columns + 12) < columns
    return LinearProgram(cost, rows, np.zeros(columns + 12), upper, whole)


def test_bounds_are_told_and_enclose_the_answer() -> None:
    told: list[tuple[float, float]] = []
    solver = HighsSolver(find_ray=False, progress=lambda low, high: told.append((low, high)))
    found = solver.solve(_hard(), time_limit=3.0, threads=1)
    assert told
    assert all(low <= found.objective + 1e-6 for low, _ in told)
    assert found.dual_bound <= found.objective + 1e-6


def test_ctrl_c_stops_the_solver() -> None:
    start, done = time.monotonic(), threading.Event()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press() -> None:  # a press that meets a destructor is ignored by Python, so press again
        while not done.wait(1.0):
            _thread.interrupt_main()

    presses = threading.Thread(target=press)
    presses.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            HighsSolver(find_ray=False).solve(_hard(), time_limit=60.0, threads=1)
    finally:
        done.set()
        presses.join()
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 30.0
