"""Where an edit stands in weight space: an origin, a current point, and the distance between."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torch_prepared.edit._base import EditProblem
from torch_prepared.edit._steps import Distance, Step
from torch_prepared.edit._vector import ParameterVector

__all__ = ["Walk"]


@dataclass
class Walk:
    """A path through weight space that starts at the original network.

    Args:
        problem: what is edited.
        vector: which parameters move; p scalars.
        measure: distances from the origin.
        origin: (p,) float64, the original parameters.
        theta: (p,) float64, the current ones; replaced, never changed in place.
    """

    problem: EditProblem
    vector: ParameterVector
    measure: Distance
    origin: Tensor
    theta: Tensor

    def distance(self, theta: Tensor | None = None) -> float:
        """Distance from the origin, of the current parameters when None."""
        return self.measure.size((self.theta if theta is None else theta) - self.origin)

    def shortest(self, jacobian: Tensor, wanted: Tensor) -> Tensor | None:
        """The shortest step (p,) with ``jacobian @ step >= wanted``; None when there is none."""
        rows = self.measure.extend(None, jacobian)
        return self._follow(self.measure.shortest(rows, self.theta - self.origin, wanted))

    def nearest(self, jacobian: Tensor, rise: Tensor) -> Tensor | None:
        """The step to the point nearest to the origin where rows have risen by ``rise``.

        Rows are those of the linearization at the current parameters.
        """
        rows = self.measure.extend(None, jacobian)
        return self._follow(self.measure.nearest(rows, self.theta - self.origin, rise))

    def look_around(self) -> None:
        """From here on, measure steps as suits the current parameters."""
        self.measure = self.measure.around(self.theta - self.origin)

    def _follow(self, step: Step | None) -> Tensor | None:
        if step is None:
            return None
        self.measure = self.measure.after(step)
        return step.delta

    def stored(self) -> dict[str, Tensor]:
        """The current parameters, rounded to what they are stored in."""
        return self.problem.store(self.vector.split(self.theta))
