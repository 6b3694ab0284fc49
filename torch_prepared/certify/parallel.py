"""Replay of one proof tree by several processes, each with its own range of leaves.

Workers are fresh interpreters that import this package's checker only. They get their job through
a pipe from their parent and answer through another one, so nothing depends on how the parent was
started, and no threads are shared.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from torch_prepared.certify.network import read_network
from torch_prepared.certify.operators import Arithmetic
from torch_prepared.certify.proof import ProofTree
from torch_prepared.certify.records import NetworkRecord, PropertyRecord
from torch_prepared.certify.replay import TreeReplay
from torch_prepared.certify.rounding import FloatArray, IntArray
from torch_prepared.errors import CertificateError

__all__ = ["run_in_processes", "serve"]

Answer = tuple[IntArray, FloatArray]
_COMMAND = "from torch_prepared.certify.parallel import serve; serve()"
_SERIAL = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def run_in_processes(
    network: NetworkRecord,
    prop: PropertyRecord,
    proof: ProofTree,
    arithmetic: Arithmetic,
    workers: int,
) -> Iterator[Answer]:
    """As :meth:`TreeReplay.run`, in ``workers`` processes.

    Raises:
        CertificateError: a worker failed; nothing is proved then.
        OSError: processes cannot be started.
    """
    tree = {**vars(proof), "slopes": dict(proof.slopes)}  # read-only mappings cannot be sent
    tree["tighten_slopes"] = dict(proof.tighten_slopes)
    edges = np.linspace(0, proof.leaves, workers + 1).astype(int).tolist()
    answers: queue.Queue[Answer | _End] = queue.Queue()
    running: list[subprocess.Popen[bytes]] = []
    try:
        for first, last in pairwise(edges):
            job = pickle.dumps((network, prop, tree, arithmetic, slice(first, last)))
            running.append(_start())
            threading.Thread(target=_attend, args=(running[-1], job, answers), daemon=True).start()
        left = workers
        while left:
            answer = answers.get()
            if not isinstance(answer, _End):
                yield answer
            elif answer.failure:
                raise CertificateError(f"replay: a worker process failed: {answer.failure}")
            else:
                left -= 1
    finally:
        for process in running:
            process.kill()
            process.wait()


def serve() -> None:
    """A worker: read a job from standard input, write answers to standard output."""
    network, prop, tree, arithmetic, part = pickle.load(sys.stdin.buffer)
    proof = ProofTree(**tree)
    out = sys.stdout.buffer
    with np.errstate(all="ignore"):  # as the checker does: what is not finite proves nothing
        for answer in TreeReplay(read_network(network), prop, proof, arithmetic).run(part):
            pickle.dump(answer, out)
            out.flush()
    pickle.dump(_End(), out)


@dataclass(frozen=True)
class _End:
    """The last message about a worker."""

    failure: str = ""


def _start() -> subprocess.Popen[bytes]:
    """A fresh interpreter that finds this package where we do."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths, **dict.fromkeys(_SERIAL, "1")}
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )


def _attend(
    process: subprocess.Popen[bytes], job: bytes, answers: queue.Queue[Answer | _End]
) -> None:
    """Give a worker its job and pass on what it says, up to the end or its failure."""
    try:
        if process.stdin is None or process.stdout is None:
            raise BrokenPipeError("no pipes")
        with process.stdin:
            process.stdin.write(job)
        while True:
            answer: Answer | _End = pickle.load(process.stdout)
            answers.put(answer)
            if isinstance(answer, _End):
                return
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        answers.put(_End(f"{type(error).__name__} {error}".strip()))
