"""Replay of one proof tree: every leaf box, batched, with inherited intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from torch_prepared.certify.network import CheckedNetwork
from torch_prepared.certify.operators import Activation, Affine, Arithmetic, SlopePair
from torch_prepared.certify.proof import ProofTree, Slopes
from torch_prepared.certify.propagation import Bounds, Propagation
from torch_prepared.certify.records import PropertyRecord
from torch_prepared.certify.rounding import FloatArray, IntArray
from torch_prepared.errors import CertificateError

__all__ = ["TreeReplay"]

_BATCH_BUDGET = 2**22  # scalars of one batch of boxes times the widest value
_LARGEST_BATCH = 512


@dataclass(frozen=True)
class _Batch:
    """Tree nodes with their boxes and the bounds that their ancestors proved.

    The subtree of ``nodes[i]`` is the range of nodes from itself to before ``ends[i]``.
    """

    nodes: IntArray
    ends: IntArray
    lower: FloatArray
    upper: FloatArray
    known: Mapping[str, Bounds]

    def take(self, chosen: np.ndarray | slice) -> _Batch:
        """The sub-batch at positions (or a mask) ``chosen``."""
        known = {k: (low[chosen], high[chosen]) for k, (low, high) in self.known.items()}
        return _Batch(
            self.nodes[chosen], self.ends[chosen], self.lower[chosen], self.upper[chosen], known
        )

    @staticmethod
    def join(parts: list[_Batch]) -> _Batch:
        """All parts in one batch; they know bounds of the same values."""
        if len(parts) == 1:
            return parts[0]
        known = {
            k: (
                np.concatenate([p.known[k][0] for p in parts]),
                np.concatenate([p.known[k][1] for p in parts]),
            )
            for k in parts[0].known
        }
        return _Batch(
            np.concatenate([p.nodes for p in parts]),
            np.concatenate([p.ends for p in parts]),
            np.concatenate([p.lower for p in parts]),
            np.concatenate([p.upper for p in parts]),
            known,
        )


class TreeReplay:
    """Lower bounds of the claimed rows at all leaves of one tree.

    Args:
        network: the operators.
        prop: what is to be shown.
        proof: the tree.
        arithmetic: how the network is evaluated.

    Raises:
        CertificateError: the tree does not fit the network or the property.
    """

    def __init__(
        self,
        network: CheckedNetwork,
        prop: PropertyRecord,
        proof: ProofTree,
        arithmetic: Arithmetic,
    ) -> None:
        self._network, self._prop, self._proof = network, prop, proof
        self._arithmetic = arithmetic
        self._check()
        self._right = proof.right_children()
        self._leaf_number = np.cumsum(proof.split_dim < 0) - 1
        self._leaves_before = np.concatenate([[0], self._leaf_number + 1])
        self._flag_number = np.cumsum(proof.tighten) - 1

    def _check(self) -> None:
        """Refuse rows, splits, names and slopes that do not exist in network or property."""
        proof, sizes = self._proof, [len(rows) for rows, _ in self._prop.clauses]
        if proof.rows.shape[1] != len(sizes):
            raise CertificateError(
                f"proof: rows for {proof.rows.shape[1]} clauses; the property has {len(sizes)}"
            )
        if (proof.rows < 0).any() or (proof.rows >= np.array(sizes)).any():
            raise CertificateError("proof: a leaf names a row that its clause does not have")
        if proof.split_dim.max() >= self._network.input_size:
            raise CertificateError("proof: a split names an input that the network does not have")
        operators = {o.name: o for o in self._network.operators}
        relaxed = {s for o in operators.values() if not isinstance(o, Affine) for s in o.sources}
        for name in proof.plan:
            if name not in relaxed:
                raise CertificateError(
                    f"proof: plan names {name!r}, which is no input of a nonlinear operator"
                )
        for name, pair in [*proof.slopes.items(), *proof.tighten_slopes.items()]:
            operator = operators.get(name)
            if not isinstance(operator, Activation):
                raise CertificateError(f"proof: slopes of {name!r}, which is no activation")
            for array in (pair.lower, pair.upper):
                if array is not None and array.shape[1] != operator.size:
                    raise CertificateError(
                        f"proof: slopes of {name!r} have {array.shape[1]} entries; "
                        f"expected {operator.size}"
                    )

    def run(self, part: slice | None = None) -> Iterator[tuple[IntArray, FloatArray]]:
        """Yield (leaf numbers (b,), lower bounds (b, clauses)) until all leaves are done.

        A bound is NaN where nothing was proved.

        Args:
            part: leaf numbers to do, a range; all when None.
        """
        wanted = slice(0, self._proof.leaves) if part is None else part
        region = self._prop.region
        known = {}
        if self._proof.tighten.any():
            sizes = {o.name: o.size for o in self._network.operators}
            sizes[self._network.input_name] = self._network.input_size
            for name in self._proof.plan:
                everything = np.full((1, sizes[name]), np.inf)
                known[name] = (-everything, everything)
        root = _Batch(
            np.zeros(1, dtype=np.int64),
            np.array([len(self._proof.split_dim)]),
            region.lower[None],
            region.upper[None],
            known,
        )
        pending, limit = [root], self._batch_limit()
        while pending:
            batch = self._next_batch(pending, limit, wanted)
            flagged = self._proof.tighten[batch.nodes]
            if flagged.any():
                batch = self._tighten(batch, np.flatnonzero(flagged))
            at_leaf = self._proof.split_dim[batch.nodes] < 0
            if at_leaf.any():
                leaves = batch if at_leaf.all() else batch.take(at_leaf)
                yield self._leaf_number[leaves.nodes], self._bound_leaves(leaves)
            if not at_leaf.all():
                pending.append(self._children(batch.take(~at_leaf)))

    def _next_batch(self, pending: list[_Batch], limit: int, wanted: slice) -> _Batch:
        """Up to ``limit`` nodes on which there is something to compute, from the end of a stack.

        Nodes that are merely split are replaced by their children on the way, those without
        wanted leaves are dropped. The stack is used depth first, so that memory is bounded.
        """
        ready: list[_Batch] = []
        room = limit
        while pending and room:
            part = self._with_leaves(pending.pop(), wanted)
            if len(part.nodes) > room:
                pending.append(part.take(slice(room, None)))
                part = part.take(slice(room))
            idle = (self._proof.split_dim[part.nodes] >= 0) & ~self._proof.tighten[part.nodes]
            if idle.any():
                pending.append(self._children(part.take(idle)))
                part = part.take(~idle)
            if len(part.nodes):
                ready.append(part)
                room -= len(part.nodes)
        return _Batch.join(ready) if ready else part

    def _with_leaves(self, batch: _Batch, wanted: slice) -> _Batch:
        """The nodes that have leaves in a range."""
        first, last = self._leaves_before[batch.nodes], self._leaves_before[batch.ends]
        inside = (first < wanted.stop) & (last > wanted.start)
        return batch if inside.all() else batch.take(inside)

    def _batch_limit(self) -> int:
        """How many boxes to treat at once."""
        widest = max([o.workspace for o in self._network.operators], default=1)
        rows = len(self._prop.clauses)
        if self._proof.tighten.any():
            rows = max(rows, min(64, widest))
        return int(np.clip(_BATCH_BUDGET // (widest * rows), 1, _LARGEST_BATCH))

    def _children(self, batch: _Batch) -> _Batch:
        """Both halves of every box.

        A plane outside of a box is moved to its nearest face; the halves still cover the box.
        """
        line = np.arange(len(batch.nodes))
        dim = self._proof.split_dim[batch.nodes]
        value = self._proof.split_value[batch.nodes]
        value = np.clip(value, batch.lower[line, dim], batch.upper[line, dim])
        upper, lower = batch.upper.copy(), batch.lower.copy()
        upper[line, dim] = value
        lower[line, dim] = value
        middle = self._right[batch.nodes]
        left = _Batch(batch.nodes + 1, middle, batch.lower, upper, batch.known)
        right = _Batch(middle, batch.ends, lower, batch.upper, batch.known)
        return _Batch.join([right, left])

    def _tighten(self, batch: _Batch, flagged: IntArray) -> _Batch:
        """The batch with bounds of the planned values recomputed at the flagged nodes."""
        part = batch.take(flagged)
        number = self._flag_number[part.nodes]
        state = self._propagate(part, self._proof.plan, self._proof.tighten_slopes, number)
        known = {}
        for name, (low, high) in batch.known.items():
            enclosure = state.enclosures[name]
            low, high = low.copy(), high.copy()
            # a box that failed proves nothing; NaN makes all of its leaves fail as well
            failed = np.where(state.failed, np.nan, 0.0)[:, None]
            low[flagged], high[flagged] = enclosure.lower + failed, enclosure.upper + failed
            known[name] = (low, high)
        return _Batch(batch.nodes, batch.ends, batch.lower, batch.upper, known)

    def _propagate(
        self,
        batch: _Batch,
        tighten: tuple[str, ...],
        slopes: Mapping[str, Slopes],
        number: IntArray,
    ) -> Propagation:
        return Propagation(
            self._network,
            self._prop.region,
            batch.lower,
            batch.upper,
            known=batch.known,
            tighten=tighten,
            slopes={name: _slopes_at(pair, number) for name, pair in slopes.items()},
            arithmetic=self._arithmetic,
        )

    def _bound_leaves(self, leaves: _Batch) -> FloatArray:
        """Lower bounds (b, clauses) of the claimed rows."""
        number = self._leaf_number[leaves.nodes]
        state = self._propagate(leaves, (), self._proof.slopes, number)
        claimed = self._proof.rows[number]
        rows = np.stack(
            [matrix[claimed[:, c]] for c, (matrix, _) in enumerate(self._prop.clauses)], axis=1
        )
        constant = np.stack(
            [offset[claimed[:, c]] for c, (_, offset) in enumerate(self._prop.clauses)], axis=1
        )
        boxes = np.repeat(np.arange(len(claimed)), claimed.shape[1])
        found = state.lower_bounds(
            self._network.output_name, rows.reshape(len(boxes), -1), constant.ravel(), boxes
        )
        return found.reshape(claimed.shape)


def _slopes_at(pair: Slopes, number: IntArray) -> SlopePair:
    """Slopes of the given leaves (or flagged nodes), float64."""

    def pick(array: np.ndarray | None) -> FloatArray | None:
        if array is None:
            return None
        return (array if len(array) == 1 else array[number]).astype(np.float64)

    return pick(pair.lower), pick(pair.upper)
