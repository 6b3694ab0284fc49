"""One verb, interchangeable solvers: the protocol and the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch_prepared.errors import SolverError
from torch_prepared.solvers._problem import LinearProgram
from torch_prepared.solvers._result import Solution

__all__ = ["LPSolver", "find_solver", "register_solver", "solve", "solver_names"]


@runtime_checkable
class LPSolver(Protocol):
    """Anything that answers a :class:`LinearProgram` with a checked :class:`Solution`."""

    @property
    def name(self) -> str:
        """Name in the registry, e.g. ``"highs"``."""

    def solve(
        self,
        problem: LinearProgram,
        *,
        time_limit: float | None = None,
        threads: int | None = None,
    ) -> Solution:
        """Minimize ``problem``.

        Args:
            problem: the program; never changed.
            time_limit: wall seconds for the whole call, None for no limit.
            threads: largest number of threads, None for the solver's own choice.

        Returns:
            A solution; failing to solve is a status, not an exception.

        Raises:
            SolverError: the solver cannot treat this kind of program at all.
            MissingDependencyError: the solver's package is not installed.
        """


_FACTORIES: dict[str, Callable[[], LPSolver]] = {}


def register_solver(name: str, factory: Callable[[], LPSolver]) -> None:
    """Make ``solve(..., solver=name)`` use ``factory()``; the factory is called on use."""
    if name in _FACTORIES:
        raise SolverError(f"solver {name!r}: registered twice; expected a new name")
    _FACTORIES[name] = factory


def solver_names() -> tuple[str, ...]:
    """Names that ``solve`` accepts, sorted."""
    return tuple(sorted(_FACTORIES))


def find_solver(name: str) -> LPSolver:
    """The solver registered as ``name`` (upper or lower case).

    Raises:
        SolverError: no such name; the message lists those known.
    """
    try:
        return _FACTORIES[name.lower()]()
    except KeyError:
        known = ", ".join(solver_names())
        raise SolverError(f"solver {name!r}: not known; expected one of: {known}") from None


def solve(
    problem: LinearProgram,
    solver: str | LPSolver = "highs",
    *,
    time_limit: float | None = None,
    threads: int | None = None,
) -> Solution:
    """Minimize ``problem`` with the named solver.

    Args:
        problem: a linear, mixed-integer or convex quadratic program.
        solver: a name from :func:`solver_names`, or a solver object.
        time_limit: wall seconds, None for no limit.
        threads: largest number of threads, None for the solver's own choice.

    Returns:
        A :class:`Solution` whose point, bound and ray were re-checked.

    Raises:
        SolverError: unknown name, a limit that is not positive, or an unsupported kind of program.
        MissingDependencyError: the solver's package is not installed.

    Example:
        >>> import numpy as np
        >>> from torch_prepared.core.rows import LinearRows
        >>> rows = LinearRows(np.array([[1.0, 2.0]]), np.array([4.0]))
        >>> problem = LinearProgram(np.ones(2), rows, np.zeros(2), np.full(2, 3.0))
        >>> solve(problem).objective
        2.0
    """
    if time_limit is not None and not time_limit > 0:
        raise SolverError(f"solve: got time_limit {time_limit}; expected seconds above 0 or None")
    if threads is not None and threads < 1:
        raise SolverError(f"solve: got threads {threads}; expected at least 1 or None")
    chosen = find_solver(solver) if isinstance(solver, str) else solver
    return chosen.solve(problem, time_limit=time_limit, threads=threads)
