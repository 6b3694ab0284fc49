"""The certificate file: what was proved, of which network, and how to replay it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from torch_prepared.certify.encoding import (
    ArrayReader,
    digest,
    encode_array,
    entries,
    fields,
    items,
    number,
    text,
    texts,
)
from torch_prepared.certify.envelope import Envelope, weights_digest
from torch_prepared.certify.proof import ProofTree, Slopes
from torch_prepared.certify.records import InputRecord, NetworkRecord, PropertyRecord
from torch_prepared.errors import CertificateError

__all__ = ["FORMAT_VERSION", "Certificate", "property_digest", "weights_digest"]

FORMAT_VERSION = 1
_CONTENT = (
    "structure", "structure_digest", "weights_digest", "properties", "proofs", "metadata",
)  # fmt: skip
_REGION = ("kind", "lower", "upper", "center", "radius", "p", "vertices")
_PROOF = ("split_dim", "split_value", "rows", "tighten", "plan", "slopes", "tighten_slopes")


def property_digest(prop: PropertyRecord) -> str:
    """SHA-256 of a property's meaning: everything but its name."""
    data = _encode_property(prop)
    return digest({key: value for key, value in data.items() if key != "name"})


@dataclass(frozen=True)
class Certificate(Envelope):
    """A claim with its proof; only ``check_certificate`` turns it into a verdict.

    Args:
        structure: of the network, plain JSON data.
        weights_digest: of the weights as stored.
        properties: what is claimed, in order.
        proofs: one tree per property.
        metadata: free text by key, outside of any claim.
        version: of the format.
    """

    FORMAT = "torch_prepared.certificate"
    VERSION = FORMAT_VERSION

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

    def _content(self) -> dict[str, object]:
        return {
            "structure": dict(self.structure),
            "structure_digest": self.structure_digest,
            "weights_digest": self.weights_digest,
            "properties": [_encode_property(p) for p in self.properties],
            "proofs": [_encode_proof(p) for p in self.proofs],
            "metadata": dict(self.metadata),
        }

    @classmethod
    def _from_content(cls, content: Mapping[str, object]) -> Certificate:
        structure, own, stored, properties, proofs, metadata = fields(
            content, _CONTENT, "certificate"
        )
        if digest(structure) != own:
            raise CertificateError("certificate: structure and its digest differ")
        reader = ArrayReader()
        return cls(
            structure=entries(structure, "structure"),
            weights_digest=text(stored, "weights_digest"),
            properties=tuple(
                _decode_property(p, reader, f"properties[{i}]")
                for i, p in enumerate(items(properties, "properties"))
            ),
            proofs=tuple(
                _decode_proof(p, reader, f"proofs[{i}]")
                for i, p in enumerate(items(proofs, "proofs"))
            ),
            metadata=texts(metadata, "metadata"),
        )


def _float64(value: np.ndarray) -> dict[str, object]:
    """Canonical float64 (negative zero becomes zero)."""
    return encode_array(np.asarray(value, dtype=np.float64) + 0.0)


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
    pairs = [fields(c, ("rows", "offset"), where) for c in items(clauses, f"{where}.clauses")]
    return PropertyRecord(
        region=InputRecord(
            kind=text(kind, f"{where}.kind"),
            lower=reader.read(lower, f"{where}.lower"),
            upper=reader.read(upper, f"{where}.upper"),
            center=None if center is None else reader.read(center, f"{where}.center"),
            radius=None if radius is None else number(radius, f"{where}.radius"),
            p=None if p is None else number(p, f"{where}.p"),
            vertices=None if vertices is None else reader.read(vertices, f"{where}.vertices"),
        ),
        clauses=tuple(
            (reader.read(rows, f"{where}.rows"), reader.read(offset, f"{where}.offset"))
            for rows, offset in pairs
        ),
        strict=strict,
        name=text(name, f"{where}.name"),
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
    for name, pair in entries(value, where).items():
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
        plan=tuple(text(name, f"{where}.plan") for name in items(plan, f"{where}.plan")),
        slopes=_decode_slopes(slopes, reader, f"{where}.slopes"),
        tighten_slopes=_decode_slopes(tighten_slopes, reader, f"{where}.tighten_slopes"),
    )
