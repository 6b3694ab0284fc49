"""Bounds over a batch of boxes: intervals forward, rows backward.

:class:`Propagation` walks the network once, keeping for every value an enclosure and for every
operator a relaxation. :meth:`Propagation.lower_bounds` substitutes rows backward through those
relaxations (the CROWN bound) and takes the best over all cuts of the graph on its way, so that it
is never worse than plain intervals with the last affine operators merged.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from torch_prepared.certify.network import CheckedNetwork
from torch_prepared.certify.operators import Arithmetic, Enclosure, Operator, Relaxation, SlopePair
from torch_prepared.certify.records import InputRecord
from torch_prepared.certify.regions import bound_on_region
from torch_prepared.certify.rounding import (
    INFLATION,
    UNIT,
    BoolArray,
    FloatArray,
    IntArray,
    row_dot,
    sum_below,
)

__all__ = ["Bounds", "Propagation"]

Bounds = tuple[FloatArray, FloatArray]
"""Lower and upper ends, each (b, n)."""

_ROW_BUDGET = 2**16  # scalars of one chunk of rows; fits a core's cache
_FEWEST_ROWS = 64


class Propagation:
    """Enclosures and relaxations of one network on b boxes inside one region.

    Args:
        network: the operators.
        region: the property's region, which contains nothing outside of its own box.
        lower: (b, n) lower ends of the boxes.
        upper: (b, n) upper ends.
        known: bounds of some values that are already proved on these boxes.
        tighten: names of values whose intervals are to be tightened by backward passes.
        slopes: suggested slopes of relaxations by operator name.
        arithmetic: how the network is evaluated.

    Soundness: every enclosure holds for all x of box and region, in the chosen arithmetic, on
    those boxes whose ``failed`` entry is False. On the others nothing is claimed.
    """

    def __init__(
        self,
        network: CheckedNetwork,
        region: InputRecord,
        lower: FloatArray,
        upper: FloatArray,
        *,
        known: Mapping[str, Bounds],
        tighten: Collection[str],
        slopes: Mapping[str, SlopePair],
        arithmetic: Arithmetic,
    ) -> None:
        self._network, self._region = network, region
        self._relaxations: dict[str, Relaxation] = {}
        self._readers = _count_readers(network)
        self.enclosures = {network.input_name: Enclosure(lower, upper)}
        self.failed: BoolArray = np.zeros(len(lower), dtype=np.bool_)
        self._accept(network.input_name, (lower, upper), known)
        if network.input_name in tighten:
            self._tighten(network.input_name)
        for operator in network.operators:
            inputs = [self.enclosures[source] for source in operator.sources]
            hints = slopes.get(operator.name, (None, None))
            low, high, relaxation = operator.propagate(inputs, hints, arithmetic)
            self._relaxations[operator.name] = relaxation
            self._accept(operator.name, (low, high), known)
            if operator.name in tighten:
                self._tighten(operator.name)

    def _accept(self, name: str, bounds: Bounds, known: Mapping[str, Bounds]) -> None:
        """Store an enclosure, intersected with what is known; note where it is not finite.

        Two proved intervals may cross only where box and region do not meet; there everything
        holds, and the ends are merely put in order.
        """
        low, high = bounds
        self.failed |= ~(np.isfinite(low) & np.isfinite(high)).all(axis=1)
        if name in known:
            low, high = np.maximum(low, known[name][0]), np.minimum(high, known[name][1])
            low, high = np.minimum(low, high), np.maximum(low, high)
            self.failed |= ~(np.isfinite(low) & np.isfinite(high)).all(axis=1)
        self.enclosures[name] = Enclosure(low, high)

    def _tighten(self, name: str) -> None:
        """Intersect the enclosure of ``name`` with backward bounds of its contested entries.

        Upper ends come first: where all readers are constant from there down, as a ReLU is on
        negative inputs, lower ends would change nothing. Each box has its own contested entries,
        so that its bounds do not depend on the batch that it is in.
        """
        box = self.enclosures[name]
        readers = [o for o in self._network.operators if name in o.sources]
        contested = np.zeros(box.lower.shape, dtype=np.bool_)
        for reader in readers:
            contested |= reader.contested(box)
        owners, entries = np.nonzero(contested)
        low, high = box.lower.copy(), box.upper.copy()
        found = -self._entry_bounds(name, owners, entries, -1.0)
        high[owners, entries] = np.minimum(high[owners, entries], found)
        halfway = Enclosure(low, high)
        flat = np.logical_and.reduce([reader.is_flat_below(halfway) for reader in readers])
        rest = ~flat[owners, entries]
        owners, entries = owners[rest], entries[rest]
        found = self._entry_bounds(name, owners, entries, 1.0)
        low[owners, entries] = np.maximum(low[owners, entries], found)
        self._accept(name, (np.minimum(low, high), np.maximum(low, high)), {})

    def _entry_bounds(
        self, name: str, owners: IntArray, entries: IntArray, sign: float
    ) -> FloatArray:
        """Lower bounds (k,) of ``sign`` times entries of a value, each on its own box."""
        size = self.enclosures[name].lower.shape[1]
        step = max(_FEWEST_ROWS, _ROW_BUDGET // self._workspace(name))
        found = np.zeros(len(entries))
        for start in range(0, len(entries), step):
            entry, owner = entries[start : start + step], owners[start : start + step]
            rows = np.zeros((len(entry), size))
            rows[np.arange(len(entry)), entry] = sign
            constant = np.zeros(len(entry))
            bounds = self.lower_bounds(name, rows, constant, owner, cuts=False)
            found[start : start + step] = bounds
        return found

    def _workspace(self, name: str) -> int:
        """Scalars per row needed below ``name``."""
        widest: int = self.enclosures[name].lower.shape[1]
        for operator in self._network.operators:
            widest = max(widest, operator.workspace)
            if operator.name == name:
                break
        return widest

    def lower_bounds(
        self,
        name: str,
        rows: FloatArray,
        constant: FloatArray,
        boxes: IntArray,
        *,
        cuts: bool = True,
    ) -> FloatArray:
        """Lower bounds (r,) of ``rows @ value + constant``; NaN where nothing is proved.

        Args:
            name: of the value.
            rows: (r, n).
            constant: (r,).
            boxes: (r,) the box over which each row is bounded.
            cuts: also evaluate over the intermediate enclosures and keep the best.
        """
        frontier = _Frontier(self.enclosures, rows, name, constant, boxes, self._readers)
        operators = {operator.name: operator for operator in self._network.operators}
        for current in reversed(list(operators)):
            if current in frontier.rows:
                if cuts:
                    frontier.measure()
                self._substitute(operators[current], frontier)
        frontier.measure()
        at_input = frontier.rows.get(self._network.input_name)
        if at_input is not None:
            bound = bound_on_region(self._region, at_input)
            if bound is not None:
                frontier.offer(sum_below(frontier.constant, bound))
        finite = frontier.finite & ~self.failed[boxes] & np.isfinite(frontier.best)
        return np.where(finite, frontier.best, np.nan)

    def _substitute(self, operator: Operator, frontier: _Frontier) -> None:
        """Replace the rows on an operator's output by rows on its inputs."""
        rows = frontier.take(operator.name)
        pieces, gain = self._relaxations[operator.name].pull_back(rows, frontier.boxes)
        frontier.constant = sum_below(frontier.constant, gain)
        for source, piece in zip(operator.sources, pieces, strict=True):
            frontier.put(source, piece)


class _Frontier:
    """Invariant: target >= sum over v of ``rows[v] @ v`` + ``constant``, v ranging over a cut."""

    def __init__(
        self,
        enclosures: Mapping[str, Enclosure],
        rows: FloatArray,
        name: str,
        constant: FloatArray,
        boxes: IntArray,
        readers: Mapping[str, int],
    ) -> None:
        self._enclosures, self._readers = enclosures, readers
        self.rows: dict[str, FloatArray] = {}
        self._bounds: dict[str, FloatArray] = {}
        self.constant, self.boxes = constant, boxes
        self.finite: BoolArray = np.ones(len(rows), dtype=np.bool_)
        self.best: FloatArray = np.full(len(rows), -np.inf)
        self.put(name, rows)

    def put(self, name: str, piece: FloatArray) -> None:
        """Add rows on a value; the addition of two pieces costs one rounding per entry."""
        if name in self.rows:
            piece = self.rows[name] + piece
        if self._readers[name] > 1:
            reach = row_dot(np.abs(piece), self._enclosures[name].reach, self.boxes)
            self.constant = sum_below(self.constant, -4.0 * UNIT * reach * INFLATION)
        self.rows[name] = piece
        self._bounds.pop(name, None)

    def take(self, name: str) -> FloatArray:
        """Remove and return the rows on a value."""
        self._bounds.pop(name, None)
        return self.rows.pop(name)

    def measure(self) -> None:
        """Concretize at the present cut; what is not finite anywhere proves nothing."""
        for name in self.rows.keys() - self._bounds.keys():
            box = self._enclosures[name]
            self._bounds[name] = box.concretize(self.rows[name], self.boxes)
            self.finite = self.finite & np.isfinite(self._bounds[name])
        self.offer(sum_below(self.constant, *self._bounds.values()))

    def offer(self, bound: FloatArray) -> None:
        """Keep the better bound; NaN stays."""
        self.best = np.maximum(self.best, bound)


def _count_readers(network: CheckedNetwork) -> dict[str, int]:
    """How often each value is read; an operator reading a value twice counts twice."""
    counts = {network.input_name: 0, **{operator.name: 0 for operator in network.operators}}
    for operator in network.operators:
        for source in operator.sources:
            counts[source] += 1
    return counts
