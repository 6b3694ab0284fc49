"""Certificates and their independent checker. Imports NumPy only; shares no code on purpose."""

from torch_prepared.certify.certificate import Certificate
from torch_prepared.certify.checker import (
    CheckResult,
    PropertyCheck,
    Verdict,
    check_certificate,
    match_certificate,
)
from torch_prepared.certify.exact import evaluate_exactly, margin_exactly
from torch_prepared.certify.proof import ProofTree, Slopes
from torch_prepared.certify.records import InputRecord, NetworkRecord, PropertyRecord

__all__ = [
    "Certificate",
    "CheckResult",
    "InputRecord",
    "NetworkRecord",
    "ProofTree",
    "PropertyCheck",
    "PropertyRecord",
    "Slopes",
    "Verdict",
    "check_certificate",
    "evaluate_exactly",
    "margin_exactly",
    "match_certificate",
]
