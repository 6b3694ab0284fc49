"""Every exception and warning class of the package.

A message says where, what was got, what was expected and what to do instead, in one line.
"""

from __future__ import annotations

__all__ = [
    "CertificateError",
    "ClusterError",
    "InfeasibleEditError",
    "MissingDependencyError",
    "ModelFormatError",
    "PreparedError",
    "PreparedWarning",
    "ReportError",
    "SolverError",
    "SpecError",
    "UnsupportedOperationError",
]


class PreparedError(Exception):
    """Root of all errors this package raises on purpose."""


class SpecError(PreparedError, ValueError):
    """A region, safe set or property file is malformed, empty or does not fit the network."""


class ModelFormatError(PreparedError, ValueError):
    """A network file or module cannot be read, is truncated, or holds non-finite weights."""


class UnsupportedOperationError(PreparedError, NotImplementedError):
    """An operator or a combination of operators has no sound treatment here."""


class SolverError(PreparedError, RuntimeError):
    """A solver failed in a way that is neither 'infeasible' nor 'time over'."""


class InfeasibleEditError(PreparedError):
    """No edit of the chosen kind exists: the properties contradict each other."""


class CertificateError(PreparedError, ValueError):
    """A certificate is malformed, altered, or was made for another network or property."""


class ReportError(PreparedError, ValueError):
    """The report file of an edit is malformed, or speaks of files that changed since."""


class ClusterError(PreparedError, RuntimeError):
    """Another process of a group is gone or silent, or a job cannot be submitted."""


class MissingDependencyError(PreparedError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class PreparedWarning(UserWarning):
    """Root of all warnings of this package."""
