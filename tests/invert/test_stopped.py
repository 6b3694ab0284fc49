"""Ctrl-C and ``Effort.stop``: the bounds found so far, or the interruption itself."""

from __future__ import annotations

import _thread
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from torch_prepared.certify import check_radius
from torch_prepared.invert import (
    Effort,
    Evidence,
    Outcome,
    injectivity_radius,
    map_radii,
    max_collision,
    nearest_preimage,
)
from torch_prepared.invert._network import PiecewiseNetwork

from .nets import random_net

HARD = random_net((6, 40, 40, 6), 2)
CENTER = np.full(6, 0.1)
PAIRS = random_net((4, 16, 16, 4), 0, 1.0)  # minutes of branch and bound over pairs of boxes


@contextmanager
def ctrl_c(*seconds: float):
    """Interrupt the main thread so many seconds from now."""
    timers = [threading.Timer(s, _thread.interrupt_main) for s in seconds]
    for timer in timers:
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def effort() -> Effort:
    return Effort(threads=1, stop=threading.Event())


def test_an_interrupted_search_over_pairs_keeps_its_certificate():
    start = time.monotonic()
    with ctrl_c(3.0):
        found = injectivity_radius(PAIRS, [0.1] * 4, r_max=1.0, effort=effort())
    assert time.monotonic() - start < 12.0
    assert found.interrupted
    assert found.message == "interrupted"
    assert found.outcome is Outcome.OPEN
    assert found.evidence is Evidence.CERTIFIED
    assert 0.0 < found.proved <= found.lower <= found.upper
    again = check_radius(found.certified.certificate, [PiecewiseNetwork.of(PAIRS, 4).record])
    assert again.status.value == "certified", again.reason


def test_an_interrupted_program_keeps_its_bound():
    start = time.monotonic()
    with ctrl_c(4.0):
        found = nearest_preimage(HARD, CENTER, r_max=3.0, method="milp", effort=effort())
    assert time.monotonic() - start < 20.0
    assert found.interrupted
    assert 0.0 < found.lower <= found.upper
    assert any("interrupted, bound" in s or "claimed" in s for s in found.steps), found.steps


def test_interrupted_distances_count_what_is_left_in_full():
    with ctrl_c(2.0):
        found = max_collision(HARD, CENTER, 2.0, effort=effort())
    assert found.interrupted
    assert found.message == "interrupted"
    assert found.outcome is Outcome.OPEN
    assert found.upper == 4.0
    assert found.lower <= found.upper


def test_who_asks_twice_or_gave_no_way_to_stop_is_interrupted():
    with ctrl_c(1.0), pytest.raises(KeyboardInterrupt):
        nearest_preimage(HARD, CENTER, r_max=3.0, effort=Effort(threads=1))
    stopped = effort()
    stopped.stop.set()
    with ctrl_c(0.05), pytest.raises(KeyboardInterrupt), stopped.until_stopped():
        time.sleep(1.0)


def test_a_question_that_is_stopped_from_outside_ends():
    asked = effort()
    threading.Timer(1.0, asked.stop.set).start()
    start = time.monotonic()
    found = injectivity_radius(PAIRS, [0.1] * 4, r_max=1.0, effort=asked)
    assert found.interrupted
    assert time.monotonic() - start < 10.0
    assert found.lower <= found.upper
    none = map_radii(lambda c, e: pytest.fail("stopped"), np.zeros((3, 2)), effort=asked)
    assert not none.reached.any()
