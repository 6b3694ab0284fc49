"""Certificates and their independent checker. Imports NumPy only; shares no code on purpose."""

from torch_prepared.certify.records import InputRecord, NetworkRecord, PropertyRecord

__all__ = ["InputRecord", "NetworkRecord", "PropertyRecord"]
