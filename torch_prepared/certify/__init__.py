"""Certificates and their independent checker. Imports NumPy only; shares no code on purpose."""

from torch_prepared.certify.certificate import Certificate, weights_digest
from torch_prepared.certify.checker import (
    MOST_FAILED,
    CheckResult,
    PropertyCheck,
    Verdict,
    check_certificate,
    match_certificate,
)
from torch_prepared.certify.exact import evaluate_exactly, margin_exactly
from torch_prepared.certify.points import (
    PointCertificate,
    PointCheck,
    PointClaims,
    check_points,
)
from torch_prepared.certify.proof import ProofTree, Slopes
from torch_prepared.certify.radius import (
    RadiusCertificate,
    RadiusCheck,
    RadiusClaim,
    check_radius,
)
from torch_prepared.certify.records import InputRecord, NetworkRecord, PropertyRecord

__all__ = [
    "MOST_FAILED",
    "Certificate",
    "CheckResult",
    "InputRecord",
    "NetworkRecord",
    "PointCertificate",
    "PointCheck",
    "PointClaims",
    "ProofTree",
    "PropertyCheck",
    "PropertyRecord",
    "RadiusCertificate",
    "RadiusCheck",
    "RadiusClaim",
    "Slopes",
    "Verdict",
    "check_certificate",
    "check_points",
    "check_radius",
    "evaluate_exactly",
    "margin_exactly",
    "match_certificate",
    "weights_digest",
]
