"""The parts of an edit that several processes can share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch_prepared.certify import ProofTree
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph

if TYPE_CHECKING:
    from torch import nn

    from torch_prepared.core.onnx import OnnxNetwork
    from torch_prepared.edit._base import EditProblem
    from torch_prepared.edit._certify import Certified
    from torch_prepared.edit._driver import Task
    from torch_prepared.edit._linearize import MarginFunction
    from torch_prepared.edit._result import EditResult
    from torch_prepared.edit._steps import Distance
    from torch_prepared.edit._vector import ParameterVector
    from torch_prepared.specs import Property

__all__ = ["Team"]


class Team(ABC):
    """Several processes that were all given the same task.

    One of them leads: it alone runs the editor and makes every decision, and the others answer it.
    So neither their clocks nor rounding that differs between machines can lead them apart.
    """

    @abstractmethod
    def run(self, task: Task) -> EditResult[nn.Module | OnnxNetwork | Graph]:
        """Lead the edit, or help until it is over; the same result in every process."""

    @abstractmethod
    def margins(self, problem: EditProblem, vector: ParameterVector) -> MarginFunction:
        """Certified margins of the problem's properties, each property bounded by one process."""

    @abstractmethod
    def distance(self, problem: EditProblem, vector: ParameterVector, damping: float) -> Distance:
        """The distance of the problem's norm, as ``choose_distance``."""

    @abstractmethod
    def certify(
        self,
        graph: Graph,
        properties: Sequence[Property],
        proofs: Sequence[ProofTree],
        metadata: Mapping[str, str],
        deadline: Deadline | None = None,
    ) -> Certified:
        """As ``certify_network``, each property replayed by one process."""
