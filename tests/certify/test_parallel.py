"""Several processes say what one process says, and their failures prove nothing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from torch_prepared.certify import Certificate, ProofTree, Verdict, check_certificate
from torch_prepared.certify import parallel as parallel_module
from torch_prepared.certify.records import PropertyRecord

from .nets import NetBuilder, box, mlp, nonlinear_inputs, row_property
from .test_trees import uniform_tree

DEPTH = 12


def case(lift: float) -> tuple[NetBuilder, PropertyRecord, ProofTree]:
    net = mlp((3, 8, 8, 2), 3)
    region = box(-np.ones(3), np.ones(3))
    prop = row_property(region, np.array([[1.0, -1.0]]), np.full(1, lift))
    tree = uniform_tree(
        DEPTH, region.lower, region.upper, nonlinear_inputs(net.record()), (DEPTH - 2,)
    )
    return net, prop, tree


def test_processes_find_the_same_margin() -> None:
    net, prop, tree = case(100.0)
    certificate = Certificate.create(net.record(), [prop], [tree])
    seen: list[tuple[int, int]] = []
    one = check_certificate(certificate, net.record(), [prop])
    two = check_certificate(
        certificate,
        net.record(),
        [prop],
        workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert one.status is two.status is Verdict.CERTIFIED
    assert two.per_property[0].leaves == tree.leaves == 2**DEPTH
    assert two.per_property[0].margin == pytest.approx(one.per_property[0].margin, rel=1e-12)
    assert seen[-1] == (2**DEPTH, 2**DEPTH)


def test_a_leaf_that_fails_in_a_process_fails_the_check() -> None:
    net, prop, tree = case(100.0)
    lowest = check_certificate(
        Certificate.create(net.record(), [prop], [tree]), net.record(), [prop]
    )
    shift = prop.clauses[0][1] - lowest.per_property[0].margin - 1e-6
    hard = dataclasses.replace(prop, clauses=((prop.clauses[0][0], shift),))
    certificate = Certificate.create(net.record(), [hard], [tree])
    result = check_certificate(certificate, net.record(), [hard], workers=2)
    assert result.status is Verdict.UNKNOWN
    assert "lower bound -" in result.per_property[0].reason


@pytest.mark.parametrize(
    "program", ["import sys; sys.exit(3)", "print('no pickle')", "import time; time.sleep(0.2)"]
)
def test_a_process_that_breaks_proves_nothing(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, prop, tree = case(100.0)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    monkeypatch.setattr(parallel_module, "_start", start)
    certificate = Certificate.create(net.record(), [prop], [tree])
    result = check_certificate(certificate, net.record(), [prop], workers=2)
    assert result.status is Verdict.UNKNOWN
    assert "worker process failed" in result.per_property[0].reason
