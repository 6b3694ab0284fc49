"""The certificate file: what was proved, of which network, and how to replay it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from torch_prepared.certify.encoding import (
    ArrayReader,
    canonical,
    digest,
    encode_array,
    fields,
    read_json,
    write_json,
)
from torch_prepared.certify.proof import ProofTree, Slopes
from torch_prepared.certify.records import InputRecord, NetworkRecord, PropertyRecord
from torch_prepared.errors import CertificateError

__all__ = ["FORMAT_VERSION", "Certificate", "property_digest", "weights_digest"]

FORMAT_NAME = "torch_prepared.certificate"
FORMAT_VERSION = 1
_FIELDS = (
    "format",
    "version",
    "structure",
    "structure_digest",
    "weights_digest",
    "properties",
    "proofs",
    "metadata",
)
_REGION = ("kind", "lower", "upper", "center", "radius", "p", "vertices")
_PROOF = ("split_dim", "split_value", "rows", "tighten", "plan", "slopes", "tighten_slopes")
_MAX_ITEMS = 100_000


def weights_digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over sorted names, dtypes, shapes and little-endian bytes of the stored weights."""
    state = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name]
        state.update(canonical([name, value.dtype.name, list(value.shape)]))
        state.update(np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<")).tobytes())
    return state.hexdigest()


def property_digest(prop: PropertyRecord) -> str:
    """SHA-256 of a property's meaning: everything but its name."""
    data = _encode_property(prop)
    return digest({key: value for key, value in data.items() if key != "name"})


@dataclass(frozen=True)
class Certificate:
    """A claim with its proof; only ``check_certificate`` turns it into a verdict.

    Args:
        structure: of the network, plain JSON data.
        weights_digest: of the weights as stored.
        properties: what is claimed, in order.
        proofs: one tree per property.
        metadata: free text by key, outside of any claim.
        version: of the format.
    """

    structure: Mapping[str, object]
    weights_digest: str
    properties: tuple[PropertyRecord, ...]
    proofs: tuple[ProofTree, ...]
    metadata: Mapping[str, str]
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))
        if self.version != FORMAT_VERSION:
            raise CertificateError(
                f"certificate: format version {self.version}; expected {FORMAT_VERSION}; "
                "certify again with this release"
            )
        if len(self.properties) != len(self.proofs) or not self.properties:
            raise CertificateError(
                f"certificate: {len(self.properties)} properties and {len(self.proofs)} proofs; "
                "expected one proof for each of at least one property"
            )

    @classmethod
    def create(
        cls,
        network: NetworkRecord,
        properties: Sequence[PropertyRecord],
        proofs: Sequence[ProofTree],
        metadata: Mapping[str, str] | None = None,
    ) -> Certificate:
        """The certificate that claims ``properties`` of ``network``, proved by ``proofs``."""
        return cls(
            structure=network.structure,
            weights_digest=weights_digest(network.weights),
            properties=tuple(properties),
            proofs=tuple(proofs),
            metadata=dict(metadata or {}),
        )

    @property
    def structure_digest(self) -> str:
        """SHA-256 of the structure."""
        return digest(self.structure)

    def to_json(self) -> dict[str, object]:
        """Plain JSON data, with a digest of all the rest under ``"digest"``."""
        data: dict[str, object] = {
            "format": FORMAT_NAME,
            "version": self.version,
            "structure": dict(self.structure),
            "structure_digest": self.structure_digest,
            "weights_digest": self.weights_digest,
            "properties": [_encode_property(p) for p in self.properties],
            "proofs": [_encode_proof(p) for p in self.proofs],
            "metadata": dict(self.metadata),
        }
        return {**data, "digest": digest(data)}

    @classmethod
    def from_json(cls, data: object) -> Certificate:
        """Read plain JSON data that is not trusted.

        Raises:
            CertificateError: altered, of another version, malformed or too large.
        """
        values = fields(data, (*_FIELDS, "digest"), "certificate")
        content = dict(zip(_FIELDS, values[:-1], strict=True))
        if content["format"] != FORMAT_NAME or type(content["version"]) is not int:
            raise CertificateError(f"certificate: format {content['format']!r} is not this one")
        if content["version"] != FORMAT_VERSION:
            raise CertificateError(
                f"certificate: format version {content['version']}; expected {FORMAT_VERSION}"
            )
        if values[-1] != digest(content):
            raise CertificateError("certificate: content digest differs; the file was altered")
        structure = content["structure"]
        if not isinstance(structure, Mapping) or digest(structure) != content["structure_digest"]:
            raise CertificateError("certificate: structure and its digest differ")
        reader = ArrayReader()
        return cls(
            structure=structure,
            weights_digest=_text(content["weights_digest"], "weights_digest"),
            properties=tuple(
                _decode_property(p, reader, f"properties[{i}]")
                for i, p in enumerate(_list(content["properties"], "properties"))
            ),
            proofs=tuple(
                _decode_proof(p, reader, f"proofs[{i}]")
                for i, p in enumerate(_list(content["proofs"], "proofs"))
            ),
            metadata={
                key: _text(value, "metadata")
                for key, value in _object(content["metadata"], "metadata").items()
            },
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` (``.json`` or ``.json.gz``), all or nothing."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Certificate:
        """Read a file that is not trusted.

        Raises:
            CertificateError: see :meth:`from_json`.
        """
        return cls.from_json(read_json(path))


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise CertificateError(f"{where}: got {type(value).__name__}; expected text")
    return value


def _list(value: object, where: str) -> list[object]:
    if not isinstance(value, list) or len(value) > _MAX_ITEMS:
        raise CertificateError(f"{where}: expected a list of at most {_MAX_ITEMS} items")
    return value


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict) or len(value) > _MAX_ITEMS:
        raise CertificateError(f"{where}: expected an object of at most {_MAX_ITEMS} fields")
    return value


def _float64(value: np.ndarray) -> dict[str, object]:
    """Canonical float64 (negative zero becomes zero)."""
    return encode_array(np.asarray(value, dtype=np.float64) + 0.0)


def _number(value: object, where: str) -> float | None:
    """A finite number, ``"inf"`` (an exponent), or None."""
    if value is None or value == "inf":
        return None if value is None else float("inf")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CertificateError(f"{where}: got {value!r}; expected a number")
    return float(value)


def _encode_property(prop: PropertyRecord) -> dict[str, object]:
    region = prop.region
    p = None if region.p is None else ("inf" if region.p == float("inf") else float(region.p))
    return {
        "name": prop.name,
        "strict": bool(prop.strict),
        "region": {
            "kind": region.kind,
            "lower": _float64(region.lower),
            "upper": _float64(region.upper),
            "center": None if region.center is None else _float64(region.center),
            "radius": None if region.radius is None else float(region.radius),
            "p": p,
            "vertices": None if region.vertices is None else _float64(region.vertices),
        },
        "clauses": [
            {"rows": _float64(rows), "offset": _float64(offset)} for rows, offset in prop.clauses
        ],
    }


def _decode_property(value: object, reader: ArrayReader, where: str) -> PropertyRecord:
    name, strict, region, clauses = fields(value, ("name", "strict", "region", "clauses"), where)
    kind, lower, upper, center, radius, p, vertices = fields(region, _REGION, f"{where}.region")
    if not isinstance(strict, bool):
        raise CertificateError(f"{where}.strict: expected true or false")
    pairs = [fields(c, ("rows", "offset"), where) for c in _list(clauses, f"{where}.clauses")]
    return PropertyRecord(
        region=InputRecord(
            kind=_text(kind, f"{where}.kind"),
            lower=reader.read(lower, f"{where}.lower"),
            upper=reader.read(upper, f"{where}.upper"),
            center=None if center is None else reader.read(center, f"{where}.center"),
            radius=_number(radius, f"{where}.radius"),
            p=_number(p, f"{where}.p"),
            vertices=None if vertices is None else reader.read(vertices, f"{where}.vertices"),
        ),
        clauses=tuple(
            (reader.read(rows, f"{where}.rows"), reader.read(offset, f"{where}.offset"))
            for rows, offset in pairs
        ),
        strict=strict,
        name=_text(name, f"{where}.name"),
    )


def _encode_slopes(slopes: Mapping[str, Slopes]) -> dict[str, object]:
    return {
        name: {
            "lower": None if pair.lower is None else encode_array(pair.lower),
            "upper": None if pair.upper is None else encode_array(pair.upper),
        }
        for name, pair in slopes.items()
    }


def _decode_slopes(value: object, reader: ArrayReader, where: str) -> dict[str, Slopes]:
    result = {}
    for name, pair in _object(value, where).items():
        low, high = fields(pair, ("lower", "upper"), where)
        result[name] = Slopes(
            lower=None if low is None else reader.read(low, where),
            upper=None if high is None else reader.read(high, where),
        )
    return result


def _encode_proof(proof: ProofTree) -> dict[str, object]:
    return {
        "split_dim": encode_array(proof.split_dim),
        "split_value": encode_array(proof.split_value),
        "rows": encode_array(proof.rows),
        "tighten": encode_array(proof.tighten),
        "plan": list(proof.plan),
        "slopes": _encode_slopes(proof.slopes),
        "tighten_slopes": _encode_slopes(proof.tighten_slopes),
    }


def _decode_proof(value: object, reader: ArrayReader, where: str) -> ProofTree:
    dims, values, rows, tighten, plan, slopes, tighten_slopes = fields(value, _PROOF, where)
    return ProofTree(
        split_dim=reader.read(dims, f"{where}.split_dim"),
        split_value=reader.read(values, f"{where}.split_value"),
        rows=reader.read(rows, f"{where}.rows"),
        tighten=reader.read(tighten, f"{where}.tighten"),
        plan=tuple(_text(name, f"{where}.plan") for name in _list(plan, f"{where}.plan")),
        slopes=_decode_slopes(slopes, reader, f"{where}.slopes"),
        tighten_slopes=_decode_slopes(tighten_slopes, reader, f"{where}.tighten_slopes"),
    )
