"""Interpretation of proofs: which hidden features a proof rests on, and what they look at.

:func:`explain_proof` does everything for one property, :func:`compare_proofs` for two networks;
``page.render_page`` makes a web page of either.
"""

from torch_prepared.interpret._query import ReductionMode
from torch_prepared.interpret._relaxed import ProofMethod
from torch_prepared.interpret._search import Extractor, FeatureOrder
from torch_prepared.interpret.compare import MarginChange, ProofComparison, compare_proofs
from torch_prepared.interpret.explain import (
    Choices,
    Explanation,
    explain_proof,
    explain_with,
    widen_region,
)
from torch_prepared.interpret.extract import FeatureSet, Outcome, extract_sufficient
from torch_prepared.interpret.features import ProofFeatures, proof_features
from torch_prepared.interpret.maps import MapStyle, feature_maps, foreground_share, total_map
from torch_prepared.interpret.report import SizeRow, proof_size_report

__all__ = [
    "Choices",
    "Explanation",
    "Extractor",
    "FeatureOrder",
    "FeatureSet",
    "MapStyle",
    "MarginChange",
    "Outcome",
    "ProofComparison",
    "ProofFeatures",
    "ProofMethod",
    "ReductionMode",
    "SizeRow",
    "compare_proofs",
    "explain_proof",
    "explain_with",
    "extract_sufficient",
    "feature_maps",
    "foreground_share",
    "proof_features",
    "proof_size_report",
    "total_map",
    "widen_region",
]
