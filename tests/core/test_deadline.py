import math

import pytest

from torch_prepared.core.deadline import Deadline


def test_without_limit_nothing_runs_out() -> None:
    deadline = Deadline()
    assert deadline.left == math.inf
    assert not deadline.over
    assert deadline.limit(0.5, least=3.0) is None
    assert deadline.share(0.5).seconds is None


def test_a_limit_is_a_part_of_what_is_left() -> None:
    limit = Deadline(1000.0).limit(0.25)
    assert limit == pytest.approx(250.0, rel=1e-3)


@pytest.mark.parametrize("seconds", [0.0, 1e-9, -1.0])
def test_a_limit_is_never_zero(seconds) -> None:
    late = Deadline(seconds)
    assert late.left == 0.0
    assert late.over
    assert late.limit() == 1e-3
    assert late.limit(0.5, least=1.0) == 1.0
