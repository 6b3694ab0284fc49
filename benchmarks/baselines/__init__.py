"""Ways to edit by training, measured through the same certificates as this package's editors."""

from benchmarks.baselines.certified_training import CertifiedTrainingEditor
from benchmarks.baselines.penalty import PenaltyEditor
from torch_prepared.edit._base import Editor

__all__ = ["BASELINES"]

BASELINES: dict[str, type[Editor]] = {
    PenaltyEditor.name: PenaltyEditor,
    CertifiedTrainingEditor.name: CertifiedTrainingEditor,
}
