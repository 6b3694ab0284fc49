"""What all certificate files share: format, version, digests, and which network is meant."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self

import numpy as np

from torch_prepared.certify.encoding import canonical, digest, entries, read_json, write_json
from torch_prepared.certify.records import NetworkRecord
from torch_prepared.errors import CertificateError

__all__ = ["Envelope", "match_network", "weights_digest"]


class Envelope(ABC):
    """A certificate as plain JSON data: its content, format and version, and a digest of them all.

    A subclass names its format, and writes and reads its content.
    """

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int] = 1

    @abstractmethod
    def _content(self) -> dict[str, object]:
        """Plain JSON data of all but format and version."""

    @classmethod
    @abstractmethod
    def _from_content(cls, content: Mapping[str, object]) -> Self:
        """Read content that is not trusted."""

    def to_json(self) -> dict[str, object]:
        """Plain JSON data, with a digest of all the rest under ``"digest"``."""
        data = {"format": self.FORMAT, "version": self.VERSION, **self._content()}
        return {**data, "digest": digest(data)}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Read plain JSON data that is not trusted.

        Raises:
            CertificateError: altered, of another version, malformed or too large.
        """
        content = dict(entries(data, "certificate"))
        stored, kind, version = (content.pop(k, None) for k in ("digest", "format", "version"))
        if kind != cls.FORMAT or type(version) is not int or version != cls.VERSION:
            raise CertificateError(
                f"certificate: format {kind!r}, version {version!r}; "
                f"expected {cls.FORMAT!r}, version {cls.VERSION}"
            )
        if stored != digest({"format": kind, "version": version, **content}):
            raise CertificateError("certificate: content digest differs; the file was altered")
        return cls._from_content(content)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` (``.json`` or ``.json.gz``), all or nothing."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that is not trusted.

        Raises:
            CertificateError: see :meth:`from_json`.
        """
        return cls.from_json(read_json(path))


def weights_digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over sorted names, dtypes, shapes and little-endian bytes of the stored weights."""
    state = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        state.update(canonical([name, value.dtype.name, list(value.shape)]))
        state.update(np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<")).tobytes())
    return state.hexdigest()


def match_network(network: NetworkRecord, structure: Mapping[str, object], weights: str) -> None:
    """Refuse a network of another structure, or whose weights have another digest."""
    if digest(structure) != digest(network.structure):
        raise CertificateError(
            "certificate: made for a network of another structure; certify this network instead"
        )
    actual = weights_digest(network.weights)
    if weights != actual:
        raise CertificateError(
            f"certificate: made for weights {weights[:12]}...; this network has "
            f"{actual[:12]}...; certify this network instead"
        )
