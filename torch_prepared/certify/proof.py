"""Proof trees: how one property is proved, as data that claims nothing by itself.

A tree splits the region's bounding box by coordinate planes, so its leaves cover the region by
construction. At each leaf one row per clause is claimed to be positive. All intervals, offsets
and bounds are recomputed by the checker; a tree only says where to split, which row to try, where
to spend backward passes, and which relaxation slopes to use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from torch_prepared.certify.rounding import BoolArray, FloatArray, IntArray
from torch_prepared.errors import CertificateError

__all__ = ["ProofTree", "Slopes"]

MAX_NODES = 2**27


@dataclass(frozen=True)
class Slopes:
    """Relaxation slopes of one activation, float32 or float64, (k, n) or None for the default.

    In ``ProofTree.slopes`` k is 1 or the number of leaves; in ``ProofTree.tighten_slopes`` 1 or
    the number of tree nodes flagged in ``tighten``.
    """

    lower: np.ndarray | None = None
    upper: np.ndarray | None = None


@dataclass(frozen=True)
class ProofTree:
    """Binary split tree in preorder (a node, its left subtree, its right subtree).

    Args:
        split_dim: (t,) int32 coordinate that an inner node splits, -1 at a leaf.
        split_value: (t,) float64; left child ``x[dim] <= value``, right child ``>=``; 0 at leaves.
        rows: (leaves, clauses) int32: row of each clause claimed positive, leaves in preorder.
        tighten: (t,) bool: tighten intervals at this tree node; its descendants inherit them.
        plan: names of the values whose intervals are tightened there (inputs of nonlinear
            operators); empty means plain intervals everywhere.
        slopes: by operator name, used for the leaves' final pass.
        tighten_slopes: by operator name, used for tightening.

    Raises:
        CertificateError: wrong dtype or shape, not a tree, or a value that is not finite.
    """

    split_dim: np.ndarray
    split_value: np.ndarray
    rows: np.ndarray
    tighten: np.ndarray
    plan: tuple[str, ...] = ()
    slopes: Mapping[str, Slopes] = field(default_factory=dict)
    tighten_slopes: Mapping[str, Slopes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slopes", MappingProxyType(dict(self.slopes)))
        object.__setattr__(self, "tighten_slopes", MappingProxyType(dict(self.tighten_slopes)))
        nodes = self.split_dim.shape[0] if self.split_dim.ndim == 1 else 0
        expected = {
            "split_dim": (self.split_dim, np.int32, (nodes,)),
            "split_value": (self.split_value, np.float64, (nodes,)),
            "tighten": (self.tighten, np.bool_, (nodes,)),
        }
        for name, (array, dtype, shape) in expected.items():
            if array.dtype != dtype or array.shape != shape or not 0 < nodes <= MAX_NODES:
                raise CertificateError(
                    f"proof: {name} is {array.dtype} {array.shape}; expected {np.dtype(dtype)} "
                    f"{shape}, between 1 and {MAX_NODES} tree nodes"
                )
        if not np.isfinite(self.split_value).all():
            raise CertificateError("proof: split_value has NaN or infinity; expected finite values")
        if self.rows.dtype != np.int32 or self.rows.ndim != 2 or len(self.rows) != self.leaves:
            raise CertificateError(
                f"proof: rows is {self.rows.dtype} {self.rows.shape}; expected int32 "
                f"({self.leaves}, clauses)"
            )
        # Preorder words of binary trees: open slots start at 1, inner +1, leaf -1, zero at the end
        open_slots = 1 + np.cumsum(np.where(self.split_dim >= 0, 1, -1))
        if open_slots[-1] != 0 or (open_slots[:-1] <= 0).any() or self.split_dim.min() < -1:
            raise CertificateError("proof: split_dim is not the preorder of a binary tree")
        self._check_slopes(self.slopes, self.leaves, "slopes")
        self._check_slopes(self.tighten_slopes, int(self.tighten.sum()), "tighten_slopes")

    @staticmethod
    def _check_slopes(slopes: Mapping[str, Slopes], count: int, where: str) -> None:
        for name, pair in slopes.items():
            for array in (pair.lower, pair.upper):
                if array is None:
                    continue
                if array.dtype not in (np.float32, np.float64) or array.ndim != 2:
                    raise CertificateError(
                        f"proof: {where}[{name!r}] is {array.dtype} with {array.ndim} axes; "
                        "expected float32 or float64 with 2"
                    )
                if len(array) not in (1, count) or not np.isfinite(array).all():
                    raise CertificateError(
                        f"proof: {where}[{name!r}] has {len(array)} rows or NaN; expected 1 or "
                        f"{count} finite rows"
                    )

    @property
    def leaves(self) -> int:
        """Number of leaves."""
        return int(np.count_nonzero(self.split_dim < 0))

    def right_children(self) -> IntArray:
        """(t,) position of each inner node's right child, -1 at leaves; the left one follows it."""
        right = np.full(len(self.split_dim), -1, dtype=np.int64)
        waiting: list[int] = []
        for position, dim in enumerate(self.split_dim.tolist()):
            if dim >= 0:
                waiting.append(position)
            elif waiting and position + 1 < len(right):
                right[waiting.pop()] = position + 1
        return right

    def leaf_box(
        self, leaf: int, lower: FloatArray, upper: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Ends (n,) of a leaf's box, given those of the root's."""
        position = int(np.flatnonzero(self.split_dim < 0)[leaf])
        right, node = self.right_children(), 0
        low, high = lower.copy(), upper.copy()
        while node != position:
            dim, goes_right = self.split_dim[node], position >= right[node]
            end = low if goes_right else high
            end[dim] = np.clip(self.split_value[node], low[dim], high[dim])
            node = int(right[node]) if goes_right else node + 1
        return low, high

    def split_leaves(
        self, leaves: Sequence[int], dims: Sequence[int], values: Sequence[float]
    ) -> ProofTree:
        """The tree with some leaves split in two, which claim and relax as the leaf did.

        Args:
            leaves: different leaf numbers.
            dims: coordinate to split, one per leaf.
            values: where, one per leaf.

        Raises:
            CertificateError: a value that is not finite.
        """
        at_leaf = self.split_dim < 0
        places = np.flatnonzero(at_leaf)[list(leaves)]
        copies = np.ones(len(self.split_dim), dtype=np.int64)
        copies[places] = 3  # the new inner node and its two children
        inner = (np.cumsum(copies) - copies)[places]
        split_dim, split_value = self.split_dim.repeat(copies), self.split_value.repeat(copies)
        tighten = self.tighten.repeat(copies)
        split_dim[inner], split_value[inner], tighten[inner] = dims, values, False
        heirs = np.where(copies > 1, 2, 1)

        def inherited(slopes: Mapping[str, Slopes], of: BoolArray) -> dict[str, Slopes]:
            def pick(array: np.ndarray | None) -> np.ndarray | None:
                same = array is None or len(array) != of.sum()
                return array if same or array is None else array.repeat(heirs[of], axis=0)

            return {name: Slopes(pick(s.lower), pick(s.upper)) for name, s in slopes.items()}

        return ProofTree(
            split_dim=split_dim,
            split_value=split_value,
            rows=self.rows.repeat(heirs[at_leaf], axis=0),
            tighten=tighten,
            plan=self.plan,
            slopes=inherited(self.slopes, at_leaf),
            tighten_slopes=inherited(self.tighten_slopes, self.tighten),
        )

    @classmethod
    def leaf(
        cls,
        rows: Sequence[int],
        *,
        tighten: Sequence[str] = (),
        slopes: Mapping[str, Slopes] | None = None,
        tighten_slopes: Mapping[str, Slopes] | None = None,
    ) -> ProofTree:
        """The tree with a single leaf.

        Args:
            rows: row claimed positive, one per clause.
            tighten: values whose intervals are tightened by backward passes.
            slopes: of the final pass.
            tighten_slopes: of the tightening passes.
        """
        return cls(
            split_dim=np.array([-1], dtype=np.int32),
            split_value=np.zeros(1),
            rows=np.array([list(rows)], dtype=np.int32),
            tighten=np.array([bool(tighten)]),
            plan=tuple(tighten),
            slopes=slopes or {},
            tighten_slopes=tighten_slopes or {},
        )

    @classmethod
    def from_links(
        cls,
        split_dim: np.ndarray,
        split_value: np.ndarray,
        left: np.ndarray,
        right: np.ndarray,
        rows: np.ndarray,
        *,
        tighten: BoolArray | None = None,
        plan: Sequence[str] = (),
    ) -> tuple[ProofTree, IntArray]:
        """A tree from nodes in any order, node 0 being the root.

        Args:
            split_dim: (t,), -1 at leaves.
            split_value: (t,), ignored at leaves.
            left: (t,) positions of left children, ignored at leaves.
            right: (t,) positions of right children, ignored at leaves.
            rows: (t, clauses), read at leaves only.
            tighten: (t,) flags; None flags every leaf and nothing else when ``plan`` is given.
            plan: names of the values to tighten.

        Returns:
            The tree and, for each of its preorder positions, the node it came from.

        Raises:
            CertificateError: the links do not form one tree of all nodes reached from the root.
        """
        order: list[int] = []
        pending = [0]
        while pending:
            node = pending.pop()
            order.append(node)
            if len(order) > len(split_dim):
                raise CertificateError("proof: the links form a cycle; expected a tree")
            if split_dim[node] >= 0:
                pending += [int(right[node]), int(left[node])]
        index = np.array(order, dtype=np.int64)
        dims = np.asarray(split_dim)[index].astype(np.int32)
        if tighten is None:
            flags = (dims < 0) & bool(plan)
        else:
            flags = np.asarray(tighten)[index].astype(np.bool_)
        tree = cls(
            split_dim=dims,
            split_value=np.where(dims >= 0, np.asarray(split_value, dtype=np.float64)[index], 0.0),
            rows=np.asarray(rows)[index[dims < 0]].astype(np.int32),
            tighten=flags,
            plan=tuple(plan),
        )
        return tree, index
