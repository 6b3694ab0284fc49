"""Messages among the ranks of a group: the leader runs operations in all, the others answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torch_prepared.cluster import _shards
from torch_prepared.cluster._group import Group
from torch_prepared.cluster._shards import OPERATIONS, Operation, Shards
from torch_prepared.errors import ClusterError

__all__ = ["Ranks"]

_BEAT, _OVER = -1, -2  #: messages that are no operations
_BEATS = 4  #: signs of life per time-out


class Ranks:
    """All ranks of a group, and what this one holds of the task.

    Args:
        group: all ranks.

    Attributes:
        shared_seconds: CPU seconds that this rank spent in operations shared by all.
        slowest_seconds: likewise of the slowest rank in each operation, known to the leader.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.shared_seconds = self.slowest_seconds = 0.0
        self._shards: Shards | None = None
        self._turn = threading.Lock()
        self._broken = False
        self._numbers = 0
        self._dead: list[int] = []

    def call(
        self,
        operation: Operation,
        shared: Sequence[Tensor],
        parts: Sequence[Sequence[Tensor]] | None = None,
    ) -> list[list[Tensor]]:
        """Run an operation in all ranks; what each of them tells.

        Raises:
            ClusterError: a rank is gone or silent.
        """
        dead, self._dead = self._dead, []
        if dead and operation is not _shards.forget:
            self.call(_shards.forget, [torch.tensor(dead)])
        with self._turn:
            if self._broken or self._shards is None:
                raise ClusterError("the group was broken off; expected to start anew")
            self._broken = True  # until all is told: an interruption leaves ranks out of step
            self.group.announce(OPERATIONS.index(operation), shared)
            mine = self.group.scatter(parts or [[]] * self.group.size)
            told = self.group.gather(self._timed(operation, list(shared), mine))
            self._broken = False
        self.slowest_seconds += max(float(values[-1]) for values in told)
        return [values[:-1] for values in told]

    def number(self) -> int:
        """A new name for rows."""
        self._numbers += 1
        return self._numbers

    def forget(self, number: int) -> None:
        """Have the rows of this name dropped with the next message."""
        self._dead.append(number)

    def _timed(
        self, operation: Operation, shared: list[Tensor], mine: list[Tensor]
    ) -> list[Tensor]:
        """What this rank tells, and the CPU seconds it took."""
        if self._shards is None:
            raise ClusterError("operation: got no task; expected `run` to be called first")
        clock = time.thread_time()
        told = operation(self._shards, shared, mine)
        spent = time.thread_time() - clock
        self.shared_seconds += spent
        return [*told, torch.tensor([spent], dtype=torch.float64)]

    def _end(self, result: Sequence[Tensor]) -> None:
        """Dismiss the helpers with the result, if they can still be reached."""
        with self._turn:
            if not self._broken:
                self._broken = True
                self.group.announce(_OVER, result)
                self._broken = False

    @contextmanager
    def _beating(self) -> Iterator[None]:
        """Tell the helpers now and then that the leader is alive, while it works alone."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.group.timeout / _BEATS):
                with self._turn:
                    if self._broken:
                        return
                    try:
                        self.group.announce(_BEAT, [])
                    except ClusterError:  # the next message fails as well, and says so
                        self._broken = True
                        return

        thread = threading.Thread(target=beat, daemon=True)
        if self.group.size > 1:
            thread.start()
        try:
            yield
        finally:
            over.set()
            if thread.is_alive():
                thread.join()

    def _answer(self) -> list[Tensor]:
        """Run what the leader asks for until it is over; its last message."""
        while True:
            code, shared = self.group.announce(0, [])
            if code == _OVER:
                return shared
            if code != _BEAT:
                operation = OPERATIONS[code]
                self.group.gather(self._timed(operation, shared, self.group.scatter([])))
