"""Processes that talk through ``torch.distributed``, in tensors only.

Every failure to reach another process becomes one :class:`ClusterError`: a process that dies
closes its connections, and one that hangs is waited for no longer than the time-out.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torch_prepared.errors import ClusterError, SpecError

__all__ = ["Group", "join_group", "launched_ranks"]

P = ParamSpec("P")
R = TypeVar("R")

_DTYPES = (torch.float64, torch.float32, torch.int64, torch.uint8)
_MOST_TENSORS, _MOST_AXES = 16, 4
_HEADER = 2 + _MOST_TENSORS * (2 + _MOST_AXES)


def _guarded(
    method: Callable[Concatenate[Group, P], R],
) -> Callable[Concatenate[Group, P], R]:
    """Count the seconds spent and name failures."""

    @functools.wraps(method)
    def call(self: Group, /, *args: P.args, **kwargs: P.kwargs) -> R:
        clock = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        except (RuntimeError, ValueError) as error:  # torch raises both, without a common class
            raise self.lost(error) from error
        finally:
            self.seconds += time.perf_counter() - clock

    return call


@dataclass
class Group:
    """Process ``rank`` of ``size``; every process calls the same methods in the same order.

    Args:
        rank: of this process; 0 leads.
        size: number of processes.
        timeout: seconds that one process is waited for.
        seconds: wall time spent talking and waiting.
        sent: bytes sent by this process.
    """

    rank: int
    size: int
    timeout: float
    seconds: float = 0.0
    sent: int = field(default=0)

    def lost(self, error: Exception) -> ClusterError:
        """The error to raise when another process cannot be reached."""
        return ClusterError(
            f"rank {self.rank} of {self.size}: lost another rank ({_brief(error)}); see that "
            "rank's own message; the same command goes on from its checkpoint, where it has one"
        )

    @_guarded
    def all_reduce(self, value: Tensor) -> Tensor:
        """The sum over all processes, in every one of them; any device, one shape."""
        total = value.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
            self.sent += _bytes(total)
        return total

    @_guarded
    def broadcast(self, value: Tensor) -> Tensor:
        """The leader's tensor; the others give one of the same shape."""
        own = value.detach().clone()
        if self.size > 1:
            dist.broadcast(own, 0)
            self.sent += _bytes(own) if not self.rank else 0
        return own

    @_guarded
    def announce(self, code: int, tensors: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
        """The leader's number and tensors, of any shapes; the others' arguments do not count."""
        if self.size == 1:
            return code, [_plain(t) for t in tensors]
        header = _describe(code, tensors) if not self.rank else torch.zeros(_HEADER).long()
        dist.broadcast(header, 0)
        code, blank = _allocate(header)
        made = blank if self.rank else [_plain(t) for t in tensors]
        for tensor in made:
            if tensor.numel():
                dist.broadcast(tensor, 0)
        self.sent += sum(map(_bytes, made)) if not self.rank else 0
        return code, made

    @_guarded
    def scatter(self, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Part i of the leader's to process i; shapes may differ. The others give none."""
        if self.rank:
            return self._receive(0)
        for other in range(1, self.size):
            self._send(other, parts[other])
        return [_plain(t) for t in parts[0]]

    @_guarded
    def gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """What every process gives, in the leader; nothing in the others."""
        if self.rank:
            self._send(0, tensors)
            return []
        mine = [_plain(t) for t in tensors]
        return [mine, *(self._receive(other) for other in range(1, self.size))]

    @_guarded
    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Part i to process i, from everyone to everyone; parts are (k, any) of one dtype."""
        if self.size == 1:
            return list(parts)
        shape = torch.tensor([[len(p), p.shape[1]] for p in parts])
        theirs = torch.zeros_like(shape)
        dist.all_to_all_single(theirs, shape)
        flat = torch.cat([p.reshape(-1) for p in parts])
        into = flat.new_empty(int(theirs.prod(dim=1).sum()))
        dist.all_to_all_single(into, flat, theirs.prod(dim=1).tolist(), [p.numel() for p in parts])
        self.sent += _bytes(flat)
        split = into.split(theirs.prod(dim=1).tolist())
        return [p.reshape(tuple(s)) for p, s in zip(split, theirs.tolist(), strict=True)]

    def _send(self, other: int, tensors: Sequence[Tensor]) -> None:
        made = [_plain(t) for t in tensors]
        dist.send(_describe(0, made), other)
        for tensor in made:
            if tensor.numel():
                dist.send(tensor, other)
        self.sent += sum(map(_bytes, made))

    def _receive(self, other: int) -> list[Tensor]:
        header = torch.zeros(_HEADER, dtype=torch.int64)
        dist.recv(header, other)
        _, made = _allocate(header)
        for tensor in made:
            if tensor.numel():
                dist.recv(tensor, other)
        return made


def launched_ranks() -> int:
    """How many processes ``torchrun`` started together with this one; 1 when it did not."""
    try:
        return max(1, int(os.environ.get("WORLD_SIZE", "1"))) if "RANK" in os.environ else 1
    except ValueError:
        return 1


@contextmanager
def join_group(timeout: float = 600.0) -> Iterator[Group]:
    """The group of all processes that ``torchrun`` started; of this one alone without it.

    Tensors on the CPU travel through gloo, those on CUDA devices through nccl.

    Args:
        timeout: seconds that one process is waited for.

    Raises:
        ClusterError: the processes do not find each other.
        SpecError: a time-out that is not positive.
    """
    if not 0 < timeout < 1e7:
        raise SpecError(f"timeout: got {timeout}; expected seconds above 0")
    if launched_ranks() == 1:
        yield Group(0, 1, timeout)
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout)
        )
    except (RuntimeError, ValueError) as error:  # torch raises both, without a common class
        text = " ".join(str(error).split())[:160]
        raise ClusterError(
            f"the ranks do not find each other ({text}); start them by torchrun"
        ) from error
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), timeout)
    finally:
        dist.destroy_process_group()


def _brief(error: Exception) -> str:
    """The first sentence of a message, without the place in its library's source."""
    text = re.sub(r"^\[[^\]]*\]\s*", "", " ".join(str(error).split()))
    return text.partition(". ")[0][:160]


def _plain(tensor: Tensor) -> Tensor:
    """As it travels: on the CPU, without gaps."""
    return tensor.detach().cpu().contiguous()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _describe(code: int, tensors: Sequence[Tensor]) -> Tensor:
    """Header (h,) int64: code, count, and dtype, axes and lengths of every tensor."""
    if len(tensors) > _MOST_TENSORS or any(t.dim() > _MOST_AXES for t in tensors):
        raise ValueError(f"got {len(tensors)} tensors; expected {_MOST_TENSORS} of few axes")
    header = [code, len(tensors)]
    for tensor in tensors:
        shape = [*tensor.shape] + [0] * (_MOST_AXES - tensor.dim())
        header += [_DTYPES.index(tensor.dtype), tensor.dim(), *shape]
    return torch.tensor(header + [0] * (_HEADER - len(header)), dtype=torch.int64)


def _allocate(header: Tensor) -> tuple[int, list[Tensor]]:
    """Code, and uninitialized tensors as described."""
    code, count, *rest = header.tolist()
    width = 2 + _MOST_AXES
    made = []
    for kind, axes, *shape in (rest[i * width : (i + 1) * width] for i in range(count)):
        made.append(torch.empty(shape[:axes], dtype=_DTYPES[kind]))
    return code, made
