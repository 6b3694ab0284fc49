"""Where an edit stands in weight space: an origin, a current point, and the metric between."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torch_prepared.edit._base import EditProblem
from torch_prepared.edit._metric import Metric
from torch_prepared.edit._vector import ParameterVector
from torch_prepared.solvers import Status, gram_matrix, project

__all__ = ["Walk"]


@dataclass
class Walk:
    """A path through weight space that starts at the original network.

    Args:
        problem: what is edited.
        vector: which parameters move; p scalars.
        metric: distances from the origin.
        origin: (p,) float64, the original parameters.
        theta: (p,) float64, the current ones; replaced, never changed in place.
    """

    problem: EditProblem
    vector: ParameterVector
    metric: Metric
    origin: Tensor
    theta: Tensor

    @property
    def moved(self) -> Tensor:
        """Current minus original parameters, (p,)."""
        return self.theta - self.origin

    def distance(self, theta: Tensor | None = None) -> float:
        """Squared distance from the origin, of the current parameters when None."""
        return self.metric.norm_squared((self.theta if theta is None else theta) - self.origin)

    def shortest(self, jacobian: Tensor, wanted: Tensor) -> Tensor | None:
        """The shortest step (p,) with ``jacobian @ step >= wanted``; None when there is none."""
        inverse = self.metric.solve(jacobian)
        answer = project(gram_matrix(jacobian, lambda _: inverse), wanted)
        if answer.status is Status.INFEASIBLE:
            return None
        step: Tensor = inverse.T @ inverse.new_tensor(answer.multipliers)
        return step

    def nearest(self, jacobian: Tensor, rise: Tensor) -> Tensor | None:
        """The step to the point nearest to the origin where rows have risen by ``rise``.

        Rows are those of the linearization at the current parameters.
        """
        found = self.shortest(jacobian, rise + jacobian @ self.moved)
        return None if found is None else found - self.moved

    def stored(self) -> dict[str, Tensor]:
        """The current parameters, rounded to what they are stored in."""
        return self.problem.store(self.vector.split(self.theta))
