"""Z3 on a hard program: the clock and Ctrl-C are heard while it runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.sparse as sp

from torch_prepared.core.rows import LinearRows
from torch_prepared.solvers import Status
from torch_prepared.solvers.smt import ReluProgram, solve_smt

pytestmark = pytest.mark.optional

UNKNOWNS, CELLS, ROWS = 40, 300, 60


def hard_program() -> ReluProgram:
    """Random rows over sums of cells: far more patterns than Z3 can look at in minutes."""
    rng = np.random.default_rng(0)
    pre = np.concatenate([rng.normal(size=(CELLS, UNKNOWNS)), np.zeros((CELLS, CELLS))], axis=1)
    over_cells = rng.normal(size=(ROWS, CELLS))
    rows = np.concatenate([np.zeros((ROWS, UNKNOWNS)), over_cells], axis=1)
    return ReluProgram(
        np.full(UNKNOWNS, -5.0),
        np.full(UNKNOWNS, 5.0),
        sp.csr_matrix(pre),
        rng.normal(size=CELLS),
        np.full(CELLS, -np.inf),
        np.full(CELLS, np.inf),
        LinearRows(sp.csr_matrix(rows), np.full(ROWS, 5.0)),
        np.arange(ROWS),
    )


def test_the_time_limit_is_kept() -> None:
    pytest.importorskip("z3")
    program, start = hard_program(), time.monotonic()
    answer = solve_smt(program, time_limit=4.0)
    assert answer.status is Status.TIME_LIMIT
    assert answer.values is None
    assert time.monotonic() - start < 10.0


SCRIPT = """
import threading
import time
from tests.solvers.test_smt import hard_program
from torch_prepared.solvers import smt

decide = smt._Search._decide
def told(self, seconds):
    print("searching", flush=True)
    return decide(self, seconds)
smt._Search._decide = told
try:
    smt.solve_smt(hard_program())
except KeyboardInterrupt:
    time.sleep(0.2)
    running = any(thread.name == "z3" for thread in threading.enumerate())
    print("left behind" if running else "interrupted", flush=True)
"""


def test_ctrl_c_ends_a_search_within_seconds() -> None:
    pytest.importorskip("z3")
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "searching\n"
    time.sleep(1.0)
    assert process.poll() is None
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        rest, _ = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert rest == "interrupted\n"
    assert process.returncode == 0
    assert time.monotonic() - start < 8.0
