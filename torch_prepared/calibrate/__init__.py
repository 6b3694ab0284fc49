"""Calibration that is certified: worst cases of calibration metrics over perturbed inputs.

``certify_calibration`` does it all. Step by step: a network's confidences are bounded over a
region around each input (``certify_confidence``; ``smoothed_confidence_bounds`` for smoothed
classifiers), and from these intervals follow the exact worst Brier score (``certified_brier``)
and calibration error (``certified_ece``). Attacks (``attack_calibration``) say how much of the
bound is reached; training against either (``calibration_training_step``,
``certified_calibration_loss``) lowers it. Pictures are in ``calibrate.diagram``.
"""

from torch_prepared.calibrate._bins import equal_count_edges
from torch_prepared.calibrate._result import (
    CalibrationBound,
    CalibrationMetric,
    Outcome,
    extend_uncertified,
    failure_budget,
    with_failures,
)
from torch_prepared.calibrate.api import (
    CalibrationReport,
    RadiusReport,
    certify_calibration,
    certify_smoothed_calibration,
)
from torch_prepared.calibrate.attack import (
    AttackBudget,
    CalibrationAttack,
    Reference,
    ace_attack,
    attack_calibration,
    confidences,
)
from torch_prepared.calibrate.brier import (
    brier_bound,
    brier_score,
    certified_brier,
    certified_brier_multiclass,
)
from torch_prepared.calibrate.confidence import (
    ConfidenceInterval,
    bound_margins,
    certify_confidence,
    confidence_bounds,
)
from torch_prepared.calibrate.ece import (
    EceMethod,
    calibration_error,
    certified_ece,
    certified_ece_uncertain,
)
from torch_prepared.calibrate.envelope import (
    Reliability,
    ReliabilityEnvelope,
    reliability,
    reliability_envelope,
)
from torch_prepared.calibrate.metrics import (
    CertifiedBrierScore,
    CertifiedCalibrationError,
    CertifiedMetric,
)
from torch_prepared.calibrate.smoothing import SmoothingBound, smoothed_confidence_bounds
from torch_prepared.calibrate.temperature import CertifiedTemperature, certified_temperature
from torch_prepared.calibrate.training import (
    CertifiedLoss,
    TrainingStep,
    calibration_adversary,
    calibration_training_step,
    certified_calibration_loss,
    smoothed_logits,
)

__all__ = [
    "AttackBudget",
    "CalibrationAttack",
    "CalibrationBound",
    "CalibrationMetric",
    "CalibrationReport",
    "CertifiedBrierScore",
    "CertifiedCalibrationError",
    "CertifiedLoss",
    "CertifiedMetric",
    "CertifiedTemperature",
    "ConfidenceInterval",
    "EceMethod",
    "Outcome",
    "RadiusReport",
    "Reference",
    "Reliability",
    "ReliabilityEnvelope",
    "SmoothingBound",
    "TrainingStep",
    "ace_attack",
    "attack_calibration",
    "bound_margins",
    "brier_bound",
    "brier_score",
    "calibration_adversary",
    "calibration_error",
    "calibration_training_step",
    "certified_brier",
    "certified_brier_multiclass",
    "certified_calibration_loss",
    "certified_ece",
    "certified_ece_uncertain",
    "certified_temperature",
    "certify_calibration",
    "certify_confidence",
    "certify_smoothed_calibration",
    "confidence_bounds",
    "confidences",
    "equal_count_edges",
    "extend_uncertified",
    "failure_budget",
    "reliability",
    "reliability_envelope",
    "smoothed_confidence_bounds",
    "smoothed_logits",
    "with_failures",
]
