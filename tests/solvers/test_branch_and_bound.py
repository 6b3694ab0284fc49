"""What may run long runs in a thread of its own: Ctrl-C is heard, bounds are told."""

import _thread
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from torch_prepared.core.rows import LinearRows
from torch_prepared.solvers import HighsSolver, LinearProgram
from torch_prepared.solvers.highs import HighsMethod


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


def _long() -> LinearProgram:
    """A dense linear program that the simplex method works on for minutes."""
    matrix = np.random.default_rng(0).uniform(0.5, 1.5, size=(1800, 1800))
    rows = LinearRows(matrix, np.ones(1800))
    return LinearProgram(np.ones(1800), rows, np.zeros(1800), np.full(1800, np.inf))


@pytest.mark.parametrize(
    ("make", "method"), [(_hard, HighsMethod.AUTO), (_long, HighsMethod.SIMPLEX)]
)
def test_ctrl_c_stops_the_solver(make: Callable[[], LinearProgram], method: HighsMethod) -> None:
    program = make()
    start, done = time.monotonic(), threading.Event()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press() -> None:  # a press that meets a destructor is ignored by Python, so press again
        pause = 1.0
        while not done.wait(pause):
            _thread.interrupt_main()
            pause = 5.0

    presses = threading.Thread(target=press)
    presses.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            HighsSolver(method, find_ray=False).solve(program, time_limit=40.0, threads=1)
    finally:
        done.set()
        presses.join()
        signal.signal(signal.SIGINT, handler)
    assert time.monotonic() - start < 20.0
