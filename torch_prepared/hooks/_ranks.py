"""One rank decides, all follow: what several processes of one training run share."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

__all__ = ["Ranks"]

T = TypeVar("T")


def _frozen(mapping: dict[object, object]) -> MappingProxyType[object, object]:
    return MappingProxyType(mapping)


class _Pickler(pickle.Pickler):
    """Also takes the read-only mappings that certificates and graphs hold."""

    def reducer_override(self, value: object) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """See ``pickle``."""
        if isinstance(value, MappingProxyType):
            return _frozen, (dict(value),)
        other: tuple[Callable[..., Any], tuple[Any, ...]] = NotImplemented
        return other


class Ranks:
    """The default process group, or a single process where there is none."""

    @property
    def several(self) -> bool:
        """Whether there is anybody to tell."""
        return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @property
    def first(self) -> bool:
        """Whether this process decides."""
        return not self.several or dist.get_rank() == 0

    def tell(self, value: T | None) -> T:
        """The first rank's data on every rank; ranks of one run trust each other."""
        if self.several:
            stream = io.BytesIO()
            _Pickler(stream).dump(value)
            box = [stream.getvalue()]
            dist.broadcast_object_list(box, src=0)
            value = pickle.loads(box[0])
        return value  # type: ignore[return-value]

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors, alike on all ranks, with the first rank's."""
        if not self.several:
            return
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.broadcast(whole, src=0)
            with torch.no_grad():
                tensor.copy_(whole)
